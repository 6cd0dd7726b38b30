"""The engine's errors as torch's: what is caught today as either goes on being caught."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from shardkeep.errors import RankFailed

__all__ = ["as_torch", "failed"]


@contextmanager
def as_torch(rank: int) -> Iterator[None]:
    """Raise every error as a `CheckpointException` that is of the error's own class, too.

    Args:
        rank: this rank, under which its own errors stand in `failures`.
    """
    try:
        yield
    except CheckpointException:
        raise
    except Exception as error:
        where = error.rank if isinstance(error, RankFailed) else rank
        frames = traceback.extract_tb(error.__traceback__)
        raise failed(error, {where: (error, frames)}) from error


def failed(error: BaseException, failures: dict[int, Any]) -> CheckpointException:
    """A `CheckpointException` with these failures that is an instance of `error`'s class as well.

    Where no such class can be made, it is a plain `CheckpointException`.
    """
    both: Any = None
    try:
        both = _both(type(error)).__new__(_both(type(error)), *error.args)
        vars(both).update(vars(error))
        CheckpointException.__init__(both, str(error), failures)
    except TypeError:  # Classes whose layouts clash, or that want other arguments.
        both = CheckpointException(str(error), failures)
    assert isinstance(both, CheckpointException)
    return both


@cache
def _both(kind: type[BaseException]) -> type[BaseException]:
    return type(kind.__name__, (CheckpointException, kind), {"__module__": kind.__module__})
