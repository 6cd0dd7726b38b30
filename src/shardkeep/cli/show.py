"""`shardkeep show`: one tensor, one object, or what is below a name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import islice

import numpy as np

from shardkeep.checkpoint.reader import CheckpointReader
from shardkeep.cli.boxes import corner, parse
from shardkeep.cli.entries import Row, rows
from shardkeep.cli.ls import print_tree
from shardkeep.cli.render import opaque_names, pretty
from shardkeep.cli.stats import Stats, statistics, widened
from shardkeep.cli.terminal import CommandError, Output
from shardkeep.coordination.progress import bar
from shardkeep.types import Box, Chunk, DType, TensorInfo
from shardkeep.util.escaping import escape, one_line
from shardkeep.util.formatting import count, human_bytes

__all__ = ["show"]

_PREVIEW = 64
"""Elements that are shown when no box is asked for."""

_PRINTED = 4096
"""Elements of a box that are printed."""

_CHUNKS = 32
"""Chunks that are listed unless all are asked for."""

_COMPARED = 20_000
"""Names that are compared with one that is not there: it takes some 20 µs each."""


def show(
    checkpoint: CheckpointReader,
    name: str,
    out: Output,
    *,
    box: str | None,
    stats: bool,
    chunks: bool,
) -> int:
    """Print a tensor, an object or a container; return the exit code.

    Raises:
        CommandError: nothing has that name (the message suggests similar names), or a box or
            statistics are requested for something that is not a tensor.
    """
    name = _resolve(checkpoint, name)
    if name in checkpoint and checkpoint.is_tensor(name):
        _tensor(checkpoint, name, out, box=box, stats=stats, chunks=chunks)
    elif box is not None or stats:
        raise CommandError(f"{name!r} is not a tensor: --box and --stats are for tensors only", 2)
    elif name in checkpoint:
        _object(checkpoint, name, out)
    else:
        _container(checkpoint, name, out)
    return 0


def _resolve(checkpoint: CheckpointReader, name: str) -> str:
    """The name itself, or the one that is printed like it: escaped names can be copied."""
    if name in checkpoint:
        return name
    found = rows(checkpoint)
    if any(row.name == name or row.name.startswith(f"{name}.") for row in found):
        return name
    printed = [row.name for row in found if escape(row.name) == name]
    if len(printed) == 1:
        return printed[0]
    close = _close(name, found)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise CommandError(
        f"{checkpoint.url} has no tensor, object or container named {name!r}{hint}", 1
    )


def _container(checkpoint: CheckpointReader, name: str, out: Output) -> None:
    found = rows(checkpoint)
    inside = [row for row in found if row.name.startswith(f"{name}.")]
    bare = [row.kind for row in found if row.name == name]
    what = f"{len(inside):,} inside" if inside else bare[0]
    out.line(f"{out.paint('bold', escape(name))}: {what}")
    print_tree(checkpoint, inside, out)


def _close(name: str, found: Sequence[Row]) -> list[str]:
    names = [row.name for row in found]
    inside = [other for other in names if name in other]
    candidates = dict.fromkeys(islice(inside + names, _COMPARED))
    return get_close_matches(name, candidates, n=3, cutoff=0.6) or inside[:3]


def _object(checkpoint: CheckpointReader, name: str, out: Output) -> None:
    value = checkpoint.value(name)
    out.line(f"{out.paint('bold', escape(name))}: object, {escape(type(value).__name__)}")
    out.lines("  " + one_line(line) for line in pretty(value))
    unknown = opaque_names(value)
    if unknown:
        out.line()
        out.line("Classes that Shardkeep does not know; they were not imported, nothing was run:")
        out.lines(f"  {escape(unknown_class)}" for unknown_class in unknown)


def _tensor(
    checkpoint: CheckpointReader,
    name: str,
    out: Output,
    *,
    box: str | None,
    stats: bool,
    chunks: bool,
) -> None:
    info = checkpoint.tensor(name)
    wanted = Box.whole(info.shape) if box is None else parse(box, info.shape)
    files = len({chunk.item.file for chunk in info.chunks})
    exact = f" ({info.nbytes:,} bytes)" if info.nbytes >= 1024 else ""
    out.line(out.paint("bold", escape(name)))
    out.line(f"  dtype   {info.dtype}" + (f" ({info.dtype.note})" if info.dtype.note else ""))
    out.line(f"  shape   {list(info.shape)}")
    out.line(f"  size    {human_bytes(info.nbytes)}{exact}")
    out.line(f"  chunks  {len(info.chunks):,} in {count(files, 'file')}")
    out.line()
    out.lines(_table(info.chunks if chunks else info.chunks[:_CHUNKS]))
    if len(info.chunks) > _CHUNKS and not chunks:
        out.line(f"  ... and {len(info.chunks) - _CHUNKS:,} more (--chunks lists all)")
    out.line()
    out.lines(_values(checkpoint, info, wanted, asked=box is not None))
    if stats:
        out.line()
        with bar() as progress:
            found = statistics(checkpoint, name, wanted, progress)
        out.lines(_statistics(found))


def _table(chunks: Sequence[Chunk]) -> Iterator[str]:
    head = ("box", "file", "offset", "length")
    cells = [
        (str(c.box), escape(c.item.file), f"{c.item.offset:,}", f"{c.item.length:,}")
        for c in chunks
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    for box, file, offset, length in (head, *cells):
        yield (
            f"  {box.ljust(widths[0])}  {file.ljust(widths[1])}  "
            f"{offset.rjust(widths[2])}  {length.rjust(widths[3])}"
        )


def _values(
    checkpoint: CheckpointReader, info: TensorInfo, wanted: Box, *, asked: bool
) -> Iterator[str]:
    """The box's values, or those of its first corner: only these are read."""
    if not wanted.numel:
        yield f"  no elements in {wanted}"
        return
    whole = wanted.numel <= (_PRINTED if asked else _PREVIEW)
    part = wanted if whole else corner(wanted, _PREVIEW)
    title = "values" if part == Box.whole(info.shape) else f"values of {part}"
    more = "" if whole else f" (the first of {wanted.numel:,}; --box shows others)"
    yield f"  {title}{more}:"
    yield from (f"  {line}" for line in _text(checkpoint.read(info.name, part), info.dtype))


def _text(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]], dtype: DType) -> list[str]:
    shown = np.array2string(
        widened(values, dtype), separator=", ", threshold=_PRINTED + 1, max_line_width=96
    )
    return shown.splitlines()


def _statistics(stats: Stats) -> Iterator[str]:
    for label, value in (("min", stats.least), ("max", stats.most), ("mean", stats.mean)):
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.9g}"
            yield f"  {label:<5}{shown}"
    yield f"  nan  {stats.nan:,}"
    yield f"  inf  {stats.inf:,}"
    if stats.nan or stats.inf:
        yield f"  ({count(stats.finite, 'finite element')}: min, max and mean are of these)"
