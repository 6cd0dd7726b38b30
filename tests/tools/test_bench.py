"""The bench measures what it claims, reports what fails and leaves no process or file behind."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench import page
from bench.machine import file_system
from bench.measure import (
    Result,
    Sample,
    Series,
    join,
    paired,
    percentile,
    store,
    stored,
    timed,
)
from bench.race import Bench, Entry, Race
from bench.ranks import RankError, RankPool
from bench.targets import TARGETS
from bench.workloads import WORKLOADS
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
SECONDS = st.floats(1e-6, 1e3)
ROUNDS = st.lists(st.none() | SECONDS, max_size=9)


def series(*seconds, role="other", label="someone", **more):
    return Series(label, role, seconds=list(seconds), **more)


@given(ROUNDS, ROUNDS)
def test_ratios_compare_only_rounds_that_both_ran_in(first, second):
    both = [(a, b) for a, b in zip(first, second, strict=False) if a and b]
    forth, back = paired(series(*first), series(*second)), paired(series(*second), series(*first))
    assert forth == [a / b for a, b in both]
    assert [a * b for a, b in zip(forth, back, strict=True)] == pytest.approx([1.0] * len(both))


@given(st.lists(SECONDS, min_size=1), st.floats(0.01, 1.0))
def test_percentile_is_the_smallest_value_that_covers_the_share(values, share):
    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    assert sum(value < found for value in values) < share * len(values)


@given(
    st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9), st.integers(0, 9)), min_size=1, max_size=5)
)
def test_ranks_are_timed_from_the_first_begin_to_the_last_end(ranks):
    samples = [Sample(b, b + d, 1.0, n, n, {"bytes_read": n, "durable": d}) for b, d, n in ranks]
    whole = join(samples)
    assert whole.begin == min(b for b, _, _ in ranks)
    assert whole.end == max(b + d for b, d, _ in ranks)
    assert whole.cpu == len(ranks)
    assert whole.peak == whole.read == whole.figures["bytes_read"] == sum(n for _, _, n in ranks)
    assert whole.figures["durable"] == max(d for _, d, _ in ranks)


def fresh(nbytes):
    """Return memory that is new to this process, touched."""
    block = mmap.mmap(-1, max(nbytes, 1))
    for at in range(0, nbytes, 4096):
        block[at] = 1
    return block


def test_timed_sees_memory_and_reads(tmp_path):
    size = 32 << 20
    (tmp_path / "file").write_bytes(bytes(1 << 20))

    def work():
        (tmp_path / "file").read_bytes()
        fresh(size)
        return {"figure": 7}

    sample = timed(work)
    assert sample.peak >= size * 0.9
    assert 1 << 20 <= sample.read < 2 << 20
    assert sample.figures == {"figure": 7}
    assert sample.cpu > 0
    assert sample.seconds > 0


def made(name="save-1", **times):
    roles = {"shardkeep": "ours", "stock": "stock", "direct_write": "limit"}
    result = Result(name, f"Workload {name}", "save", "save", 1, 10**9, 240, limit="direct_write")
    result.date, result.machine = "2026-01-02", {"processor": "a fast one, 2 cores"}
    for key, seconds in times.items():
        result.series[key] = series(
            *seconds, role=roles.get(key, "other"), label=key.title(), first=9.0, cpu=[1.0] * 3
        )
    return result


def test_results_are_stored_and_come_back(tmp_path):
    result = made(shardkeep=[1.0, 2.0, None], stock=[3.0, 3.0, 3.0])
    result.series["gone"] = Series("Gone", error="RuntimeError: it | broke")
    store(result, tmp_path)
    store(made("load-1"), tmp_path)
    assert stored(tmp_path) == {"save-1": result, "load-1": made("load-1")}


@pytest.mark.smoke
def test_page_shows_targets_and_faster_contestants():
    fast = made(
        shardkeep=[1.0, 1.0, 4.0],
        stock=[3.0, 2.0, 16.0],
        direct_write=[0.95, 0.95, 3.8],
        safetensors=[0.5, 0.5, 2.0],
        torch=[2.0, 2.0, 8.0],
    )
    said = page.text({"save-1": fast})
    assert "| save, durable, 1 process | of raw direct write | ≥ 0.9 | 0.95 | yes |" in said
    assert "|  | x stock | ≥ 2.5 | 3.00 | yes |" in said
    assert "Workload save-1: Safetensors is 2.00 × as fast." in said
    assert "Torch is" not in said
    assert (
        "| **Shardkeep** | 1 | 1 to 4 | 1.00 | 0.95 (0.95 to 0.95) | 3.00 (2.00 to 4.00) |" in said
    )
    assert "processor: a fast one" in said
    slow = page.text({"save-1": made(shardkeep=[2.0], stock=[3.0], direct_write=[1.0])})
    assert "| 0.50 | **no** |" in slow
    assert "| 1.50 | **no** |" in slow


def test_page_shows_failures():
    broken = made(shardkeep=[1.0])
    broken.series["torch"] = Series("torch.save", error="RuntimeError: it | broke")
    lost = Result("load-1", "Cached load", "load", "failed", 0, 0, error="RankError: gone")
    said = page.text({"save-1": broken, "load-1": lost})
    assert "| torch.save | `RuntimeError: it \\| broke` |" in said
    assert "The workload failed: `RankError: gone`" in said
    assert "There are no results yet" in page.text({})


def test_every_target_has_its_workload():
    """Otherwise the page would show "not measured" for a misspelt name."""
    known = {*WORKLOADS, *(f"{name}-{verb}" for name in WORKLOADS for verb in ("save", "load"))}
    asked: set[str] = set()

    class Asked(dict):
        def get(self, key, default=None):
            asked.add(key)
            return default

    assert {target.reached(Asked()) for target in TARGETS} == {None}
    assert asked
    assert asked <= known


def test_the_file_system_is_that_of_the_deepest_mount():
    assert file_system(Path("/proc/self")) == "proc"


class FakePool:
    """A pool without processes."""

    def keep(self, *args):
        return [None]

    all = one = drop = keep


def raced(entries, act, rounds=4):
    bench = Bench(Path(), rounds=rounds, nbytes=1, say=lambda line: None)
    result = Result("race", "Race", "race", "save", 1, 1)
    return Race(bench, FakePool(), result, entries).run(act)


def test_each_entry_runs_once_per_round_in_changing_order():
    entries = [Entry(key, key) for key in "abcd"]
    order = []

    def act(entry, trial):
        if not trial:
            order.append(entry.key)
        return [Sample(0.0, 1.0)]

    result = raced(entries, act)
    turns = [tuple(order[at : at + 4]) for at in range(0, 16, 4)]
    assert all(sorted(turn) == list("abcd") for turn in turns)
    assert len(set(turns)) > 1
    assert all(one.times == [1.0] * 4 for one in result.series.values())


def test_the_fastest_settings_of_the_trials_are_used():
    tried = iter([9.0, 3.0, 1.0, 5.0, 2.0])
    entry = Entry("a", "a", variants=({"threads": 1}, {"threads": 2}))
    result = raced([entry], lambda entry, trial: [Sample(0.0, next(tried))], rounds=1)
    assert result.series["a"].settings == "threads=1"
    assert result.series["a"].first == 9.0
    assert result.series["a"].seconds == [2.0]


def test_no_round_begins_after_the_time_limit():
    race = Race(
        Bench(Path(), rounds=4, nbytes=1, say=lambda line: None),
        FakePool(),
        Result("race", "Race", "race", "save", 1, 1),
        [Entry("a", "a")],
        seconds=-1.0,
    )
    result = race.run(lambda entry, trial: [Sample(0.0, 1.0)])
    assert result.series["a"].seconds == [1.0]
    assert result.notes == ["Stopped after 1 rounds, when the time limit was reached."]


@pytest.mark.parametrize("fails_at", [0, 3])
def test_an_entry_that_fails_is_dropped_and_the_others_go_on(fails_at):
    calls = []

    def act(entry, trial):
        if entry.key == "b":
            calls.append(trial)
            if len(calls) > fails_at:
                raise RankError("ValueError: b is broken")
        return [Sample(0.0, 1.0)]

    result = raced([Entry("a", "a"), Entry("b", "b")], act)
    assert result.series["a"].seconds == [1.0] * 4
    assert result.series["b"].error == "ValueError: b is broken"
    assert list(result.series) == ["a", "b"]
    assert result.series["b"].seconds == [1.0] * (fails_at == 3) + [None] * (4 - (fails_at == 3))


# --- saves and loads of tiny states


@pytest.fixture
def tiny(tmp_path):
    return Bench(
        tmp_path, rounds=2, nbytes=400_000, ranks=2, steps=10, saves=12, say=lambda line: None
    )


@pytest.mark.torch
def test_a_state_detects_a_changed_element():
    states = pytest.importorskip("bench.states", exc_type=ImportError)
    for kind in states.KINDS:
        state = states.build(kind, 2_000_000)
        assert len(state) == 240
        assert 1_500_000 < states.nbytes_of(state) < 2_500_000
        states.check(state, 0)
        bits = next(iter(state.values())).view(-1)[7:8].view(sys.modules["torch"].uint8)
        bits[0] ^= 1
        with pytest.raises(AssertionError, match="1 of 240 tensors"):
            states.check(state, 0)
        states.clear(state)
        with pytest.raises(AssertionError, match="240 of 240 tensors"):
            states.check(state, 0)


@pytest.mark.smoke
@pytest.mark.torch
@pytest.mark.parametrize("who", ["shardkeep", "stock", "torch", "safetensors"])
def test_contestants_load_what_they_saved(who, tmp_path):
    states = pytest.importorskip("bench.states", exc_type=ImportError)
    from bench.competitors import make

    contestant = make(who, 0, 1, {})
    state = states.build("adamw", 300_000)
    contestant.save(state, tmp_path / "all")
    states.clear(state)
    contestant.load(state, tmp_path / "all")
    states.check(state, 0)
    one = states.build("one", 100_000)
    contestant.save(one, tmp_path / "one")
    tensor = one[states.ONE]
    found = contestant.columns(tensor, 16, 32, tmp_path / "one")
    assert found.tobytes() == tensor[:, 16:32].contiguous().numpy().tobytes()
    contestant.close()


@pytest.mark.torch
def test_checking_a_save_keeps_the_state(tmp_path):
    states = pytest.importorskip("bench.states", exc_type=ImportError)
    from bench.rank_worker import RankWorker

    worker = RankWorker(0, 1)
    worker.build("state", "small", 5)
    worker.enter("stock", "stock", {"threads": 2, "caching": True})
    worker.save("stock", "state", tmp_path / "right")
    worker.check_saved("state", tmp_path / "right")
    states.check(worker.states["state"], 0)
    worker.states["state"]["t000003"][7] += 1
    worker.save("stock", "state", tmp_path / "wrong")
    with pytest.raises(AssertionError, match="1 of 5 tensors"):
        worker.check_saved("state", tmp_path / "wrong")
    states.check(worker.states["state"], 0)


@pytest.mark.torch
def test_limits_move_every_byte(tmp_path):
    states = pytest.importorskip("bench.states", exc_type=ImportError)
    from bench import limits

    state = states.build("adamw", 20_000_000)
    nbytes = states.nbytes_of(state)
    try:
        limits.DirectWrite(0, 1, threads=3).save(state, tmp_path)
    except OSError:
        pytest.skip("this file system has no direct I/O")
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == nbytes
    assert file.stat().st_blocks * 512 >= nbytes
    limits.Preadv(0, 1, threads=3).load(state, tmp_path)
    bits = (tensor.view(-1).view(sys.modules["torch"].uint8) for tensor in state.values())
    held = b"".join(each.numpy().tobytes() for each in bits)
    assert held == file.read_bytes()
    sample = timed(lambda: limits.DirectRead(0, 1, threads=4).load(state, tmp_path))
    assert nbytes <= sample.read < nbytes + 100_000


@pytest.mark.torch
def test_limit_that_fails_in_a_thread_fails():
    limits = pytest.importorskip("bench.limits", exc_type=ImportError)

    def call(number):
        if number == 5:
            raise ValueError("five")

    with pytest.raises(ValueError, match="five"):
        limits.in_threads(3, range(9), call)


@pytest.mark.torch
def test_the_raw_writer_process_writes_as_many_bytes(tmp_path):
    torch = pytest.importorskip("torch")
    from bench.limits import RawWriterProcess

    aside = RawWriterProcess(0, 1)
    for number in range(2):
        path = tmp_path / f"a b {number}"
        aside.begin({"t": torch.zeros(5000)}, path).result(60)
        assert (path / "raw").stat().st_size == 20000
    aside.close()
    with pytest.raises((RuntimeError, ValueError, BrokenPipeError)):
        aside.begin({"t": torch.zeros(5000)}, tmp_path).result(60)


@pytest.mark.torch
def test_loop_steps_while_saves_run(tmp_path):
    pytest.importorskip("torch")
    from bench import solo

    class Third:
        """Done at the third call of `done`; counts the calls of `result`."""

        def __init__(self):
            self.looks, self.results = 0, 0

        def done(self):
            self.looks += 1
            return self.looks == 3

        def result(self):
            self.results += 1

    begun = {}

    class Fast:
        def begin(self, state, path):
            path.mkdir()
            begun[path] = Third()
            return begun[path]

    worker = SimpleNamespace(states={"state": {}}, entries={"fast": Fast(), "nobody": object()})
    sample, steps = solo.loop(worker, "fast", "state", tmp_path / "loop", 8)
    assert len(steps) == 8
    assert sample.figures["saves"] == len(begun)
    assert [(save.looks, save.results) for save in begun.values()] == [(3, 1), (3, 1), (2, 1)]
    assert list(tmp_path.iterdir()) == []
    assert sample.seconds == max(steps)
    assert solo.loop(worker, "nobody", "state", tmp_path, 3)[0].figures["saves"] == 0


@pytest.mark.torch
def test_a_rank_that_ended_is_reported_and_restarted(tmp_path):
    pytest.importorskip("torch")
    with RankPool(1, tmp_path) as pool:
        pool.keep("build", "state", "small", 3)
        with pytest.raises(RankError, match="has no attribute 'nothing'"):
            pool.all("nothing")
        (process,) = pool.processes
        process.kill()
        with pytest.raises(RankError, match="rank 0 ended in save"):
            pool.all("save", "none", "state", tmp_path)
        pool.all("enter", "torch", "torch", {})
        (sample,) = pool.all("save", "torch", "state", tmp_path / "saved")
        assert sample.seconds > 0
        (other,) = pool.processes
    for pid in (process.pid, other.pid):
        assert_ends(pid)


@pytest.mark.torch
@pytest.mark.gloo
def test_ranks_load_rows_as_columns(tiny):
    pytest.importorskip("torch")
    (result,) = WORKLOADS["reshard"].run(tiny)
    assert result.title == "Load rows as columns, 2 ranks, cached"
    for key in ("shardkeep", "unverified", "stock", "straight"):
        assert not result.series[key].error, key
        assert len(result.series[key].times) == 2
    assert result.series["shardkeep"].figures["bytes_needed"] == [result.nbytes] * 2


def test_memory_over_saves_detects_a_leak(tmp_path):
    from bench import solo

    class Pruner:
        def __init__(self, nbytes):
            self.kept, self.nbytes = [], nbytes

        def save(self, state, path):
            self.kept.append(fresh(self.nbytes))

    entries = {"leaks": Pruner(1 << 20), "does not": Pruner(0)}
    worker = SimpleNamespace(states={"state": {}}, entries=entries)
    slopes = {
        entry: solo.memory_over(worker, entry, "state", "save", tmp_path, 60).figures["slope"]
        for entry in entries
    }
    assert 0.8 * (1 << 20) < slopes["leaks"] < 1.2 * (1 << 20)
    assert abs(slopes["does not"]) < 0.1 * (1 << 20)


def assert_ends(pid):
    """Wait until a process has ended: one whose parent was killed ends a moment later."""
    deadline = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)


def command(tmp_path, *names):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    sizes = ["--quick", "--size=0.0005", "--rounds=2", f"--out={out}", f"--scratch={scratch}"]
    return [sys.executable, "-m", "bench", *names, *sizes], out, scratch


@pytest.mark.torch
def test_command_writes_results_page_and_picture(tmp_path):
    words, out, scratch = command(tmp_path, "load-1", "slice")
    done = subprocess.run(words, check=False, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    results = stored(out / "results")
    assert set(results) == {"load-1", "slice"}
    for key in ("shardkeep", "stock", "torch", "safetensors", "preadv"):
        one = results["load-1"].series[key]
        assert len(one.times) == 2 or "Invalid argument" in one.error, one.error
    said = (out / "performance.md").read_text()
    assert f"## {results['slice'].title}" in said
    if find_spec("torchsnapshot") is None:
        assert "| torchsnapshot | `ModuleNotFoundError: not installed" in said
    assert (out / page.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert list(scratch.iterdir()) == []


@pytest.mark.torch
def test_command_that_is_stopped_leaves_nothing_behind(tmp_path):
    words, _, scratch = command(tmp_path, "load-1")
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout.readline().startswith("load-1")
        ranks: list[int] = []
        while not ranks and bench.poll() is None:
            children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children").read_text()
            ranks = [int(pid) for pid in children.split()]
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(60) == 143
    assert ranks
    for pid in ranks:
        assert_ends(pid)
    assert list(scratch.iterdir()) == []
