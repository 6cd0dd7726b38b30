"""The engine's errors as torch's: what is caught today as either goes on being caught."""

from __future__ import annotations

import pickle
import re
import traceback
from collections.abc import Mapping
from copy import copy
from functools import cache
from traceback import StackSummary
from types import TracebackType
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from shardkeep.dcp.bridge.trust import how_to_trust
from shardkeep.errors import Mismatch, RankFailed, Untrusted

__all__ = ["Failures", "as_torch", "failed", "portable", "together", "wrapped"]

Failures = Mapping[int, tuple[BaseException, StackSummary]]
"""Rank -> what it raised, and where."""

_SHOWN = 40
_SHAPES = re.compile(r"shape: (\[.*\]) in the checkpoint, (\[.*\]) in the template")


class as_torch:
    """Raise every error in a block as a `CheckpointException` of the error's own class, too.

    Args:
        rank: this rank, under which its own errors stand in `failures`.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, CheckpointException):
            rank = error.rank if isinstance(error, RankFailed) else self._rank
            raise failed(error, {rank: wrapped(error)}) from error


def wrapped(error: BaseException) -> tuple[BaseException, StackSummary]:
    """An error, in torch's words where it has some, and where it was raised; both can travel."""
    if isinstance(error, Untrusted):
        error.args = Untrusted(error.name, error.classes, how_to_trust(error.classes)).args
    elif isinstance(error, Mismatch):
        error.args = ("\n".join(dict.fromkeys([str(error), *_torchs_words(error)])),)
    # Frames of their own: those of Python 3.13 carry code, which can't be pickled.
    frames = traceback.extract_tb(error.__traceback__)
    plain = [(frame.filename, frame.lineno or 0, frame.name, frame.line) for frame in frames]
    if isinstance(error, RankFailed):
        error = copy(error)  # Python shows its note below the whole: here it would hide who failed.
        error.__dict__.pop("__notes__", None)
    return error, StackSummary.from_list(plain)


def _torchs_words(error: Mismatch) -> list[str]:
    """What torch says of the same names: there are programs that look for it."""
    refused: Mapping[str, str] = getattr(error.report, "refused", {})
    lines = []
    for name, why in list(refused.items())[:_SHOWN]:
        if why.startswith("missing: "):
            lines.append(f"Missing key in checkpoint state_dict: {name}.")
        elif shapes := _SHAPES.fullmatch(why):
            saved, current = (f"torch.Size({shape})" for shape in shapes.groups())
            lines.append(f"Size mismatch between saved {saved} and current: {current} for {name}")
    return lines


def together(phase: str, failures: Failures) -> CheckpointException:
    """What all ranks raise of what some of them did; of its class, if all did the same.

    Args:
        phase: what they were doing.
        failures: of the ranks that failed; at least one.
    """
    errors = [error for error, _ in failures.values()]
    if len({type(error) for error in errors}) == 1:
        return failed(errors[0], failures)
    return failed(Exception(f"{len(errors)} ranks failed in phase {phase!r}"), failures)


def failed(error: BaseException, failures: Failures) -> CheckpointException:
    """A `CheckpointException` with these failures that is an instance of `error`'s class as well.

    It has the error's arguments and attributes, and can be pickled. Where the class can't be
    derived from, it is an `Exception` only.
    """
    if isinstance(error, CheckpointException):  # Of a save or load inside this one.
        error = getattr(error, "_error", error)
    try:
        made = _like(error)
    except Exception:  # Whatever a class does to those who derive from it.
        made = _like(Exception(*error.args))
    made._error, made._failures = error, dict(failures)
    assert isinstance(made, CheckpointException)
    return made


def _like(error: BaseException) -> Any:
    """A copy of the error, of a class that is torch's too. No code of its own class runs."""
    if not isinstance(error, Exception):
        raise TypeError("Python's own ways of ending a program are no failures")
    kind: Any = type(error)
    native: Any = next(base for base in kind.__mro__ if base.__module__ == "builtins")
    # Some have more than `args`: the file of an OSError, the bytes of a UnicodeDecodeError.
    _, args, *state = native.__reduce__(error)
    made = native.__new__(_both(kind), *args)
    native.__init__(made, *args)
    for attributes in filter(None, state):
        native.__setstate__(made, attributes)
    return made


@cache
def _both(kind: type[BaseException]) -> type[BaseException]:
    named = CheckpointException if kind is Exception else kind
    parts = {"__module__": named.__module__, "__reduce__": _reduce}
    return type(named.__name__, (CheckpointException, kind), parts)


def _reduce(self: Any) -> Any:
    """The class can't be found by its name: it is made again from what it is made of."""
    return failed, (_travelling(self._error), portable(self._failures))


def portable(failures: Failures) -> dict[int, tuple[BaseException, StackSummary]]:
    """The failures, with text in place of exceptions that can't be pickled and come back."""
    return {rank: (_travelling(error), trace) for rank, (error, trace) in failures.items()}


def _travelling(error: BaseException) -> BaseException:
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):  # noqa: S301 - just made
            return error
    except Exception:  # noqa: S110 - whatever its class does
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
