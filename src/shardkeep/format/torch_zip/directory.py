"""The directory of a zip with stored records, checked for overlaps and contradictions."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NoReturn

from shardkeep.errors import FormatError
from shardkeep.format.excerpt import shown
from shardkeep.format.pickle.torch_builders import Record

__all__ = ["ReadAt", "records"]

ReadAt = Callable[[int, int], bytes]
"""Reads `length` bytes at `offset`, relative to the item: (offset, length)."""

_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_TAIL = 4096
"""Bytes at the end that contain the whole directory of a tensor's item."""
_LONG_TAIL = (1 << 16) + _END.size
"""Bytes at the end that can contain the end record: a comment of any 16-bit length follows it."""
_MAX_DIRECTORY = 64 << 20
_LARGE = 0xFFFFFFFF
_ENCRYPTED = 0x2041
_DESCRIBED = 0x0008

_LEGACY = (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x02}q", b"\x80\x02ctorch")


def records(read_at: ReadAt, length: int, *, file: str, place: str) -> tuple[Record, ...]:
    """Return the records of a zip, in the order of their bytes.

    Args:
        read_at: reads (offset, length), relative to the item; never asked for more than the item
            has, nor for memory that a header merely announces.
        length: bytes of the item.
        file, place: name the item in errors.

    Raises:
        FormatError: not a zip; a compressed, encrypted, overlapping or duplicate record, or one
            beyond the item; local headers that contradict the directory.
    """
    return _Zip(read_at, length, file, place).records()


class _Zip:
    def __init__(self, read_at: ReadAt, length: int, file: str, place: str) -> None:
        self._read_at = read_at
        self.length = length
        self.file, self.place = file, place

    def fail(self, what: str) -> NoReturn:
        raise FormatError(what, file=self.file, place=self.place)

    def read(self, offset: int, length: int, what: str) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.length:
            self.fail(f"{what} is located beyond the item's {self.length} bytes")
        data = self._read_at(offset, length)
        if len(data) != length:
            self.fail(f"{what} is cut short")
        return data

    def records(self) -> tuple[Record, ...]:
        start, size, count = self._directory()
        if count * _CENTRAL.size > size:
            self.fail(f"a directory of {size} bytes for {count} records")
        data = self.read(start, size, "its directory")
        found: dict[str, tuple[int, Record]] = {}
        at = 0
        for _ in range(count):
            local, record, at = self._central(data, at)
            if record.name in found:
                self.fail(f"two records {shown(record.name)}")
            found[record.name] = local, record
        if at != size:
            self.fail(f"a directory of {size} bytes with {at} in use")
        end = 0
        ordered = []
        for local, record in sorted(found.values(), key=lambda entry: entry[0]):
            if local < end:
                self.fail(f"record {shown(record.name)} overlaps the one before it")
            placed = self._local(local, record)
            end = placed.offset + placed.nbytes
            if end > start:
                self.fail(f"record {shown(record.name)} reaches into the directory")
            ordered.append(placed)
        return tuple(ordered)

    def _directory(self) -> tuple[int, int, int]:
        """Return where the directory starts, its bytes, and its number of records."""
        for size in (_TAIL, _LONG_TAIL):
            first = max(0, self.length - size)
            tail = self.read(first, self.length - first, "its end")
            at = tail.rfind(b"PK\5\6", 0, max(0, len(tail) - _END.size + 4))
            if at >= 0:
                break
        else:
            self._not_a_zip()
        _, disk, first_disk, here, count, size, start, _ = _END.unpack_from(tail, at)
        end = first + at
        if _LARGE in (size, start) or 0xFFFF in (here, count):
            disk, first_disk, here, count, size, start, end = self._directory64(end)
        if disk or first_disk or here != count:
            self.fail("a zip in several parts")
        if size > _MAX_DIRECTORY:
            self.fail(f"a directory of {size} bytes")
        if start + size > end:
            self.fail("its directory is located after its end record")
        return start, size, count

    def _directory64(self, end: int) -> tuple[int, int, int, int, int, int, int]:
        what = "its zip64 end record"
        locator = self.read(end - _END64_LOCATOR.size, _END64_LOCATOR.size, what)
        signature, disk, at, disks = _END64_LOCATOR.unpack(locator)
        if signature != b"PK\6\7" or disk or disks > 1 or at >= end:
            self.fail(f"{what} is missing")
        fields = _END64.unpack(self.read(at, _END64.size, what))
        signature, _, _, _, first, second, here, count, size, start = fields
        if signature != b"PK\6\6":
            self.fail(f"{what} is missing")
        return first, second, here, count, size, start, at

    def _not_a_zip(self) -> NoReturn:
        head = self.read(0, min(self.length, 512), "its start")
        if head.startswith(_LEGACY) or head[257:262] == b"ustar":
            self.fail("saved by torch.save of a release before 1.6: not a zip, and not read here")
        self.fail("not a zip: it has no end record")

    def _central(self, data: bytes, at: int) -> tuple[int, Record, int]:
        """Return the local header's position, the record without offset, and the next entry."""
        if at + _CENTRAL.size > len(data):
            self.fail("its directory is cut short")
        fields = _CENTRAL.unpack_from(data, at)
        signature, _, _, flags, method, _, _, crc, packed, size, *rest = fields
        name_size, extra_size, comment_size, _, _, _, local = rest
        at += _CENTRAL.size
        end = at + name_size + extra_size + comment_size
        if signature != b"PK\1\2" or end > len(data):
            self.fail("its directory is broken")
        name = self._name(data[at : at + name_size])
        if flags & _ENCRYPTED:
            self.fail(f"record {shown(name)} is encrypted")
        if method != 0:
            self.fail(f"record {shown(name)} is compressed (method {method})")
        extra = data[at + name_size : at + name_size + extra_size]
        size, packed, local = self._wide(extra, [size, packed, local], name)
        if packed != size:
            self.fail(f"record {shown(name)} has {size} bytes in {packed}")
        return local, Record(name, -1, size, crc), end

    def _wide(self, extra: bytes, numbers: list[int], name: str) -> list[int]:
        """Replace numbers whose 32-bit fields cannot hold them by their zip64 values."""
        if _LARGE not in numbers:
            return numbers
        at = 0
        while at + 4 <= len(extra):
            kind, size = struct.unpack_from("<2H", extra, at)
            wanted = [i for i, number in enumerate(numbers) if number == _LARGE]
            if kind == 1 and 8 * len(wanted) <= size <= len(extra) - at - 4:
                wide = struct.unpack_from(f"<{len(wanted)}Q", extra, at + 4)
                for i, number in zip(wanted, wide, strict=True):
                    numbers[i] = number
                return numbers
            at += 4 + size
        self.fail(f"record {shown(name)} lacks its 64-bit sizes")

    def _name(self, raw: bytes) -> str:
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"a record's name {shown(raw)} is not UTF-8")
        if not name or "\0" in name:
            self.fail(f"invalid record name {shown(name)}")
        return name

    def _local(self, at: int, record: Record) -> Record:
        """Return the record with its offset, from a local header that agrees with the directory."""
        what = f"record {shown(record.name)}"
        head = self.read(at, _LOCAL.size, what)
        fields = _LOCAL.unpack(head)
        signature, _, flags, method, _, _, crc, packed, size, name_size, extra_size = fields
        if signature != b"PK\3\4":
            self.fail(f"{what} has no header")
        rest = self.read(at + _LOCAL.size, name_size + extra_size, what)
        if rest[:name_size] != record.name.encode("utf-8"):
            self.fail(f"{what} has another name in its header")
        if flags & _ENCRYPTED or method != 0:
            self.fail(f"{what} is compressed or encrypted, says its header")
        sizes = self._wide(rest[name_size:], [size, packed], record.name)
        later = flags & _DESCRIBED and (*sizes, crc) == (0, 0, 0)  # After the bytes.
        if not later and (*sizes, crc) != (record.nbytes, record.nbytes, record.crc32):
            self.fail(f"{what} has other sizes or another CRC in its header")
        offset = at + _LOCAL.size + name_size + extra_size
        if offset + record.nbytes > self.length:
            self.fail(f"{what} is located beyond the item's {self.length} bytes")
        return Record(record.name, offset, record.nbytes, record.crc32)
