"""Names of step folders. They decide what is deleted, so they are parsed strictly."""

from __future__ import annotations

import re
from string import Formatter

from shardkeep.stores.names import checked_name

__all__ = ["StepNames"]

_WIDTH = re.compile(r"(0[1-9][0-9]?)?d?", re.ASCII)
_DIGITS = re.compile(r"[0-9]{1,18}", re.ASCII)
_PLACEHOLDER = "\0"


class _Placeholder:
    """Stands for the number of a step when the template is split at it."""

    def __format__(self, width: str) -> str:
        return _PLACEHOLDER


class StepNames:
    """Converts steps to the names of their folders and back.

    Args:
        template: the name, with `{step}` in it, or `{step:08}` to pad the number with zeros.

    Raises:
        ValueError: the template does not contain exactly one `{step}`, or is not a folder name.
    """

    def __init__(self, template: str = "step_{step}") -> None:
        parsed = list(Formatter().parse(template))
        fields = [(name, width, conv) for _, name, width, conv in parsed if name is not None]
        if len(fields) != 1 or fields[0][0] != "step" or fields[0][2] is not None:
            raise ValueError(
                f"name must contain {{step}} exactly once and no other field, not {template!r}"
            )
        if not _WIDTH.fullmatch(fields[0][1] or ""):
            raise ValueError(
                f"name must contain {{step}}, or {{step:08}} for a padded number, not {template!r}"
            )
        self._template = template
        self._prefix, _, self._suffix = template.format(step=_Placeholder()).partition(_PLACEHOLDER)
        if "/" in template or checked_name(self.name(0)) != self.name(0):
            raise ValueError(f"name must be the name of a single folder, not {template!r}")

    def name(self, step: int) -> str:
        """Return the folder name of a step.

        Raises:
            ValueError: the step is negative, or has more than 18 digits.
        """
        if not 0 <= step < 10**18:
            raise ValueError(f"step must be 0 or more, with at most 18 digits, not {step}")
        return self._template.format(step=step)

    def step(self, name: str) -> int | None:
        """Return the step whose folder has exactly this name, or None if there is no such step.

        "step_7" is the name of a step. "step_07", "step_7.bak", "step_-7", "step_７" and "Step_7"
        only resemble one.
        """
        digits = name[len(self._prefix) : len(name) - len(self._suffix)]
        if not _DIGITS.fullmatch(digits):
            return None
        step = int(digits)
        return step if self.name(step) == name else None
