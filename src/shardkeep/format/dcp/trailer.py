"""The trailer of `.metadata`, which ties the pickle to one save and to its manifest.

Every `pickle.load` stops at the STOP byte, so torch never sees what follows it. One small read of
the file's end shows whether Shardkeep wrote the file, and which manifest belongs to it.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from hashlib import blake2b
from zlib import crc32

from shardkeep.errors import Damaged, FormatError

__all__ = ["TRAILER_SIZE", "Trailer", "digest", "manifest_name", "manifest_save_id"]

_BEGIN = b"\xffSHARDK\x01"
_END = b"\xffSKTRL\x01\n"
_CUT = tuple(b"." + _BEGIN[:length] for length in range(1, len(_BEGIN)))
"""The end of a file that was cut inside the first marker: a pickle ends with a dot."""
_LAYOUT = struct.Struct("<8s16sQ16sQ16sI8s")
_NAME = re.compile(r"\.manifest-([0-9a-f]{32})\.npz")

TRAILER_SIZE = _LAYOUT.size
"""Bytes of a trailer: the last ones of the file."""


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """Return the BLAKE2b digest of some bytes, of 16 bytes."""
    return blake2b(data, digest_size=16).digest()


def manifest_name(save_id: str) -> str:
    """Return the name of the file of that save's manifest."""
    return f".manifest-{save_id}.npz"


def manifest_save_id(name: str) -> str | None:
    """Return the save that a manifest's file name belongs to; None if it is not such a name."""
    match = _NAME.fullmatch(name)
    return match[1] if match else None


@dataclass(frozen=True, slots=True)
class Trailer:
    """The content of a trailer.

    Attributes:
        save_id: 32 hexadecimal digits, random for every save.
        pickle_length, manifest_length: in bytes; the trailer directly follows the pickle.
        pickle_digest, manifest_digest: `digest` of the whole of each.
    """

    save_id: str
    pickle_length: int
    pickle_digest: bytes
    manifest_length: int
    manifest_digest: bytes

    @staticmethod
    def of(save_id: str, pickle: bytes, manifest: bytes) -> Trailer:
        """Return the trailer to append to that pickle."""
        return Trailer(save_id, len(pickle), digest(pickle), len(manifest), digest(manifest))

    @property
    def manifest(self) -> str:
        """Name of the manifest's file."""
        return manifest_name(self.save_id)

    def to_bytes(self) -> bytes:
        """Return the `TRAILER_SIZE` bytes of the trailer; raise ValueError for an invalid id."""
        if not re.fullmatch("[0-9a-f]{32}", self.save_id):
            raise ValueError(f"a save id has 32 hex digits, not {self.save_id!r}")
        save_id = bytes.fromhex(self.save_id)
        lengths = self.pickle_length, self.pickle_digest, self.manifest_length, self.manifest_digest
        packed = _LAYOUT.pack(_BEGIN, save_id, *lengths, 0, _END)
        crc = crc32(packed[: -len(_END) - 4])
        return _LAYOUT.pack(_BEGIN, save_id, *lengths, crc, _END)

    @staticmethod
    def parse(tail: bytes, file_size: int, *, file: str = ".metadata") -> Trailer | None:
        """Return the trailer at the end of a file; None if it has none.

        Args:
            tail: the last bytes of the file: at least `TRAILER_SIZE` of them, if it has as many.
            file_size: bytes of the file.
            file: its name, for errors.

        Raises:
            FormatError: there is a trailer, but it is cut, followed by other bytes, damaged, or
                does not fit the file.
        """
        if len(tail) > file_size:
            raise ValueError("a file's tail cannot be longer than the file")
        begins, ends = tail.rfind(_BEGIN), tail.endswith(_END)
        if begins < 0 and not ends and not tail.endswith(_CUT):
            return None
        # Either marker is enough: a flipped or missing byte must not make a trailer disappear.
        if not ends or begins != len(tail) - TRAILER_SIZE:
            raise FormatError("the trailer is cut or damaged", file=file)
        packed = tail[begins:]
        _, save_id, length, pickle, manifest_length, manifest, crc, _ = _LAYOUT.unpack(packed)
        if crc != crc32(packed[: -len(_END) - 4]):
            raise FormatError("the trailer does not match its checksum", file=file)
        if length + TRAILER_SIZE != file_size:
            what = f"the trailer is for {length} bytes of pickle, not {file_size - TRAILER_SIZE}"
            raise FormatError(what, file=file)
        return Trailer(save_id.hex(), length, pickle, manifest_length, manifest)

    def check_pickle(self, pickle: bytes, *, file: str = ".metadata") -> None:
        """Raise Damaged unless these are the bytes of the pickle."""
        _check(pickle, self.pickle_length, self.pickle_digest, "the pickle", file)

    def check_manifest(self, manifest: bytes) -> None:
        """Raise Damaged unless these are the bytes of the manifest."""
        _check(manifest, self.manifest_length, self.manifest_digest, "the manifest", self.manifest)


def _check(data: bytes, length: int, expected: bytes, what: str, file: str) -> None:
    if len(data) != length:
        raise Damaged(f"{what} has {len(data)} bytes, not {length}", file=file)
    if digest(data) != expected:
        raise Damaged(f"{what} does not match its digest", file=file)
