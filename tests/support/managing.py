"""Runs with a manager, on real ranks."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import shardkeep as sk


def state(rank: int, size: int, step: int) -> dict[str, Any]:
    """Return a tensor sharded by rows, a tensor of each rank's own, and the step."""
    rows = torch.arange(size * 300.0).reshape(size, 300) + step
    shard = sk.Shards((size, 300), [((rank, 0), rows[rank : rank + 1].clone())])
    return {"w": shard, "mine": {rank: torch.full((7,), float(rank + step))}, "step": step}


def terminated(
    rank: int, size: int, path: str, rounds: int, signalled: list[int], seed: int
) -> list[dict[str, Any]]:
    """Train with a collective in every step until SIGTERM arrives at some ranks or at all.

    Returns:
        For each round, the step at which this rank stopped, and the seconds from the signal until
        the state was durable.
    """
    found = []
    for number in range(rounds):
        chance = random.Random(f"{seed} {number} {rank}")
        root, sent, step = Path(path) / f"run_{number}", [0.0], 0

        def send(after: float = chance.uniform(0.0, 0.3), sent: list[float] = sent) -> None:
            time.sleep(after)
            sent[0] = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)

        before = signal.getsignal(signal.SIGTERM)
        with sk.Manager(root, keep=sk.KeepLast(2), every=5) as m:
            m.save_on_signal()
            if rank in signalled:
                threading.Thread(target=send).start()
            while True:
                step += 1
                time.sleep(chance.uniform(0.0, 0.01))
                dist.all_reduce(torch.ones(3))
                if m.should_save(step):
                    m.save(step, state(rank, size, step), metrics={"step": step})
                if m.preempted:
                    break
                assert step < 5000
            while rank in signalled and not sent[0]:
                # Another rank's signal came first. This one must arrive before the block ends.
                time.sleep(0.01)
        took = time.monotonic() - sent[0] if rank in signalled else 0.0
        assert signal.getsignal(signal.SIGTERM) == before
        found.append({"step": step, "took": took})
    return found


def fallback(rank: int, size: int, path: str, culprit: int) -> dict[str, Any]:
    """Save three steps, change a byte of the newest that one rank alone reads, and restore."""
    with sk.Manager(path) as m:
        for step in (1, 2, 3):
            m.save(step, state(rank, size, step))
    dist.barrier()
    if rank == culprit:
        (data,) = Path(m.path(3)).glob(f"__{rank}_*.distcp")
        content = bytearray(data.read_bytes())
        content[content.find(torch.full((7,), float(rank + 3)).numpy().tobytes())] ^= 1
        data.write_bytes(content)
    dist.barrier()
    found = {"w": state(rank, size, 0)["w"], "mine": {rank: torch.zeros(7)}, "step": 0}
    m = sk.Manager(path)
    step = m.restore(found)
    wanted = state(rank, size, 2)
    assert torch.equal(found["w"].parts[0][1], wanted["w"].parts[0][1])
    assert torch.equal(found["mine"][rank], wanted["mine"][rank])
    assert m.restored is not None
    return {"step": step, "passed over": dict(m.restored.passed_over), "value": found["step"]}
