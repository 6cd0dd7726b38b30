"""`shardkeep ls`: what a checkpoint holds, one line each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from shardkeep.checkpoint import Checkpoint
from shardkeep.cli.entries import Node, Row, matching, rows, tree
from shardkeep.cli.render import brief, is_json
from shardkeep.cli.terminal import CommandError, Output, count, escape, human
from shardkeep.errors import ShardkeepError

__all__ = ["ls", "print_tree"]

_SMALL = 64 * 1024
"""Bytes of an object that is read to show its value."""

_READS = 1000
"""Objects that are read to show their values: each costs a read of its file."""

_LABEL = 60
"""Widest label that others are aligned with."""


def ls(
    checkpoint: Checkpoint,
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


def _header(checkpoint: Checkpoint, found: Sequence[Row], out: Output) -> str:
    nbytes = sum(row.nbytes for row in found)
    tensors = sum(row.dtype is not None for row in found)
    parts = [
        _writer(checkpoint),
        count(tensors, "tensor"),
        count(len(found) - tensors, "object"),
        f"{human(nbytes)} ({nbytes:,} bytes)" if nbytes >= 1024 else count(nbytes, "byte"),
        count(len(checkpoint.outline.files), "file"),
    ]
    return f"{out.paint('bold', escape(checkpoint.url))}: {', '.join(parts)}"


_KINDS = {
    "shardkeep": "Shardkeep checkpoint",
    "dcp": "torch.distributed checkpoint",
    "dcp-per-rank": "torch.distributed checkpoint with metadata of each rank",
    "safetensors": "safetensors",
}


def _writer(checkpoint: Checkpoint) -> str:
    """The kind, and which versions wrote it as far as it says."""
    extra = checkpoint.outline.extra
    known = [
        f"{tool} {brief(extra[tool])}" if tool != "format" else f"format {brief(extra[tool])}"
        for tool in ("format", "shardkeep", "torch")
        if isinstance(extra.get(tool), (str, int)) and extra[tool] != ""
    ]
    kind = _KINDS.get(checkpoint.kind, checkpoint.kind)
    return escape(f"{kind} ({', '.join(known)})".replace("'", "")) if known else kind


def _print_flat(checkpoint: Checkpoint, shown: Sequence[Row], out: Output) -> None:
    """A line for each row, under its whole name."""
    labels = [escape(row.name) for row in shown]
    width = _width(labels)
    told = _Values(checkpoint, shown)
    paint = _painter(out)
    out.lines(
        f"{label.ljust(width)}  {_what(row, told, paint)}"
        for label, row in zip(labels, shown, strict=True)
    )


def print_tree(
    checkpoint: Checkpoint, shown: Sequence[Row], out: Output, *, depth: int | None = None
) -> None:
    """The rows as a tree; containers below `depth` levels are folded into one line each."""
    lines = list(_walk(tree(shown), depth))
    width = _width(guide + label for guide, label, _ in lines)
    told = _Values(checkpoint, [what for _, _, what in lines if isinstance(what, Row)])
    paint = _painter(out)

    def line(guide: str, label: str, what: Row | Node) -> str:
        pad = " " * max(0, width - len(guide) - len(label))
        if isinstance(what, Row):
            return f"{paint('dim', guide)}{label}{pad}  {_what(what, told, paint)}"
        return f"{paint('dim', guide)}{paint('bold', label)}{pad}  {_sum(what, paint)}"

    out.lines(line(*entry).rstrip() for entry in lines)


def _walk(root: Node, depth: int | None) -> Iterator[tuple[str, str, Row | Node]]:
    """Guide, label, and what is there, top to bottom. With its own stack: paths may be deep."""
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


def _width(labels: Iterable[str]) -> int:
    return max((len(label) for label in labels if len(label) <= _LABEL), default=0)


_Paint = Callable[[str, str], str]


def _painter(out: Output) -> _Paint:
    """Without colour, a function that does nothing: it is called some 400,000 times."""
    return out.paint if out.colour else lambda _, text: text


def _what(row: Row, told: _Values, paint: _Paint) -> str:
    if row.dtype is None:
        return paint("yellow", escape(told.line(row.name)))
    return f"{paint('cyan', row.dtype.name)} {list(row.shape)}  {paint('green', human(row.nbytes))}"


def _sum(node: Node, paint: _Paint) -> str:
    tensors = nbytes = objects = 0
    for row in node.all():
        nbytes += row.nbytes
        tensors += row.dtype is not None
        objects += row.dtype is None
    parts = [count(tensors, "tensor")] if tensors else []
    parts += [human(nbytes)] if tensors else []
    parts += [count(objects, "object")] if objects else []
    return paint("dim", ", ".join(parts))


class _Values:
    """Values of objects, in a line each.

    What must be read first is read only where it is small, and not by the thousands: each costs a
    read of its file.
    """

    def __init__(self, checkpoint: Checkpoint, shown: Iterable[Row]) -> None:
        self._checkpoint = checkpoint
        self._known = checkpoint.outline.objects.values
        unknown = [row.name for row in shown if row.dtype is None and row.name not in self._known]
        self._unread = frozenset(unknown[_READS:])
        self._rows: dict[str, int] = {}
        if unknown:
            names = checkpoint.index.objects.names
            self._rows = {name: row for row, name in enumerate(names)}

    def size(self, name: str) -> int:
        """Bytes of the item; 0 where the value is known without it."""
        if name in self._known:
            return 0
        return int(self._checkpoint.index.objects.length[self._rows[name]])

    def line(self, name: str) -> str:
        """The value; or the size where it is large, or why it can't be read. Not escaped."""
        nbytes = self.size(name)
        if nbytes > _SMALL or name in self._unread:
            return f"object of {human(nbytes)}"
        try:
            return brief(self._checkpoint.value(name))
        except (ShardkeepError, OSError) as error:
            return f"object that can't be read: {error}"

    def entry(self, name: str) -> dict[str, Any]:
        """The same for JSON."""
        nbytes = self.size(name)
        if nbytes > _SMALL or name in self._unread:
            return {"nbytes": nbytes}
        try:
            value = self._checkpoint.value(name)
        except (ShardkeepError, OSError) as error:
            return {"nbytes": nbytes, "error": str(error)}
        exact = is_json(value)
        return {"nbytes": nbytes} | ({"value": value} if exact else {"repr": brief(value, 2000)})


def _print_json(checkpoint: Checkpoint, shown: Sequence[Row], out: Output) -> None:
    """One document, an entry a line, written as it is made."""
    index = checkpoint.index
    chunks = np.bincount(index.chunks.tensor, minlength=len(index.tensors.names)).tolist()
    counted = dict(zip(index.tensors.names, chunks, strict=True))
    head = {
        "path": checkpoint.url,
        "kind": checkpoint.kind,
        "wrote": {key: _json_value(value) for key, value in index.extra.items()},
        "files": list(index.files),
        "tensors": sum(row.dtype is not None for row in shown),
        "objects": sum(row.dtype is None for row in shown),
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
    entry: dict[str, Any] = {"name": row.name, "path": path}
    if row.dtype is not None:
        return entry | {
            "kind": "tensor",
            "dtype": row.dtype.name,
            "shape": row.shape,
            "nbytes": row.nbytes,
            "chunks": chunks[row.name],
        }
    return entry | {"kind": "object"} | told.entry(row.name)


def _json_value(value: Any) -> Any:
    """The value where JSON holds it, else its text."""
    return value if is_json(value) else brief(value, 2000)
