"""Which steps stay: each policy is one method, and `|` keeps what either of two keeps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from shardkeep.types import Step

__all__ = ["KeepBest", "KeepEvery", "KeepLast", "KeepPolicy", "Mode", "best_first", "doomed"]

Mode = Literal["min", "max"]


class KeepPolicy(Protocol):
    """Which steps of a run stay."""

    def keep(self, steps: Sequence[Step]) -> Collection[int]:
        """The numbers of those to keep, of all that are committed, which come in ascending order.

        The step that was just saved and the newest whole one stay in any case.
        """
        ...


class _Combined:
    """Policies that `|` joins, with each other and with any of your own."""

    def __or__(self, other: KeepPolicy) -> Either:
        return Either(self, other)  # type: ignore[arg-type]

    def __ror__(self, other: KeepPolicy) -> Either:
        return Either(other, self)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Either(_Combined, KeepPolicy):
    """What one of two policies keeps, or both."""

    one: KeepPolicy
    other: KeepPolicy

    def keep(self, steps: Sequence[Step]) -> Collection[int]:
        return {*self.one.keep(steps), *self.other.keep(steps)}


@dataclass(frozen=True, slots=True)
class KeepLast(_Combined, KeepPolicy):
    """The newest `n` steps."""

    n: int = 1

    def __post_init__(self) -> None:
        _at_least_one(self, self.n)

    def keep(self, steps: Sequence[Step]) -> Collection[int]:
        return {step.number for step in steps[-self.n :]}


@dataclass(frozen=True, slots=True)
class KeepEvery(_Combined, KeepPolicy):
    """Steps whose number is a multiple of `n`."""

    n: int

    def __post_init__(self) -> None:
        _at_least_one(self, self.n)

    def keep(self, steps: Sequence[Step]) -> Collection[int]:
        return {step.number for step in steps if step.number % self.n == 0}


@dataclass(frozen=True, slots=True)
class KeepBest(_Combined, KeepPolicy):
    """The `n` steps with the best value of a metric; of equal ones, the later.

    Steps that were saved without that metric are not among the best.

    Args:
        mode: "min" if less is better, or "max".
    """

    metric: str
    n: int = 1
    mode: Mode = "min"

    def __post_init__(self) -> None:
        _at_least_one(self, self.n)
        best_first((), self.metric, self.mode)

    def keep(self, steps: Sequence[Step]) -> Collection[int]:
        return {step.number for step in best_first(steps, self.metric, self.mode)[: self.n]}


def best_first(steps: Sequence[Step], metric: str, mode: Mode) -> list[Step]:
    """Steps that have a metric, the best first; of equal ones, the later. ValueError for a mode."""
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', not {mode!r}")
    sign = 1 if mode == "min" else -1
    having = [step for step in steps if metric in step.metrics]
    return sorted(having, key=lambda step: (sign * step.metrics[metric], -step.number))


def doomed(steps: Sequence[Step], policy: KeepPolicy, protected: Collection[int]) -> list[int]:
    """Which of the committed steps, ascending, neither a policy nor anything else keeps."""
    kept = {*policy.keep(steps), *protected}
    return [step.number for step in steps if step.number not in kept]


def _at_least_one(policy: object, n: int) -> None:
    if type(n) is not int or n < 1:
        raise ValueError(f"{type(policy).__name__} keeps from 1 on, not {n!r}")
