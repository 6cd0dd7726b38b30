"""Saves and restores of a run by a manager, also when saves, ranks, storage or processes fail."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.coordination.keyvalue.ranks import KeyValueRanks
from shardkeep.coordination.solo import Solo
from shardkeep.run import Steps
from shardkeep.stores import LocalStore, MemoryStore
from shardkeep.testing import simulated_ranks
from support import managing
from support.faults import WAYS, Crashed, FaultyStore
from support.store_files import names_in


@pytest.fixture(autouse=True)
def _no_memory_is_kept():
    yield
    sk.release_memory()


def state(step: int) -> dict:
    return {"w": torch.full((40, 5), float(step)), "odd": {1, step}, "step": step}


def blank() -> dict:
    return {"w": torch.zeros(40, 5), "odd": None, "step": None}


def same(found: dict, step: int) -> bool:
    wanted = state(step)
    equal = torch.equal(found["w"], wanted["w"])
    return equal and {**found, "w": 0} == {**wanted, "w": 0}


def restored(root, **how) -> tuple[int, dict]:
    found = blank()
    return sk.Manager(root).restore(found, **how), found


def flip(folder: Path) -> None:
    (data,) = folder.glob("*.distcp")
    content = bytearray(data.read_bytes())
    place = content.find(torch.full((8,), float(folder.name[5:])).numpy().tobytes())
    content[place] ^= 1
    data.write_bytes(content)


def test_a_run_saves_restores_and_prunes_steps(tmp_path):
    with sk.Manager(tmp_path / "run", keep=sk.KeepLast(2) | sk.KeepBest("loss")) as m:
        keep = "KeepLast(n=2) | KeepBest(metric='loss', n=1, mode='min')"
        assert repr(m) == f"<Manager: {tmp_path / 'run'}, rank 0 of 1, keeps {keep}>"
        assert m.latest() is None and m.steps() == [] and m.best("loss") is None
        assert m.restore(blank(), default=0) == 0
        for step, loss in {10: 0.5, 20: 0.1, 30: 0.3, 40: 0.2}.items():
            handle = m.save(step, state(step), metrics={"loss": loss})
            assert handle.step == step and not handle.skipped
        report = handle.result(60)
        assert report.path == m.path(40) == str(tmp_path / "run" / "step_40")
        m.wait()
        assert m.steps() == [20, 30, 40] and m.latest() == 40 and m.best("loss") == 20
        assert m.metrics(20) == {"loss": 0.1}
        found = blank()
        assert m.restore(found) == 40 and same(found, 40)
        assert m.restored.step == 40 and m.restored.passed_over == {}
        assert "w" in m.restored.report.loaded
        assert m.restore(found, step=20) == 20 and same(found, 20)
        assert sk.open(m.path(30))["step"].value == 30 == sk.open(m.store(30))["step"].value


def test_restoring_a_run_without_steps_is_refused(tmp_path):
    with pytest.raises(sk.NotACheckpoint, match=f"{tmp_path}: no step is committed there"):
        sk.Manager(tmp_path).restore(blank())
    with pytest.raises(sk.NotACheckpoint):
        sk.Manager(tmp_path).restore(blank(), step=3, default=0)


@pytest.mark.parametrize("damage", ["flip", "cut", "no data", "no manifest", "metadata", "folder"])
def test_a_damaged_newest_step_is_skipped_with_a_warning(tmp_path, damage):
    with sk.Manager(tmp_path) as m:
        for step in (1, 2, 3):
            m.save(step, state(step))
    newest = tmp_path / "step_3"
    (data,) = newest.glob("*.distcp")
    if damage == "flip":
        flip(newest)
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[:600])
    elif damage == "no data":
        data.unlink()
    elif damage == "no manifest":
        next(newest.glob(".manifest-*")).unlink()
    elif damage == "metadata":
        metadata = newest / ".metadata"
        metadata.write_bytes(metadata.read_bytes()[:-1])
    else:
        (newest / ".metadata").unlink()
        (newest / ".metadata").mkdir()
    m = sk.Manager(tmp_path)
    found = blank()
    with pytest.warns(UserWarning, match="step 3 cannot be read, so step 2 is restored: "):
        assert m.restore(found) == 2
    assert same(found, 2)
    assert m.restored.step == 2 and list(m.restored.passed_over) == [3]
    if damage == "flip":
        assert "Damaged: " in m.restored.passed_over[3] and "'w'" in m.restored.passed_over[3]


def test_an_unreadable_step_is_not_deleted_and_may_be_saved_again(tmp_path):
    with sk.Manager(tmp_path) as m:
        for step in (1, 2, 3):
            m.save(step, state(step))
    flip(tmp_path / "step_3")
    m = sk.Manager(tmp_path, keep=sk.KeepLast(1))
    with pytest.warns(UserWarning, match="step 3 cannot be read"):
        assert m.restore(blank()) == 2
    m.save(5, state(5))
    m.wait()
    assert m.steps() == [3, 5]  # not a whole step: neither counted nor deleted
    m.save(3, state(3)).result(60)
    m.wait()
    assert restored(tmp_path, step=3)[1]["step"] == 3
    m.save(6, state(6))
    m.close()
    assert m.steps() == [6]


@pytest.mark.parametrize("looked", [True, False])
def test_an_unreadable_step_prevents_only_its_own_deletion(tmp_path, looked):
    with sk.Manager(tmp_path) as m:
        for step in (1, 2, 3):
            m.save(step, state(step), metrics={"loss": step})
    shown = tmp_path / "step_3" / ".metadata"
    shown.unlink()
    shown.mkdir()
    m = sk.Manager(tmp_path, keep=sk.KeepLast(1) | sk.KeepBest("loss"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if looked:
            assert m.restore(blank()) == 2
        for step in (4, 5):
            m.save(step, state(step), metrics={"loss": step})
            m.wait()
            assert m.steps() == [1, 3, step]
        m.save(6, state(6), metrics={"loss": 0.5})
        m.wait()
        assert m.steps() == [3, 6] and m.prune() == ()
    told = [str(one.message) for one in caught if "step 3 stays" in str(one.message)]
    assert told == [] if looked else "not a regular file" in told[0]


def test_a_step_that_cannot_be_deleted_does_not_prevent_deleting_others(tmp_path):
    class Stuck(LocalStore):
        """A root in which the files of one step cannot be deleted."""

        def subfolder(self, folder):
            class Step(LocalStore):
                def delete(self, name):
                    if folder == "step_1":
                        raise PermissionError(1, "Operation not permitted", self.path_of(name))
                    return super().delete(name)

            return Step(self.path_of(folder))

    for step in (1, 2, 3, 4):
        sk.save(state(step), tmp_path / f"step_{step}")
    m = sk.Manager(Stuck(tmp_path), keep=sk.KeepLast(1))
    with pytest.raises(PermissionError, match="Operation not permitted"):
        m.prune()
    assert m.steps() == [1, 4]
    with pytest.warns(UserWarning, match="old steps stay: .*Operation not permitted"):
        m.save(5, state(5))
        m.close()
    assert m.steps() == [1, 5]


FIRST_SAVE = """
import sys
import torch, shardkeep as sk
with sk.Manager(sys.argv[1]) as m:
    m.restore({}, default=0)
    before = set(sys.modules)
    m.save(1, {"w": torch.ones(1 << 20), "odd": {1}}).result()
print(sorted(name for name in set(sys.modules) - before if name.startswith("shardkeep")))
"""


def test_the_first_save_after_a_restore_imports_nothing(tmp_path):
    command = [sys.executable, "-c", FIRST_SAVE, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- steps that fail after a part of them was loaded --------------------------------------------

BLOCKS = 200_000
"""Number of elements of a tensor that has several blocks."""


def wide(step: float, *more: str) -> dict:
    """Return a state whose tensors and objects are not all read at once."""
    tensors = {name: torch.full((BLOCKS,), float(step)) for name in ("a", *more)}
    return {**tensors, "odd": {"kept", step}} if more else tensors


def flip_last_block(folder: Path, value: float, pattern: str = "*.distcp") -> None:
    """Flip a bit in the last block of the first tensor that is filled with `value`."""
    (data,) = folder.glob(pattern)
    content = bytearray(data.read_bytes())
    first = content.find(torch.full((64,), value).numpy().tobytes())
    content[first + 4 * BLOCKS - 8] ^= 1
    data.write_bytes(content)


@pytest.mark.parametrize("strict", [False, {"b": False, "odd": False}])
def test_values_of_a_damaged_step_are_not_mixed_with_an_older_step(tmp_path, strict):
    with sk.Manager(tmp_path) as m:
        m.save(1, wide(1))
        m.save(2, wide(2, "b"))
    flip_last_block(tmp_path / "step_2", 2.0)
    m = sk.Manager(tmp_path)
    with pytest.raises(sk.Mismatch, match="may have filled") as caught:
        m.restore(wide(0, "b"), strict=strict)  # now "b" may be of step 2
    assert f"{tmp_path / 'step_1'} does not have 'b', 'odd', which step 2" in str(caught.value)
    assert caught.value.report.missing == ("b", "odd") and m.restored is None
    assert m.restore(fresh := wide(0, "b"), step=1, strict=strict) == 1
    assert fresh["b"][0] == 0 and fresh["a"][0] == 1


def test_an_older_step_that_fills_everything_is_restored(tmp_path):
    with sk.Manager(tmp_path) as m:
        m.save(1, wide(1, "b"))
        m.save(2, wide(2, "b"))
    flip_last_block(tmp_path / "step_2", 2.0)
    found = {**wide(0, "b"), "c": torch.zeros(3)}
    with pytest.warns(UserWarning, match="step 2 cannot be read"):
        assert sk.Manager(tmp_path).restore(found, strict={"c": False}) == 1
    assert all((found[name] == 1).all() for name in ("a", "b"))
    assert found["odd"] == {"kept", 1} and not found["c"].any()


def test_names_below_an_object_of_a_damaged_step_count_as_filled(tmp_path):
    """A checkpoint may hold one object where the template has a mapping."""
    import torch.distributed.checkpoint as stock

    with sk.Manager(tmp_path) as m:
        m.save(1, wide(1))
    held = {"a": torch.full((BLOCKS,), 2.0), "box": [{"t": torch.ones(3), "n": 2}]}
    stock.save(held, checkpoint_id=tmp_path / "step_2", no_dist=True)
    flip_last_block(tmp_path / "step_2", 2.0)
    template = {"a": torch.zeros(BLOCKS), "box": [{"t": torch.zeros(3), "n": 0}]}
    with pytest.raises(sk.Mismatch, match="which step 2 may have filled"):
        sk.Manager(tmp_path).restore(template, strict=False)


def test_a_step_that_could_not_be_opened_has_filled_nothing(tmp_path):
    with sk.Manager(tmp_path) as m:
        m.save(1, wide(1))
        m.save(2, wide(2, "b"))
        m.save(3, wide(3, "b"))
    metadata = tmp_path / "step_3" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-1])
    next((tmp_path / "step_2").glob(".manifest-*")).unlink()
    found = wide(0, "b")
    with pytest.warns(UserWarning, match="cannot be read, so step 1 is restored"):
        assert sk.Manager(tmp_path).restore(found, strict=False) == 1
    assert found["a"][0] == 1 and found["b"][0] == 0 and found["odd"] == {"kept", 0}


def mixing(ranks, path, strict):
    """Restore after damage to rank 1's part of step 2; return the error of this rank."""

    def mine(value: float) -> dict:
        row = torch.full((1, BLOCKS), float(value))
        return {"w": sk.Shards((2, BLOCKS), [((ranks.rank, 0), row)])}

    def more(value: float) -> dict:
        return {"ema": torch.full((9,), value), "rng": sk.PerRank(torch.full((9,), value))}

    with sk.Manager(path, ranks=ranks) as m:
        m.save(1, mine(1))
        m.save(2, mine(2) | more(2.0))
    if ranks.rank == 1:
        flip_last_block(path / "step_2", 2.0, "__1_*.distcp")
    m = sk.Manager(path, ranks=ranks)
    try:
        m.restore(mine(0) | more(0.0), strict=strict)
    except (sk.Mismatch, sk.RankFailed) as error:
        return str(error)


def test_all_ranks_refuse_a_step_that_would_be_mixed_on_one_rank(tmp_path):
    found = simulated_ranks.run(2, mixing, tmp_path, {"ema": False, "rng*": False})
    for rank, text in enumerate(found):
        assert f"'ema', 'rng.rank_{rank}_of_2', which step 2 may have filled" in text


def test_a_value_that_a_policy_leaves_alone_was_not_filled_by_a_damaged_step(tmp_path):
    def save(ranks, step):
        with sk.Manager(tmp_path, ranks=ranks) as m:
            m.save(step, {"a": torch.full((BLOCKS,), float(step)), "rng": sk.PerRank(step)})

    simulated_ranks.run(3, save, 1)
    save(None, 2)
    flip_last_block(tmp_path / "step_2", 2.0)
    template = {"a": torch.zeros(BLOCKS), "rng": sk.PerRank(0)}
    with pytest.raises(sk.Mismatch, match="step_1 does not have 'rng', which step 2"):
        sk.Manager(tmp_path).restore(template, per_rank="skip")


def test_all_steps_damaged(tmp_path):
    with sk.Manager(tmp_path) as m:
        m.save(1, state(1))
        m.save(2, state(2))
    flip(tmp_path / "step_1")
    flip(tmp_path / "step_2")
    with pytest.raises(sk.Damaged) as caught:
        sk.Manager(tmp_path).restore(blank())
    assert str(caught.value).startswith(
        f"{tmp_path}: none of its steps can be read: step 2: Damaged"
    )
    assert "; step 1: Damaged: " in str(caught.value)
    with pytest.raises(sk.Damaged, match="'w', block 0"):
        sk.Manager(tmp_path).restore(blank(), step=2)


def test_a_wrong_template_raises_instead_of_restoring_an_older_step(tmp_path):
    with sk.Manager(tmp_path) as m:
        m.save(1, state(1))
        m.save(2, state(2))
    with pytest.raises(sk.Mismatch, match="missing: not in the checkpoint"):
        sk.Manager(tmp_path).restore({**blank(), "more": 1})
    assert sk.Manager(tmp_path).restore({**blank(), "more": 1}, strict=False) == 2


def test_a_step_is_not_overwritten_without_overwrite(tmp_path):
    with sk.Manager(tmp_path) as m:
        m.save(1, state(1))
        with pytest.raises(sk.AlreadyExists, match="already holds a checkpoint"):
            m.save(1, state(9))
        m.save(2, state(2))  # the previous save was refused at once: no failure is pending
        m.save(1, state(9), overwrite=True)
    assert restored(tmp_path, step=1)[1]["step"] == 9


def test_a_step_saved_again_by_fewer_ranks_keeps_no_stale_shard(tmp_path):
    def one(ranks, value):
        with sk.Manager(tmp_path, ranks=ranks) as m:
            m.save(1, {"mine": {ranks.rank: torch.full((9,), value)}}, overwrite=True)

    simulated_ranks.run(4, one, 1.0)
    before = {path.name for path in (tmp_path / "step_1").iterdir()}
    assert len(before) == 6
    simulated_ranks.run(2, one, 2.0)
    after = {path.name for path in (tmp_path / "step_1").iterdir()}
    assert len(after) == 4 and before & after == {".metadata"}
    assert set(sk.open(tmp_path / "step_1")) == {"mine.0", "mine.1"}


class Gate(LocalStore):
    """A root in which no data file of some steps is created before an event is set."""

    def __init__(self, path, steps=()):
        super().__init__(path)
        self.opened, self.steps = threading.Event(), steps

    def subfolder(self, folder):
        gate = self

        class Step(LocalStore):
            def open_positioned_writer(self, name, nbytes):
                if folder in gate.steps:
                    assert gate.opened.wait(60)
                return super().open_positioned_writer(name, nbytes)

        return Step(self.path_of(folder))


def test_a_save_waits_for_the_previous_one(tmp_path):
    gate = Gate(tmp_path, ["step_1"])
    with sk.Manager(gate) as m:
        first = m.save(1, state(1))
        second = []
        other = threading.Thread(target=lambda: second.append(m.save(2, state(2))))
        other.start()
        other.join(0.3)
        assert not first.done() and not second and m.steps() == []
        gate.opened.set()
        other.join(60)
        assert first.done()
    assert m.steps() == [1, 2]


def skipping(ranks, path, gate):
    seen = []
    with sk.Manager(gate if ranks.rank == 2 else path, when_busy="skip", ranks=ranks) as m:
        for step in (1, 2, 3):
            handle = m.save(step, {"mine": {ranks.rank: torch.ones(9)}})
            seen.append(handle.skipped)
            if handle.skipped:
                assert handle.done() and handle.result() is None
            if step == 2:
                gate.opened.set()
                m.wait()
    return seen


def test_a_save_is_skipped_by_all_ranks_or_by_none(tmp_path):
    """Only rank 2 is slow, and the other ranks treat the first save as unfinished, too."""
    gate = Gate(tmp_path, ["step_1"])
    assert simulated_ranks.run(4, skipping, tmp_path, gate) == [[False, True, False]] * 4
    assert Steps(tmp_path).numbers() == [1, 3]


class Full(LocalStore):
    """A root in which no data file can be created as long as it is full."""

    full: bool = True

    def subfolder(self, folder):
        root = self

        class Step(LocalStore):
            def open_positioned_writer(self, name, nbytes):
                if root.full:
                    raise OSError(28, "No space left on device", self.path_of(name))
                return super().open_positioned_writer(name, nbytes)

        return Step(self.path_of(folder))


def test_a_failure_raised_by_the_result_is_not_raised_again(tmp_path):
    root = Full(tmp_path)
    m = sk.Manager(root)
    handle = m.save(1, state(1))
    with pytest.raises(OSError, match="No space left on device"):
        handle.result(60)
    root.full = False
    m.save(2, state(2)).result(60)
    m.close()
    assert m.steps() == [2]


def test_an_unretrieved_failure_is_raised_by_the_next_save(tmp_path):
    root = Full(tmp_path)
    m = sk.Manager(root)
    m.save(1, state(1))
    with pytest.raises(OSError, match="No space left on device"):
        m.save(2, state(2))
    root.full = False
    m.save(2, state(2))
    m.close()
    assert m.steps() == [2]


@pytest.mark.parametrize("call", ["wait", "close"])
def test_wait_and_close_raise_a_pending_failure(tmp_path, call):
    m = sk.Manager(Full(tmp_path))
    m.save(1, state(1))
    with pytest.raises(OSError, match="No space left on device"):
        getattr(m, call)()
    m.close()


def test_a_pending_failure_does_not_hide_an_exception_in_the_block(tmp_path):
    with (
        pytest.raises(KeyError, match="training"),
        pytest.warns(UserWarning, match="step 1 was not"),
        sk.Manager(Full(tmp_path)) as m,
    ):
        m.save(1, state(1))
        raise KeyError("training")


def test_failures_of_saves_can_be_warnings(tmp_path):
    root = Full(tmp_path)
    m = sk.Manager(root, on_error="warn")
    handle = m.save(1, state(1))
    with pytest.warns(
        UserWarning, match=r"step 1 was not saved: OSError: .*No space left on device"
    ):
        m.save(2, state(2))
    with pytest.warns(UserWarning, match="step 2 was not saved"):
        m.wait()
    with pytest.raises(OSError, match="No space left"):
        handle.result()
    root.full = False
    m.save(3, state(3))
    with pytest.warns(UserWarning, match="step 3 was not saved: AlreadyExists"):
        assert m.save(3, state(3)).done()
    m.close()
    assert m.steps() == [3]


class Shaky(LocalStore):
    """A root in which some writes fail: those for which `fails` is true, given their number."""

    def __init__(self, path, fails):
        super().__init__(path)
        self.fails, self.calls = fails, 0

    def subfolder(self, folder):
        root = self

        class Step(LocalStore):
            def open_positioned_writer(self, name, nbytes):
                target = super().open_positioned_writer(name, nbytes)
                write_at = target.write_at

                def shaky(offset, parts):
                    root.calls += 1
                    if root.fails(root.calls):
                        raise OSError(5, "Input/output error", self.path_of(name))
                    write_at(offset, parts)

                target.write_at = shaky
                return target

        return Step(self.path_of(folder))


@pytest.mark.parametrize("how", [{"on_error": "warn"}, {"retries": 5}])
def test_a_job_on_unreliable_storage_finishes_and_shows_only_whole_steps(tmp_path, how):
    chance = random.Random(24)
    root = Shaky(tmp_path, lambda _: chance.random() < 0.2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sk.Manager(root, **how) as m:
            for step in range(1, 31):
                m.save(step, state(step))
    failed = [one for one in caught if "was not saved: OSError" in str(one.message)]
    assert len(m.steps()) == 30 - len(failed)
    assert root.calls > 30 if how == {"retries": 5} else 1 <= len(failed) <= 15
    for step in m.steps():
        assert sk.open(m.path(step)).verify().ok and same(restored(tmp_path, step=step)[1], step)
        assert len(list((tmp_path / f"step_{step}").iterdir())) == 3  # no files of failed attempts
    assert {path.name for path in tmp_path.iterdir()} >= {f"step_{step}" for step in m.steps()}


def test_a_retry_writes_the_state_as_it_was_at_the_call(tmp_path):
    first = threading.Event()

    root = Shaky(tmp_path, lambda call: call <= 2 and first.wait(60))
    with sk.Manager(root, retries=2) as m:
        mine = state(1)
        handle = m.save(1, mine)
        mine["w"].fill_(7)
        first.set()
        handle.result(60)
        assert root.calls == 3
    assert same(restored(tmp_path)[1], 1)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_retries_are_limited(tmp_path, asynchronous):
    root = Shaky(tmp_path, lambda call: True)
    m = sk.Manager(root, retries=1, asynchronous=asynchronous)
    with pytest.raises(OSError, match="Input/output error"):
        m.save(1, state(1)).result(60)
    assert root.calls == 2 and m.steps() == []
    root.fails = lambda call: False
    m.save(1, state(1))
    m.close()
    assert m.steps() == [1]


def failing_together(ranks, path, root):
    seen = []
    with sk.Manager(root if ranks.rank == 1 else path, ranks=ranks) as m:
        handle = m.save(1, {"mine": {ranks.rank: torch.ones(9)}})
        if ranks.rank == 0:  # only one rank retrieves the result
            with contextlib.suppress(sk.RankFailed):
                handle.result(60)
            root.full = False  # the others wait for this rank before they write again
        for step in (2, 3):
            try:
                m.save(step, {"mine": {ranks.rank: torch.ones(9)}})
            except (OSError, sk.RankFailed) as error:
                seen.append((step, type(error).__name__, getattr(error, "rank", None)))
    return seen


def test_all_ranks_raise_a_failure_at_the_same_save(tmp_path):
    found = simulated_ranks.run(3, failing_together, tmp_path, Full(tmp_path))
    assert found == [[(2, "RankFailed", 1)], [(2, "OSError", None)], [(2, "RankFailed", 1)]]
    assert Steps(tmp_path).numbers() == [3]


def test_a_save_has_one_session_and_its_errors_name_the_step(tmp_path):
    class Recorded(KeyValueRanks):
        """Ranks that record the work of each session."""

        def session(self, work, path, **how):
            met.append((self.rank, work))
            return super().session(work, path, **how)

    def one(ranks):
        ranks.__class__ = Recorded
        root = Full(tmp_path)
        root.full = False
        with sk.Manager(root, ranks=ranks) as m:
            mine = {"mine": {ranks.rank: torch.ones(9)}}
            m.save(1, mine).result(60)
            root.full = ranks.rank == 1
            try:
                m.save(2, mine).result(60)
            except (OSError, sk.RankFailed) as error:
                return getattr(error, "path", None)

    met: list[tuple[int, str]] = []
    assert simulated_ranks.run(2, one) == [str(tmp_path / "step_2"), None]
    once = [(rank, "stop agreement") for rank in (0, 1)]  # on the step to stop at
    assert sorted(met) == sorted([*once, *[(0, "save"), (1, "save")] * 2])


def test_ranks_at_different_steps_are_refused(tmp_path):
    def one(ranks):
        with sk.Manager(tmp_path, ranks=ranks) as m:
            try:
                m.save(1 + (ranks.rank == 2), {"a": 1})
            except sk.ShardkeepError as error:
                return str(error)

    found = simulated_ranks.run(3, one)
    assert found[2] == (
        "rank 2 saves step 2, but rank 0 saves step 1: "
        "all ranks must save the same steps in the same order"
    )
    assert "rank 2 saves step 2" in found[0] and "rank 2 saves step 2" in found[1]
    assert Steps(tmp_path).numbers() == []


def test_metrics_that_are_not_finite_are_left_out(tmp_path):
    with sk.Manager(tmp_path) as m:
        with pytest.warns(UserWarning, match="metrics that are not finite are left out: 'loss'"):
            m.save(1, state(1), metrics={"loss": torch.tensor(float("nan")), "n": 3})
        with pytest.raises(TypeError, match="metric 'loss' must be a number, not a str"):
            m.save(2, state(2), metrics={"loss": "low"})
        m.save(2, state(2), metrics={"loss": torch.tensor(0.5)})
    assert [dict(m.metrics(step)) for step in (1, 2)] == [{"n": 3.0}, {"loss": 0.5}]


def test_names_and_synchronous_saves(tmp_path):
    with sk.Manager(tmp_path, name="{step:06}.ckpt", asynchronous=False, every=2) as m:
        for step in range(1, 5):
            if m.should_save(step):
                assert m.save(step, state(step)).done()
                assert m.steps()[-1] == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002.ckpt", "000004.ckpt"]


def test_folders_that_are_not_steps_of_the_run_are_not_deleted(tmp_path):
    others = ["step_01", "step_1.bak", "step_x", "best", "step_2_old"]
    for name in others:
        sk.save(state(1), tmp_path / name)
    sk.save(state(7), tmp_path / "elsewhere" / "step_2")
    (tmp_path / "step_2").symlink_to(tmp_path / "elsewhere" / "step_2")
    with sk.Manager(tmp_path, keep=sk.KeepLast(1)) as m:
        for step in (1, 3, 4):
            m.save(step, state(step))
    assert m.steps() == [2, 4]
    assert {path.name for path in tmp_path.iterdir()} == {*others, "elsewhere", "step_2", "step_4"}
    assert sk.open(tmp_path / "elsewhere" / "step_2").verify().ok


def test_a_policy_that_fails_deletes_nothing(tmp_path):
    class Broken:
        def keep(self, steps):
            raise RuntimeError("no idea")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sk.Manager(tmp_path, keep=Broken()) as m:
            m.save(1, state(1))
            m.save(2, state(2))
    assert m.steps() == [1, 2]
    assert {str(one.message) for one in caught} == {f"{tmp_path}: old steps stay: no idea"}


def test_the_latest_save_is_kept_even_if_its_step_number_is_lower(tmp_path):
    with sk.Manager(tmp_path, keep=sk.KeepLast(1)) as m:
        m.save(30, state(30))
        m.save(20, state(20))
    assert m.steps() == [20, 30]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"when_busy": "drop"}, "when_busy must be one of 'wait', 'skip', not 'drop'"),
        ({"on_error": "ignore"}, "on_error must be one of 'raise', 'warn', not 'ignore'"),
        ({"on_error": 3}, "on_error must be one of 'raise', 'warn', not 3"),
        ({"retries": -1}, "retries must be at least 0, not -1"),
        ({"files": 0}, "files must be at least 1, not 0"),
        ({"every": 0}, "every must be at least 1, not 0"),
        ({"name": "step"}, "name must contain {step} exactly once"),
    ],
)
def test_invalid_manager_arguments_are_refused(tmp_path, wrong, why):
    with pytest.raises(ValueError) as caught:
        sk.Manager(tmp_path, **wrong)
    assert why in str(caught.value)


# --- crashes -------------------------------------------------------------------------------------

FIRST = (1, 2)
THEN = (3, 4)


def memory_of(files: dict[str, bytes]) -> MemoryStore:
    store = MemoryStore("run")
    for name, data in files.items():
        store.put(name, data, mode="replace")
    return store


def files_of(store: MemoryStore) -> dict[str, bytes]:
    return {name: store.get_range(name, 0, store.head(name).size) for name in names_in(store)}


@pytest.fixture(scope="module")
def two_steps() -> dict[str, bytes]:
    store = MemoryStore("run")
    with sk.Manager(store) as m:
        for step in FIRST:
            m.save(step, state(step))
    return files_of(store)


@pytest.mark.parametrize(("kind", "when"), WAYS)
def test_no_crash_removes_the_last_whole_step(two_steps, kind, when):
    """Two saves with deletion, in which one operation of the store fails: each one in turn."""
    ends = []
    for at in range(2000):
        inner = memory_of(two_steps)
        store = FaultyStore(inner, at, kind, when)
        committed = list(FIRST)
        with contextlib.suppress(OSError, Crashed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            m = sk.Manager(store, keep=sk.KeepLast(2), asynchronous=False)
            for step in THEN:
                m.save(step, state(step))
                committed.append(step)
                m.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # The newest step loads without falling back.
            newest, found = restored(inner)
        assert newest >= committed[-1] and same(found, newest)
        steps = Steps(inner)
        for step in steps.numbers():
            assert sk.open(steps.store(step)).verify().ok
        assert len(steps.numbers()) >= 2
        ends.append(newest)
        if len(store.log) <= at:
            break
    assert ends == sorted(ends) if kind == "crash" else set(ends) == {2, 3, 4}
    assert ends[0] == 2 and ends[-1] == 4 and len(ends) > 40
    assert Steps(inner).numbers() == [3, 4]
    assert {name.split("/")[0] for name in names_in(inner)} == {"step_3", "step_4"}


# --- real ranks ----------------------------------------------------------------------------------


@pytest.mark.gloo
@pytest.mark.parametrize(("size", "signalled"), [(2, [1]), (4, [2]), (4, [0, 1, 2, 3])])
def test_sigterm_saves_one_step_on_all_ranks(gloo, tmp_path, size, signalled):
    """The signal comes at any moment, to one rank or to all, and each step has a collective."""
    rounds = 3
    found = gloo.run(managing.terminated, str(tmp_path), rounds, signalled, 1, size=size)
    for number in range(rounds):
        (step,) = {ends[number]["step"] for ends in found}
        assert max(ends[number]["took"] for ends in found) < 30
        run = sk.Manager(tmp_path / f"run_{number}")
        assert run.latest() == step and run.metrics(step) == {"step": step}
        ckpt = sk.open(run.path(step))
        assert ckpt["step"].value == step and ckpt.verify().ok
        assert ckpt.read("w").tobytes() == (torch.arange(size * 300.0) + step).numpy().tobytes()


@pytest.mark.gloo
@pytest.mark.parametrize("culprit", [0, 3])
def test_damage_seen_by_one_rank_makes_all_ranks_fall_back(gloo, tmp_path, culprit):
    found = gloo.run(managing.fallback, str(tmp_path), culprit)
    for end in found:
        assert end["step"] == end["value"] == 2
        (text,) = end["passed over"].values()
        assert text.startswith("Damaged: ") and f"'mine.{culprit}'" in text


def test_a_save_request_is_met_at_the_next_step_and_the_previous_handler_still_runs(tmp_path):
    before, seen = signal.getsignal(signal.SIGUSR1), []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    mine = signal.getsignal(signal.SIGUSR1)
    try:
        with sk.Manager(tmp_path, every=10) as m:
            m.save_on_signal(signal.SIGUSR1)
            assert not m.should_save(1) and not m.preempted
            os.kill(os.getpid(), signal.SIGUSR1)
            assert seen == [signal.SIGUSR1]
            assert m.should_save(2) and m.preempted
            m.save(2, state(2))
            assert m.preempted
            assert not m.should_save(3) and not m.preempted
            m.request_save()
            m.save(4, state(4))
            assert m.preempted
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert m.steps() == [2, 4]


def test_a_signal_handler_installed_later_is_not_replaced(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with sk.Manager(tmp_path) as m:
            m.save_on_signal(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_ranks_without_a_key_value_store_report_that_they_cannot_agree(tmp_path):
    class Storeless(Solo):
        def stop_agreement(self, path):
            return None

    before = signal.getsignal(signal.SIGTERM)
    with sk.Manager(tmp_path, ranks=Storeless(), every=2) as m:
        for call in (m.request_save, m.save_on_signal):
            with pytest.raises(
                sk.ShardkeepError, match="the ranks of this job cannot agree on a step to save"
            ):
                call()
        assert [m.should_save(step) for step in (1, 2)] == [False, True] and not m.preempted
        m.save(2, state(2))
    assert m.steps() == [2] and signal.getsignal(signal.SIGTERM) == before
