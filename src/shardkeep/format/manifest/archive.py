"""An `.npz` file: columns of integers and JSON in a zip, written at once and read by member.

`numpy.load` opens it too, but trusts its sizes. Here every size is checked before memory is
allocated for it, and only plain integers are returned.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.errors import Damaged, FormatError
from shardkeep.format.values import Json, dumps, loads
from shardkeep.types import YieldGil, never_yield

__all__ = ["Archive", "ReadAt", "Writer"]

ReadAt = Callable[[int, int], bytes]
"""Reads up to `length` bytes from `offset` on: fewer only where the file ends."""

_DTYPES = {np.dtype(code) for code in ("u1", "<u2", "<u4", "<u8", "i1", "<i2", "<i4", "<i8")}
_MAX_NPY_HEADER = 512
_SMALL = 1024
"""Bytes up to which compressing a member takes more time than its bytes are worth."""
_WINDOW = 1 << 20
"""Minimum bytes of a read: the members that are read first are at the end."""
_FREE = 1 << 24
_RATIO = 256
"""All members together decompress to at most `_FREE` bytes, or `_RATIO` times the file."""


class Writer:
    """Collects members; `finish` returns the file. `yield_gil` is called after each of them."""

    def __init__(self, yield_gil: YieldGil = never_yield) -> None:
        self._yield_gil = yield_gil
        self._file = io.BytesIO()
        self._zip = zipfile.ZipFile(self._file, "w")

    def column(self, name: str, values: NDArray[Any], *, packed: bool = True) -> None:
        """Add integers, in the smallest type that holds them; `packed` compresses them."""
        values = _narrow(values)
        data = _npy_head(values.dtype.str, values.shape) + values.tobytes()
        self._add(f"{name}.npy", data, packed=packed)

    def json(self, name: str, value: Json) -> None:
        """Add a value of JSON."""
        self._add(f"{name}.json", dumps(value).encode(), packed=True)

    def _add(self, name: str, data: bytes, *, packed: bool) -> None:
        # No date: equal content makes equal files.
        info = zipfile.ZipInfo(name)
        packed = packed and len(data) > _SMALL
        info.compress_type = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
        self._zip.writestr(info, data, compresslevel=1)
        self._yield_gil()

    def finish(self) -> bytes:
        """Return the bytes of the file. Nothing can be added afterwards."""
        self._zip.close()
        return self._file.getvalue()


def _narrow(values: NDArray[Any]) -> NDArray[Any]:
    """Return the same integers in the smallest little-endian type that holds them all."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    signed = low < 0
    bits = max(~low if signed else 0, high).bit_length() + signed
    size = next(size for size in (1, 2, 4, 8) if bits <= 8 * size)
    return values.astype(f"<{'i' if signed else 'u'}{size}")


class Archive:
    """Reads members by range. Its errors name the file, and the member if there is one.

    Args:
        read_at: reads bytes of the file.
        size: bytes of the file.
        file: its name, for errors.

    Raises:
        FormatError: the file is not such an archive, here and from every method.
        Damaged: a member does not match its checksum, from every method.
    """

    def __init__(self, read_at: ReadAt, size: int, *, file: str) -> None:
        self._name = file
        try:
            self._zip = zipfile.ZipFile(_File(read_at, size))
        except _UNREADABLE as error:
            raise FormatError(f"not a zip archive: {error}", file=file) from None
        infos = self._zip.infolist()
        self._members = {info.filename: info for info in infos}
        total = sum(info.file_size for info in infos)
        if total > max(_FREE, _RATIO * size):
            raise FormatError(f"unpacks to {total} bytes, which is too much", file=file)

    def column(
        self, name: str, *shape: int, dtype: type[np.integer[Any]] = np.int64
    ) -> NDArray[Any]:
        """Return the integers of a member, which must have that shape and fit into the dtype."""
        member, count, wanted = f"{name}.npy", prod(shape), np.dtype(dtype)
        data = self._read(member, count * 8 + _MAX_NPY_HEADER)
        try:
            begin = 10 + int.from_bytes(data[8:10], "little")
            header = _npy_header(data[:begin])
        # numpy does not catch errors of Python's tokenizer, among others.
        except Exception as error:
            raise self._error(f"not a column: {error}", member) from None
        found, fortran, stored = header
        if found != shape or fortran or stored not in _DTYPES:
            raise self._error(f"holds {stored} of shape {found}, not integers of {shape}", member)
        if len(data) - begin != count * stored.itemsize:
            raise self._error(f"does not hold {count} numbers of {stored}", member)
        values = np.frombuffer(data, stored, count, begin).reshape(shape)
        if count and not np.can_cast(stored, wanted):
            limits = np.iinfo(dtype)
            if int(values.min()) < limits.min or int(values.max()) > limits.max:
                raise self._error(f"holds a number outside the range of {wanted}", member)
        return values.astype(wanted)

    def blob(self, name: str, size: int) -> bytes:
        """Return a column of bytes, as bytes."""
        return self.column(name, size, dtype=np.uint8).tobytes()

    def json(self, name: str) -> Json:
        """Return the value of a JSON member."""
        member = f"{name}.json"
        return loads(self._read(member, None), file=self._name, place=member)

    def _read(self, member: str, limit: int | None) -> bytes:
        info = self._members.get(member)
        if info is None:
            raise self._error("is missing", member)
        if limit is not None and info.file_size > limit:
            raise self._error(f"has {info.file_size} bytes, more than it needs", member)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise self._error("is compressed in an unknown way", member)
        try:
            with self._zip.open(info) as source:
                data = source.read(info.file_size)
        except (zlib.error, EOFError) as error:
            raise Damaged(f"member {member} cannot be unpacked: {error}", file=self._name) from None
        except _UNREADABLE as error:
            if "Bad CRC-32" in str(error):
                what = f"member {member} does not match its CRC-32"
                raise Damaged(what, file=self._name) from None
            raise self._error(f"cannot be read: {error}", member) from None
        if len(data) != info.file_size:
            raise Damaged(f"member {member} is cut", file=self._name)
        return data

    def _error(self, what: str, member: str) -> FormatError:
        return FormatError(what, file=self._name, place=member)


@lru_cache(maxsize=256)
def _npy_head(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the start of an `.npy` file of that array, in C order."""
    out = io.BytesIO()
    what = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, what)
    return out.getvalue()


@lru_cache(maxsize=256)
def _npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether it is in Fortran order, and dtype; cached, as most columns share them.

    Raises: whatever numpy raises.
    """
    source = io.BytesIO(data)
    if np.lib.format.read_magic(source) != (1, 0):
        raise ValueError("unknown version")
    header: tuple[tuple[int, ...], bool, np.dtype[Any]] = np.lib.format.read_array_header_1_0(
        source, max_header_size=_MAX_NPY_HEADER
    )
    return header


_UNREADABLE = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    LookupError,
    EOFError,
    zlib.error,
    struct.error,
)
"""What `zipfile` raises for broken archives. OSError is not included: that is the store's error."""


class _File:
    """The file interface that `zipfile` needs, over ranges: first the end, then windows."""

    def __init__(self, read_at: ReadAt, size: int) -> None:
        self._read_at, self._size, self._position = read_at, size, 0
        self._start = max(0, size - _WINDOW)
        self._window = read_at(self._start, size - self._start)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        count = left if count < 0 else min(count, left)
        skipped = self._position - self._start
        if skipped < 0 or skipped + count > len(self._window):
            self._start, skipped = self._position, 0
            self._window = self._read_at(self._position, min(left, max(count, _WINDOW)))
        data = self._window[skipped : skipped + count]
        self._position += len(data)
        return data

    def close(self) -> None:
        self._window = b""
