"""`shardkeep ls`: what a checkpoint holds, one line each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from shardkeep.checkpoint.reader import CheckpointReader
from shardkeep.cli.entries import Node, Row, matching, rows, tree
from shardkeep.cli.render import brief, is_json
from shardkeep.cli.terminal import CommandError, Output
from shardkeep.errors import ShardkeepError
from shardkeep.format.manifest.read import Outline
from shardkeep.util.escaping import escape, one_line
from shardkeep.util.formatting import count, human_bytes

__all__ = ["ls", "print_tree"]

_SMALL = 64 * 1024
"""Bytes of an object that is read to show its value."""

_LARGEST = 1 << 20
"""Bytes that such an object may have decompressed: 64 KiB can hold gigabytes of zeros."""

_READS = 1000
"""Objects that are read to show their values: each costs a read of its file."""

_LABEL = 60
"""Widest label that others are aligned with."""

_WHAT = 40
"""Widest dtype and shape that others are aligned with."""


def ls(
    checkpoint: CheckpointReader,
    out: Output,
    *,
    pattern: str | None,
    as_json: bool,
    flat: bool,
    depth: int | None,
) -> int:
    """Print the listing; the exit code."""
    found = rows(checkpoint)
    shown = found if pattern is None else matching(found, pattern)
    if not shown and pattern is not None:
        raise CommandError(
            f"nothing in {checkpoint.url} matches {pattern!r}: "
            "a pattern fits whole names (try '*part*'), a name lists what is below it",
            1,
        )
    if as_json:
        _print_json(checkpoint, shown, out)
        return 0
    out.line(_header(checkpoint, found, out))
    if len(shown) < len(found):
        out.line(out.paint("dim", f"{count(len(shown), 'name')} of {len(found):,} match"))
    if flat:
        _print_flat(checkpoint, shown, out)
    else:
        print_tree(checkpoint, shown, out, depth=depth)
    return 0


def _header(checkpoint: CheckpointReader, found: Sequence[Row], out: Output) -> str:
    nbytes = sum(row.nbytes for row in found)
    tensors = sum(row.kind == "tensor" for row in found)
    parts = [
        _writer(checkpoint),
        count(tensors, "tensor"),
        count(sum(row.kind == "object" for row in found), "object"),
        f"{human_bytes(nbytes)} ({nbytes:,} bytes)" if nbytes >= 1024 else count(nbytes, "byte"),
        count(len(checkpoint.outline.files), "file"),
    ]
    return f"{out.paint('bold', escape(checkpoint.url))}: {', '.join(parts)}"


_KINDS = {
    "shardkeep": "Shardkeep checkpoint",
    "dcp": "torch.distributed checkpoint",
    "dcp-per-rank": "torch.distributed checkpoint with metadata of each rank",
    "safetensors": "safetensors",
}


def _writer(checkpoint: CheckpointReader) -> str:
    """The kind, and what wrote it when, as far as it says."""
    said = _said(checkpoint)
    known = [
        f"{prefix}{said[key]}"
        for key, prefix in (("shardkeep", "by shardkeep "), ("torch", "torch "), ("created", ""))
        if isinstance(said.get(key), str)
    ]
    kind = _KINDS.get(checkpoint.kind, checkpoint.kind)
    return f"{kind} ({escape(', '.join(known)[:200])})" if known else kind


def _said(checkpoint: CheckpointReader) -> Mapping[str, Any]:
    """What the checkpoint says of itself."""
    outline = checkpoint.outline
    header = outline.header if isinstance(outline, Outline) else {}
    return {**outline.extra, **header}


def _print_flat(checkpoint: CheckpointReader, shown: Sequence[Row], out: Output) -> None:
    """A line for each row, under its whole name."""
    _print([("", escape(row.name), row) for row in shown], checkpoint, out)


def print_tree(
    checkpoint: CheckpointReader, shown: Sequence[Row], out: Output, *, depth: int | None = None
) -> None:
    """The rows as a tree; containers below `depth` levels are folded into one line each."""
    _print(list(_walk(tree(shown), depth)), checkpoint, out)


_Line = tuple[str, str, "Row | Node"]
"""Guide, label, and what is there."""


def _print(lines: Sequence[_Line], checkpoint: CheckpointReader, out: Output) -> None:
    """In columns: guide and label, what it is, its size."""
    told = _Values(checkpoint, [what for _, _, what in lines if isinstance(what, Row)])
    cells = [_cells(what, told) for _, _, what in lines]
    label_width = _width((guide + label for guide, label, _ in lines), _LABEL)
    what_width = _width((what for what, size, _ in cells if size), _WHAT)
    size_width = _width((size for _, size, _ in cells), _WHAT)

    def line(guide: str, label: str, what: str, size: str, style: str) -> str:
        indent = " " * (label_width - len(guide) - len(label))
        gap = " " * (what_width - len(what) + 2) if size else ""
        number = size.rjust(size_width) if size else ""
        if not out.colour:
            return f"{guide}{label}{indent}  {what}{gap}{number}"
        name = out.paint("bold", label) if style == "dim" else label
        left = f"{out.paint('dim', guide)}{name}{indent}"
        return f"{left}  {out.paint(style, what)}{gap}{out.paint('green', number)}"

    out.lines(
        line(guide, label, *cell) for (guide, label, _), cell in zip(lines, cells, strict=True)
    )


def _width(texts: Iterable[str], most: int) -> int:
    """Of a column; what is wider than `most` sticks out of it."""
    return max((n for n in map(len, texts) if n <= most), default=0)


def _cells(what: Row | Node, told: _Values) -> tuple[str, str, str]:
    """What it is, its size if it has one, and the style."""
    if isinstance(what, Node):
        return _sum(what)
    if what.dtype is None:
        known = told.line(what.name) if what.kind == "object" else what.kind
        return known, "", "yellow"
    shape = ", ".join(map(str, what.shape))
    return f"{what.dtype.name} [{shape}]", human_bytes(what.nbytes), "cyan"


def _walk(root: Node, depth: int | None) -> Iterator[_Line]:
    """Top to bottom. With its own stack: paths may be deep."""
    stack = [("", iter(_children(root)))]
    while stack:
        indent, children = stack[-1]
        entry = next(children, None)
        if entry is None:
            stack.pop()
            continue
        key, node, last = entry
        guide = indent + ("└─ " if last else "├─ ")
        if depth is not None and len(stack) > depth:
            continue
        label = escape(key if isinstance(key, str) else brief(key))
        for row in node.rows:
            yield guide, _label(label, row), row
        if node.below:
            yield guide, label, node
            stack.append((indent + ("   " if last else "│  "), iter(_children(node))))


def _children(node: Node) -> list[tuple[object, Node, bool]]:
    end = len(node.below) - 1
    return [(key, inner, number == end) for number, (key, inner) in enumerate(node.below.items())]


def _label(label: str, row: Row) -> str:
    """The key, and the name where it is not the keys joined by dots, as it must be given then."""
    joined = ".".join(map(str, row.path))
    return label if joined == row.name else f"{label} (named {escape(row.name)})"


def _sum(node: Node) -> tuple[str, str, str]:
    tensors = nbytes = objects = 0
    for row in node.all():
        nbytes += row.nbytes
        tensors += row.kind == "tensor"
        objects += row.kind == "object"
    parts = [count(tensors, "tensor")] if tensors else []
    parts += [count(objects, "object")] if objects else []
    return ", ".join(parts), human_bytes(nbytes) if tensors else "", "dim"


class _Values:
    """Values of objects, in a line each.

    What must be read first is read only where it is small, and not by the thousands: each costs a
    read of its file.
    """

    def __init__(self, checkpoint: CheckpointReader, shown: Iterable[Row]) -> None:
        self._checkpoint = checkpoint
        objects = checkpoint.outline.objects
        self._known = objects.values
        self._sizes = dict(zip(objects.names, objects.length.tolist(), strict=True))
        unknown = [
            row.name for row in shown if row.kind == "object" and row.name not in self._known
        ]
        self._unread = frozenset(unknown[_READS:])

    def _shown(self, name: str) -> bool:
        small = self._sizes[name] <= _SMALL and name not in self._unread
        return small or name in self._known

    def line(self, name: str) -> str:
        """The value; or the size where it is large, or why it can't be read."""
        if not self._shown(name):
            return f"object of {human_bytes(self._sizes[name])}"
        try:
            return one_line(brief(self._checkpoint.value(name, limit=_LARGEST)))
        except (ShardkeepError, OSError) as error:
            return one_line(f"object that can't be read: {error}")

    def entry(self, name: str) -> dict[str, Any]:
        """The same for JSON."""
        entry: dict[str, Any] = {"nbytes": self._sizes[name]}
        if self._shown(name):
            try:
                value = self._checkpoint.value(name, limit=_LARGEST)
                entry |= {"value": value} if is_json(value) else {"repr": brief(value, 2000)}
            except (ShardkeepError, OSError) as error:
                entry["error"] = str(error)
        return entry


def _print_json(checkpoint: CheckpointReader, shown: Sequence[Row], out: Output) -> None:
    """One document, an entry a line, written as it is made."""
    outline = checkpoint.outline
    if isinstance(outline, Outline):
        counts = outline.counts
    else:
        counts = np.bincount(outline.chunks.tensor, minlength=len(outline.tensors.names))
    counted = dict(zip(outline.tensors.names, counts.tolist(), strict=True))
    head = {
        "path": checkpoint.url,
        "kind": checkpoint.kind,
        "says": {key: _json_value(value) for key, value in _said(checkpoint).items()},
        "files": list(outline.files),
        "tensors": sum(row.kind == "tensor" for row in shown),
        "objects": sum(row.kind == "object" for row in shown),
        "nbytes": sum(row.nbytes for row in shown),
    }
    encode = json.JSONEncoder().encode
    out.line(encode(head)[:-1] + ', "entries": [')
    last = len(shown) - 1
    told = _Values(checkpoint, shown)
    out.lines(
        encode(_entry(row, counted, told)) + ("," if number < last else "")
        for number, row in enumerate(shown)
    )
    out.line("]}")


def _entry(row: Row, chunks: dict[str, int], told: _Values) -> dict[str, Any]:
    path = [key if type(key) in (str, int) else brief(key) for key in row.path]
    entry: dict[str, Any] = {"name": row.name, "path": path, "kind": row.kind}
    if row.dtype is not None:
        entry |= {"dtype": row.dtype.name, "shape": row.shape, "nbytes": row.nbytes}
        return entry | {"chunks": chunks[row.name]}
    return entry | (told.entry(row.name) if row.kind == "object" else {})


def _json_value(value: Any) -> Any:
    """The value where JSON holds it, else its text."""
    return value if is_json(value) else brief(value, 2000)
