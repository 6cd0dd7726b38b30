"""Pickles, containers and checkpoints made by hand, as by an attacker who knows the format."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path

PROTOCOL = b"\x80\x04"
MARK, STOP, NONE, BUILD, REDUCE = b"(", b".", b"N", b"b", b"R"
METADATA = "torch.distributed.checkpoint.metadata"


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(data)) + data


def sequence(*parts: bytes) -> bytes:
    return MARK + b"".join(parts) + b"t"


def listing(*parts: bytes) -> bytes:
    return b"](" + b"".join(parts) + b"e"


def mapping(*pairs: bytes) -> bytes:
    return b"}(" + b"".join(pairs) + b"u"


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def call(module: str, name: str, *args: bytes) -> bytes:
    return named(module, name) + sequence(*args) + REDUCE


def new(module: str, name: str, state: bytes) -> bytes:
    return named(module, name) + b")\x81" + state + BUILD


def attributes(**values: bytes) -> bytes:
    return mapping(*(part for key, value in values.items() for part in (text(key), value)))


def size(*sizes: int) -> bytes:
    return call("torch", "Size", sequence(*map(number, sizes)))


def properties(dtype: bytes = b"") -> bytes:
    layout = call("torch.serialization", "_get_layout", text("torch.strided"))
    memory = call(METADATA, "_MEM_FORMAT_ENCODING", number(0))
    state = sequence(dtype or named("torch", "float32"), layout, b"\x89", memory, b"\x89")
    return new(METADATA, "TensorProperties", state)


def chunk(offsets: bytes, sizes: bytes) -> bytes:
    return new(METADATA, "ChunkStorageMetadata", attributes(offsets=offsets, sizes=sizes))


def tensor(shape: bytes = b"", chunks: bytes = b"", props: bytes = b"") -> bytes:
    state = attributes(
        properties=props or properties(),
        size=shape or size(2, 3),
        chunks=chunks or listing(chunk(size(0, 0), size(2, 3))),
    )
    return new(METADATA, "TensorStorageMetadata", state)


def key(name: str, offset: bytes = NONE) -> bytes:
    return new(METADATA, "MetadataIndex", attributes(fqn=text(name), index=NONE, offset=offset))


def place(path: str = "data", offset: int = 0, length: int = 0, **more: bytes) -> bytes:
    state = attributes(
        relative_path=text(path), offset=number(offset), length=number(length), **more
    )
    return new("torch.distributed.checkpoint.filesystem", "_StorageInfo", state)


def metadata(
    entries: dict[str, bytes], storage: list[bytes], paths: bytes | None = None, tail: bytes = b""
) -> bytes:
    """Return a `.metadata` from its parts; `storage` is key, place, key, place, ..."""
    if paths is None:
        pairs = (part for name in entries for part in (text(name), sequence(text(name))))
        paths = mapping(*pairs)
    state = attributes(
        state_dict_metadata=attributes(**entries),
        planner_data=paths,
        storage_data=mapping(*storage),
    )
    return PROTOCOL + new(METADATA, "Metadata", state) + tail + STOP


def entry_of_bytes() -> bytes:
    return named(METADATA, "BytesStorageMetadata") + b")\x81"


def tensor_pickle(
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    *,
    offset: int = 0,
    count: int = 6,
    kind: str = "FloatStorage",
) -> bytes:
    """Return the `data.pkl` of a tensor."""
    storage = (
        sequence(text("storage"), named("torch", kind), text("0"), text("cpu"), number(count))
        + b"Q"
    )
    return (
        PROTOCOL
        + call(
            "torch._utils",
            "_rebuild_tensor_v2",
            storage,
            number(offset),
            sequence(*map(number, shape)),
            sequence(*map(number, strides)),
            b"\x89",
            call("collections", "OrderedDict"),
        )
        + STOP
    )


PAYLOAD = struct.pack("<6f", *range(6))


def container(
    pickle: bytes,
    payload: bytes | None = PAYLOAD,
    *,
    compress: bool = False,
    more: tuple[tuple[str, bytes], ...] = (),
) -> bytes:
    """Return a zip as `torch.save` makes it, but from another writer."""
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickle)
        if payload is not None:
            archive.writestr("archive/data/0", payload)
        archive.writestr("archive/version", "3\n")
        for name, data in more:
            archive.writestr(name, data)
    return out.getvalue()


def with_tensor(folder: Path, item: bytes, entry: bytes = b"", **more: bytes) -> None:
    """Write a checkpoint of one tensor "w" with this item."""
    storage = [key("w", size(0, 0)), place("data", 0, len(item), **more)]
    (folder / ".metadata").write_bytes(metadata({"w": entry or tensor()}, storage))
    (folder / "data").write_bytes(item)


def with_object(folder: Path, pickle: bytes, **more: bytes) -> None:
    """Write a checkpoint of one object "o" with this pickle, and of one valid tensor."""
    good, item = container(tensor_pickle()), container(pickle, None)
    storage = [
        key("w", size(0, 0)),
        place("data", 0, len(good)),
        key("o"),
        place("data", len(good), len(item), **more),
    ]
    (folder / ".metadata").write_bytes(metadata({"w": tensor(), "o": entry_of_bytes()}, storage))
    (folder / "data").write_bytes(good + item)


def with_metadata(folder: Path, data: bytes) -> None:
    """Write a checkpoint with this `.metadata`, and a valid item at the start of "data"."""
    (folder / ".metadata").write_bytes(data)
    (folder / "data").write_bytes(container(tensor_pickle()))


GOOD = len(container(tensor_pickle()))
"""The length of the item that `with_metadata` writes."""


def safetensors(header: bytes | dict[str, object], payload: bytes = b"", length: int = -1) -> bytes:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data) if length < 0 else length) + data + payload
