"""An inert reader of pickles, protocols 0 to 5: no imports, no calls except to builders.

It is not based on `pickle.Unpickler`, whose C code crashes the interpreter on a deeply nested tuple
as a key, hangs on shared nested ones, takes 935 MB for a 9-byte pickle with a large memo index, and
sets any attribute, including `__class__`, from a state. Here every opcode uses a bounded amount of
memory and time, and the result has a bounded depth.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from shardkeep.errors import FormatError
from shardkeep.format.pickle.machine import Machine
from shardkeep.format.pickle.opcodes import TABLE
from shardkeep.format.pickle.registry import (
    CALLED,
    Builder,
    Limits,
    Reference,
    Registry,
    check_nesting,
    opaque_classes,
)

__all__ = [
    "CALLED",
    "Builder",
    "Limits",
    "Reference",
    "Registry",
    "loads",
    "loads_prefix",
    "opaque_classes",
]

_LIMITS = Limits()


_BROKEN = (
    LookupError,
    ValueError,
    TypeError,
    ArithmeticError,
    AttributeError,
    MemoryError,
    RecursionError,
    struct.error,
)
_EARLY = "it is cut short, or takes from its stack what is not there"


def loads(
    data: bytes | memoryview,
    builders: Mapping[str, Builder],
    *,
    file: str = "",
    persistent: Callable[[Any], Any] | None = None,
    limits: Limits = _LIMITS,
) -> Any:
    """Return the value of the pickle at the start of `data`; bytes after its STOP are ignored.

    Args:
        data: the pickle.
        builders: what may be built, by full name; any other global becomes an `Opaque`.
        file: names the file in errors.
        persistent: resolves a persistent id; without it, persistent ids are refused.
        limits: the budgets of the run.

    Raises:
        FormatError: the pickle is invalid, exceeds `limits`, or does what no checkpoint needs.
    """
    return loads_prefix(data, builders, file=file, persistent=persistent, limits=limits)[0]


def loads_prefix(
    data: bytes | memoryview,
    builders: Mapping[str, Builder],
    *,
    file: str = "",
    persistent: Callable[[Any], Any] | None = None,
    limits: Limits = _LIMITS,
) -> tuple[Any, int]:
    """Return the value of a pickle, and how many bytes the pickle takes, including its STOP."""
    registry = builders if isinstance(builders, Registry) else Registry(builders)
    machine = Machine(bytes(data), registry, persistent, limits)
    try:
        value = machine.run(TABLE)
        check_nesting(value, limits.depth, limits.parts + 16 * machine.end)
    except FormatError as error:
        raise error.within(file=file, place=f"offset {machine.at}") from error
    except _BROKEN as error:
        what = _EARLY if isinstance(error, (IndexError, struct.error)) else f"{error}"[:200]
        place = f"offset {machine.at}"
        raise FormatError(f"invalid pickle: {what}", file=file, place=place) from error
    # An error's traceback keeps the machine alive; it should not keep a pickle bomb alive as well.
    finally:
        machine.stack.clear()
        machine.memo.clear()
    return value, machine.end
