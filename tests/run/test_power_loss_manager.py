"""Power losses during a run that keeps few steps: the newest durable step is always whole."""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.checkpoint.leases import Holder
from shardkeep.testing import simulated_ranks
from support import disk, recording
from support.disk import Operation, Rename, Sync, Unlink
from support.judging import Judge
from support.objects import Change, Files, ObjectStore, cuts

STATES = {
    str(step): {"w": torch.arange(3.0) + step, "step": step, "set": {step}} for step in range(1, 5)
}
_RECORD = re.compile(r"run/step_(\d+)/\.metadata")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Use one thread, for a fixed order of operations. After a power loss, no save is alive."""
    monkeypatch.setenv("SHARDKEEP_READ_THREADS", "1")
    monkeypatch.setenv("SHARDKEEP_WRITE_THREADS", "1")
    monkeypatch.setattr(Holder, "ended", lambda _: True)


def run(root: Path) -> list[Operation]:
    """Save four steps and keep two; each deletion happens after the next save."""
    with (
        recording.recorded(root) as operations,
        sk.Manager(root / "run", keep=sk.KeepLast(2), asynchronous=False) as manager,
    ):
        for step, state in STATES.items():
            manager.save(int(step), state).result()
            manager.wait()
    assert manager.steps() == [3, 4]
    return operations


def commits(operations: Sequence[Operation]) -> Iterator[tuple[int, int, int]]:
    """Yield each step, with the numbers of the operations that publish and sync it."""
    for number, one in enumerate(operations):
        if isinstance(one, Rename) and (found := _RECORD.fullmatch(one.target)):
            folder = Sync(one.target.rpartition("/")[0])
            yield int(found[1]), number, operations.index(folder, number)


def found_in(files: Mapping[str, bytes], judge: Judge) -> dict[int, str]:
    """Return what the judge finds in the folder of each step."""
    folders: dict[int, dict[str, bytes]] = defaultdict(dict)
    for name, data in files.items():
        folder, inner = name.split("/")
        folders[int(folder.removeprefix("step_"))][inner] = data
    return {step: judge(folders[step]) for step in folders}


def explore(operations: Sequence[Operation]) -> tuple[int, list[str]]:
    """Return the number of states, and a description of each wrong one."""
    judge, count, wrong = Judge(STATES), 0, []
    published = list(commits(operations))
    for number, files in disk.states(operations, {}):
        count += 1
        there = found_in({name.removeprefix("run/"): data for name, data in files.items()}, judge)
        newest = max((step for step, found in there.items() if found != "none"), default=0)
        durable = max((step for step, _, end in published if end < number), default=0)
        begun = max((step for step, begin, _ in published if begin < number), default=0)
        bad = {step: found for step, found in there.items() if found not in ("none", str(step))}
        if bad or not durable <= newest <= begun:
            wrong.append(f"after {number} of {len(operations)} operations: {there}")
    return count, wrong


def test_after_any_power_loss_the_newest_durable_step_of_a_run_is_whole(tmp_path):
    operations = run(tmp_path)
    gone = [one for one in operations if isinstance(one, Unlink) and _RECORD.fullmatch(one.path)]
    assert len(gone) == 2
    count, wrong = explore(operations)
    assert not wrong
    assert count >= 2000  # 2,336 according to docs/reliability.md; deletion has a thread of its own


def test_the_model_detects_steps_deleted_too_early_or_in_a_wrong_order(tmp_path):
    operations = run(tmp_path)
    published = {step: begin for step, begin, _ in commits(operations)}
    gone = [
        one
        for one in operations
        if isinstance(one, Unlink)
        and one.path.startswith("run/step_2/")
        and "lease" not in one.path
    ]
    assert len(gone) == 3
    record, *others = gone
    assert _RECORD.fullmatch(record.path)
    rest = [one for one in operations if one not in gone]
    durable = rest.index(operations[published[2]]) + 2
    for wrong in (
        # Delete the whole step before the next one is durable.
        [*rest[:durable], *gone, *rest[durable:]],
        # Delete the files that the commit record names before the record.
        [*rest, *others, record],
    ):
        assert explore(wrong)[1]


# --- on an object store ---------------------------------------------------------------------------


def run_on_objects(ranks: int) -> list[list[Change]]:
    """Save the same run by several ranks; return the changes of each step.

    The changes of a step begin with its first write. No rank begins a step before all ranks have
    finished the previous one and its deletions, because of the agreement before each save.
    """
    store = ObjectStore()

    def one(job) -> None:
        threading.current_thread().name = f"rank {job.rank}"
        with sk.Manager(store, keep=sk.KeepLast(2), asynchronous=False, ranks=job) as manager:
            for step, state in STATES.items():
                shares = enumerate(state.items())
                mine = {name: value for n, (name, value) in shares if n % ranks == job.rank}
                manager.save(int(step), mine).result()
                manager.wait()

    simulated_ranks.run(ranks, one)
    rounds: list[list[Change]] = []
    begun: set[str] = set()
    for change in store.changes:
        if (folder := change.name.partition("/")[0]) not in begun:
            begun.add(folder)
            rounds.append([])
        rounds[-1].append(change)
    return [list(_of_one_step(changes)) for changes in rounds]


def _of_one_step(changes: Sequence[Change]) -> Iterator[Change]:
    """Yield changes with rounds counted from the start of the step.

    Changes by the coordinator's threads count as those of rank 0.
    """
    before: dict[str, int] = {}
    for one in changes:
        if one.rank.startswith("rank "):
            at = one.round - before.setdefault(one.rank, one.round)
            yield replace(one, round=at)
        else:
            yield replace(one, rank="rank 0", round=1)


def explore_objects(steps: Sequence[Sequence[Change]]) -> tuple[int, list[str]]:
    """Stop all ranks at any point; return the number of states, and the wrong ones as text."""
    judge, count, wrong = Judge(STATES), 0, []
    before: Files = {}
    for number, changes in enumerate(steps, 1):
        for done, files in cuts(list(changes), before):
            count += 1
            there = found_in(files, judge)
            whole = {step for step, found in there.items() if found == str(step)}
            broken = {step for step, found in there.items() if found not in ("none", str(step))}
            committed = number - (f"step_{number}/.metadata" not in {one.name for one in done})
            if broken or max(whole, default=0) != committed or len(whole) < min(2, committed):
                wrong.append(f"after {done[-1:]} of step {number}: {there}")
        before = files
    return count, wrong


@pytest.mark.parametrize(("ranks", "states"), [(1, 30), (3, 58)])
def test_after_a_crash_on_an_object_store_the_newest_committed_step_is_whole(ranks, states):
    steps = run_on_objects(ranks)
    gone = [one.name for changes in steps for one in changes if one.data is None]
    assert [name for name in gone if name.endswith("/.metadata")] == [
        "step_1/.metadata",
        "step_2/.metadata",
    ]
    count, wrong = explore_objects(steps)
    assert not wrong
    assert count == states  # as docs/reliability.md states


def test_the_model_of_object_stores_detects_steps_deleted_too_early_or_in_a_wrong_order():
    steps = run_on_objects(1)
    last = steps[3]
    gone = [one for one in last if one.name.startswith("step_2/")]
    rest = [one for one in last if one not in gone]
    assert len(gone) == 3 and gone[0].name == "step_2/.metadata"
    for wrong in ([rest[0], *gone, *rest[1:]], [*rest, *gone[1:], gone[0]]):
        assert explore_objects([*steps[:3], wrong])[1]
