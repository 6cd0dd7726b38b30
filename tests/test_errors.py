"""Errors: their fields, their messages, and that they survive pickling."""

from __future__ import annotations

import pickle
from typing import get_type_hints

import pytest

import shardkeep as sk
from shardkeep import errors

HOSTILE = "w\x1b[2J\n\u202e"

MADE = [
    sk.ShardkeepError("why"),
    sk.NotACheckpoint("run is empty"),
    sk.AlreadyExists("run already holds a checkpoint"),
    sk.AsyncSaveFailed("run", "OSError: full"),
    sk.FormatError("no opcode", file=".metadata", place="byte 0"),
    sk.Damaged("too short", file="__3_0_ab.distcp", name="w", block=2),
    sk.Conflict("two values"),
    sk.LeaseLost("late"),
    sk.Mismatch("names differ", report=None),
    sk.Untrusted("config", ("mine.Config", "mine.Other")),
    sk.RankFailed(3, "node", "write", "run", "Traceback\nOSError: full"),
]


def test_every_error_is_tried_here():
    names = set(errors.__all__)
    assert {type(error).__name__ for error in MADE} >= names - {"Replaced"}


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_errors_survive_pickling_with_their_fields(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_every_field_of_an_error_has_a_type(error):
    hints = type(error).__annotations__ if vars(error) else {}
    assert set(vars(error)) - {"__notes__"} <= set(hints)


def test_types_of_fields_resolve():
    assert get_type_hints(sk.Damaged)["block"] == int | None
    assert get_type_hints(sk.Untrusted)["classes"] == tuple[str, ...]


@pytest.mark.parametrize(
    "error",
    [
        sk.FormatError(HOSTILE, file=HOSTILE, place=HOSTILE),
        sk.Damaged(HOSTILE, file=HOSTILE, name=HOSTILE, block=1),
        sk.Untrusted(HOSTILE, (HOSTILE,)),
        sk.RankFailed(1, "node", "read", "run", f"Traceback\n{HOSTILE}"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_hostile_names_are_escaped_in_messages_and_kept_in_fields(error):
    assert str(error).isprintable()
    assert any(HOSTILE in value for value in vars(error).values() if isinstance(value, str))


def test_messages_say_what_where_and_what_to_do():
    assert str(MADE[4]) == ".metadata, byte 0: no opcode"
    assert str(MADE[5]) == "__3_0_ab.distcp, 'w', block 2: too short"
    assert MADE[5].rank == 3
    assert str(MADE[9]).endswith('pass trust=["mine.Config", "mine.Other"]')
    assert str(MADE[10]) == "rank 3 on node failed in phase 'write' of run: OSError: full"
    assert MADE[10].__notes__ == ["On rank 3:\nTraceback\nOSError: full"]
