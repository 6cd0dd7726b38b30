"""Errors of single system calls, given by the kernel (`strace -e inject`), and what a save makes of
them: the table in docs/reliability.md.

`python -m support.injected docs/reliability.md` (with tests/ on the path) writes the section.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from shardkeep import commit
from shardkeep.format.trailer import manifest_name

SIZE = 2
ERRORS = ["ENOSPC", "EIO", "EACCES", "EROFS", "ENOENT"]


class Call(NamedTuple):
    """A system call of the save: in which phase, of what, and which one of several (from 1)."""

    phase: str
    name: str
    of: str
    number: int = 1


CALLS = [
    Call("own", "openat", "lease"),
    Call("own", "fsync", "lease"),
    Call("write", "openat", "data"),
    Call("write", "fallocate", "data"),
    Call("write", "pwritev2", "data"),
    Call("write", "pwritev2", "data", 2),
    Call("sync", "ftruncate", "data"),
    Call("sync", "fsync", "data"),
    Call("sync", "close", "data"),
    Call("sync", "fsync", "folder"),
    Call("report", "newfstatat", "data"),
    Call("commit", "openat", "manifest"),
    Call("commit", "write", "manifest"),
    Call("commit", "fsync", "manifest"),
    Call("commit", "fsync", "folder", 2),
    Call("commit", "openat", "new .metadata"),
    Call("commit", "write", "new .metadata"),
    Call("commit", "fsync", "new .metadata"),
    Call("commit", "rename", "new .metadata"),
    Call("commit", "fsync", "folder", 3),
    Call("after", "unlink", "old data"),
]
"""Of a save. Data files are those of rank 1; the coordinator does the rest. Both sync the folder
once they have written: numbers count the calls of each thread.
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
"""Of a load."""


def main() -> None:
    """The saves, in a process of their own: takes requests from standard input, line by line."""
    import torch

    import shardkeep as sk
    from shardkeep.ranks import threads
    from shardkeep.stores import local

    local.token_hex = lambda n: "0" * 2 * n  # type: ignore[assignment]
    whole = torch.arange(1 << 21).float()  # 8 MiB: several writes of rank 1's half

    def state(rank: int, seed: int) -> dict[str, Any]:
        half = (whole[: 1 << 20] if rank == 0 else whole[1 << 20 :]) + seed
        return {"w": sk.Shards(tuple(whole.shape), [((rank << 20,), half)]), f"n{rank}": seed}

    def save(ranks: Any, path: str, seed: int, save_id: str | None) -> dict[str, Any]:
        sk.save(
            state(ranks.rank, seed), path, overwrite=True, save_id=save_id, ranks=ranks,
            host_budget=1 << 20,
        )  # fmt: skip
        return {"end": "saved"}

    def load(ranks: Any, path: str, seed: int, _: None) -> dict[str, Any]:
        filled = state(ranks.rank, -1)
        sk.load(filled, path, ranks=ranks)
        right, found = state(ranks.rank, seed)["w"], filled["w"]
        same = torch.equal(found.parts[0][1], right.parts[0][1])
        return {"end": "loaded" if same else "wrong"}

    def one(ranks: Any, act: Any, path: str, seed: int, save_id: str | None) -> dict[str, Any]:
        try:
            return act(ranks, path, seed, save_id)
        except sk.RankFailed as error:
            return {"end": "told", "rank": error.rank, "phase": error.phase, "text": str(error)}
        except OSError as error:
            return {"end": "raised", "errno": error.errno, "file": error.filename}
        except sk.ShardkeepError as error:
            return {"end": "raised", "text": f"{type(error).__name__}: {error}"}

    def there(path: str) -> dict[str, Any]:
        ckpt = sk.open(path)
        first = float(ckpt.read("w")[0])
        return {
            "seed": first,
            "whole": ckpt.verify().ok and (ckpt.read("w") == whole.numpy() + first).all().item(),
            "files": sorted(file.name for file in Path(path).iterdir()),
        }

    def look(path: str) -> dict[str, Any]:
        found = there(path)
        gc.collect()  # and with it what was open to look
        return found | {"open": len([*Path("/proc/self/fd").iterdir()])}

    print("ready", flush=True)
    for line in sys.stdin:
        what, path, seed, save_id = json.loads(line)
        act = {"save": save, "load": load}.get(what)
        answer = threads.run(SIZE, one, act, path, seed, save_id) if act else look(path)
        print(json.dumps(answer), flush=True)


class Saver:
    """The other end of that process."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.injected", "serve"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._line()

    def ask(self, what: str, path: Path, seed: int = 0, save_id: str | None = None) -> Any:
        self.process.stdin.write(json.dumps([what, str(path), seed, save_id]) + "\n")
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
    """That call, of that file, fails with that error, in that process."""
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
    """Whether processes can be traced here."""
    try:
        command = ["strace", "-o", str(folder / "log"), "true"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def outcome(saver: Saver, folder: Path, call: Call, error: str, number: int) -> str:
    """A checkpoint, a save over it that meets the error, and another one, in a word."""
    path = folder / f"{number}"
    save_id = f"{number:032x}"
    first = f"{number + 500_000:032x}"
    assert saver.ask("save", path, 1, first) == [{"end": "saved"}] * SIZE
    old = saver.ask("look", path)
    file = {
        "data": commit.data_file(1, 0, save_id),
        "old data": commit.data_file(1, 0, first),
        "folder": "",
        "lease": f".lease_{save_id}.json",
        "manifest": manifest_name(save_id),
        "new .metadata": f"{commit.METADATA}.{'0' * 16}.tmp",
    }[call.of]
    log = folder / "log"
    with injected(saver.process.pid, call, error, str(path / file) if file else str(path), log):
        ends = saver.ask("save", path, 2, save_id)
    met = "(INJECTED)" in log.read_text()
    after = saver.ask("look", path)
    last = saver.ask("save", path, 3, None)
    end = saver.ask("look", path)
    assert (last, end["seed"], end["whole"]) == ([{"end": "saved"}] * SIZE, 3.0, True), call
    assert after["whole"], (call, error)
    # A close that strace lets fail is not made at all.
    assert call.name == "close" or after["open"] == old["open"], (call, error)
    if not met:
        return "not met"
    how = sorted(one["end"] for one in ends)
    if how == ["saved"] * SIZE and after["seed"] == 2.0:
        return "saved" if not set(old["files"]) & set(after["files"]) - {".metadata"} else "kept"
    both = call.of == "folder" and call.phase == "sync"
    assert how == ["raised", "raised" if both else "told"], (call, error, ends)
    culprit = [one["end"] for one in ends].index("raised")
    assert both or culprit == (call.of == "data" and call.phase != "report"), (call, error, ends)
    for one in ends:
        if one["end"] == "told":
            assert (one["rank"], one["phase"]) == (culprit, call.phase), (call, error, ends)
        else:
            _met(one, error, file.removesuffix(".tmp"))
    if after["seed"] == 2.0:
        assert (call.of, call.number) == ("folder", 3), (call, error, ends)
        return "new"
    assert after["seed"] == 1.0, (call, error, ends)
    assert after["files"] == old["files"], (call, error, after, old)
    return "refused"


def _met(end: dict[str, Any], error: str, file: str) -> None:
    """An error of the system is raised as it is, and names the file."""
    if "errno" in end:
        assert end["errno"] == getattr(errno, error), (error, end)
        assert file in str(end["file"]), (error, end)


def outcome_of_load(saver: Saver, folder: Path, call: Call, error: str, number: int) -> str:
    """A load that meets the error, and another one, in a word."""
    path = folder / f"{number}"
    save_id = f"{number:032x}"
    assert saver.ask("save", path, 1, save_id) == [{"end": "saved"}] * SIZE
    before = saver.ask("look", path)
    file = {
        "data": commit.data_file(1, 0, save_id),
        "manifest": manifest_name(save_id),
        ".metadata": commit.METADATA,
    }[call.of]
    log = folder / "log"
    with injected(saver.process.pid, call, error, str(path / file), log):
        ends = saver.ask("load", path, 1)
    met = "(INJECTED)" in log.read_text()
    assert saver.ask("load", path, 1) == [{"end": "loaded"}] * SIZE, (call, error)
    assert saver.ask("look", path) == before, (call, error)
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
        _met(end, error, file)
        assert "errno" in end or file in end["text"] or str(path) in end["text"], (call, error, end)
    return "refused"


_HEAD = """## Injected faults

One system call of a save over a checkpoint fails, given the error by the kernel (`strace -e
inject`), in a save by two ranks; data files are those of rank 1. `refused` stands for all of this,
checked in each case: both ranks raised, who met the error as it is, naming the file, who did not as
`RankFailed` with rank and phase; the old checkpoint loads, every byte of it checked; the folder
holds the same files as before; no file is left open; the next save works. `saved`: the call is not
needed, or the file counts as removed, and the new checkpoint is whole. `kept`: it is, and an old
file stayed behind, with a warning; `shardkeep gc` finds it. `new`: the error came after `.metadata`
was replaced; it is raised, and the new checkpoint is whole. `make faults` writes this section.
"""

_LOADS = """
The same for a load by two ranks, the second of which reads the file of rank 1. `refused`: the rank
that met the error raised it, naming the file, and the other one the same or `RankFailed`; `loaded`:
the bytes came in another way, and are right. The next load works in each case.
"""


def table(folder: Path) -> str:
    """The section."""
    numbers = count(1)
    with Saver() as saver:
        return "\n".join(
            [
                _HEAD,
                *_lines(CALLS, lambda *what: outcome(saver, folder, *what, next(numbers))),
                _LOADS,
                *_lines(READS, lambda *what: outcome_of_load(saver, folder, *what, next(numbers))),
                "",
            ]
        )


def _lines(calls: list[Call], what_comes: Callable[[Call, str], str]) -> Iterator[str]:
    yield f"| Phase | System call | of the | {' | '.join(ERRORS)} |"
    yield "|---|---|---|" + "---|" * len(ERRORS)
    for call in calls:
        cells = [what_comes(call, error) for error in ERRORS]
        if set(cells) == {"not met"}:
            continue
        name = call.name + (f", {call.number}." if call.number > 1 else "")
        line = f"| {call.phase} | {name} | {call.of} | {' | '.join(cells)} |"
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
