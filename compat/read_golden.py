"""Read what a release wrote: by `shardkeep.open` without a template, and by the drop-in."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import shardkeep as sk
from compat.expected import compare, contents, known_here, template
from compat.results import Outcome

Node = Mapping[str, Any]

PACKED = ": Opaque, not quint4x2"
"""Quantized integers, two in a byte, whose zero points are floats: a stand-in, by decision."""


def read_all(folder: Path, read: Callable[[str, Path, Node], Outcome]) -> tuple[Outcome, ...]:
    """Read every case of a set of golden checkpoints."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    outcomes = []
    for name, entry in manifest["cases"].items():
        if not entry["ok"]:
            outcomes.append(Outcome(name, absent=entry["why"]))
            continue
        expected = json.loads((folder / name / "expected.json").read_text(encoding="utf-8"))
        try:
            outcomes.append(read(name, folder / name / "ckpt", expected))
        except Exception as error:
            outcomes.append(Outcome(name, 1, (f": {type(error).__name__}: {error}",)))
    return tuple(outcomes)


def opened(name: str, path: Path, expected: Node) -> Outcome:
    """Read all tensors and values by `shardkeep.open`, as numpy arrays; verify all checksums."""
    checkpoint = sk.open(path)
    done = compare(expected, contents(checkpoint))
    report = checkpoint.verify()
    damaged = () if report.ok else (f": verify says {report}",)
    packed = tuple(line for line in done.differences if line.endswith(PACKED))
    wrong = tuple(line for line in done.differences if line not in packed)
    notes = ("torch.quint4x2 comes back as a stand-in",) if packed else ()
    return _outcome(name, done.leaves - len(packed), (*wrong, *damaged), notes)


def loaded(name: str, path: Path, expected: Node) -> Outcome:
    """Read by `shardkeep.dcp.load` into a template, without the objects that need trust."""
    import shardkeep.dcp as dcp

    left_out: list[str] = []
    expected = known_here(expected)
    while True:
        state = template(expected)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(state, checkpoint_id=path)
            break
        except sk.Untrusted as error:
            expected, removed = without(expected, error.name)
            if not removed:
                raise
            left_out.append(f"{error.name} needs trust ({', '.join(error.classes)})")
    done = compare(expected, state, typed_keys=True)
    return _outcome(name, done.leaves, done.differences, tuple(left_out))


def _outcome(
    name: str, leaves: int, differences: tuple[str, ...], left_out: tuple[str, ...]
) -> Outcome:
    # Each rank has stored its own value under one name; the case expects only one of them.
    each_rank = name == "no_collectives"
    wrong = tuple(line for line in differences if not (each_rank and "not expected" in line))
    extra = len(differences) - len(wrong)
    notes = (*left_out, *(["`i` has another value on each rank"] if extra else []))
    return Outcome(name, leaves - extra, wrong, left_out=notes)


def without(node: Node, name: str, prefix: str = "") -> tuple[Node, int]:
    """Return a description without a flat name, and the number of leaves removed."""
    if node["kind"] not in ("dict", "list"):
        return node, 0
    pairs = node["items"] if node["kind"] == "dict" else enumerate(node["items"])
    items: list[Any] = []
    removed = 0
    for key, value in pairs:
        text = str(key if node["kind"] == "list" else key.get("value"))
        here = f"{prefix}.{text}" if prefix else text
        if here == name or here.startswith(name + "."):
            removed += 1
            continue
        kept, more = without(value, name, here)
        items.append([key, kept] if node["kind"] == "dict" else kept)
        removed += more
    return {**node, "items": items}, removed
