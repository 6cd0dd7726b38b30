"""Errors of single system calls from the kernel (`strace -e inject`), and their effect on a save.

`python -m support.injected docs/reliability.md` (with tests/ on the path) writes the table of the
results into the section of that page.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from shardkeep.checkpoint import commit
from shardkeep.checkpoint.leases import lease_name
from shardkeep.format.dcp.trailer import manifest_name
from support import injected_store

SIZE = 2
ERRORS = injected_store.ERRORS


class Call(NamedTuple):
    """A system call of a save or a load: its phase, name, file, and number (from 1) among several.

    `kind` is the kind of save: "over" an old checkpoint, to a "new" folder, "async" (over an old
    one), or of a "manager" that keeps one step.
    """

    phase: str
    name: str
    of: str
    number: int = 1
    kind: str = "over"


def _of(kind: str, calls: Iterable[tuple[Any, ...]]) -> list[Call]:
    return [Call(*call)._replace(kind=kind) for call in calls]


CALLS = [
    *_of(
        "over",
        [
            ("assign", "openat", "new lease"),
            ("assign", "write", "new lease"),
            ("assign", "fsync", "new lease"),
            ("assign", "fsync", "folder above"),
            ("assign", "rename", "new lease"),
            ("assign", "fsync", "folder"),
            ("write", "openat", "data"),
            ("write", "fallocate", "data"),
            ("write", "pwritev2", "data"),
            ("write", "pwritev2", "data", 2),
            ("sync", "ftruncate", "data"),
            ("sync", "fsync", "data"),
            ("sync", "close", "data"),
            ("sync", "fsync", "folder", 2),
            ("report", "newfstatat", "data"),
            ("commit", "openat", "manifest"),
            ("commit", "write", "manifest"),
            ("commit", "fsync", "manifest"),
            ("commit", "fsync", "folder", 3),
            ("commit", "openat", "new .metadata"),
            ("commit", "write", "new .metadata"),
            ("commit", "fsync", "new .metadata"),
            ("commit", "rename", "new .metadata"),
            ("commit", "fsync", "folder", 4),
            ("after", "unlink", "old data"),
            ("after", "unlink", "lease"),
        ],
    ),
    *_of(
        "new",
        [
            ("assign", "mkdir", "folder"),
            ("assign", "fsync", "folder above"),
            ("assign", "rename", "new lease"),
            ("assign", "fsync", "folder"),
            ("assign", "fsync", "folder above", 2),
            ("write", "pwritev2", "data"),
            ("sync", "fsync", "data"),
            ("sync", "fsync", "folder", 2),
            ("commit", "fsync", "manifest"),
            ("commit", "renameat2", "new .metadata"),
            ("commit", "fsync", "folder", 4),
        ],
    ),
    *_of(
        "async",
        [
            ("write", "openat", "data"),
            ("write", "pwritev2", "data"),
            ("sync", "fsync", "data"),
            ("commit", "write", "manifest"),
            ("commit", "rename", "new .metadata"),
            ("commit", "fsync", "folder", 3),
            ("after", "unlink", "old data"),
        ],
    ),
    *_of(
        "manager",
        [
            ("assign", "mkdir", "folder"),
            ("write", "pwritev2", "data"),
            ("commit", "renameat2", "new .metadata"),
            ("commit", "fsync", "folder", 3),
            ("after", "unlink", "old .metadata"),
            ("after", "fsync", "old folder"),
            ("after", "unlink", "old data"),
            ("after", "unlink", "old manifest"),
            ("after", "rmdir", "old folder"),
        ],
    ),
]
"""Calls of saves. Data files are those of rank 1; the coordinator makes all other calls. Numbers
count the calls of each thread. Only the coordinator syncs the folder more than once. A background
save makes the calls up to the lease on another thread than the rest.
"""

READS = [
    Call("open", "newfstatat", ".metadata"),
    Call("open", "openat", ".metadata"),
    Call("open", "pread64", ".metadata"),
    Call("match", "openat", "manifest"),
    Call("match", "pread64", "manifest"),
    Call("read", "openat", "data"),
    Call("read", "preadv2", "data"),
]
"""Calls of a load."""


def main() -> None:
    """Serve saves and loads in a separate process: one request per line of standard input."""
    import warnings

    import torch

    import shardkeep as sk
    from shardkeep.stores.local import store
    from shardkeep.testing import simulated_ranks

    warnings.simplefilter("ignore")
    store.token_hex = lambda n: "0" * 2 * n  # type: ignore[assignment]
    whole = torch.arange(1 << 21).float()  # 8 MiB: several writes of rank 1's half

    def state(rank: int, seed: int) -> dict[str, Any]:
        half = (whole[: 1 << 20] if rank == 0 else whole[1 << 20 :]) + seed
        return {"w": sk.Shards(tuple(whole.shape), [((rank << 20,), half)]), f"n{rank}": seed}

    def save(ranks: Any, kind: str, path: str, seed: int) -> dict[str, Any]:
        mine = state(ranks.rank, seed)
        if kind == "manager":
            with sk.Manager(path, keep=sk.KeepLast(1), ranks=ranks) as manager:
                manager.save(seed, mine).result(60)
        elif kind == "async":
            sk.async_save(mine, path, overwrite=True, ranks=ranks).result(60)
        else:
            sk.save(mine, path, overwrite=kind == "over", ranks=ranks, max_host_memory=1 << 20)
        return {"end": "saved"}

    def load(ranks: Any, kind: str, path: str, seed: int) -> dict[str, Any]:
        filled = state(ranks.rank, -1)
        sk.load(filled, path, ranks=ranks)
        right, found = state(ranks.rank, seed)["w"], filled["w"]
        same = torch.equal(found.parts[0][1], right.parts[0][1])
        return {"end": "loaded" if same else "wrong"}

    def one(ranks: Any, act: Any, kind: str, path: str, seed: int) -> dict[str, Any]:
        try:
            return act(ranks, kind, path, seed)
        except sk.RankFailed as error:
            return {"end": "told", "rank": error.rank, "phase": error.phase, "text": str(error)}
        except OSError as error:
            return {"end": "raised", "errno": error.errno, "file": error.filename}
        except sk.ShardkeepError as error:
            return {"end": "raised", "text": f"{type(error).__name__}: {error}"}

    def checked(path: str) -> tuple[float, bool]:
        """Return the seed that a checkpoint was saved with, and whether all of it is intact."""
        ckpt = sk.open(path)
        first = float(ckpt.read("w")[0])
        return first, ckpt.verify().ok and (ckpt.read("w") == whole.numpy() + first).all().item()

    def there(kind: str, path: str) -> dict[str, Any]:
        manager = sk.Manager(path)
        paths = [manager.path(step) for step in manager.steps()] if kind == "manager" else [path]
        found = [checked(one) for one in paths if (Path(one) / commit.METADATA).exists()]
        inside = Path(path).rglob("*")
        return {
            "seed": found[-1][0] if found else 0.0,
            "whole": all(whole for _, whole in found),
            "files": sorted(str(one.relative_to(path)) for one in inside if one.is_file()),
        }

    def look(kind: str, path: str) -> dict[str, Any]:
        found = there(kind, path)
        gc.collect()  # and closes the files that were opened to look
        return found | {"open": len([*Path("/proc/self/fd").iterdir()])}

    print("ready", flush=True)
    for line in sys.stdin:
        what, kind, path, seed, save_id = json.loads(line)
        act = {"save": save, "load": load}.get(what)
        with pytest.MonkeyPatch.context() as patch:
            if save_id:
                patch.setattr(commit, "new_id", lambda save_id=save_id: save_id)
            answer = (
                simulated_ranks.run(SIZE, one, act, kind, path, seed) if act else look(kind, path)
            )
        print(json.dumps(answer), flush=True)


class Saver:
    """The parent's end of the process that saves."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.injected", "serve"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._line()

    def ask(
        self, what: str, kind: str, path: Path, seed: int = 0, save_id: str | None = None
    ) -> Any:
        self.process.stdin.write(json.dumps([what, kind, str(path), seed, save_id]) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        line = self.process.stdout.readline()
        assert line, "the process of the saves has ended"
        return line

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(20)


@contextmanager
def injected(pid: int, call: Call, error: str, path: str, log: Path) -> Any:
    """Make one call on one file fail with an error in a process, while the block runs."""
    inject = f"{call.name}:error={error}:when={call.number}"
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(pid), "-P", path, "-e", f"trace={call.name}", "-e",
         f"inject={inject}", "-o", str(log)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while "attached" not in (line := tracer.stderr.readline()):
            if not line:
                raise OSError(f"strace ended with {tracer.wait()}")
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(20)
        tracer.stderr.close()


def works(folder: Path) -> bool:
    """Return whether processes can be traced here."""
    try:
        command = ["strace", "-o", str(folder / "log"), "true"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


SAVED = [{"end": "saved"}] * SIZE
_TMP = f".{'0' * 16}.tmp"
"""The suffix of a file that is to replace another; `main` makes its number predictable."""


class Place(NamedTuple):
    """The target of a save that meets an error, and of the save before it.

    Attributes:
        root: the folder that is examined; for a manager, the folder of the run.
        new, old: the folders of both checkpoints; for a manager, of two steps.
        save_id, first: the ids of both saves.
    """

    root: Path
    new: Path
    old: Path
    save_id: str
    first: str

    @classmethod
    def at(cls, root: Path, kind: str, number: int) -> Place:
        new, old = (root / "step_2", root / "step_1") if kind == "manager" else (root, root)
        return cls(root, new, old, f"{number:032x}", f"{number + 500_000:032x}")

    def of(self, what: str) -> Path:
        """Return the path of the file that a call is about."""
        return {
            "data": self.new / commit.data_file(1, 0, self.save_id),
            "folder": self.new,
            "folder above": self.new.parent,
            "lease": self.new / lease_name(self.save_id),
            "manifest": self.new / manifest_name(self.save_id),
            "new .metadata": self.new / f"{commit.METADATA}{_TMP}",
            "new lease": self.new / f"{lease_name(self.save_id)}{_TMP}",
            "old data": self.old / commit.data_file(1, 0, self.first),
            "old folder": self.old,
            "old manifest": self.old / manifest_name(self.first),
            "old .metadata": self.old / commit.METADATA,
        }[what]

    def files(self) -> set[str]:
        """Return the files after a save without an error."""
        names = [commit.data_file(rank, 0, self.save_id) for rank in range(SIZE)]
        names += [manifest_name(self.save_id), commit.METADATA]
        return {str((self.new / name).relative_to(self.root)) for name in names}


_NEVER = {
    ("after", "unlink", "old .metadata"),  # the rest of the step would be deleted
    ("assign", "fsync", "folder"),  # the lease would be written again, and rank 1 would fail
}
"""Calls without a result for ENOENT: no disk reports it for an existing file."""


def outcome(saver: Saver, folder: Path, call: Call, error: str, number: int) -> str:
    """Return the effect of the error on a save as a word of the page; check the next save."""
    kind = call.kind
    if error == "ENOENT" and (call.phase, call.name, call.of) in _NEVER:
        return "-"
    place = Place.at(folder / f"{number}", kind, number)
    ask = partial(saver.ask, kind=kind, path=place.root)
    before = {"async": "over", "new": None}.get(kind, kind)
    if before is not None:
        assert saver.ask("save", before, place.root, 1, place.first) == SAVED
    old = ask("look")
    log = folder / "log"
    with injected(saver.process.pid, call, error, str(place.of(call.of)), log):
        ends = ask("save", seed=2, save_id=place.save_id)
    met = "(INJECTED)" in log.read_text()
    after = ask("look")
    last = saver.ask("save", "over" if kind == "new" else kind, place.root, 3)
    end = ask("look")
    assert (last, end["seed"], end["whole"]) == (SAVED, 3.0, True), (call, error, last, end)
    assert after["whole"], (call, error)
    # strace skips a close that it lets fail, so the file stays open.
    assert call.name == "close" or after["open"] == old["open"], (call, error)
    if not met:
        return "not met"
    if ends == SAVED and after["seed"] == 2.0:
        assert set(after["files"]) >= place.files(), (call, error, after)
        return "saved" if set(after["files"]) == place.files() else "kept"
    _check_errors(call, error, ends, place)
    if after["seed"] == 2.0:
        last_sync = 3 if kind in ("async", "manager") else 4
        assert (call.of, call.number) == ("folder", last_sync), (call, error, ends)
        return "new"
    assert after["seed"] == old["seed"], (call, error, ends)
    assert after["files"] == old["files"], (call, error, after, old)
    return "refused"


def _check_errors(call: Call, error: str, ends: list[dict[str, Any]], place: Place) -> None:
    """Check that one rank raised the error with its file, and the other named rank and phase."""
    assert sorted(one["end"] for one in ends) == ["raised", "told"], (call, error, ends)
    culprit = [one["end"] for one in ends].index("raised")
    assert culprit == (call.of == "data" and call.phase != "report"), (call, error, ends)
    for one in ends:
        if one["end"] == "told":
            assert (one["rank"], one["phase"]) == (culprit, call.phase), (call, error, ends)
        else:
            _check_system_error(one, error, place.of(call.of).name.removesuffix(_TMP))


def _check_system_error(end: dict[str, Any], error: str, file: str) -> None:
    """Check that an error of the system is raised unchanged and names the file."""
    if "errno" in end:
        assert end["errno"] == getattr(errno, error), (error, end)
        assert file in str(end["file"]), (error, end)


def outcome_of_load(saver: Saver, folder: Path, call: Call, error: str, number: int) -> str:
    """Return the effect of the error on a load as a word of the page; check the next load."""
    path = folder / f"{number}"
    save_id = f"{number:032x}"
    assert saver.ask("save", "over", path, 1, save_id) == SAVED
    before = saver.ask("look", "over", path)
    file = {
        "data": commit.data_file(1, 0, save_id),
        "manifest": manifest_name(save_id),
        ".metadata": commit.METADATA,
    }[call.of]
    log = folder / "log"
    with injected(saver.process.pid, call, error, str(path / file), log):
        ends = saver.ask("load", "over", path, 1)
    met = "(INJECTED)" in log.read_text()
    assert saver.ask("load", "over", path, 1) == [{"end": "loaded"}] * SIZE, (call, error)
    assert saver.ask("look", "over", path) == before, (call, error)
    if not met:
        return "not met"
    if ends == [{"end": "loaded"}] * SIZE:
        return "loaded"
    raised = [end for end in ends if end["end"] == "raised"]
    told = [end for end in ends if end["end"] == "told"]
    assert raised and len(raised) + len(told) == SIZE, (call, error, ends)
    assert call.of != "data" or ends.index(raised[0]) == 1, (call, error, ends)
    for end in told:
        assert end["rank"] == ends.index(raised[0]), (call, error, ends)
        assert end["phase"] == call.phase, (call, error, ends)
    for end in raised:
        _check_system_error(end, error, file)
        assert "errno" in end or file in end["text"] or str(path) in end["text"], (call, error, end)
    return "refused"


_HEAD = """## Injected faults

One system call of a save by two ranks fails with an error from the kernel (`strace -e inject`).
Data files are those of rank 1. A save goes over an old checkpoint, to a new folder, over an old one
in the background, or is the second step of a manager that keeps one. Each result is checked:

- `refused`: both ranks raised. The rank that met the error raised the error itself, which names
  the file; the other raised `RankFailed` with rank and phase. The old checkpoint loads, with every
  byte compared. The folder holds the same files as before, no file is left open, and the next save
  works.
- `saved`: the call is not needed, or the file counts as removed, and the new checkpoint is whole.
- `kept`: the new checkpoint is whole, but an old file, the lease or a part of the old step remains.
  The next save or `shardkeep gc` removes it.
- `new`: the error came after `.metadata` was replaced. It is raised, and the new checkpoint is
  whole.
- `-`: the error is impossible, as the file exists.

`make faults` writes this section.
"""

_LOADS = """
The same for a load by two ranks, the second of which reads the file of rank 1. `refused`: the rank
that met the error raised it, naming the file, and the other one the same error or `RankFailed`.
`loaded`: the bytes were read in another way and are right. The next load works in each case.
"""


def table(folder: Path) -> str:
    """Return the section of the page."""
    numbers = count(1)
    with Saver() as saver:
        return "\n".join(
            [
                _HEAD,
                *_lines(CALLS, lambda *what: outcome(saver, folder, *what, next(numbers))),
                _LOADS,
                *_lines(READS, lambda *what: outcome_of_load(saver, folder, *what, next(numbers))),
                "",
                *injected_store.section(),
                "",
            ]
        )


def _lines(calls: list[Call], what_comes: Callable[[Call, str], str]) -> Iterator[str]:
    saves = any(call.kind != "over" for call in calls)
    yield f"| {'Save | ' * saves}Phase | System call | of the | {' | '.join(ERRORS)} |"
    yield "|---" * (3 + saves + len(ERRORS)) + "|"
    for call in calls:
        cells = [what_comes(call, error) for error in ERRORS]
        if set(cells) == {"not met"}:
            print(f"not met: {call}", flush=True)
            continue
        name = call.name + (f", {call.number}." if call.number > 1 else "")
        kind = [call.kind] * saves
        line = f"| {' | '.join([*kind, call.phase, name, call.of, *cells])} |"
        print(line, flush=True)
        yield line


def write(page: Path) -> None:
    """Replace the section of the page, or add it."""
    with tempfile.TemporaryDirectory() as folder:
        section = table(Path(folder))
    text = page.read_text() if page.exists() else "# Reliability\n"
    before, _, rest = text.partition("## Injected faults\n")
    following = rest.find("\n## ")
    after = rest[following + 1 :] if following >= 0 else ""
    page.write_text(before.rstrip() + "\n\n" + section + ("\n" + after if after else ""))


if __name__ == "__main__":
    began = time.monotonic()
    if sys.argv[1] == "serve":
        main()
    else:
        write(Path(sys.argv[1]))
        print(f"{time.monotonic() - began:.0f} s")
