"""Claims as bytes: what a rank has to save, as it sends it to the coordinator (`types.Claim`).

The outline (names, dtypes, shapes, structure, values) is usually the same on all ranks of a job
and is then sent once. The pieces differ and are columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.format.manifest.layout import KINDS
from shardkeep.format.messages.columns import pack, unpack
from shardkeep.format.paths import paths_of
from shardkeep.format.texts import from_json, to_json
from shardkeep.format.values import Json, decode_key, encode_key
from shardkeep.types import DTYPES, I64, Claim, DType, Path, Structure, Tensors

__all__ = ["outline", "pack_claim", "unpack_claim"]


def outline(claim: Claim) -> bytes:
    """Return all of a claim except its pieces; the same bytes for the same content."""
    tensors, structure = claim.tensors, claim.structure
    codes, dtypes = np.unique(tensors.dtype, return_inverse=True)
    paths = paths_of(structure, (*tensors.names, *claim.objects))
    return pack(
        {
            "names": to_json(tensors.names),
            "dtypes": [DTYPES[code].name for code in codes.tolist()],
            "objects": to_json(claim.objects),
            "values": [
                [row, claim.values[name]]
                for row, name in enumerate(claim.objects)
                if name in claim.values
            ],
            "keys": [encode_key(key) for key in paths.keys],
            "empties": [[_path(path), count] for path, count in structure.empties.items()],
            "twins": to_json(list(claim.legacy_duplicates)),
            "twin paths": [_path(path) for path in claim.legacy_duplicates.values()],
            "marks": [[_path(path), kind] for path, kind in claim.marks.items()],
            "content": [[what, digest.hex()] for what, digest in claim.content.items()],
        },
        {
            "dtype": dtypes,
            "ndim": tensors.ndim,
            "shape": tensors.shape,
            "kind": np.array([KINDS.index(kind) for kind in structure.containers.values()]),
            "outer": paths.containers[0],
            "outer key": paths.containers[1],
            "leaf": paths.leaves[0],
            "leaf key": paths.leaves[1],
            "leaf name": paths.names,
        },
    )


def pack_claim(claim: Claim, outline: bytes | None) -> bytes:
    """Return a claim as bytes; without an outline if the coordinator's own is the same."""
    columns: dict[str, NDArray[Any]] = {
        "piece": claim.piece,
        "offsets": claim.offsets,
        "sizes": claim.sizes,
        "alias": claim.alias,
    }
    if outline is not None:
        columns["outline"] = np.frombuffer(outline, dtype=np.uint8)
    return pack({}, columns)


def unpack_claim(block: bytes, lead: Claim) -> Claim:
    """Invert `pack_claim`; `lead` is the coordinator's claim, whose outline may be the same."""
    _, columns = unpack(block)
    head = _read_outline(columns["outline"].tobytes()) if "outline" in columns else lead
    return Claim(
        tensors=head.tensors,
        piece=columns["piece"],
        offsets=columns["offsets"],
        sizes=columns["sizes"],
        alias=columns["alias"],
        objects=head.objects,
        values=head.values,
        structure=head.structure,
        legacy_duplicates=head.legacy_duplicates,
        marks=head.marks,
        content=head.content,
    )


def _read_outline(block: bytes) -> Claim:
    head, columns = unpack(block)
    codes = np.array([DType.named(name).code for name in head["dtypes"]], dtype=np.uint8)
    none = np.empty(0, dtype=np.int64)
    names, objects = from_json(head["names"]), from_json(head["objects"])
    return Claim(
        tensors=Tensors(names, codes[columns["dtype"]], columns["ndim"], columns["shape"]),
        piece=none,
        offsets=none,
        sizes=none,
        alias=none,
        objects=objects,
        values={objects[row]: value for row, value in head["values"]},
        structure=_read_structure(head, columns, names + objects),
        legacy_duplicates=dict(
            zip(from_json(head["twins"]), map(_keys, head["twin paths"]), strict=True)
        ),
        marks={_keys(path): kind for path, kind in head["marks"]},
        content={what: bytes.fromhex(digest) for what, digest in head["content"]},
    )


def _read_structure(
    head: dict[str, Any], columns: dict[str, I64], names: Sequence[str]
) -> Structure:
    keys = [decode_key(key) for key in head["keys"]]
    paths: list[Path] = [()]
    for parent, key in zip(columns["outer"].tolist(), columns["outer key"].tolist(), strict=True):
        paths.append((*paths[parent], keys[key]))
    rows = (columns[name].tolist() for name in ("leaf name", "leaf", "leaf key"))
    return Structure(
        {names[name]: (*paths[parent], keys[key]) for name, parent, key in zip(*rows, strict=True)},
        {path: KINDS[kind] for path, kind in zip(paths, columns["kind"].tolist(), strict=True)},
        {_keys(path): count for path, count in head["empties"]},
    )


def _path(path: Path) -> list[Json]:
    return [encode_key(key) for key in path]


def _keys(path: list[Json]) -> Path:
    return tuple(decode_key(key) for key in path)
