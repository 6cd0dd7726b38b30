"""Keep policies: which steps of a run stay. `|` keeps what either of two policies keeps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from shardkeep.types import Step

__all__ = [
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepPolicy",
    "Mode",
    "by_metric",
    "steps_to_delete",
]

Mode = Literal["min", "max"]


class KeepPolicy(Protocol):
    """Says which steps of a run to keep.

    Example:
        >>> class KeepFirst:
        ...     def keep(self, steps):
        ...         return [step.number for step in steps[:1]]
        >>> run = shardkeep.Manager("run", keep=shardkeep.KeepLast(3) | KeepFirst())
    """

    def keep(self, steps: Sequence[Step]) -> Collection[int]:
        """Return the numbers of the steps to keep.

        The step that was just saved and the newest readable step are kept in any case.

        Args:
            steps: all committed steps of the run, in ascending order.
        """
        ...


class _Combinable:
    """A policy that `|` combines with any other policy."""

    def __or__(self, other: KeepPolicy) -> Either:
        return Either(self, other)  # type: ignore[arg-type]

    def __ror__(self, other: KeepPolicy) -> Either:
        return Either(other, self)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Either(_Combinable, KeepPolicy):
    """Keeps the steps that at least one of two policies keeps: what `first | second` returns.

    Args:
        first: a policy.
        second: another policy.
    """

    first: KeepPolicy
    second: KeepPolicy

    def keep(self, steps: Sequence[Step]) -> Collection[int]:
        return {*self.first.keep(steps), *self.second.keep(steps)}

    def __repr__(self) -> str:
        return f"{self.first!r} | {self.second!r}"


@dataclass(frozen=True, slots=True)
class KeepLast(_Combinable, KeepPolicy):
    """Keeps the newest `n` steps.

    Args:
        n: how many steps, at least 1.

    Example:
        >>> run = shardkeep.Manager("run", keep=shardkeep.KeepLast(3))
    """

    n: int = 1

    def __post_init__(self) -> None:
        _check_count(self, self.n)

    def keep(self, steps: Sequence[Step]) -> Collection[int]:
        return {step.number for step in steps[-self.n :]}


@dataclass(frozen=True, slots=True)
class KeepEvery(_Combinable, KeepPolicy):
    """Keeps the steps whose number is a multiple of `n`.

    Args:
        n: the interval in steps, at least 1.

    Example:
        >>> keep = shardkeep.KeepLast(3) | shardkeep.KeepEvery(10_000)
    """

    n: int

    def __post_init__(self) -> None:
        _check_count(self, self.n)

    def keep(self, steps: Sequence[Step]) -> Collection[int]:
        return {step.number for step in steps if step.number % self.n == 0}


@dataclass(frozen=True, slots=True)
class KeepBest(_Combinable, KeepPolicy):
    """Keeps the `n` steps with the best value of a metric. Steps without the metric do not count.

    Args:
        metric: the name of the metric, as it was passed to `Manager.save`.
        n: how many steps, at least 1.
        mode: "min" if lower values are better, "max" if higher values are. Of several steps with
            the same value, the newer ones are better.

    Example:
        >>> keep = shardkeep.KeepBest("loss", n=2) | shardkeep.KeepBest("accuracy", mode="max")
    """

    metric: str
    n: int = 1
    mode: Mode = "min"

    def __post_init__(self) -> None:
        _check_count(self, self.n)
        by_metric((), self.metric, self.mode)

    def keep(self, steps: Sequence[Step]) -> Collection[int]:
        return {step.number for step in by_metric(steps, self.metric, self.mode)[: self.n]}


def by_metric(steps: Sequence[Step], metric: str, mode: Mode) -> list[Step]:
    """Return the steps that have a metric, the best first; of equal ones, the newest first.

    Raises:
        ValueError: `mode` is neither "min" nor "max".
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', not {mode!r}")
    sign = 1 if mode == "min" else -1
    measured = [step for step in steps if metric in step.metrics]
    return sorted(measured, key=lambda step: (sign * step.metrics[metric], -step.number))


def steps_to_delete(
    steps: Sequence[Step], policy: KeepPolicy, protected: Collection[int]
) -> list[int]:
    """Return the numbers of the steps that neither the policy keeps nor `protected` contains."""
    kept = {*policy.keep(steps), *protected}
    return [step.number for step in steps if step.number not in kept]


def _check_count(policy: object, n: int) -> None:
    if type(n) is not int or n < 1:
        raise ValueError(
            f"n of {type(policy).__name__} must be a whole number from 1 on, not {n!r}"
        )
