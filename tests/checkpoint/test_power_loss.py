"""Exploration of power losses: each leaves the old or the new checkpoint.

The operations are those of the real store and the real save. The disk is a model (`support.disk`)
that may lose everything that POSIX allows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.checkpoint.commit import data_file
from shardkeep.checkpoint.leases import Holder
from shardkeep.checkpoint.reader import open_reader
from shardkeep.format.dcp.trailer import manifest_name
from shardkeep.stores import LocalStore, MemoryStore
from shardkeep.stores.contract import FileInfo
from shardkeep.stores.local import syscalls
from shardkeep.testing import simulated_ranks
from support import disk, recording
from support.disk import Create, HardLink, Operation, Rename, Sync, Unlink
from support.judging import Judge
from support.objects import Change, ObjectStore, cuts
from support.store_files import names_in

OLD = {"w": torch.arange(3.0), "tied": torch.ones(2), "note": "old", "set": {1, 2}}
NEW = {"w": torch.arange(4.0) + 1, "tied": torch.ones(2), "note": "new", "set": {3}}
STATES = {"old": OLD, "new": NEW}
FOLDER = "run/step_1"


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Use one thread, so that operations have an order; no save survives a power loss."""
    monkeypatch.setenv("SHARDKEEP_READ_THREADS", "1")
    monkeypatch.setenv("SHARDKEEP_WRITE_THREADS", "1")
    monkeypatch.setattr(Holder, "ended", lambda _: True)


@dataclass(frozen=True)
class Saved:
    """A recorded save.

    Attributes:
        before: Durable files before the save, by name.
        operations: The operations of the save, in order.
    """

    before: dict[str, bytes]
    operations: list[Operation]

    @property
    def publishes(self) -> int:
        """The number of the operation that replaces the commit record."""
        (at,) = (n for n, one in enumerate(self.operations) if _is_record(one))
        return at

    @property
    def durable(self) -> int:
        """The number of the operation after which the commit record is durable."""
        return self.operations.index(Sync(FOLDER), self.publishes)

    @property
    def start(self) -> str:
        return "old" if self.before else "none"


def _is_record(operation: Operation) -> bool:
    return isinstance(operation, Rename | HardLink) and operation.target == f"{FOLDER}/.metadata"


def files_below(root: Path) -> dict[str, bytes]:
    store = LocalStore(root)
    return {name: (root / name).read_bytes() for name in names_in(store)}


def save(root: Path, *, old: bool, act: Callable[[Path], None] | None = None) -> Saved:
    """Return the record of a save, over an old checkpoint or to a new path."""
    if old:
        sk.save(OLD, root / FOLDER)
    before = files_below(root)
    with recording.recorded(root) as operations:
        if act:
            act(root)
        sk.save(NEW, LocalStore(root / FOLDER), overwrite=old, files=3)
    return Saved(before, operations)


@dataclass
class Explored:
    """The number of states, the different ones, and a description of each wrong one."""

    states: int
    different: dict[int, dict[str, bytes]]
    wrong: list[str]


def explore(saved: Saved, *, without: Container[int] = ()) -> Explored:
    """Return all states of a save. With operations left out, stop at the first wrong one."""
    kept = [n for n in range(len(saved.operations)) if n not in without]
    operations = [saved.operations[n] for n in kept]
    begins = sum(n < saved.publishes for n in kept)
    ends = sum(n <= saved.durable for n in kept)
    judge, states, seen, wrong = Judge(STATES), 0, {}, []
    for number, files in disk.states(operations, saved.before):
        states += 1
        inner = {
            name.removeprefix(f"{FOLDER}/"): data
            for name, data in files.items()
            if name.startswith(f"{FOLDER}/")
        }
        seen[hash(frozenset(inner.items()))] = inner
        allowed = {saved.start} if number <= begins else {"new"}
        if begins < number < ends:
            allowed = {saved.start, "new"}
        if (found := judge(inner)) not in allowed:
            wrong.append(f"after {number} of {len(operations)} operations: {found}")
            if without:
                break
    return Explored(states, seen, wrong)


FOLDERS = (FOLDER, "run", ".")


@pytest.mark.parametrize(("old", "how"), [(False, "rename"), (False, "link"), (True, "rename")])
def test_a_power_loss_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch, old, how):
    if how == "link":  # as on NFS, which has no exclusive rename
        monkeypatch.setattr(syscalls, "rename_new", lambda *_: False)
    saved = save(tmp_path, old=old)
    record = saved.operations[saved.publishes]
    assert isinstance(record, HardLink if how == "link" else Rename)
    explored = explore(saved)
    assert not explored.wrong
    # The numbers in docs/reliability.md.
    assert explored.states >= 1350
    assert len(explored.different) >= 560


def file_syncs(saved: Saved) -> Iterator[tuple[str, set[int]]]:
    names = {one.file: one.path for one in saved.operations if isinstance(one, Create)}
    for number, one in enumerate(saved.operations):
        if isinstance(one, Sync) and isinstance(one.what, int):
            yield names[one.what], {number}


def folder_syncs(saved: Saved) -> Iterator[tuple[str, set[int]]]:
    """Yield the syncs of each folder before, and those after the commit record is replaced."""
    for folder in FOLDERS:
        numbers = {n for n, one in enumerate(saved.operations) if one == Sync(folder)}
        for when, some in (
            ("before", {n for n in numbers if n < saved.publishes}),
            ("after", {n for n in numbers if n > saved.publishes}),
        ):
            if some:
                yield f"{folder} {when}", some


@pytest.mark.parametrize("old", [False, True])
def test_the_model_detects_any_missing_sync(tmp_path, old):
    saved = save(tmp_path, old=old)
    left_out = dict([*file_syncs(saved), *folder_syncs(saved)])
    missed = {what for what, some in left_out.items() if not explore(saved, without=some).wrong}
    # Leases need not survive a power loss, and old folders are already durable.
    (lease,) = [what for what in left_out if ".lease" in what]
    assert missed == {lease, *(("run before", ". before") if old else ())}
    assert len(left_out) >= 7


def test_the_model_detects_a_wrong_order(tmp_path):
    saved = save(tmp_path, old=True)
    operations, publishes = saved.operations, saved.publishes
    record = operations[publishes]
    (manifest,) = [n for n, one in enumerate(operations) if _makes(one, ".manifest-")]
    old = [one for one in operations if isinstance(one, Unlink) and one.path in saved.before]
    assert len(old) == 2
    rest = [one for one in operations if one not in old]
    for wrong in (
        [
            *operations[:manifest],
            record,
            *operations[manifest:publishes],
            *operations[publishes + 1 :],
        ],
        [*rest[:publishes], *old, *rest[publishes:]],
    ):
        try:
            assert explore(Saved(saved.before, wrong)).wrong
        except KeyError as error:  # the record is renamed before it is written
            assert record.source in str(error)


def _makes(operation: Operation, name: str) -> bool:
    return isinstance(operation, Create) and operation.path.startswith(f"{FOLDER}/{name}")


def test_folders_created_without_a_sync_are_made_durable(tmp_path):
    saved = save(tmp_path, old=False, act=lambda root: (root / FOLDER).mkdir(parents=True))
    assert not explore(saved).wrong


class Later(MemoryStore):
    """The files that a power loss left, an hour after it."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files=files)
        self._old = dict(self._files)

    def head(self, name: str) -> FileInfo:
        is_old = self._found(name) is self._old.get(name)
        return replace(super().head(name), modified=0.0 if is_old else 3600.0)


def test_after_any_power_loss_the_next_save_leaves_only_its_own_files(tmp_path):
    saved = save(tmp_path, old=True)
    by_names = {frozenset(files): files for files in explore(saved).different.values()}
    assert len(by_names) >= 19
    for files in by_names.values():
        store = Later(files)
        sk.save(OLD, store, overwrite=True)
        save_id = open_reader(store).found.trailer.save_id
        own = {data_file(0, 0, save_id), manifest_name(save_id), ".metadata"}
        assert set(names_in(store)) == own, set(files)
        assert Judge(STATES)({name: store.get_range(name, 0, 1 << 20) for name in own}) == "old"


def save_to_objects(ranks: int, before: dict[str, bytes], state: dict, **more) -> list[Change]:
    store = ObjectStore(before)

    def one(job):
        threading.current_thread().name = f"rank {job.rank}"
        mine = {
            name: value for n, (name, value) in enumerate(state.items()) if n % ranks == job.rank
        }
        sk.save(mine, store, ranks=job, **more)

    simulated_ranks.run(ranks, one)
    return store.changes


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("old", [False, True])
def test_a_crash_on_an_object_store_leaves_the_old_or_the_new_checkpoint(old, ranks):
    before: dict[str, bytes] = {}
    if old:
        for change in save_to_objects(2, {}, OLD):
            before[change.name] = change.data
    before = {name: data for name, data in before.items() if data is not None}
    changes = save_to_objects(ranks, before, NEW, overwrite=old, files=2)
    judge, count = Judge(STATES), 0
    for done, files in cuts(changes, before):
        committed = any(one.name == ".metadata" for one in done)
        assert judge(files) == ("new" if committed else "old" if old else "none"), done[-1]
        count += 1
    assert count >= (len(changes) + 1 if ranks == 1 else 30)


def test_the_model_of_object_stores_detects_a_wrong_order():
    changes = save_to_objects(1, {}, NEW)
    for first in (".manifest-", "__0_"):
        (at,) = [n for n, one in enumerate(changes) if one.name.startswith(first)]
        late = replace(changes[at], round=2)
        wrong = [*changes[:at], *changes[at + 1 : -1], late, changes[-1]]
        found = {Judge(STATES)(files)[:6] for _, files in cuts(wrong, {})}
        assert found - {"none", "new"}, first
