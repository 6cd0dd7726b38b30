"""The targets: functions that process the bytes as Shardkeep does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import shardkeep as sk
from fuzz.mutators import unpack_files
from shardkeep.checkpoint.leases import Holder
from shardkeep.errors import Damaged, FormatError, Mismatch, NotACheckpoint, Untrusted
from shardkeep.format.dcp.metadata_read import merge_metadata, read_metadata
from shardkeep.format.dcp.trailer import TRAILER_SIZE, Trailer
from shardkeep.format.manifest.read import read_outline
from shardkeep.format.pickle.reader import opaque_classes
from shardkeep.format.safetensors import parse
from shardkeep.format.torch_zip import container
from shardkeep.stores import MemoryStore

__all__ = ["ALLOWED", "TARGETS", "Target"]

Target = Callable[[bytes], object]

ALLOWED = (FormatError, Damaged, NotACheckpoint, Untrusted, Mismatch)
"""The errors that a case may raise, all of which say what is wrong."""


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: data[offset : offset + length]


def metadata(data: bytes) -> object:
    return read_metadata(data, file=".metadata")


def per_rank(data: bytes) -> object:
    return merge_metadata([("__0.metadata", data), ("__1.metadata", data)])


def manifest(data: bytes) -> object:
    outline = read_outline(reader(data), len(data), file="m.npz")
    index = outline.index()
    return [index.objects.values[name] for name in index.objects.values]


def trailer(data: bytes) -> object:
    found = Trailer.parse(data[-2 * TRAILER_SIZE :], len(data))
    if found is not None:
        found.check_pickle(data[: found.pickle_length])
    return found


def tensor_item(data: bytes) -> object:
    stored = container.tensor(reader(data), len(data), file="f", place="t")
    if stored.nbytes > 64 << 20:  # `sources` refuses what is not stored
        return stored
    record = memoryview(data)[stored.record.offset :][: stored.record.nbytes]
    return container.array(stored, record)


def object_item(data: bytes) -> object:
    value = container.value(data, file="f", place="o")
    return opaque_classes(value), repr(value)[:100]


def torch_object(data: bytes) -> object:
    from shardkeep.torch_state.objects import from_bytes

    return from_bytes(data, name="o")


def safetensors_header(data: bytes) -> object:
    header = parse.read_header(reader(data), len(data), file="f.safetensors")
    return parse.index_of({"f.safetensors": header}, None)


def safetensors_index(data: bytes) -> object:
    return parse.weight_map(data)


def lease(data: bytes) -> object:
    holder = Holder.parse(data)
    return holder and holder.ended()


def checkpoint(data: bytes) -> object:
    store = MemoryStore()
    for name, content in unpack_files(data).items():
        store.put(name, content, mode="replace")
    opened = sk.open(store)
    for name in opened:
        try:
            value: Any = opened[name]
            opened.read(name)
            repr(value)[:100]
        except (FormatError, Damaged):
            continue
    with suppress(FormatError, Damaged):
        opened.tree()
    return opened.verify()


TARGETS: Mapping[str, Target] = {
    "metadata": metadata,
    "per-rank metadata": per_rank,
    "manifest": manifest,
    "trailer": trailer,
    "tensor item": tensor_item,
    "object item": object_item,
    "torch object": torch_object,
    "safetensors": safetensors_header,
    "safetensors index": safetensors_index,
    "lease": lease,
    "checkpoint": checkpoint,
}

SHARES: Mapping[str, int] = {"checkpoint": 1, "lease": 1, "safetensors index": 1, "trailer": 1}
"""The weights of targets that differ from 3, as cases of whole checkpoints take long."""
