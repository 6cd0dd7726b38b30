"""`shardkeep gc`: what dead saves left behind, listed or removed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardkeep.checkpoint import commit
from shardkeep.checkpoint.garbage import OrphanedFile, collect_garbage, find_garbage
from shardkeep.checkpoint.leases import Lease
from shardkeep.cli.terminal import CommandError, Output
from shardkeep.stores import LocalStore
from shardkeep.util.escaping import escape
from shardkeep.util.formatting import count, human_bytes

__all__ = ["gc"]


@dataclass(frozen=True, slots=True)
class _Left:
    """A file that a dead save left, and the folder that it is in."""

    folder: Path
    file: OrphanedFile


def gc(path: str, out: Output, *, delete: bool, as_json: bool) -> int:
    """List what dead saves left in a folder and those below it, or remove it.

    Raises:
        CommandError: there is no such folder.
    """
    root = Path(path)
    if not root.is_dir():
        raise CommandError(f"{path} is not a folder", 2)
    left = [_Left(folder, one) for folder in _folders(root) for one in _find(folder, delete)]
    if as_json:
        out.line(json.dumps(_document(left, delete), indent=2))
    else:
        out.lines(_lines(path, left, delete))
    return 0


def _folders(root: Path) -> Iterator[Path]:
    """Those that have files in them."""
    parents = {Path(name).parent for name in LocalStore(root).list(delimiter=None).files}
    yield from (root / parent for parent in sorted(parents))


def _find(folder: Path, delete: bool) -> list[OrphanedFile]:
    with LocalStore(folder) as store:
        # A mere look writes nothing, so it goes by the clock of this host.
        found = find_garbage(store, time.time)
        if not (found and delete):
            return found
        with Lease(store, commit.new_id()) as lease:
            lease.take()
            return collect_garbage(store, lease)


def _lines(path: str, left: list[_Left], delete: bool) -> Iterator[str]:
    for one in left:
        name = escape(str(one.folder / one.file.name))
        yield f"{human_bytes(one.file.nbytes):>10}  {name}"
    total = f"{count(len(left), 'file')}, {human_bytes(sum(one.file.nbytes for one in left))}"
    if not left:
        yield f"{escape(path)}: no files of dead saves"
    elif delete:
        yield f"{escape(path)}: removed {total}"
    else:
        yield f"{escape(path)}: {total} of dead saves; pass --delete to remove them"


def _document(left: list[_Left], delete: bool) -> dict[str, object]:
    return {
        "removed": delete,
        "nbytes": sum(one.file.nbytes for one in left),
        "files": [
            {
                "path": str(one.folder / one.file.name),
                "nbytes": one.file.nbytes,
                "save_id": one.file.save_id or None,
            }
            for one in left
        ],
    }
