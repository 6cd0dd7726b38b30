"""The commands: their arguments, their help, their exit codes."""

from __future__ import annotations

import gc as collector
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardkeep.cli.terminal import CommandError, Output, PipeClosed
from shardkeep.errors import NotACheckpoint, ShardkeepError
from shardkeep.util.escaping import one_line
from shardkeep.version import __version__

if TYPE_CHECKING:
    from shardkeep.checkpoint.reader import CheckpointReader

__all__ = ["app", "run"]

app = typer.Typer(
    name="shardkeep",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_DONE, _WRONG, _NO_CHECKPOINT = 0, 1, 2
_USAGE = _NO_CHECKPOINT
_INTERRUPTED, _PIPE_CLOSED = 130, 141

_SHOWN = 8
"""Folders that a message names."""

_UsageError: Any = typer.BadParameter.__base__
"""Wrong arguments. Newer releases of typer carry a click of their own: click can't be asked."""

CheckpointPath = Annotated[
    str, typer.Argument(metavar="PATH", help="Folder of the checkpoint.", show_default=False)
]

_EXIT = (
    "**Exit code**: 0 success; 1 damaged, or no such name; 2 not a checkpoint, or wrong arguments."
)
_EXIT_VERIFY = (
    "**Exit code**: 0 whole, as far as checksums tell; 1 damaged, and that includes "
    "metadata that can't be read; 2 not a checkpoint, or wrong arguments."
)


def _version(wanted: bool) -> None:
    if wanted:
        Output().line(f"shardkeep {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Look into checkpoints of torch.distributed.checkpoint, Shardkeep and safetensors.

    Nothing here needs torch, and nothing in a checkpoint is ever executed.
    """
    if context.invoked_subcommand is None:
        Output().line(context.get_help())
        raise typer.Exit(_USAGE)


@app.command(epilog=_EXIT)
def ls(
    path: CheckpointPath,
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="PATTERN",
            help="Only these: a name, a container (all that is in it), or a shell pattern that "
            "matches whole names ('*.bias').",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document, one entry on each line.")
    ] = False,
    flat: Annotated[
        bool, typer.Option("--flat", help="Print full names instead of a tree.")
    ] = False,
    depth: Annotated[
        int | None,
        typer.Option(min=0, help="Fold containers that are deeper than N levels.", metavar="N"),
    ] = None,
) -> int:
    """List what a checkpoint holds: names, dtypes, shapes, sizes, small values.

    Only metadata is read, and small objects, to show their values.
    """
    from shardkeep.cli import ls

    if depth is not None and (flat or as_json):
        raise CommandError(
            "--depth folds a tree and can't be combined with --flat or --json", _USAGE
        )
    return ls.ls(_open(path), Output(), pattern=pattern, as_json=as_json, flat=flat, depth=depth)


@app.command(epilog=_EXIT)
def show(
    path: CheckpointPath,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Name of a tensor or an object, as ls --flat prints it; or of a container, to "
            "list what is in it.",
        ),
    ],
    box: Annotated[
        str | None,
        typer.Option(
            metavar="BOX",
            help="Show this part: a range or position for each dimension, as in '0:4,:,-1'. Only "
            "its bytes are read.",
        ),
    ] = None,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats", help="Minimum, maximum, mean, NaNs and infinities (reads the whole box)."
        ),
    ] = False,
    chunks: Annotated[
        bool, typer.Option("--chunks", help="List all chunks, however many there are.")
    ] = False,
) -> int:
    """Show one tensor (its chunks and a first look at its values) or one object."""
    from shardkeep.cli import show

    return show.show(_open(path), name, Output(), box=box, stats=stats, chunks=chunks)


@app.command(epilog=_EXIT_VERIFY)
def verify(
    path: CheckpointPath,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing; only set the exit code.")
    ] = False,
) -> int:
    """Check all bytes that have a checksum; name damaged files, tensors and blocks.

    Checkpoints of Shardkeep are checked to the last byte, those of stock torch by the CRC-32 values
    in their files. Names without a checksum are listed: damage there is not detected.
    """
    from shardkeep.cli import verify

    return verify.verify(lambda: _open(path), path, Output(), as_json=as_json, quiet=quiet)


@app.command(epilog="**Exit code**: 0 success; 2 no such folder, or wrong arguments.")
def gc(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="Folder of a checkpoint, or a folder with checkpoints below it.",
            show_default=False,
        ),
    ],
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove the files; without it, they are only listed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The list as JSON.")] = False,
) -> int:
    """List, or remove, the files of saves that were killed.

    Only files that no committed checkpoint uses and whose save is dead: its process has ended or,
    if it ran on another machine, it has not renewed its lease for SHARDKEEP_LEASE_SECONDS (300).
    Files with names that Shardkeep does not create are never touched.
    """
    from shardkeep.cli import gc

    return gc.gc(path, Output(), delete=delete, as_json=as_json)


def _open(path: str) -> CheckpointReader:
    from shardkeep.checkpoint import reader

    if "://" in path:
        raise CommandError(
            f"{path!r} is a URL; the command opens only local folders", _NO_CHECKPOINT
        )
    try:
        return reader.open_reader(path)
    except NotACheckpoint as error:
        below = _checkpoints_below(path)
        if not below:
            raise
        raise NotACheckpoint(
            f"{error}; it contains checkpoints: {below}; name one of them"
        ) from None


def _checkpoints_below(path: str) -> str:
    """The folders in a folder that hold one each, in words; "" if there is none."""
    found = sorted(record.parent.name for record in Path(path).glob("*/.metadata"))
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def run(argv: Sequence[str] | None) -> int:
    """Run one command; its exit code. Errors become one line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal without Unicode must not turn a listing into a traceback.
            stream.reconfigure(errors="backslashreplace")
    try:
        with _uncollected():
            code = _run(argv)
        sys.stdout.flush()
    except (PipeClosed, BrokenPipeError):
        # The reader has left, as `head` does. Python would try to flush once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    return code


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage: with a million live objects, it takes longer than all other work."""
    enabled = collector.isenabled()
    collector.disable()
    try:
        yield
    finally:
        if enabled:
            collector.enable()


def _run(argv: Sequence[str] | None) -> int:
    arguments: Any = None if argv is None else list(argv)
    try:
        code = app(arguments, prog_name="shardkeep", standalone_mode=False)
    except (KeyboardInterrupt, PipeClosed, typer.Abort):
        raise
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "shardkeep"
        return _fail(f"{error.format_message().rstrip('.')} (see {command} --help)", _USAGE)
    except CommandError as error:
        return _fail(str(error), error.code)
    except NotACheckpoint as error:
        return _fail(str(error), _NO_CHECKPOINT)
    except OSError as error:
        where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _fail(where, _NO_CHECKPOINT)
    except ShardkeepError as error:
        return _fail(str(error), _WRONG)
    return code if isinstance(code, int) else _DONE


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()
    print(f"shardkeep: {one_line(message)}", file=sys.stderr)
    return code
