"""Sessions on simulated ranks: failures, heartbeats and races that real processes cannot show."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.coordination.contract import Ranks
from shardkeep.coordination.keyvalue import entry
from shardkeep.coordination.keyvalue.memory import MemoryKeyValueStore
from shardkeep.coordination.keyvalue.ranks import KeyValueRanks
from shardkeep.coordination.keyvalue.session import KeyValueSession
from shardkeep.coordination.keyvalue.timeouts import Timeouts
from shardkeep.errors import RankFailed
from shardkeep.testing.simulated_ranks import run
from support import sessions
from support.waiting import PROMPT_SECONDS

CALM = Timeouts(100, 0.0, 5)
QUICK = Timeouts(100, 0.05, 4)


@settings(max_examples=30)
@given(size=st.integers(1, 7), lengths=st.lists(st.integers(0, 2000), max_size=4))
def test_conversations_leave_nothing_behind(size: int, lengths: list[int]) -> None:
    keys = MemoryKeyValueStore()
    assert run(size, sessions.conversation, lengths, keys=keys) == ["done"] * size
    assert len(keys) == 0


def test_64_ranks() -> None:
    assert run(64, sessions.conversation, [0, 300]) == ["done"] * 64


def test_a_slow_rank_does_not_delay_the_entry_of_others(monkeypatch) -> None:
    monkeypatch.setattr(
        entry, "_RECHECK_SECONDS", 60.0
    )  # Then it would look which other ranks have come.

    class Held(MemoryKeyValueStore):
        """No rank enters before all requests have been answered."""

        def __init__(self) -> None:
            super().__init__()
            self.answered, self.all, self.late = 0, threading.Event(), False

        def set(self, key: str, value: bytes) -> None:
            if "/heartbeat/" in key and not key.endswith("/0"):
                self.late |= not self.all.wait(5)
            super().set(key, value)
            if "/answer/" in key:
                self.answered += 1
                if self.answered == 3:
                    self.all.set()

    keys = Held()
    assert run(4, sessions.conversation, [0], keys=keys, timeouts=CALM) == ["done"] * 4
    assert not keys.late


def test_a_request_that_is_removed_while_it_is_read_means_entry(
    monkeypatch,
) -> None:
    monkeypatch.setattr(
        entry, "_RECHECK_SECONDS", 0.05
    )  # It soon looks which other ranks have come.
    looked = threading.Event()

    class Reordered(MemoryKeyValueStore):
        """Removes a request between the look for it and the read."""

        def __init__(self) -> None:
            super().__init__()
            self.going: set[str] = set()

        def delete(self, names: Iterable[str]) -> None:
            names = set(names)
            words = {name for name in names if name.endswith("/request/3")}
            self.going |= words
            super().delete(names - words)

        def wait(self, names: Sequence[str], timeout: float) -> str | None:
            found = super().wait(names, timeout)
            if found in self.going and not timeout:
                super().delete([found])
                looked.set()
            return found

    def scenario(ranks: Ranks) -> str:
        if ranks.rank == 2:  # Meanwhile rank 3 enters, and its request is looked for again.
            assert looked.wait(5)
        return sessions.conversation(ranks, [0])

    assert run(4, scenario, keys=Reordered(), timeouts=CALM) == ["done"] * 4


def test_failures_leave_nothing_behind() -> None:
    keys = MemoryKeyValueStore()
    run(4, sessions.failure, 2, keys=keys)
    assert len(keys) == 0


def test_a_concluded_session_is_left_without_another_exchange() -> None:
    class Recorded(MemoryKeyValueStore):
        """A store that notes which messages were sent."""

        def set(self, key: str, value: bytes) -> None:
            sent.append(key)
            super().set(key, value)

    def one(ranks: KeyValueRanks, concludes: bool) -> str:
        with ranks.session("load", "run/a") as session:
            answers = session.gather(b"%d" % session.rank)
            answer = session.broadcast(None if answers is None else b"".join(answers))
            if concludes:
                session.conclude()
        return answer.decode()

    sent: list[str] = []
    keys = Recorded()
    for concludes, rounds in ((False, 2), (True, 1)):
        sent.clear()
        assert run(3, one, concludes, keys=keys) == ["012"] * 3
        assert sum("/gather/" in key for key in sent) == rounds * 2
        assert sum("/broadcast/" in key for key in sent) == rounds
        assert len(keys) == 0


def test_an_error_after_conclude_is_not_raised_on_other_ranks() -> None:
    def one(ranks: KeyValueRanks) -> str:
        try:
            with ranks.session("load", "run/a") as session:
                session.gather(b"")
                session.broadcast(b"")
                session.conclude()
                if session.rank == 1:
                    raise ValueError("too late")
        except ValueError as error:
            return str(error)
        return "fine"

    keys = MemoryKeyValueStore()
    assert run(3, one, keys=keys) == ["fine", "too late", "fine"]
    assert len(keys) == 0


@settings(max_examples=30)
@given(
    culprits=st.dictionaries(st.integers(0, 4), st.sampled_from(sessions.PHASES), min_size=1),
)
def test_any_set_of_failures_reaches_all(culprits: dict[int, str]) -> None:
    def scenario(ranks: Ranks) -> list[dict]:
        def step(phase: str) -> None:
            if culprits.get(ranks.rank) == phase:
                raise ValueError("boom")

        return [sessions.outcome(ranks, step), sessions.outcome(ranks, sessions.nothing)]

    results = run(5, scenario, timeouts=CALM)
    named = {first["rank"] for first, _ in results if first["end"] == "told"}
    assert named <= set(culprits)
    for rank, (first, later) in enumerate(results):
        assert first["end"] == "told" or (first["end"] == "raised" and rank in culprits)
        assert later["end"] == "done"


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    run(8, sessions.conversation, [1], timeouts=QUICK)
    assert threading.active_count() == before


def test_error_of_a_rank_is_raised_with_its_number() -> None:
    def scenario(ranks: Ranks) -> None:
        with ranks.session("save", "x") as session:
            if ranks.rank == 3:
                raise ValueError("mine")
            session.gather(b"")

    with pytest.raises(ValueError, match="mine") as caught:
        run(5, scenario)
    assert caught.value.__notes__ == ["raised on rank 3 of 5"]


def test_every_later_call_raises_the_failure_again() -> None:
    def scenario(ranks: Ranks) -> int:
        told = 0
        with pytest.raises(ValueError if ranks.rank == 1 else RankFailed):  # noqa: SIM117
            with ranks.session("save", "x") as session:
                session.gather(b"")  # From here on, all ranks have entered.
                session.broadcast(b"")
                if ranks.rank == 1:
                    raise ValueError("mine")
                # The first call waits for a message that never comes. The others need not wait.
                wait, go_on = session.gather, session.broadcast
                for call in (go_on, wait, wait) if ranks.rank else (wait, go_on, go_on):
                    with pytest.raises(RankFailed, match="mine"):
                        call(b"")
                    told += 1
        return told

    assert run(3, scenario, timeouts=CALM) == [3, 0, 3]


def test_a_rank_that_enters_after_the_failure_raises_it_at_once() -> None:
    def scenario(ranks: Ranks) -> tuple[str, str, bool]:
        def step(phase: str) -> None:
            if ranks.rank == 1:
                raise ValueError("boom")

        if ranks.rank == 2:
            time.sleep(0.5)
        first = sessions.outcome(ranks, step)
        return (
            first["end"],
            sessions.outcome(ranks, sessions.nothing)["end"],
            first["took"] < PROMPT_SECONDS,
        )

    keys = MemoryKeyValueStore()
    assert run(3, scenario, timeouts=CALM, keys=keys) == [
        ("told", "done", True),
        ("raised", "done", True),
        ("told", "done", True),
    ]
    assert len(keys) == 0


def test_misuse_is_refused() -> None:
    def scenario(ranks: Ranks) -> None:
        with pytest.raises(RuntimeError, match="with block"):
            ranks.session("save", "x").gather(b"")
        if ranks.rank == 0:
            with pytest.raises(ValueError, match="one message to each rank: 2"):  # noqa: SIM117
                with ranks.session("save", "x") as session:
                    session.scatter([b""])
        else:
            with pytest.raises(RankFailed, match="one message to each rank"):  # noqa: SIM117
                with ranks.session("save", "x") as session:
                    session.scatter(None)

    run(2, scenario)


# --- heartbeats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("culprit", [0, 1, 3])
def test_a_rank_without_heartbeats_is_named(culprit: int) -> None:
    def scenario(ranks: Ranks) -> dict:
        def step(phase: str) -> None:
            if ranks.rank == culprit and phase == "write":
                session = next(one for one in alive if one.rank == culprit)
                time.sleep(0.15)  # A heartbeat with the phase "write" has been sent.
                session._peers.stop_heartbeats()
                time.sleep(1.0)

        return sessions.outcome(ranks, step)

    alive: list[KeyValueSession] = []
    real = KeyValueSession._enter

    def note(session: KeyValueSession) -> None:
        alive.append(session)
        real(session)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyValueSession, "_enter", note)
        results = run(4, scenario, timeouts=QUICK)
    for rank, end in enumerate(results):
        assert (end["end"], end["rank"], end["phase"]) == ("told", culprit, "write")
        assert end["cause"] == "it stopped answering: no heartbeat for 0.2 s"
        assert rank == culprit or end["took"] < PROMPT_SECONDS


def test_a_slow_rank_with_heartbeats_is_waited_for() -> None:
    def scenario(ranks: Ranks) -> str:
        return sessions.outcome(ranks, lambda _: time.sleep(0.3 * (ranks.rank == 1)))["end"]

    assert run(3, scenario, timeouts=QUICK) == ["done"] * 3


# --- entering -------------------------------------------------------------------------------------


def test_a_rank_that_gave_up_and_comes_again_is_admitted() -> None:
    def scenario(ranks: KeyValueRanks) -> int:
        if ranks.rank == 0:
            time.sleep(1.5)
        for attempt in range(100):
            deadline = 20 if ranks.rank == 0 else 0.01
            own = KeyValueRanks(
                ranks._keys, ranks.rank, range(2), timeouts=Timeouts(deadline, 0, 5)
            )
            try:
                with own.session("save", "x"):
                    return attempt
            except RankFailed as error:
                assert (error.rank, error.phase) == (0, "enter")
        return -1

    first, second = run(2, scenario)
    assert first == 0
    assert second > 0


def test_the_request_of_a_dead_rank_is_not_an_entry() -> None:
    """A killed rank leaves its request; the rank that is started in its place comes later."""
    keys = MemoryKeyValueStore()

    def scenario(ranks: KeyValueRanks) -> str:
        session = ranks.session("save", "run/step")
        if ranks.rank:
            keys.set(session._transport.request_key(ranks.rank), b"dead")
            time.sleep(0.1)
            started.wait(5)
        else:
            started.set()
        return sessions.conversation(ranks, [3])

    started = threading.Event()
    assert run(3, scenario, timeouts=CALM, keys=keys) == ["done"] * 3
    assert len(keys) == 0


def test_rank_that_dies_while_it_enters_is_named() -> None:
    def scenario(ranks: KeyValueRanks) -> str:
        session = ranks.session("save", "x")
        if ranks.rank == 2:
            ranks._keys.set(session._transport.request_key(2), b"last word")
            return "died"
        try:
            with session:
                session.gather(b"")
        except RankFailed as error:
            return f"{error.rank} {error.phase} {error.cause}"
        return "done"

    told = "2 enter it stopped answering: no heartbeat for 0.2 s"
    assert run(3, scenario, timeouts=QUICK) == [told, told, "died"]


def test_other_jobs_in_the_same_store_do_not_meet() -> None:
    keys = MemoryKeyValueStore()

    def scenario(ranks: Ranks, scope: str) -> list[bytes] | None:
        own = KeyValueRanks(keys, ranks.rank, range(3), scope=scope, timeouts=CALM)
        with own.session("save", "x") as session:
            return session.gather(scope.encode())

    def job(scope: str) -> None:
        results[scope] = run(3, scenario, scope)

    results: dict[str, list] = {}
    threads = [threading.Thread(target=job, args=(scope,)) for scope in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results["a"][0] == [b"a"] * 3
    assert results["b"][0] == [b"b"] * 3


# --- hosts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", ["aaaa", "abcd", "abba", "aaab"])
def test_every_rank_knows_how_many_ranks_share_its_host(hosts: str) -> None:
    """`srun` and `mpirun` do not set LOCAL_WORLD_SIZE."""

    def scenario(ranks: KeyValueRanks) -> int:
        session = ranks.session("load", "run/step")
        session._peers.host = hosts[ranks.rank]
        with session:
            return session.ranks_on_this_host()

    keys = MemoryKeyValueStore()
    assert run(4, scenario, keys=keys, timeouts=CALM) == [hosts.count(host) for host in hosts]
    assert len(keys) == 0


# --- the store itself -----------------------------------------------------------------------------


class BrokenKeys(MemoryKeyValueStore):
    """A store that is out of reach once `broken` is set."""

    broken = False

    def _try(self) -> None:
        if self.broken:
            raise ConnectionError("connection reset by peer")

    def set(self, key: str, value: bytes) -> None:
        self._try()
        super().set(key, value)

    def wait(self, keys: list[str], timeout: float) -> str | None:
        end = time.monotonic() + timeout
        while True:
            self._try()
            left = end - time.monotonic()
            if (found := super().wait(keys, min(left, 0.01))) or left <= 0:
                return found


def test_lost_store_is_explained() -> None:
    keys = BrokenKeys()

    def scenario(ranks: Ranks) -> str:
        def step(phase: str) -> None:
            if phase == "write":
                if ranks.rank == 1:
                    time.sleep(0.1)
                    keys.broken = True
                else:
                    time.sleep(0.3)

        return sessions.outcome(ranks, step)["cause"]

    for cause in run(2, scenario, timeouts=CALM, keys=keys):
        assert cause == (
            "the job's store, which runs beside rank 0, is out of reach: connection reset by peer"
        )


def test_no_torch_is_imported() -> None:
    """import-linter checks the imports; this also finds imports in strings."""
    room = Path(sessions.__file__).parents[2] / "src/shardkeep/coordination"
    assert room.is_dir()
    for file in room.rglob("*.py"):
        assert "import torch" not in file.read_text(), file


# --- between two calls ----------------------------------------------------------------------------


@pytest.mark.parametrize("timeouts", [CALM, QUICK])
def test_check_raises_failures_of_other_ranks_during_long_work(timeouts: Timeouts) -> None:
    def scenario(ranks: Ranks) -> str:
        with ranks.session("save", "x") as session:
            session.phase("write")
            session.check()
            if ranks.rank == 1:
                raise ValueError("boom")
            for _ in range(1000):
                time.sleep(0.01)
                session.check()
        return "not raised"

    def told(ranks: Ranks) -> str:
        try:
            return scenario(ranks)
        except RankFailed as error:
            return f"{error.rank} {error.phase}"
        except ValueError:
            return "raised"

    assert run(3, told, timeouts=timeouts) == ["1 write", "raised", "1 write"]


def test_a_phase_is_known_as_soon_as_it_begins() -> None:
    """Otherwise, a rank that is killed at once would be reported in the phase before."""

    def scenario(ranks: Ranks) -> list[tuple[str, str]]:
        with ranks.session("save", "x") as session:
            session.phase(f"phase of {ranks.rank}")
            if session.gather(b"") is None:
                return []
            everyone = range(ranks.size)
            phases = [session._peers.heartbeat_of(rank).phase for rank in everyone]
            return [(phases[rank], session.host(rank)) for rank in everyone]

    slow = Timeouts(20, 60, 5)
    host = socket.gethostname()
    assert run(3, scenario, timeouts=slow)[0] == [(f"phase of {rank}", host) for rank in range(3)]
