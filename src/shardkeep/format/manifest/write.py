"""Writes an index as a manifest. See `manifest.layout` for the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from shardkeep.format.manifest.archive import Writer
from shardkeep.format.manifest.layout import FORMAT, KINDS, VERSION, LazyValues, too_long
from shardkeep.format.paths import Paths, names_of, paths_of
from shardkeep.format.texts import joined
from shardkeep.format.values import Json, dumps, encode, encode_key
from shardkeep.types import DTYPES, I64, Chunks, Index, Objects, YieldGil, never_yield

__all__ = ["write_manifest"]


def write_manifest(
    index: Index,
    header: Mapping[str, Any],
    paths: Paths | None = None,
    yield_gil: YieldGil = never_yield,
) -> bytes:
    """Return the manifest of an index.

    Args:
        index: the content of the checkpoint, with locations.
        header: what else to store, above all "save_id"; anything that `values.encode` accepts.
        paths: the paths of its structure, if they are known already.
        yield_gil: called between pieces of work.

    Raises:
        NotEncodable: `header`, `index.extra` or a key of a path cannot be encoded.
        ValueError: the structure is inconsistent, or its paths are too long.
    """
    out = Writer(yield_gil)
    head = _write_chunks(out, index.chunks) | _write_tensors(out, index)
    head |= _write_objects(out, index.objects)
    head |= {
        "format": FORMAT,
        "version": VERSION,
        "names": _write_texts(out, "names", names_of(index)),
        "files": [encode(file) for file in index.files],
        "transforms": [[encode(name) for name in names] for names in index.transforms],
        "twins": [
            [encode(n), [encode_key(k) for k in p]] for n, p in index.legacy_duplicates.items()
        ],
        "extra": encode(dict(index.extra)),
        "header": encode(dict(header)),
        "structure": _write_structure(out, index, paths),
    }
    out.json("header", head)  # Last, so that a reader gets it together with the zip's directory.
    return out.finish()


def _write_chunks(out: Writer, chunks: Chunks) -> dict[str, Json]:
    """Write the columns of chunks; return their part of the header."""
    first, last = chunks.block[[0, -1]].tolist()
    out.column("chunks.digests", chunks.checksums[first:last], packed=False)
    out.column("chunks.offsets", chunks.offsets)
    out.column("chunks.sizes", chunks.sizes)
    out.column("chunks.file", chunks.file)
    out.column("chunks.gap", chunks.item - _ends_before(chunks.item, chunks.length))
    out.column("chunks.length", chunks.length)
    out.column("chunks.payload", np.where(chunks.payload < 0, -1, chunks.payload - chunks.item))
    out.column("chunks.transform", chunks.transform)
    out.column("chunks.blocks", np.diff(chunks.block))
    return {"chunks": len(chunks.tensor), "digests": last - first}


def _write_tensors(out: Writer, index: Index) -> dict[str, Json]:
    """Write the columns of tensors; return their part of the header."""
    tensors, count = index.tensors, len(index.tensors.names)
    codes, dtypes = np.unique(tensors.dtype, return_inverse=True)
    out.column("tensors.dtype", dtypes)
    out.column("tensors.ndim", tensors.ndim)
    out.column("tensors.shape", tensors.shape)
    out.column("tensors.chunks", np.bincount(index.chunks.tensor, minlength=count))
    names = [DTYPES[code].name for code in codes.tolist()]
    return {"tensors": count, "dims": tensors.shape.shape[1], "dtypes": list[Json](names)}


def _write_objects(out: Writer, objects: Objects) -> dict[str, Json]:
    """Write the columns of objects; return their part of the header."""
    for name in ("file", "item", "length", "transform", "crc"):
        out.column(f"objects.{name}", getattr(objects, name))
    texts = _value_texts(objects)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    values = _write_blob(out, "values", b"".join(texts), lengths)
    return {"objects": len(objects.names), "values": values}


def _ends_before(item: I64, length: I64) -> I64:
    """Return, for each row, the end of the item in the row before it."""
    return np.concatenate([np.zeros(1, np.int64), (item + length)[:-1]])[: len(item)]


def _write_texts(out: Writer, name: str, texts: Sequence[str]) -> int:
    """Write texts as one blob and a column of lengths; return the size of the blob, in bytes."""
    return _write_blob(out, name, *joined(texts))


def _write_blob(out: Writer, name: str, blob: bytes, lengths: I64) -> int:
    out.column(f"{name}.lengths", lengths)
    out.column(name, np.frombuffer(blob, np.uint8))
    return len(blob)


def _value_texts(objects: Objects) -> list[bytes]:
    """Return the values as the text of their JSON, b"" for those that are not known."""
    if isinstance(objects.values, LazyValues):
        return [objects.values.text(name) for name in objects.names]
    values = objects.values
    return [dumps(values[name]).encode() if name in values else b"" for name in objects.names]


def _write_structure(out: Writer, index: Index, paths: Paths | None) -> Json:
    """Write containers and leaves, each as the row of its container and of its last key."""
    if index.structure is None:
        return None
    structure = index.structure
    lengths = map(len, chain(structure.containers, structure.leaves.values()))
    depths = np.fromiter(lengths, np.int64)
    if too_long(depths):
        raise ValueError("the structure's paths are too long")
    paths = paths or paths_of(structure, names_of(index))
    rows = {path: row for row, path in enumerate(structure.containers) if path in structure.empties}
    if len(rows) != len(structure.empties):
        raise ValueError("the structure names an empty container that is not there")
    empties = [rows[path] for path in structure.empties]
    for table, (parent, key) in (("containers", paths.containers), ("leaves", paths.leaves)):
        out.column(f"{table}.parent", parent)
        out.column(f"{table}.key", key)
    kinds = [KINDS.index(kind) for kind in structure.containers.values()]
    out.column("containers.kind", np.array(kinds, np.int64))
    out.column("leaves.name", paths.names)
    out.column("empties.container", np.array(empties, np.int64))
    out.column("empties.before", np.array(list(structure.empties.values()), np.int64))
    out.json("keys", [encode_key(key) for key in paths.keys])
    return {"containers": len(kinds), "leaves": len(paths.names), "empties": len(empties)}
