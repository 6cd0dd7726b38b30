"""Sessions of real processes: kills, training beside a save, subgroups, torch's store."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from shardkeep.coordination import detect_ranks
from shardkeep.coordination.contract import Ranks
from shardkeep.coordination.group import GroupRanks, GroupSession
from support import sessions
from support.gloo import Failed, Pool
from support.waiting import PROMPT_SECONDS

QUICK = {"SHARDKEEP_HEARTBEAT_SECONDS": "0.3", "SHARDKEEP_MAX_MISSED_HEARTBEATS": "4"}


def beside_training(ranks: Ranks) -> tuple[int, list[Any]]:
    with sessions.training() as rounds:
        ends = [
            sessions.conversation(ranks, [0, 100_000]),
            [
                [one["end"] for one in ends]
                for ends in sessions.failure(ranks, 1, ["assign", "commit"])
            ],
            sessions.parallel(ranks, 3),
        ]
    return rounds[0], ends


def test_training_goes_on_beside_sessions(gloo: Pool) -> None:
    results = gloo.ranks(beside_training)
    assert len({rounds for rounds, _ in results}) == 1
    assert results[0][0] > 5
    for rank, (_, (talked, failed, several)) in enumerate(results):
        assert talked == "done"
        assert failed == [["raised" if rank == 1 else "told", "done"]] * 2
        assert several == ["done", "raised" if rank == 2 else "told", "done"]


def gone(ranks: Ranks, culprit: int, where: str, number: int) -> dict[str, Any]:
    def step(phase: str) -> None:
        if phase == where and ranks.rank == culprit:
            time.sleep(0.7)  # A heartbeat with this phase has been sent.
            os.kill(os.getpid(), number)

    return sessions.outcome(ranks, step)


@pytest.mark.parametrize(
    ("culprit", "where", "number"), [(2, "write", signal.SIGKILL), (3, "leave", signal.SIGSTOP)]
)
def test_killed_or_frozen_rank_is_named(
    gloo: Pool, culprit: int, where: str, number: signal.Signals
) -> None:
    with pytest.raises(Failed) as caught:
        gloo.ranks(gone, culprit, where, number, env=QUICK)
    assert list(caught.value.errors) == [culprit]
    for end in caught.value.results.values():
        assert (end["end"], end["rank"], end["phase"]) == ("told", culprit, where)
        assert end["cause"] == "it stopped answering: no heartbeat for 1.2 s"
        assert end["took"] < PROMPT_SECONDS


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_killed_or_frozen_store_is_explained(gloo: Pool, number: signal.Signals) -> None:
    with pytest.raises(Failed) as caught:
        gloo.ranks(gone, 0, "write", number, env=QUICK)
    assert list(caught.value.errors) == [0]
    for end in caught.value.results.values():
        assert (end["end"], end["rank"]) == ("told", 0)
        assert "the job's store, which runs beside rank 0, is out of reach" in end["cause"]
        assert ("no answer for 7 s" in end["cause"]) == (number == signal.SIGSTOP)
        assert end["host"] == socket.gethostname()
        assert end["took"] < PROMPT_SECONDS


def in_halves(rank: int, size: int) -> list[str]:
    half = detect_ranks([1, 0] if rank < 2 else [2, 3])
    assert half.rank == [1, 0, 0, 1][rank]
    first = sessions.conversation(half, [0, 5000])

    def step(phase: str) -> None:
        if phase == "report" and rank == 3:
            raise ValueError("boom")

    end = sessions.outcome(half, step)
    return [first, end["end"], str(end.get("rank")), sessions.conversation(detect_ranks(), [1])]


def test_subgroups_have_sessions_at_the_same_time(gloo: Pool) -> None:
    done = ["done", "done", "None", "done"]
    assert gloo.run(in_halves) == [
        done,
        done,
        ["done", "told", "3", "done"],
        ["done", "raised", "None", "done"],
    ]


def beside_a_blocking_wait(ranks: Ranks) -> bool:
    """Exchange messages while another thread holds the store's client; whether it still does."""
    from torch import distributed as dist

    store = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    key = f"release rank {ranks.rank}"
    thread = threading.Thread(target=lambda: store.wait([key], timedelta(seconds=100)))
    thread.start()
    time.sleep(0.1)
    sessions.conversation(ranks, [10])
    blocked = thread.is_alive()
    dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False).set(key, b"")
    thread.join()
    return blocked


def test_a_blocked_client_of_the_job_does_not_delay_sessions(gloo: Pool) -> None:
    assert gloo.ranks(beside_a_blocking_wait) == [True] * 4


def clients(rank: int, size: int) -> bool:
    from torch import distributed as dist

    from shardkeep.coordination.keyvalue import clients as ours

    gc.collect()  # Earlier jobs of these processes may have left clients.
    first, second = detect_ranks()._keys._client, detect_ranks([1, 0])._keys._client
    assert len(ours._clients) == 1
    assert first.store is not dist.distributed_c10d._get_default_store()
    return first is second


def test_one_own_client_per_group(gloo: Pool) -> None:
    for _ in range(2):  # The second time, the same processes have another group.
        assert gloo.run(clients, size=2) == [True, True]


def count_keys(ranks: Ranks) -> tuple[int, int]:
    from torch import distributed as dist

    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    before = store.num_keys()
    dist.barrier()
    sessions.conversation(ranks, [0, 3_000_000])
    sessions.failure(ranks, 2)
    dist.barrier()
    # The session of rank 0 ends last, and the barrier needs no key.
    return before, store.num_keys()


def test_no_key_is_left_in_the_store(gloo: Pool) -> None:
    for before, after in gloo.ranks(count_keys):
        assert before == after


def count_keys_of_a_manager(ranks: Ranks, path: str) -> tuple[int, int]:
    from torch import distributed as dist

    from shardkeep.run.manager import Manager

    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    before = store.num_keys()
    dist.barrier()
    with Manager(path, every=2) as manager:
        for step in range(5):
            if step == 3 and ranks.rank == 1:
                manager.request_save()
            if manager.should_save(step):
                manager.save(step, {"step": step})
    dist.barrier()
    return before, store.num_keys()


def test_a_closed_manager_leaves_no_key_in_the_store(gloo: Pool, tmp_path: Path) -> None:
    for before, after in gloo.ranks(count_keys_of_a_manager, str(tmp_path)):
        assert before == after


def by_collectives(rank: int, size: int) -> list[Any]:
    from torch import distributed as dist

    ranks = GroupRanks(dist)
    talked = sessions.conversation(ranks, [0, 1, 300_000])
    ends = sessions.failure(ranks, 2)
    half = GroupRanks(dist, [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2])
    stranger = sessions.strangers(ranks)
    with ranks.session("load", "run/step") as session:
        together = session.ranks_on_this_host()
    return [talked, ends, sessions.conversation(half, [5]), stranger, together]


def test_sessions_by_collectives(gloo: Pool) -> None:
    for rank, (talked, rounds, half, stranger, together) in enumerate(gloo.run(by_collectives)):
        assert talked == half == "done"
        assert together == 4
        for where, (first, later) in zip(sessions.PHASES, rounds, strict=True):
            assert first["end"] == ("raised" if rank == 2 else "told")
            if rank != 2:
                assert (first["rank"], first["phase"]) == (2, where)
                assert first["cause"].endswith("ValueError: boom\n")
            assert later["end"] == "done"
        assert stranger["rank"] == 3
        assert "run/b" in stranger["cause"]
        assert "run/a" in stranger["cause"]


class LeftAlone:
    """`torch.distributed` of a rank whose peers are gone after a number of rounds."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds

    def get_rank(self, group: Any) -> int:
        return 0

    def all_gather_object(self, told: list[Any], own: Any, group: Any) -> None:
        if not self.rounds:
            raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:4711")
        self.rounds -= 1
        told[:] = [own] * len(told)


def test_an_error_is_not_hidden_by_peers_that_are_gone() -> None:
    session = GroupSession(LeftAlone(1), None, [0, 1], "save", "run/a")
    with pytest.raises(ValueError, match="boom"), session:
        raise ValueError("boom")
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        GroupSession(LeftAlone(0), None, [0, 1], "save", "run/a").__enter__()
