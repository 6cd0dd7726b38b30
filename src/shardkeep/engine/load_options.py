"""Options of a load: one typed dictionary for callers, one validated value for the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from typing_extensions import TypedDict

from shardkeep import settings
from shardkeep.coordination.events import EventHook
from shardkeep.state.per_rank import ChooseRank, PerRankMode
from shardkeep.types import Progress

__all__ = ["DtypePolicy", "LoadConfig", "LoadOptions", "PerRankPolicy", "StrictPolicy"]

DtypeMode = Literal["error", "cast", "upcast"]
StrictPolicy = bool | Mapping[str, bool]
DtypePolicy = DtypeMode | Mapping[str, DtypeMode]
PerRankPolicy = PerRankMode | ChooseRank | Mapping[str, PerRankMode | ChooseRank]


class LoadOptions(TypedDict, total=False):
    """Keyword arguments that `load` and `Manager.restore` share.

    Example:
        >>> options: shardkeep.LoadOptions = {"strict": {"optim.*": False}, "dtype": "cast"}
        >>> report = shardkeep.load(state, "run/step_100", **options)
    """

    strict: StrictPolicy
    """Whether a name that the checkpoint lacks is an error; also per name pattern."""
    dtype: DtypePolicy
    """What to do with a tensor whose stored dtype differs; also per name pattern."""
    trust: Sequence[str]
    """Classes, as "module.Class", that objects may contain besides plain values."""
    per_rank: PerRankPolicy
    """What to do with a `PerRank` value of another number of ranks; also per name pattern."""
    verify: bool
    """Check the checksums of everything that is read."""
    max_host_memory: int | None
    """Bytes of host memory that the reading may use."""
    progress: Progress | bool | None
    """Callback for progress; True shows a progress bar."""
    on_event: EventHook | None
    """Hook that receives every event of the load."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LoadConfig:
    """Validated options of one load; see `LoadOptions`.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option has a value that is not allowed. It is refused even if no name of
            this checkpoint needs it, since the next checkpoint may.
    """

    strict: StrictPolicy = True
    dtype: DtypePolicy = "error"
    trust: Sequence[str] = ()
    per_rank: PerRankPolicy = "error"
    verify: bool = True
    max_host_memory: int | None = None
    progress: Progress | bool | None = None
    on_event: EventHook | None = None

    def __post_init__(self) -> None:
        for dtype in _values(self.dtype):
            if dtype not in get_args(DtypeMode):
                modes = get_args(DtypeMode)
                raise ValueError(f"dtype policy must be one of {modes}, not {dtype!r}")
        for strict in _values(self.strict):
            if not isinstance(strict, bool):
                raise ValueError(f"strict must be True or False, not {strict!r}")
        for choice in _values(self.per_rank):
            if not callable(choice) and choice not in get_args(PerRankMode):
                modes = get_args(PerRankMode)
                raise ValueError(f"per_rank must be one of {modes} or a function, not {choice!r}")
        if isinstance(self.trust, str):
            raise TypeError(f"trust must be a list of class names, not the string {self.trust!r}")
        settings.check_max_host_memory(self.max_host_memory)
        if self.on_event is not None and not callable(self.on_event):
            raise TypeError(f"on_event must be a function or None, not {self.on_event!r}")

    @classmethod
    def of(cls, function: str, options: Mapping[str, Any]) -> LoadConfig:
        """Return the validated options of a call.

        Args:
            function: the name of the called function, for the error message.
            options: its keyword arguments.

        Raises:
            TypeError: a keyword argument is unknown, or has the wrong type.
            ValueError: an option has a value that is not allowed.
        """
        known = list(LoadOptions.__annotations__)
        for name in options:
            if name not in known:
                similar = get_close_matches(name, known, 1)
                hint = f"; did you mean {similar[0]!r}?" if similar else ""
                raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")
        return cls(**options)

    def is_strict(self, name: str) -> bool:
        """Return whether it is an error if the checkpoint lacks this name."""
        strict: bool = _matching(self.strict, name, True)
        return strict

    def dtype_mode(self, name: str) -> DtypeMode:
        """Return what to do if the stored dtype of this tensor differs."""
        mode: DtypeMode = _matching(self.dtype, name, "error")
        return mode

    def per_rank_mode(self, name: str) -> PerRankMode | ChooseRank:
        """Return what to do if another number of ranks saved this `PerRank` value."""
        mode: PerRankMode | ChooseRank = _matching(self.per_rank, name, "error")
        return mode


def _values(policy: Any) -> list[Any]:
    return list(policy.values()) if isinstance(policy, Mapping) else [policy]


def _matching(policy: Any, name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the name, or the policy of all names."""
    if not isinstance(policy, Mapping):
        return policy
    return next((value for pattern, value in policy.items() if fnmatchcase(name, pattern)), default)
