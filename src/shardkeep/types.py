"""The vocabulary of Shardkeep: frozen values that all packages share.

A *tensor* has a name, a dtype and a global shape. It is stored as one or more *chunks*, each of
which is a *box* of the tensor. The bytes of a chunk are its *payload*. An *item* is the container
around a payload, as it is stored in a file. An *object* is any value that is not a tensor.

There are two views of the same data. Single values (`TensorInfo`, `Chunk`, ...) are meant for
people, and columns (`Index` and its tables) for arithmetic over many tensors and chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from shardkeep.errors import FormatError

__all__ = [
    "DTYPES",
    "ITEMSIZES",
    "MAX_DIMS",
    "Box",
    "ByteRange",
    "Chunk",
    "Chunks",
    "Claim",
    "DType",
    "Frame",
    "Framing",
    "Index",
    "ObjectInfo",
    "Objects",
    "Opaque",
    "Progress",
    "Step",
    "Structure",
    "TensorInfo",
    "Tensors",
    "YieldGil",
    "never_yield",
]

I64 = NDArray[np.int64]

MAX_DIMS = 64
"""Largest number of dimensions of a tensor: the limit of torch's iterators and of numpy 2."""


@dataclass(frozen=True, slots=True)
class DType:
    """A tensor element type, with torch's name for it.

    Attributes:
        name: torch's name without the module, such as "bfloat16".
        numpy: the little-endian numpy dtype that `read` returns. Its item size is the stored one.
        note: a description of the numpy values, if numpy lacks the type and only carries its bits.

    Example:
        >>> sk.DType.named("torch.bfloat16").itemsize
        2
    """

    name: str
    numpy: np.dtype[Any]
    note: str = ""

    @property
    def itemsize(self) -> int:
        """Number of bytes of one stored element."""
        return self.numpy.itemsize

    @staticmethod
    def named(name: str) -> DType:
        """Return the dtype of a name, with or without "torch."; raise FormatError if unknown."""
        dtype = _BY_NAME.get(name.removeprefix("torch."))
        if dtype is None:
            raise FormatError(f"unknown dtype {name!r}")
        return dtype

    @property
    def code(self) -> int:
        """Position in `DTYPES`, which columns in memory hold in place of the name."""
        return _CODES[self.name]

    def __str__(self) -> str:
        return self.name


def _dtypes() -> Iterator[DType]:
    for name in (
        "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
        "float16 float32 float64 complex64 complex128"
    ).split():
        yield DType(name, np.dtype(name).newbyteorder("<"))
    for name in (
        "bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
    ).split():
        yield DType(name, np.dtype(getattr(ml_dtypes, name)))
    half = np.dtype([("real", "<f2"), ("imag", "<f2")])
    yield DType("complex32", half, "pairs of float16, as fields 'real' and 'imag'")
    brain = np.dtype([("real", ml_dtypes.bfloat16), ("imag", ml_dtypes.bfloat16)])
    yield DType("bcomplex32", brain, "pairs of bfloat16, as fields 'real' and 'imag'")
    packed = "two 4-bit floats (e2m1) a byte, packed as they are stored"
    yield DType("float4_e2m1fn_x2", np.dtype(np.uint8), packed)
    for name, carrier in (("qint8", "i1"), ("quint8", "u1"), ("qint32", "<i4")):
        note = "the quantized integers, without scale and zero point"
        yield DType(name, np.dtype(carrier), note)
    for name in ("quint4x2", "quint2x4"):
        yield DType(name, np.dtype(np.uint8), "packed quantized integers, as they are stored")
    for bits in range(1, 8):
        yield DType(f"uint{bits}", np.dtype(np.uint8), f"a byte that holds {bits} bits")
        yield DType(f"int{bits}", np.dtype(np.uint8), f"a byte that holds {bits} bits")
    for name in ("bits8", "bits1x8", "bits2x4", "bits4x2"):
        yield DType(name, np.dtype(np.uint8), "raw bits")
    yield DType("bits16", np.dtype("<u2"), "raw bits")


DTYPES: tuple[DType, ...] = tuple(_dtypes())
ITEMSIZES: NDArray[np.int64] = np.array([dtype.itemsize for dtype in DTYPES], dtype=np.int64)
"""Bytes of an element, indexed by the code of its dtype."""
_BY_NAME = {dtype.name: dtype for dtype in DTYPES}
_CODES = {dtype.name: code for code, dtype in enumerate(DTYPES)}


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor: `sizes[d]` elements from `offsets[d]` on, for each d.

    Attributes:
        offsets: index of the first element in each dimension.
        sizes: number of elements in each dimension.

    Example:
        >>> print(sk.Box((0, 4), (2, 8)))
        [0:2, 4:12]
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Box:
        """Return the box that covers a tensor of a shape."""
        return Box((0,) * len(shape), tuple(shape))

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.sizes)

    @property
    def numel(self) -> int:
        """Number of elements: 1 for a scalar, 0 if any size is 0."""
        return prod(self.sizes)

    @property
    def ends(self) -> tuple[int, ...]:
        """Index after the last element in each dimension."""
        return tuple(o + s for o, s in zip(self.offsets, self.sizes, strict=True))

    def within(self, shape: tuple[int, ...]) -> bool:
        """Return whether the box is inside a tensor of a shape."""
        return len(shape) == self.ndim and all(
            o >= 0 and s >= 0 and o + s <= n
            for o, s, n in zip(self.offsets, self.sizes, shape, strict=True)
        )

    def intersect(self, other: Box) -> Box | None:
        """Return the intersection of two boxes with the same ndim, or None if it is empty."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = tuple(map(min, self.ends, other.ends))
        sizes = tuple(e - s for s, e in zip(starts, ends, strict=True))
        return None if any(s <= 0 for s in sizes) else Box(starts, sizes)

    def relative_to(self, outer: Box) -> Box:
        """Return the same box, with offsets counted from the start of `outer`."""
        moved = tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True))
        return Box(moved, self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Return the slices that select the box from an array of the global shape."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    def __str__(self) -> str:
        return f"[{', '.join(f'{o}:{e}' for o, e in zip(self.offsets, self.ends, strict=True))}]"


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A range of `length` bytes from `offset` on, in a file named relative to the checkpoint.

    Example:
        >>> item = sk.open("run/step_100").tensor("model.0.weight").chunks[0].item
        >>> print(f"{item.length} bytes at {item.offset} of {item.file}")
    """

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Frame:
    """The bytes around one payload, which make it an item.

    The tail holds the CRC-32 of the payload in two places.

    Attributes:
        head: the bytes before the payload.
        before, between, after: the tail before, between and after the two checksums.
        tail_length: number of bytes of the tail.
    """

    head: bytes
    before: bytes
    between: bytes
    after: bytes
    tail_length: int = field(init=False)

    def __post_init__(self) -> None:
        length = len(self.before) + len(self.between) + len(self.after) + 8
        object.__setattr__(self, "tail_length", length)

    def tail(self, crc: int) -> bytes:
        """Return the bytes after a payload with this CRC-32."""
        packed = crc.to_bytes(4, "little")
        return b"%b%b%b%b%b" % (self.before, packed, self.between, packed, self.after)


Framing = Callable[[int, bool], Frame]
"""Makes the frames of one kind. Called as (offset of the item in its file, page_aligned).

The payload starts at a multiple of `ALIGNMENT`, or of `PAGE` if `page_aligned` is true. Offsets
that differ by a multiple of that number get the same frame.
"""


YieldGil = Callable[[], None]
"""Called between pieces of work that hold the interpreter lock for more than a moment."""


def never_yield() -> None:
    """Return at once: a `YieldGil` that keeps the interpreter lock."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One stored box of a tensor, and the location of the item that holds it.

    Example:
        >>> for chunk in sk.open("run/step_100").tensor("model.0.weight").chunks:
        ...     print(chunk.box, chunk.item.file)
    """

    box: Box
    item: ByteRange


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a checkpoint.

    Attributes:
        name: its flat name.
        dtype: its element type.
        shape: its global shape, in elements.
        chunks: the stored boxes, which together cover the tensor.

    Example:
        >>> info = sk.open("run/step_100").tensor("model.0.weight")
        >>> print(info.dtype, info.shape, info.nbytes)
        float32 (256, 64) 65536
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object in a checkpoint.

    Attributes:
        name: its flat name.
        item: the location of the item that holds it, if it has one.
        value: the object. Parts of it that have an unknown class are replaced by `Opaque` values.

    Example:
        >>> sk.open("run/step_100")["epoch"].value
        3
    """

    name: str
    item: ByteRange | None
    value: Any

    @property
    def nbytes(self) -> int:
        """Number of bytes of the item that holds the object; 0 if there is none."""
        return self.item.length if self.item else 0


@dataclass(frozen=True, slots=True)
class Opaque:
    """Placeholder for an instance of a class that is not known to be safe and was not imported.

    Attributes:
        module, qualname: module and qualified name of the class, as stored in the checkpoint.
        args: the arguments that the class or function would have been called with.
        state: the state that the instance would have been given; None if there is none.

    Example:
        >>> sk.open("run/step_100").value("config")
        <Opaque mymodule.Config>
    """

    module: str
    qualname: str
    args: tuple[Any, ...] = field(default=(), repr=False)
    state: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Full name of the class, with its module."""
        return f"{self.module}.{self.qualname}"

    def __repr__(self) -> str:
        return f"<Opaque {self.name}>"


Path = tuple[Any, ...]
"""Keys from the root of a state to a leaf. They keep their type: index 0 of a list is an int."""


@dataclass(frozen=True, slots=True)
class Structure:
    """The nesting of a state: the path of each leaf, and the kind of each container.

    Attributes:
        leaves: flat name -> path. Several names may share a payload, but not a path.
        containers: path -> "dict", "list" or "OrderedDict", outer containers first. The root is ().
            Empty containers are included. Tuples are leaves, as in DCP.
        empties: path of each empty container -> number of leaves before it in the state. This
            number preserves the position of the container, which no leaf shows.
        parents: for each container but the root, and for each leaf, the row in `containers` of the
            container around it. None if the code that made the structure does not know these rows:
            to look them up by path takes long.
    """

    leaves: Mapping[str, Path]
    containers: Mapping[Path, str]
    empties: Mapping[Path, int] = field(default_factory=dict)
    parents: tuple[Sequence[int], Sequence[int]] | None = field(
        default=None, compare=False, repr=False
    )


@dataclass(frozen=True, slots=True, eq=False)
class Tensors:
    """N tensors as columns. D is the largest ndim of all of them, or 0 if there are none."""

    names: tuple[str, ...]
    dtype: NDArray[np.uint8]
    """[N] codes: positions in `DTYPES`."""
    ndim: NDArray[np.uint8]
    """[N] number of dimensions."""
    shape: I64
    """[N, D] global shapes, padded with 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """M chunks as columns. Rows are sorted by tensor.

    A payload consists of the elements in C order, without gaps. If `payload` is negative, only the
    header of the item describes where the elements are stored.
    """

    tensor: I64
    """[M] row in `Tensors`."""
    offsets: I64
    """[M, D] padded with 0."""
    sizes: I64
    """[M, D] padded with 1."""
    file: NDArray[np.int32]
    """[M] position in `Index.files`."""
    item: I64
    """[M] offset of the item in its file, in bytes."""
    length: I64
    """[M] number of bytes of the item."""
    payload: I64
    """[M] offset of the payload in its file, in bytes; negative if only the item's header knows it.

    """
    transform: NDArray[np.int16]
    """[M] position in `Index.transforms`; 0 for chunks without a transform."""
    block: I64
    """[M + 1] rows block[i]:block[i + 1] of `checksums` are those of chunk i, if it has any."""
    checksums: NDArray[np.uint32]
    """CRC-32 of each block of `BLOCK` bytes of a payload, counted from the payload's start."""


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """K objects as columns."""

    names: tuple[str, ...]
    file: NDArray[np.int32]
    """[K] position in `Index.files`."""
    item: I64
    """[K] offset of the item in its file, in bytes."""
    length: I64
    """[K] number of bytes of the item."""
    transform: NDArray[np.int16]
    """[K] position in `Index.transforms`; 0 for objects without a transform."""
    crc: I64
    """[K] CRC-32 of the item's bytes; -1 if it is not known."""
    values: Mapping[str, Any]
    """Name -> value as typed JSON (`format.values`), for objects whose value the manifest holds."""


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """The content of a checkpoint of any format, and the location of each part.

    Attributes:
        files: data files, as paths relative to the checkpoint. None of them is outside of it.
        transforms: stream transforms of items, as DCP names them (`("stream.zstd/1",)`), the
            outermost last. The first entry is always `()`.
        structure: the nesting of the names; None if the checkpoint has flat names only.
        legacy_duplicates: name -> path, for objects that repeat a container whose leaves are stored
            as well. Only torch 2.3 and older look them up.
        extra: further facts for people: "format", "torch", "created", ...
    """

    files: tuple[str, ...]
    tensors: Tensors
    chunks: Chunks
    objects: Objects
    transforms: tuple[tuple[str, ...], ...] = ((),)
    structure: Structure | None = None
    legacy_duplicates: Mapping[str, Path] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """Names and boxes of the data that one rank has to save, without the data.

    P pieces are stored as columns. A piece is a box of a tensor that this rank holds in memory.
    """

    tensors: Tensors
    piece: I64
    """[P] row in `tensors`."""
    offsets: I64
    """[P, D] padded with 0."""
    sizes: I64
    """[P, D] padded with 1."""
    alias: I64
    """[P] the first piece of this rank that has the same memory, which may be the piece itself."""
    objects: tuple[str, ...]
    values: Mapping[str, Any]
    """Name -> value as typed JSON, for the small objects that have such a form."""
    structure: Structure
    legacy_duplicates: Mapping[str, Path]
    marks: Mapping[Path, str] = field(default_factory=dict)
    """Path of each marked value -> "PerRank" or "Replicated"."""
    content: Mapping[str, bytes] = field(default_factory=dict)
    """Description of each value marked `Replicated` -> checksum of this rank's replica."""


@dataclass(frozen=True, slots=True)
class Step:
    """A committed checkpoint of a run.

    Attributes:
        number: the training step, 0 or more.
        metrics: the metrics that were saved with it: finite numbers by name.

    Example:
        >>> class KeepLowLoss:  # a policy of your own
        ...     def keep(self, steps: Sequence[sk.Step]) -> list[int]:
        ...         return [step.number for step in steps if step.metrics.get("loss", 9.0) < 1.0]
    """

    number: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Progress(Protocol):
    """A function that is called with the progress of a long operation.

    Example:
        >>> def show(phase: str, done: int, total: int) -> None:
        ...     print(f"{phase}: {done} of {total} bytes")
        >>> sk.save(state, "run/step_100", progress=show)
    """

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Report that `done` of `total` bytes of a phase are done. Several threads may call it."""
        ...
