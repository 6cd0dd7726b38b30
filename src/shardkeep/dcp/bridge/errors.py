"""The engine's errors as `CheckpointException`s, so that handlers for either catch them."""

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

from shardkeep.dcp.bridge.torch_messages import missing_key, size_mismatch
from shardkeep.dcp.bridge.trust import how_to_trust
from shardkeep.errors import Mismatch, RankFailed, Untrusted

__all__ = ["Failures", "as_torch", "failed", "portable", "together", "wrapped"]

Failures = Mapping[int, tuple[BaseException, StackSummary]]
"""Rank -> the error that it raised, and its traceback."""

_MAX_NAMES_SHOWN = 40
_SHAPES = re.compile(r"shape: (\[.*\]) in the checkpoint, (\[.*\]) in the template")


class as_torch:
    """A context in which every error is raised as a `CheckpointException` of its own class, too.

    Args:
        rank: this rank, under which its errors are listed in `failures`.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __enter__(self) -> None:
        """Do nothing."""

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
    """Return an error and its traceback, as other ranks can unpickle them.

    The text of the error has torch's own message where torch has one for the case.
    """
    if isinstance(error, Untrusted):
        error.args = Untrusted(error.name, error.classes, how_to_trust(error.classes)).args
    elif isinstance(error, Mismatch):
        error.args = ("\n".join(dict.fromkeys([str(error), *_torch_messages(error)])),)
    # The frames are made anew: those of Python 3.13 refer to code, which can't be pickled.
    frames = traceback.extract_tb(error.__traceback__)
    plain = [(frame.filename, frame.lineno or 0, frame.name, frame.line) for frame in frames]
    if isinstance(error, RankFailed):
        # Python prints notes below all ranks' tracebacks, where this one would hide who failed.
        error = copy(error)
        error.__dict__.pop("__notes__", None)
    return error, StackSummary.from_list(plain)


def _torch_messages(error: Mismatch) -> list[str]:
    """Return torch's messages for the names that do not match; programs look for them."""
    refused: Mapping[str, str] = getattr(error.report, "refused", {})
    lines = []
    for name, why in list(refused.items())[:_MAX_NAMES_SHOWN]:
        if why.startswith("missing: "):
            lines.append(missing_key(name))
        elif shapes := _SHAPES.fullmatch(why):
            saved, current = (f"torch.Size({shape})" for shape in shapes.groups())
            lines.append(size_mismatch(name, saved, current))
    return lines


def together(phase: str, failures: Failures) -> CheckpointException:
    """Return the error that all ranks raise when some of them have failed.

    If all errors are of one class, it is of that class as well.

    Args:
        phase: what the ranks were doing.
        failures: the errors of the ranks that failed; at least one.
    """
    errors = [error for error, _ in failures.values()]
    if len({type(error) for error in errors}) == 1:
        return failed(errors[0], failures)
    return failed(Exception(f"{len(errors)} ranks failed in phase {phase!r}"), failures)


def failed(error: BaseException, failures: Failures) -> CheckpointException:
    """Return a `CheckpointException` that is an instance of the class of `error` as well.

    It has the error's arguments and attributes, and can be pickled. If the class does not allow
    subclasses, it is a plain `CheckpointException`.

    Args:
        error: the error.
        failures: the errors of all ranks that failed.
    """
    if isinstance(error, CheckpointException):  # Raised by a save or load inside this one.
        error = getattr(error, "_error", error)
    try:
        made = _like(error)
    except Exception:  # A class may raise anything when a subclass is made.
        made = _like(Exception(*error.args))
    made._error, made._failures = error, dict(failures)
    assert isinstance(made, CheckpointException)
    return made


def _like(error: BaseException) -> Any:
    """Return a copy of an error that is a `CheckpointException`, too.

    No code of the error's own class runs.
    """
    if not isinstance(error, Exception):
        raise TypeError(f"{type(error).__name__} ends a program; it is not a failure of a rank")
    kind: Any = type(error)
    native: Any = next(base for base in kind.__mro__ if base.__module__ == "builtins")
    # Some errors have more than `args`, such as the file of an OSError.
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
    """Pickle what the error is made from, as its class can't be found by name."""
    return failed, (_picklable(self._error), portable(self._failures))


def portable(failures: Failures) -> dict[int, tuple[BaseException, StackSummary]]:
    """Return the failures with a RuntimeError in place of each error that can't be pickled."""
    return {rank: (_picklable(error), trace) for rank, (error, trace) in failures.items()}


def _picklable(error: BaseException) -> BaseException:
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):  # noqa: S301 - just made
            return error
    except Exception:  # noqa: S110 - its class may raise anything
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
