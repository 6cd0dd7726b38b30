"""Headers of safetensors files, and sets of them as an index.

The limits are the format's own: a header of at most 100 MB, and bytes without holes or overlaps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from shardkeep.errors import FormatError
from shardkeep.format.dcp.metadata_columns import (
    Files,
    Row,
    chunk_columns,
    object_columns,
    tensor_columns,
)
from shardkeep.format.excerpt import shown
from shardkeep.format.names import safe_file_name
from shardkeep.types import MAX_DIMS, DType, Index

__all__ = [
    "INDEX",
    "KINDS",
    "MAX_HEADER",
    "SHARDING",
    "Entry",
    "Header",
    "index_of",
    "read_header",
    "weight_map",
]

ReadAt = Callable[[int, int], bytes]
Ints = tuple[int, ...]

INDEX = "model.safetensors.index.json"
"""File name of the index of a set."""

SHARDING = "DCP_SHARDING_INFO"
"""Key in `__metadata__` where DCP stores which part of each tensor a file contains."""

MAX_HEADER = 100_000_000

KINDS = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}
"""The format's name of a dtype -> torch's."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file.

    Attributes:
        dtype: element type.
        shape: sizes, in elements of torch's dtype (two 4-bit floats make one).
        start: position of its bytes in the file. They are in C order, without gaps.
        nbytes: number of its bytes.
    """

    dtype: DType
    shape: Ints
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A file's header: its tensors by name, and its `__metadata__`."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor, or a part of one that starts at `begin`, if the file says that it is a part."""

    file: str
    entry: Entry
    begin: Ints | None


def read_header(read_at: ReadAt, size: int, *, file: str) -> Header:
    """Return the header of a safetensors file.

    Args:
        read_at: reads (offset, length) of the file.
        size: bytes of the file.
        file: names it in errors.

    Raises:
        FormatError: not such a file, a header that is too large, or tensors that overlap, leave
            holes, or do not have the bytes that their dtype and shape need.
    """
    if size < 8:
        raise FormatError("too short for a safetensors file", file=file)
    length = int.from_bytes(read_at(0, 8), "little")
    if length > MAX_HEADER or length > size - 8:
        raise FormatError(f"a header of {length} bytes in a file of {size}", file=file)
    fields = _json(read_at(8, length), file)
    metadata = fields.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise FormatError("__metadata__ is not text by name", file=file)
    tensors = {name: _entry(name, field, 8 + length, file) for name, field in fields.items()}
    end = 8 + length
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != end:
            what = f"bytes from {min(end, entry.start)} on are in no tensor, or in two"
            raise FormatError(what, file=file, place=_named(name))
        end += entry.nbytes
    if end != size:
        raise FormatError(f"its tensors end at {end}, the file at {size}", file=file)
    return Header(tensors, metadata)


def _named(name: str) -> str:
    return f"tensor {shown(name)}"


def _json(data: bytes, file: str) -> dict[str, Any]:
    """Parse a JSON object strictly: no name twice anywhere."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a name occurs twice")
        return made

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"broken JSON: {error}"[:300], file=file) from error
    if type(value) is not dict:
        raise FormatError("the header is not a JSON object", file=file)
    return value


def _entry(name: str, field: Any, base: int, file: str) -> Entry:
    def bad(what: str) -> FormatError:
        return FormatError(what, file=file, place=_named(name))

    if type(field) is not dict:
        raise bad("invalid entry")
    kind: Any = field.get("dtype")
    shape: Any = field.get("shape")
    offsets: Any = field.get("data_offsets")
    if type(kind) is not str or kind not in KINDS:
        raise bad(f"unknown dtype {shown(kind)}")
    if not _counts(shape) or len(shape) > MAX_DIMS:
        raise bad(f"invalid shape: {shown(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad(f"invalid offsets: {shown(offsets)}")
    dtype = DType.named(KINDS[kind])
    if kind == "F4":
        if not shape or shape[-1] % 2:
            raise bad(f"4-bit floats that fill no bytes: {shown(shape)}")
        shape = [*shape[:-1], shape[-1] // 2]
    nbytes = offsets[1] - offsets[0]
    if prod(shape) * dtype.itemsize != nbytes:
        raise bad(f"{nbytes} bytes for {dtype}{shown(shape)}")
    return Entry(dtype, tuple(shape), base + offsets[0], nbytes)


def _counts(value: Any) -> bool:
    return type(value) is list and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def weight_map(data: bytes, *, file: str = INDEX) -> dict[str, str]:
    """Return which file contains which tensor, from the index of a set.

    Raises:
        FormatError: it is not such an index, or names a file outside the folder.
    """
    names = _json(data, file).get("weight_map")
    if type(names) is not dict or not all(type(value) is str for value in names.values()):
        raise FormatError("no weight_map in it", file=file)
    known: dict[str, str] = {}
    for path in names.values():
        if path not in known:
            known[path] = safe_file_name(path, file=file)
    return {name: known[path] for name, path in names.items()}


def index_of(headers: Mapping[str, Header], weights: Mapping[str, str] | None) -> Index:
    """Return the index of a set of files.

    A tensor may be in several files: those that DCP wrote store where in the whole tensor each part
    starts (`DCP_SHARDING_INFO`). The whole then extends as far as its parts do.

    Args:
        headers: by file name.
        weights: which file contains which tensor, if the set has such an index: it decides.

    Raises:
        FormatError: a tensor is missing, or in two files that do not say which part of it they
            contain; parts differ in dtype or dimensions.
    """
    parts: dict[str, list[_Part]] = {}
    for file, header in headers.items():
        offsets = _saved_offsets(header, file)
        for name, entry in header.tensors.items():
            if weights is None or weights.get(name, file) == file:
                parts.setdefault(name, []).append(_Part(file, entry, offsets.get(name)))
    for name, file in (weights or {}).items():
        if file not in headers or name not in headers[file].tensors:
            raise FormatError("it should be here, says the index", file=file, place=_named(name))
    names, dtypes, shapes = list(parts), [], []
    rows: list[Row] = []
    payloads: list[int] = []
    for number, (name, found) in enumerate(parts.items()):
        dtype, shape = _whole(name, found)
        dtypes.append(dtype)
        shapes.append(shape)
        for begin, part in _unique(name, found).items():
            entry = part.entry
            rows.append((number, begin, entry.shape, (part.file, entry.start, entry.nbytes, ())))
            payloads.append(entry.start)
    files = Files()
    table = tensor_columns(names, dtypes, shapes)
    return Index(
        tensors=table,
        chunks=chunk_columns(rows, table, files, payloads),
        objects=object_columns({}, files),
        files=files.files,
        extra={"format": "safetensors"},
    )


def _saved_offsets(header: Header, file: str) -> dict[str, Ints]:
    """Return where in its tensor each part of this file starts; empty if it does not say."""
    text = header.metadata.get(SHARDING)
    if text is None:
        return {}
    offsets = {}
    for name, entry in _json(text.encode("utf-8", "replace"), file).items():
        begin: Any = entry.get("saved_offsets") if type(entry) is dict else None
        if not _counts(begin) or name not in header.tensors:
            raise FormatError(f"{SHARDING} without offsets", file=file, place=_named(name))
        if len(begin) != len(header.tensors[name].shape):
            raise FormatError("offsets of other dimensions", file=file, place=_named(name))
        offsets[name] = tuple(begin)
    return offsets


def _whole(name: str, parts: list[_Part]) -> tuple[DType, Ints]:
    """Return dtype and shape of the tensor that these are parts of."""
    first = parts[0].entry
    shape = list(first.shape)
    for part in parts:
        entry = part.entry
        if entry.dtype != first.dtype or len(entry.shape) != len(shape):
            raise FormatError("parts of two kinds of tensor", file=part.file, place=_named(name))
        if part.begin is None and len(parts) > 1:
            what = f"it is in {parts[0].file} and in {parts[1].file}, and no part of it"
            raise FormatError(what, file=part.file, place=_named(name))
        begin = part.begin or (0,) * len(shape)
        ends = (offset + size for offset, size in zip(begin, entry.shape, strict=True))
        shape = list(map(max, shape, ends))
    return first.dtype, tuple(shape)


def _unique(name: str, parts: list[_Part]) -> dict[Ints, _Part]:
    """Return the parts by where they start; replicas count once."""
    unique: dict[Ints, _Part] = {}
    for part in parts:
        known = unique.setdefault(part.begin or (0,) * len(part.entry.shape), part)
        if known.entry.shape != part.entry.shape:
            raise FormatError(
                "two parts start at the same offsets", file=part.file, place=_named(name)
            )
    return unique
