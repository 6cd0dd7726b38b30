"""Mutators: nearly valid bytes, changed as bytes, pickles, zips or JSON, with valid checksums.

Random bytes are refused by the first check. Cases with recomputed checksums get past it.
"""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from shardkeep.errors import ShardkeepError
from shardkeep.format.dcp.trailer import TRAILER_SIZE, Trailer

__all__ = ["MUTATORS", "Mutator", "pack_files", "unpack_files"]

Mutator = Callable[[bytes, bytes, random.Random], bytes]
"""Makes a case from a seed, another seed, and a source of random numbers."""

_NUMBERS = (0, 1, -1, 2, 7, 8, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1,
            2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**63))  # fmt: skip
_OPS = (
    b"cos\nsystem\n", b"cposix\nsystem\n(X\x04\x00\x00\x00exittR", b"cbuiltins\neval\n", b"R", b"b",
    b"0", b"1", b"2", b"t", b"a", b"e", b"s", b"u", b"\x81", b"\x92", b"\x93", b"\x94", b"h\x00",
    b"j\xff\xff\xff\xff", b"r\xff\xff\xff\x7f", b"]", b"}", b")", b"(", b"N", b"\x88", b"K\xff",
    b"J\xff\xff\xff\x7f", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x95\x08" + bytes(7),
    b"G\x7f\xf8\0\0\0\0\0\0", b"Q", b"P0\n", b"\x82\x01", b"I99999999999999999999\n", b"L-1L\n",
    b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x97", b"\x98", b"\x8f", b"\x90", b"\x91", b"\x85",
    b"\x86", b"\x87", b"l", b"d", b"o", b".", b"i__main__\nx\n", b"V\\ud800\n", b"S'x'\n",
)  # fmt: skip


def as_bytes(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Flip, set, cut, repeat, insert or splice bytes."""
    made = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 3, 8))):
        at, kind = dice.randrange(len(made) + 1), dice.randrange(8)
        length = min(len(made) - at, dice.choice((1, 1, 2, 4, 8, 16, 64, 400)))
        if kind == 0 and at < len(made):
            made[at] ^= 1 << dice.randrange(8)
        elif kind == 1 and at < len(made):
            made[at] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
        elif kind == 2:
            width = dice.choice((1, 2, 4, 8))
            number = dice.choice(_NUMBERS) % (1 << 8 * width)
            made[at : at + width] = number.to_bytes(width, dice.choice(("little", "big")))
        elif kind == 3:
            del made[at : at + length]
        elif kind == 4:
            made[at:at] = made[at : at + length] * dice.choice((1, 2, 50))
        elif kind == 5:
            made[at:at] = dice.randbytes(length)
        elif kind == 6:
            start = dice.randrange(len(other) + 1)
            made[at : at + length] = other[start : start + dice.randrange(200)]
        elif kind == 7 and dice.randrange(4) == 0:
            del made[at:]
    return bytes(made)


@lru_cache(maxsize=256)
def _operations(data: bytes) -> tuple[bytes, ...]:
    """Split a pickle into its operations, as far as it can be parsed, and the rest."""
    starts = []
    try:
        for _, _, at in pickletools.genops(data):
            starts.append(at or 0)
    except Exception:
        pass
    if not starts:
        return (data,) if data else ()
    ends = [*starts[1:], starts[-1] + 1]
    parts = [data[a:b] for a, b in zip(starts, ends, strict=True)]
    rest = data[ends[-1] :]
    return (*parts, rest) if rest else tuple(parts)


def as_pickle(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Drop, repeat, swap, insert or change whole operations."""
    ops, more = list(_operations(data)), _operations(other)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        if not ops:
            break
        at, kind, count = dice.randrange(len(ops)), dice.randrange(8), dice.choice((1, 1, 2, 5, 20))
        if kind == 0:
            del ops[at : at + count]
        elif kind == 1:
            ops[at:at] = ops[at : at + count] * dice.choice((1, 1, 3, 200))
        elif kind == 2:
            to = dice.randrange(len(ops))
            ops[at], ops[to] = ops[to], ops[at]
        elif kind == 3:
            ops.insert(at, dice.choice(_OPS))
        elif kind == 4:
            ops[at] = dice.choice(_OPS)
        elif kind == 5:
            ops[at] = dice.choice(ops)
        elif kind == 6 and more:
            start = dice.randrange(len(more))
            ops[at:at] = more[start : start + count]
        elif kind == 7:
            ops[at] = _integer(dice.choice(_NUMBERS))
    return b"".join(ops)


def _integer(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def as_json(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Replace values, keys and numbers of a document."""
    try:
        document = json.loads(data)
    except ValueError:
        return as_bytes(data, other, dice)
    for _ in range(dice.choice((1, 1, 2, 3))):
        document = _changed(document, dice, dice.randrange(1, 6))
    return json.dumps(document).encode()


def _value(dice: random.Random) -> Any:
    deep: Any = []
    for _ in range(dice.choice((1, 3, 200))):
        deep = [deep] if dice.randrange(2) else {"dict": [[deep, 1]]}
    return dice.choice(
        (None, True, 1.5, "", "x", "../x", "a" * 5000, [], {}, deep, "F32", "\ud800", [0, 8],
         float("nan"), {"tuple": [1]}, {"bytes": "AA=="}, {"array": ["<f4", [2**40], ""]},
         {"int": "0x" + "f" * 400}, {"range": [0, 2**62, 1]}, {"set": [[1]]}, *_NUMBERS)
    )  # fmt: skip


def _changed(node: Any, dice: random.Random, depth: int) -> Any:
    if not depth or not isinstance(node, dict | list) or not node:
        return _value(dice)
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    key = dice.choice(keys)
    made = dict(node) if isinstance(node, dict) else list(node)
    kind = dice.randrange(6)
    if kind == 0:
        del made[key]
    elif kind == 1 and isinstance(made, dict):
        made[str(_value(dice))[:300]] = made[key]
    elif kind == 1:
        made += made[:20]
    else:
        made[key] = _changed(made[key], dice, depth - 1)
    return made


def unpack_files(data: bytes) -> dict[str, bytes]:
    """Return the files of a zip that is not compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def pack_files(files: dict[str, bytes], dice: random.Random | None = None) -> bytes:
    """Return a zip of the files with valid checksums; with `dice`, compress some."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            packed = dice is not None and dice.randrange(30) == 0
            method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return out.getvalue()


def _by_name(name: str, data: bytes, other: bytes, dice: random.Random) -> bytes:
    if name.endswith(".json"):
        return as_json(data, other, dice)
    if name.endswith(".pkl"):
        return as_pickle(data, other, dice)
    return as_bytes(data, other, dice)


def as_zip(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Change, drop, rename or swap records, and recompute their checksums."""
    try:
        files, more = unpack_files(data), unpack_files(other)
    except Exception:  # zipfile raises many kinds of errors for broken files
        return as_bytes(data, other, dice)
    for _ in range(dice.choice((1, 1, 1, 2))):
        if not files:
            break
        name = dice.choice(list(files))
        kind = dice.randrange(10)
        if kind == 0:
            del files[name]
        elif kind == 1:
            swap = dice.choice(list(files))
            files[name], files[swap] = files[swap], files[name]
        elif kind == 2:
            files[dice.choice((name + "x", name[1:] or "y", "data.pkl", "a/b/c"))] = files[name]
        elif kind == 3 and more:
            files[name] = dice.choice(list(more.values()))
        else:
            files[name] = _by_name(name, files[name], dice.choice(list(files.values())), dice)
    return pack_files(files, dice)


def with_length(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Change the header of a safetensors file as JSON, and correct its length."""
    size = int.from_bytes(data[:8], "little")
    if 8 + size > len(data):
        return as_bytes(data, other, dice)
    header = as_json(data[8 : 8 + size], other[8 : 8 + size], dice)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def with_checksum(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Change fields of the trailer of `.metadata`, and recompute its checksum."""
    made = bytearray(as_bytes(data[-TRAILER_SIZE:], other, dice))
    if len(made) == TRAILER_SIZE:
        made[-12:-8] = struct.pack("<I", zlib.crc32(made[:-12]))
    return data[:-TRAILER_SIZE] + bytes(made)


def as_checkpoint(data: bytes, other: bytes, dice: random.Random) -> bytes:
    """Change one of the files of a checkpoint, mostly with a valid trailer."""
    files, more = unpack_files(data), unpack_files(other)
    name = dice.choice(list(files))
    content = files[name]
    others = more.get(name, dice.choice(list(more.values())))
    if name.startswith(".manifest"):
        content = as_zip(content, others, dice)
    elif name.endswith("metadata"):
        pickle, trailer = _parts(content)
        content = as_pickle(pickle, others, dice) + trailer
    elif name.endswith(".safetensors"):
        content = with_length(content, others, dice)
    elif name.endswith(".json"):
        content = as_json(content, others, dice)
    else:
        content = as_bytes(content, others, dice)
    files[name] = content
    if dice.randrange(10):
        _mend(files)
    return pack_files(files)


def _parts(metadata: bytes) -> tuple[bytes, bytes]:
    """Split `.metadata` into its pickle and its trailer, which may be empty."""
    ours = metadata.endswith(b"SKTRL\x01\n")
    at = len(metadata) - TRAILER_SIZE if ours else len(metadata)
    return metadata[:at], metadata[at:]


def _mend(files: dict[str, bytes]) -> None:
    pickle, trailer = _parts(files.get(".metadata", b""))
    if not trailer:
        return
    manifests = [name for name in files if name.startswith(".manifest-")]
    try:
        save_id = manifests[0].removeprefix(".manifest-").removesuffix(".npz")
        mended = Trailer.of(save_id, pickle, files[manifests[0]])
        files[".metadata"] = pickle + mended.to_bytes()
    except (IndexError, ValueError, ShardkeepError):
        return


MUTATORS: dict[str, Sequence[Mutator]] = {
    "metadata": (as_pickle, as_pickle, as_bytes),
    "per-rank metadata": (as_pickle, as_bytes),
    "manifest": (as_zip, as_zip, as_bytes),
    "trailer": (with_checksum, as_bytes),
    "tensor item": (as_zip, as_zip, as_bytes),
    "object item": (as_zip, as_zip, as_bytes),
    "torch object": (as_zip, as_zip, as_bytes),
    "safetensors": (with_length, with_length, as_bytes),
    "safetensors index": (as_json, as_bytes),
    "lease": (as_json, as_bytes),
    "checkpoint": (as_checkpoint,),
}
"""The mutators of each target, one of which is chosen for each case."""
