"""Names of the folders of steps. They decide what is deleted, so they are read strictly."""

from __future__ import annotations

import re
from string import Formatter

from shardkeep.stores.names import checked

__all__ = ["StepNames"]

_WIDTH = re.compile(r"(0[1-9][0-9]?)?d?", re.ASCII)
_DIGITS = re.compile(r"[0-9]{1,18}", re.ASCII)


_MARK = "\0"


class _Mark:
    """Stands where a step's number goes."""

    def __format__(self, width: str) -> str:
        return _MARK


class StepNames:
    """Step ⇄ name of its folder.

    Args:
        template: the name, with `{step}` in it, or `{step:08}` for zeros in front.

    Raises:
        ValueError: the template has no step in it, or could be no folder's name.
    """

    def __init__(self, template: str = "step_{step}") -> None:
        parts = list(Formatter().parse(template))
        fields = [(name, width, how) for _, name, width, how in parts if name is not None]
        if len(fields) != 1 or fields[0][0] != "step" or fields[0][2] is not None:
            raise ValueError(f"{template!r} must have {{step}} in it, once, and no other field")
        if not _WIDTH.fullmatch(fields[0][1] or ""):
            raise ValueError(f"{template!r}: a step can be {{step}} or, say, {{step:08}}")
        self._template = template
        self._before, _, self._after = template.format(step=_Mark()).partition(_MARK)
        if "/" in template or checked(self.name(0)) != self.name(0):
            raise ValueError(f"{template!r} is no name of a folder")

    def name(self, step: int) -> str:
        """The folder of a step. ValueError if the step is negative or has more than 18 digits."""
        if not 0 <= step < 10**18:
            raise ValueError(f"a step is a whole number from 0 on, not {step}")
        return self._template.format(step=step)

    def step(self, name: str) -> int | None:
        """The step whose folder has exactly this name; None if it is not one of ours.

        "step_7" is; "step_07", "step_7.bak", "step_-7", "step_７" and "Step_7" only resemble one.
        """
        digits = name[len(self._before) : len(name) - len(self._after)]
        if not _DIGITS.fullmatch(digits):
            return None
        step = int(digits)
        return step if self.name(step) == name else None
