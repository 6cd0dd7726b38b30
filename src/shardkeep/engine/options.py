"""Options of a save: one typed dictionary for callers, one validated value for the engine."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from numbers import Integral
from typing import Any

from typing_extensions import TypedDict

from shardkeep import settings
from shardkeep.coordination.events import EventHook
from shardkeep.types import Progress

__all__ = ["AsyncSaveOptions", "SaveConfig", "SaveOptions"]

_SAVE_ID = re.compile(r"[0-9a-f]{32}")


class SaveOptions(TypedDict, total=False):
    """Keyword arguments that `save`, `async_save` and `Manager` share.

    Example:
        >>> options: shardkeep.SaveOptions = {"files": 4, "max_host_memory": 256 << 20}
        >>> report = shardkeep.save(state, "run/step_100", **options)
    """

    flatten: bool
    """Store nested containers leaf by leaf. False stores each top-level value as one object."""
    files: int | None
    """Number of data files that each rank writes at most; None lets Shardkeep choose."""
    balance_replicas: bool
    """Distribute replicated tensors over the ranks that hold them."""
    require_identical_objects: bool
    """Refuse to save an object whose value differs between ranks."""
    max_host_memory: int | None
    """Bytes of host memory that the save may use for copies and buffers."""
    retries: int
    """Number of times that a rank writes its files again after an `OSError`."""
    progress: Progress | bool | None
    """Callback for progress; True shows a progress bar."""
    on_event: EventHook | None
    """Hook that receives every event of the save."""


class AsyncSaveOptions(SaveOptions, total=False):
    """Keyword arguments that only saves in the background take, besides `SaveOptions`.

    Example:
        >>> options: shardkeep.AsyncSaveOptions = {"low_priority": True}
        >>> handle = shardkeep.async_save(state, "run/step_100", **options)
    """

    low_priority: bool
    """Write with the lowest scheduling priority."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SaveConfig:
    """Validated options of one save. Nothing is written before they are validated.

    Attributes:
        overwrite: replace a checkpoint that is already at the path.
        save_id: the id of the save; None generates one.
        metrics: finite numbers to store with the checkpoint.
        step: the training step that events and log lines name.
        low_priority: write with the lowest scheduling priority (background saves only).

    The other attributes are documented in `SaveOptions`.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option has a value out of range.
    """

    overwrite: bool = False
    save_id: str | None = None
    metrics: Mapping[str, float] | None = None
    step: int | None = None
    flatten: bool = True
    files: int | None = None
    balance_replicas: bool = True
    require_identical_objects: bool = True
    max_host_memory: int | None = None
    retries: int = 0
    progress: Progress | bool | None = None
    on_event: EventHook | None = None
    low_priority: bool = False

    def __post_init__(self) -> None:
        for name in _FLAGS:
            _check_flag(name, getattr(self, name))
        if self.files is not None:
            _check_count("files", self.files, 1)
        _check_count("retries", self.retries, 0)
        settings.check_max_host_memory(self.max_host_memory)
        _check_save_id(self.save_id)
        if not isinstance(self.progress, bool):
            _check_callback("progress", self.progress, "True, False, ")
        _check_callback("on_event", self.on_event)

    @classmethod
    def of(
        cls,
        function: str,
        allowed: type[SaveOptions],
        options: Mapping[str, Any],
        **explicit: Any,
    ) -> SaveConfig:
        """Return the validated options of a call.

        Args:
            function: the name of the called function, for the error message.
            allowed: the typed dictionary that lists the keyword arguments of the function.
            options: the keyword arguments as the caller passed them.
            explicit: options that the function names in its own signature.

        Raises:
            TypeError: a keyword argument is unknown, or has the wrong type.
            ValueError: an option has a value out of range.
        """
        known = list(allowed.__annotations__)
        for name in options:
            if name not in known:
                similar = get_close_matches(name, [*known, *explicit], 1)
                hint = f"; did you mean {similar[0]!r}?" if similar else ""
                raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")
        return cls(**options, **explicit)


_FLAGS = tuple(field.name for field in fields(SaveConfig) if field.type == "bool")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def _check_count(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number of at least {minimum}, not {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {value!r}")


def _check_save_id(value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise TypeError(f"save_id must be a string of 32 hexadecimal digits, not {value!r}")
    if not _SAVE_ID.fullmatch(value):
        raise ValueError(f"save_id must be 32 lowercase hexadecimal digits, not {value!r}")


def _check_callback(name: str, value: Callable[..., object] | None, others: str = "") -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be {others}None or a callable, not {value!r}")
