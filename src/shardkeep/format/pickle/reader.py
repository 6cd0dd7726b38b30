"""An inert reader of pickles, protocols 0 to 5: own opcodes, no imports, no calls but to builders.

Not built on `pickle.Unpickler`: its C code crashes the interpreter on a deeply nested tuple as a
key, hangs on shared nested ones, takes 935 MB for a 9-byte pickle with a large memo index, and
sets any attribute, `__class__` included, from a state. Here every opcode makes a bounded amount of
memory and takes a bounded time, and what comes out has bounded depth.
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
    """The value of the pickle that `data` begins with; bytes behind its STOP are not looked at.

    Args:
        data: the pickle.
        builders: what may be built, by full name; anything else becomes an `Opaque`.
        file: names it in errors.
        persistent: what a persistent id stands for; without it, they are refused.
        limits: what it may take.

    Raises:
        FormatError: it is broken, takes more than `limits`, or does what no checkpoint needs.
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
    """As `loads`; the value, and how many bytes the pickle takes, its STOP included."""
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
        raise FormatError(f"broken pickle: {what}", file=file, place=place) from error
    finally:  # an error's traceback keeps the machine: it should not keep a bomb as well
        machine.stack.clear()
        machine.memo.clear()
    return value, machine.end
