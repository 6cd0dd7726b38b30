"""Writes safetensors files and sets of them: headers, names, the index of a set."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from shardkeep.errors import Conflict
from shardkeep.format.safetensors.parse import KINDS, MAX_HEADER, SHARDING
from shardkeep.types import DType

__all__ = ["Layout", "file_name", "is_file_name", "layout", "listing", "of_parts", "of_wholes"]

Ints = tuple[int, ...]

_NAMES = {dtype: kind for kind, dtype in KINDS.items()}
_FILE = re.compile(
    r"(shard-\d{5,}-)?model-\d{5,}-of-\d{5,}(-part-\d{5,})?\.safetensors(\.[0-9a-f]{16}\.tmp)?"
)
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """The header of a file, and the order of what follows.

    Attributes:
        header: its first bytes.
        names: the tensors whose bytes follow, one after the other, in this order.
        nbytes: number of bytes without the header.
    """

    header: bytes
    names: tuple[str, ...]
    nbytes: int


def layout(tensors: Mapping[str, tuple[DType, Ints]], metadata: Mapping[str, str]) -> Layout:
    """Return the layout of a file with these tensors; each starts at a multiple of its item size.

    Args:
        tensors: name -> dtype and shape, in elements of torch's dtype.
        metadata: content of `__metadata__`.

    Raises:
        Conflict: the format lacks such a dtype or does not permit such a name; or there are more
            names than a header can hold.
    """
    # Wide elements first: so all are aligned without gaps, which the format forbids.
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        kind, sizes = _kind(name, dtype, shape)
        fields[name] = {"dtype": kind, "shape": sizes, "data_offsets": [start, end]}
    return Layout(_header(fields), tuple(order), end)


def _kind(name: str, dtype: DType, shape: Ints) -> tuple[str, list[int]]:
    kind = _NAMES.get(dtype.name)
    if name == "__metadata__":
        raise Conflict("no tensor of a safetensors file can be named '__metadata__'")
    if kind is None or (kind == "F4" and not shape):
        raise Conflict(f"tensor {name!r}: safetensors files can't hold {dtype}{list(shape)}")
    return kind, [*shape[:-1], 2 * shape[-1]] if kind == "F4" else list(shape)


def _header(fields: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise Conflict(f"a tensor's name is not valid text: {error.object[:100]!r}") from None
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise Conflict(
            f"{len(fields)} tensors need a header of {len(text)} bytes, and one file's may have "
            f"{MAX_HEADER}: share them out over more files (fqn_to_index_mapping)"
        )
    return len(text).to_bytes(8, "little") + text


def of_wholes() -> dict[str, str]:
    """Return the `__metadata__` of a file that contains whole tensors."""
    return {"format": "pt"}


def of_parts(begins: Mapping[str, Ints]) -> dict[str, str]:
    """Return the `__metadata__` of a file as DCP writes it, with the start of each part."""
    info = {name: {"saved_offsets": list(begin)} for name, begin in begins.items()}
    return {SHARDING: json.dumps(info), "DCP_VERSION": "1.0", **of_wholes()}


def file_name(number: int, last: int, shard: int | None = None, part: int = 1) -> str:
    """Return the name of file `number` of `last`, both counted from 1.

    Args:
        number, last: position and number of files.
        shard: the rank whose file it is, counted from 1; None if files are not sharded.
        part: a tensor has one part in a file; its second part is in a file of its own.
    """
    before = "" if shard is None else f"shard-{shard:05}-"
    after = "" if part == 1 else f"-part-{part:05}"
    return f"{before}model-{number:05}-of-{last:05}{after}.safetensors"


def is_file_name(name: str) -> bool:
    """Return whether a file has such a name, or its temporary form."""
    return _FILE.fullmatch(name) is not None


def listing(weights: Mapping[str, str], nbytes: int) -> bytes:
    """Return the index of a set: which file contains which tensor, and the bytes of all of them."""
    fields = {"metadata": {"total_size": nbytes}, "weight_map": dict(weights)}
    return json.dumps(fields, indent=2).encode()
