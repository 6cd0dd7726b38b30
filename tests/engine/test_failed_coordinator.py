"""If the coordinator fails, no file of any rank remains, however far the other ranks were."""

from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.stores import LocalStore
from shardkeep.testing import simulated_ranks


class Failing(LocalStore):
    """A store in which the coordinator can't write at a given moment of rank 1."""

    def __init__(self, path, before, after):
        super().__init__(path)
        self.before, self.after = before, after

    def open_positioned_writer(self, name, nbytes):
        assert self.before.wait(60)
        self.after.set()
        raise OSError(5, "Input/output error", self.path_of(name))


class Notified(LocalStore):
    """A store that waits before its data file, and notifies when the file is durable."""

    def __init__(self, path, before, after):
        super().__init__(path)
        self.before, self.after = before, after

    def open_positioned_writer(self, name, nbytes):
        assert self.before.wait(60)
        return super().open_positioned_writer(name, nbytes)

    def sync(self):
        super().sync()
        self.after.set()


def save(ranks, path, order):
    before_rank_1, before_rank_0 = order
    state = {f"w{ranks.rank}": torch.ones(3)}
    if ranks.rank:
        store = Notified(path, before_rank_1, before_rank_0)
    else:
        store = Failing(path, before_rank_0, before_rank_1)
    try:
        sk.save(state, store, ranks=ranks)
    except (OSError, sk.RankFailed) as error:
        return type(error).__name__
    return "saved"


@pytest.mark.parametrize("coordinator_fails_first", [False, True])
@pytest.mark.parametrize("attempt", range(5))
def test_no_file_remains_if_the_coordinator_cannot_write(
    tmp_path, coordinator_fails_first, attempt
):
    before_rank_1, before_rank_0 = threading.Event(), threading.Event()
    (before_rank_0 if coordinator_fails_first else before_rank_1).set()
    path = str(tmp_path / "a")
    ends = simulated_ranks.run(2, save, path, (before_rank_1, before_rank_0))
    assert ends == ["OSError", "RankFailed"]
    assert [one.name for one in (tmp_path / "a").iterdir()] == []
