"""Writes one tensor as the zip that `torch.save` makes, in one pass around its payload.

The payload comes last, so that head, payload and tail follow each other: its CRC-32 and size are
in a data descriptor after it and in the central directory (docs/format.md).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from operator import mul
from zlib import crc32

from shardkeep.format.pickle.writer import FALSE, integer, sequence, strings
from shardkeep.settings import ALIGNMENT, PAGE
from shardkeep.types import DType, Frame

__all__ = ["MAX_ALIGNMENT", "TensorFraming", "TensorItem"]

MAX_ALIGNMENT = 32768
"""Bytes: the padding has to fit into a zip's extra field."""

_STORAGES = {
    "bool": "BoolStorage",
    "uint8": "ByteStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "bfloat16": "BFloat16Storage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
    # The loaders of 2.4 and 2.5 know these dtypes but refuse their names in an item. As signed
    # integers of the same bits they load everywhere: `.metadata` has the real dtype.
    "uint16": "ShortStorage",
    "uint32": "IntStorage",
    "uint64": "LongStorage",
}
"""Dtypes with a storage class; all others are rebuilt from an untyped storage."""

_QUANTIZED = frozenset({"qint8", "quint8", "qint32", "quint4x2", "quint2x4"})

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LARGE = 0xFFFFFFFF
"""Content of a 32-bit field of a zip whose value is in the zip64 field."""
_DESCRIBED = 0x0808
"""Flags: CRC and sizes follow the payload, and names are UTF-8; as torch sets them."""
_DATE = 0x21
"""1 January 1980, in the format of MS-DOS: equal tensors make equal items."""


@dataclass(frozen=True, slots=True)
class TensorItem:
    """Wraps the bytes of one tensor, in C order without gaps, as an item: head + payload + tail.

    Args:
        dtype: element type; quantized dtypes are refused, because the scale would be lost.
        shape: shape of the tensor in this item, that is, the sizes of a chunk.
        alignment: the payload starts at a multiple of this many bytes of the file.

    Raises:
        ValueError: a quantized dtype, a negative size, or an alignment outside 1..32768.
    """

    dtype: DType
    shape: tuple[int, ...]
    alignment: int = ALIGNMENT

    def __post_init__(self) -> None:
        if self.dtype.name in _QUANTIZED:
            raise ValueError(
                f"a tensor of dtype {self.dtype} needs its scale: it has no plain item"
            )
        if min(self.shape, default=0) < 0:
            raise ValueError(f"negative size in shape {self.shape}")
        if not 1 <= self.alignment <= MAX_ALIGNMENT:
            raise ValueError(f"alignment {self.alignment} is not in 1..{MAX_ALIGNMENT}")

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return prod(self.shape) * self.dtype.itemsize

    def head(self, position: int) -> bytes:
        """Return the bytes before the payload of an item that starts at `position`."""
        return self.frame(position).head

    def tail(self, position: int, crc: int) -> bytes:
        """Return the bytes after the payload, given its CRC-32."""
        return self.frame(position).tail(crc)

    def length(self, position: int) -> int:
        """Return the bytes of the whole item."""
        frame = self.frame(position)
        return len(frame.head) + self.nbytes + frame.tail_length

    def frame(self, position: int) -> Frame:
        """Return the bytes around the payload of an item that starts at `position`."""
        # Everything except the padding is the same at all positions, so few heads are ever made.
        return _frame(self.dtype.name, self.shape, self.alignment, position % self.alignment)


class TensorFraming:
    """The frames of all tensors of one dtype and shape (`types.Framing`).

    Raises:
        ValueError: a quantized dtype or a negative size.
    """

    def __init__(self, dtype: DType, shape: tuple[int, ...]) -> None:
        self._item, self._paged = TensorItem(dtype, shape), TensorItem(dtype, shape, PAGE)
        self._known: list[Frame | None] = [None] * ALIGNMENT

    def __call__(self, position: int, paged: bool) -> Frame:
        """Return the frame of an item that starts at `position` of its file."""
        if paged:
            return self._paged.frame(position)
        residue = position % ALIGNMENT
        known = self._known[residue]
        if known is None:
            known = self._known[residue] = self._item.frame(position)
        return known


@lru_cache(maxsize=4096)
def _frame(dtype: str, shape: tuple[int, ...], alignment: int, residue: int) -> Frame:
    """Return the frame of that tensor for positions with this remainder modulo the alignment."""
    records, entries, count = _small_records(dtype, shape)
    nbytes = prod(shape) * DType.named(dtype).itemsize
    large = nbytes >= _LARGE
    name = b"archive/data/0"
    extra = struct.pack("<2H2Q", 1, 16, 0, 0) if large else b""
    start = residue + len(records) + _LOCAL.size + len(name) + len(extra)
    padding = -start % alignment
    while 0 < padding < 4:  # A field in the header takes at least 4 bytes.
        padding += alignment
    if padding:
        extra += b"FB" + (padding - 4).to_bytes(2, "little") + bytes(padding - 4)
    head = records + _local(name, extra, large=large)
    sizes = struct.pack("<2Q" if large else "<2I", nbytes, nbytes)
    entry = _central(name, nbytes, 0, len(records), _DESCRIBED)
    directory = len(head) + nbytes + 8 + len(sizes)
    crc_at = 16  # Of the entry.
    return Frame(
        head,
        b"PK\x07\x08",
        sizes + entries + entry[:crc_at],
        entry[crc_at + 4 :] + _end(count + 1, directory, len(entries) + len(entry)),
    )


@lru_cache(maxsize=512)
def _small_records(dtype: str, shape: tuple[int, ...]) -> tuple[bytes, bytes, int]:
    """Return the records before the payload, their directory entries, and their number."""
    content, entries = b"", b""
    records = {
        b"archive/data.pkl": _pickle(DType.named(dtype), shape),
        b"archive/version": b"3\n",
        b"archive/byteorder": b"little",
    }
    for name, data in records.items():
        entries += _central(name, len(data), crc32(data), len(content))
        content += _local(name, size=len(data), crc=crc32(data)) + data
    return content, entries, len(records)


def _local(
    name: bytes, extra: bytes = b"", size: int = 0, crc: int = 0, *, large: bool = False
) -> bytes:
    """Return a record's local header; without a size, the descriptor has size and CRC."""
    flags, version = (0, 20) if size else (_DESCRIBED, 45 if large else 20)
    size = _LARGE if large else size
    fixed = (b"PK\x03\x04", version, flags, 0, 0, _DATE, crc, size, size, len(name), len(extra))
    return _LOCAL.pack(*fixed) + name + extra


def _central(name: bytes, size: int, crc: int, offset: int, flags: int = 0) -> bytes:
    """Return a record's entry in the central directory."""
    version, extra = 20, b""
    if size >= _LARGE:
        version, extra, size = 45, struct.pack("<2H2Q", 1, 16, size, size), _LARGE
    fixed = (b"PK\x01\x02", version, version, flags, 0, 0, _DATE, crc, size, size)
    lengths = (len(name), len(extra), 0, 0, 0, 0, offset)
    return _CENTRAL.pack(*fixed, *lengths) + name + extra


def _end(count: int, offset: int, size: int) -> bytes:
    """Return what follows a central directory of `count` entries and `size` bytes."""
    large = b""
    if offset >= _LARGE:
        fixed = (b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
        large = struct.pack("<4sQ2H2I4Q", *fixed)
        large += struct.pack("<4sIQI", b"PK\x06\x07", 0, offset + size, 1)
        offset = _LARGE
    return large + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, size, offset, 0)


def _pickle(dtype: DType, shape: tuple[int, ...]) -> bytes:
    """Return the pickle that rebuilds the tensor, for `torch.load` with its safe unpickler."""
    storage = _STORAGES.get(dtype.name)
    kind = _named("torch", storage) if storage else _named("torch.storage", "UntypedStorage")
    size = prod(shape) * (1 if storage else dtype.itemsize)  # Elements, or bytes if untyped.
    key = [strings("storage"), kind, strings("0"), strings("cpu"), integer(size)]
    arguments = [
        sequence(key) + b"Q",
        integer(0),
        sequence([integer(n) for n in shape]),
        sequence([integer(n) for n in _strides(shape)]),
        FALSE,
        _named("collections", "OrderedDict") + b")R",
    ]
    if not storage:
        arguments.append(_named("torch", dtype.name))
    rebuild = _named("torch._utils", f"_rebuild_tensor_v{2 if storage else 3}")
    return b"\x80\x02" + rebuild + sequence(arguments) + b"R."


def _named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode("ascii")


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements, as torch counts them."""
    inner = accumulate((max(n, 1) for n in reversed(shape[1:])), mul, initial=1)
    return tuple(inner)[::-1] if shape else ()
