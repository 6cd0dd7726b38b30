"""Detection of the participating ranks, without torch."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from shardkeep.coordination import detect_ranks
from shardkeep.coordination.contract import Ranks, Session
from shardkeep.coordination.solo import Solo


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.distributed", raising=False)
    assert isinstance(detect_ranks(), Solo)
    assert isinstance(detect_ranks([0]), Ranks)
    with pytest.raises(
        ValueError, match=r"ranks=\[0, 1\] must be different ranks of this job, which has 1"
    ):
        detect_ranks([0, 1])


def test_solo_session() -> None:
    with detect_ranks().session("save", "x") as session:
        assert isinstance(session, Solo().session("save", "x").__class__)
        assert (session.rank, session.size) == (0, 1)
        session.phase("write")
        assert session.ranks_on_this_host() == 1
        assert session.gather(b"a") == [b"a"]
        assert session.scatter([b"b"]) == b"b"
        assert session.broadcast(b"c") == b"c"
        with pytest.raises(ValueError, match="one message to each rank: 1"):
            session.scatter([b"", b""])
        with pytest.raises(ValueError, match="no message"):
            session.broadcast(None)
    with pytest.raises(ZeroDivisionError), detect_ranks().session("save", "x"):
        1 / 0  # noqa: B018


def test_a_ranks_object_is_returned_as_it_is() -> None:
    ranks = Solo()
    assert detect_ranks(ranks) is ranks


@pytest.mark.parametrize(
    ("dist", "kind"),
    [
        (SimpleNamespace(is_available=lambda: False), Solo),
        (SimpleNamespace(is_available=lambda: True, is_initialized=lambda: False), Solo),
    ],
)
def test_torch_without_a_group(
    monkeypatch: pytest.MonkeyPatch, dist: SimpleNamespace, kind: type[Ranks]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed", dist)
    assert isinstance(detect_ranks(), kind)


def job(rank: int, size: int) -> SimpleNamespace:
    return SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_rank=lambda: rank,
        get_world_size=lambda: size,
    )


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([0, 1], r"rank 2 made a call with ranks=\[0, 1\], but is not among them"),
        ([2, 2], "must be different ranks"),
        ([2, 4], "must be different ranks of this job, which has 4"),
        ([-1, 2], "must be different ranks of this job, which has 4"),
    ],
)
def test_invalid_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch, ranks: list[int], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed", job(2, 4))
    with pytest.raises(ValueError, match=message):
        detect_ranks(ranks)
    assert isinstance(detect_ranks([2]), Solo)


def test_sessions_implement_the_contract() -> None:
    assert Session in type(Solo().session("save", "x")).__mro__
