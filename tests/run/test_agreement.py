"""Agreement of the ranks before a save, and the session in which the save continues. No torch."""

import threading

import pytest

from shardkeep.coordination.keyvalue.memory import MemoryKeyValueStore
from shardkeep.coordination.solo import Solo
from shardkeep.errors import Conflict, RankFailed
from shardkeep.run.agreement import SaveProposal, Severity, agree_on_save, worst_outcome
from shardkeep.run.entered import EnteredRanks
from shardkeep.testing import simulated_ranks


def agree(proposals):
    """Return the decision or the error of each rank."""

    def one(ranks):
        try:
            with ranks.session("save", "run") as session:
                return agree_on_save(session, proposals[ranks.rank])
        except (Conflict, RankFailed) as error:
            return f"{type(error).__name__}: {error}"

    return simulated_ranks.run(len(proposals), one)


def proposal(step=1, busy=False, stops=True, error=None):
    return SaveProposal(step, busy, stops, error)


def test_all_ranks_save_if_none_objects():
    for decision in agree([proposal()] * 3):
        assert (decision.skip, decision.stop) == (False, False)
        assert decision.previous.severity is Severity.SUCCESS


@pytest.mark.parametrize("busy", [0, 2])
def test_a_save_is_skipped_on_all_ranks_if_one_is_busy(busy):
    found = agree([proposal(busy=rank == busy, error=OSError("x")) for rank in range(3)])
    assert [(decision.skip, decision.stop) for decision in found] == [(True, False)] * 3


def test_a_failure_of_one_rank_stops_all_and_is_named():
    found = agree([proposal(error=OSError("disk full") if rank == 1 else None) for rank in (0, 1)])
    assert {(decision.skip, decision.stop) for decision in found} == {(False, True)}
    (previous,) = {decision.previous for decision in found}
    assert (previous.rank, previous.error) == (1, "OSError: disk full")
    error = previous.rank_failed("save", "run/step_1")
    assert "rank 1 on" in str(error) and "OSError: disk full" in str(error)


@pytest.mark.parametrize(("stops", "stop"), [([False, False], False), ([False, True], True)])
def test_failures_that_are_warnings_stop_no_rank_unless_another_rank_stops(stops, stop):
    found = agree([proposal(stops=one, error=OSError("x")) for one in stops])
    assert [decision.stop for decision in found] == [stop, stop]


def test_a_rank_at_another_step_is_refused_on_all_ranks():
    found = agree([proposal(step=4), proposal(step=4), proposal(step=5)])
    why = (
        "rank 2 saves step 5, but rank 0 saves step 4: "
        "all ranks must save the same steps in the same order"
    )
    assert found[2] == f"Conflict: {why}"
    assert all(text.startswith("RankFailed: rank 2") and why in text for text in found[:2])


def test_among_outcomes_of_equal_severity_that_of_the_lowest_rank_is_reported():
    def one(ranks):
        with ranks.session("restore", "run") as session:
            severity = Severity.UNREADABLE if ranks.rank else Severity.OTHER_RANK
            return worst_outcome(session, severity, ValueError(ranks.rank))

    (outcome,) = set(simulated_ranks.run(4, one))
    assert (outcome.rank, outcome.error) == (1, "ValueError: 1")


def test_work_continues_in_the_session_that_was_entered():
    keys = MemoryKeyValueStore()

    def one(ranks):
        with EnteredRanks(ranks, "save", "run") as entered:
            assert (entered.rank, entered.size) == (ranks.rank, 3)
            entered.entered.gather(b"before")
            handed = entered.session("save", "run/step_1")
        found = []

        def work():
            with handed as session:
                found.append(session.broadcast(b"" if session.rank else b"within"))

        worker = threading.Thread(target=work)
        worker.start()
        worker.join(60)
        return found

    assert simulated_ranks.run(3, one, keys=keys) == [[b"within"]] * 3
    assert len(keys) == 0


def test_an_error_names_the_path_of_the_work_and_not_that_of_the_agreement():
    def one(ranks):
        with EnteredRanks(ranks, "save", "run") as entered:
            handed = entered.session("save", "run/step_1")
        with handed as session:
            session.phase("write")
            if session.rank == 1:
                raise OSError("disk full")
            session.gather(b"")
            session.broadcast(b"")

    def caught(ranks):
        try:
            one(ranks)
        except (OSError, RankFailed) as error:
            return getattr(error, "path", None), getattr(error, "phase", None)

    assert simulated_ranks.run(2, caught) == [("run/step_1", "write"), (None, None)]


def test_a_session_without_work_is_closed():
    with EnteredRanks(Solo(), "save", "run") as entered:
        pass
    with pytest.raises(RuntimeError, match="has ended before it began"):
        entered.session("save", "run/step_1")


def test_work_that_cannot_begin_fails_on_all_ranks():
    def one(ranks):
        try:
            with EnteredRanks(ranks, "save", "run") as entered:
                if ranks.rank == 1:
                    entered.fail(MemoryError("no thread"))
                    return "failed"
                entered.entered.gather(b"")
                entered.entered.broadcast(b"")
        except RankFailed as error:
            return error.rank, error.cause.splitlines()[-1]

    assert simulated_ranks.run(2, one) == [(1, "MemoryError: no thread"), "failed"]
