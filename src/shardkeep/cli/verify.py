"""`shardkeep verify`: whether a checkpoint is whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from shardkeep.checkpoint.reader import CheckpointReader
from shardkeep.checkpoint.verify import VerifyReport
from shardkeep.cli.terminal import Output
from shardkeep.coordination.progress import bar
from shardkeep.errors import Damaged, FormatError
from shardkeep.util.escaping import one_line

__all__ = ["verify"]


def verify(
    open_: Callable[[], CheckpointReader], path: str, out: Output, *, as_json: bool, quiet: bool
) -> int:
    """Check a checkpoint and print what was found; the exit code: 0 whole, 1 damaged.

    Raises:
        NotACheckpoint: there is none.
    """
    try:
        with bar(show=not quiet) as progress:
            report = open_().verify(progress=progress)
    except (Damaged, FormatError) as error:
        report = _unreadable(path, error)
    if as_json:
        out.line(json.dumps(_document(report), indent=2))
    elif not quiet:
        out.lines(_lines(report, out))
    return 0 if report.ok else 1


def _unreadable(path: str, error: Damaged | FormatError) -> VerifyReport:
    """The metadata itself is broken: nothing else could be looked at."""
    if isinstance(error, FormatError):
        what = f"{error.place}: {error.what}" if error.place else error.what
        error = Damaged(f"can't be read: {what}", file=error.file or ".metadata")
    return VerifyReport(path, "unknown", 0, 0, (error,), ())


def _lines(report: VerifyReport, out: Output) -> Iterator[str]:
    colour = "red" if report.damaged else "green" if report.checked_bytes else "yellow"
    path = out.paint("bold", one_line(report.path))
    yield f"{path}: {out.paint(colour, report.verdict)}; {report.extent}"
    yield from report.details()


def _document(report: VerifyReport) -> dict[str, object]:
    return {
        "path": report.path,
        "kind": report.kind,
        "ok": report.ok,
        "files": report.files,
        "checked_bytes": report.checked_bytes,
        "damaged": [
            {"file": d.file, "name": d.name, "rank": d.rank, "block": d.block, "what": d.what}
            for d in report.damaged
        ],
        "unchecked": list(report.unchecked),
        "unchecked_bytes": report.unchecked_bytes,
    }
