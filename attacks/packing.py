"""Items with false information: zips, storages, strides, streams."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from pathlib import Path

import zstandard
from attacks import pickles as p
from attacks.attack import Attack, Attacks, in_item

__all__ = ["attacks"]


def _find(item: bytes, signature: bytes, name: str, at: int) -> int:
    """Return the offset of a record's header, in the file or in the zip directory."""
    found = item.find(signature)
    while found >= 0:
        if item[found + at : found + at + len(name)] == name.encode():
            return found
        found = item.find(signature, found + 1)
    raise ValueError(name)


def _patched(item: bytes, at: int, form: str, value: int) -> bytes:
    data = struct.pack(form, value)
    return item[:at] + data + item[at + len(data) :]


def _central(item: bytes, field: int, form: str, value: int, name: str = "archive/data/0") -> bytes:
    return _patched(item, _find(item, b"PK\1\2", name, 46) + field, form, value)


def _local(item: bytes, field: int, form: str, value: int) -> bytes:
    return _patched(item, _find(item, b"PK\3\4", "archive/data/0", 30) + field, form, value)


def _zips() -> Attacks:
    good = p.container(p.tensor_pickle())
    end = good.rfind(b"PK\5\6")
    pickle_at = _find(good, b"PK\3\4", "archive/data.pkl", 30)
    expanded = p.tensor_pickle((1 << 40,), (0,), count=6)
    wide = p.tensor(p.size(1 << 40), p.listing(p.chunk(p.size(0), p.size(1 << 40))))
    for name, item, error, what in (
        (
            "zip_size",
            _central(_central(good, 24, "<I", 1 << 30), 20, "<I", 1 << 30),
            "other sizes|beyond",
            "The directory says a gigabyte.",
        ),
        (
            "zip_small_size",
            _central(_central(good, 24, "<I", 4), 20, "<I", 4),
            "other sizes",
            "The directory says four bytes.",
        ),
        ("zip_offset", _central(good, 42, "<I", 1 << 31), "beyond", "A record beyond the item."),
        (
            "zip_count",
            _patched(_patched(good, end + 8, "<H", 60_000), end + 10, "<H", 60_000),
            "directory of",
            "60,000 records in 200 bytes.",
        ),
        (
            "zip_count64",
            _patched(good, end + 8, "<H", 0xFFFF),
            "zip64|missing|beyond",
            "More records than 16 bits hold.",
        ),
        (
            "zip_directory_offset",
            _patched(good, end + 16, "<I", 1 << 31),
            "beyond|after its end record",
            "Elsewhere.",
        ),
        ("zip_directory_size", _patched(good, end + 12, "<I", 1 << 31), "directory", "Large."),
        (
            "zip_overlap",
            _central(good, 42, "<I", pickle_at, "archive/version"),
            "overlaps|another name",
            "Two records share their bytes.",
        ),
        ("zip_duplicate", _twice(), "two records", "Two records of one name."),
        (
            "zip_local_name",
            good.replace(b"archive/data/0", b"archive/data/1", 1),
            "another name",
            "Local header and directory disagree.",
        ),
        ("zip_local_size", _local(good, 18, "<I", 5), "other sizes", "They disagree on the size."),
        ("zip_encrypted", _central(good, 8, "<H", 1), "encrypted", "A record is encrypted."),
        ("zip_compressed", p.container(p.tensor_pickle(), compress=True), "compressed", "One bit."),
        (
            "zip_bomb",
            p.container(p.tensor_pickle(), bytes(1 << 26), compress=True),
            "compressed",
            "64 MB in 64 KB.",
        ),
        ("zip_no_pickle", good.replace(b"data.pkl", b"data.pkX"), "0 records", "No data.pkl."),
        (
            "zip_legacy",
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(100),
            "before 1.6",
            "Not a zip, but an older format.",
        ),
        ("zip_garbage", bytes(200), "not a zip", "Zeros."),
        (
            "zip_big_endian",
            p.container(p.tensor_pickle(), more=(("archive/byteorder", b"big"),)),
            "big-endian",
            "Bytes in the other order.",
        ),
        (
            "storage_small",
            p.container(p.tensor_pickle(count=2)),
            "reaches beyond",
            "A storage of two elements for six.",
        ),
        (
            "storage_lies",
            p.container(p.tensor_pickle(), p.PAYLOAD[:8]),
            "holds 8 bytes",
            "A storage of six elements in eight bytes.",
        ),
        ("storage_missing", p.container(p.tensor_pickle(), None), "without a record", "None."),
        ("storage_offset", p.container(p.tensor_pickle(offset=1 << 40)), "reaches beyond", "Far."),
        (
            "stride_outside",
            p.container(p.tensor_pickle(strides=(1 << 40, 1))),
            "reaches beyond",
            "Row 1 is a terabyte away.",
        ),
        ("stride_negative", p.container(p.tensor_pickle(strides=(3, -1))), "strides", "Backwards."),
        (
            "storage_class",
            p.container(p.tensor_pickle(kind="load")),
            "unknown class",
            "A function is the storage's class.",
        ),
    ):
        yield name, Attack(in_item(item), error, what)
    yield (
        "stride_bomb",
        Attack(
            lambda folder: _expanded(folder, p.container(expanded), wide),
            "cannot be stored in",
            "A terabyte of one element.",
        ),
    )
    tensors = p.PROTOCOL + p.listing(*[p.tensor_pickle((1 << 20,), (0,))[2:-1]] * 100) + p.STOP
    yield (
        "object_stride_bomb",
        Attack(
            lambda folder: _with_storage(folder, tensors),
            "much more memory",
            "400 MB of tensors out of 24 bytes, inside an object.",
        ),
    )
    zeros = p.container(p.PROTOCOL + p.NONE + p.STOP, bytes(1 << 28))
    bomb = zstandard.ZstdCompressor().compress(zeros)
    transform = p.listing(p.text("stream.zstd/1"))
    yield (
        "zstd_bomb",
        Attack(
            in_item(bomb, transform_descriptors=transform),
            "decompresses to more",
            "256 MB.",
        ),
    )
    yield (
        "zstd_bomb_object",
        Attack(
            lambda folder: _only_object(folder, bomb, transform),
            "decompresses to more",
            "An object.",
        ),
    )
    yield (
        "zstd_broken",
        Attack(
            in_item(b"(\xb5/\xfd" + bytes(50), transform_descriptors=transform),
            "zstd|zip",
            "A stub.",
        ),
    )
    yield (
        "transform_unknown",
        Attack(
            in_item(good, transform_descriptors=p.listing(p.text("stream.exec/1"))),
            "unknown stream transform",
            "A transform that does not exist.",
        ),
    )


def _twice() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for record in ("data.pkl", "data/0", "data/0", "version"):
            archive.writestr(f"archive/{record}", p.PAYLOAD)
    return out.getvalue()


def _expanded(folder: Path, item: bytes, entry: bytes) -> None:
    storage = [p.key("w", p.size(0)), p.place("data", 0, len(item))]
    (folder / ".metadata").write_bytes(p.metadata({"w": entry}, storage))
    (folder / "data").write_bytes(item)


def _with_storage(folder: Path, pickle: bytes) -> None:
    _only_object(folder, p.container(pickle))


def _only_object(folder: Path, item: bytes, transforms: bytes = b"](e") -> None:
    place = p.place("data", 0, len(item), transform_descriptors=transforms)
    (folder / ".metadata").write_bytes(p.metadata({"o": p.entry_of_bytes()}, [p.key("o"), place]))
    (folder / "data").write_bytes(item)


def attacks() -> Attacks:
    """Return all attacks of this module, by name."""
    yield from _zips()
