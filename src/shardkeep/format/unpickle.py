"""An inert reader of pickles, protocols 0 to 5: own opcodes, no imports, no calls but to builders.

Not built on `pickle.Unpickler`: its C code crashes the interpreter on a deeply nested tuple as a
key, hangs on shared nested ones, takes 935 MB for a 9-byte pickle with a large memo index, and
sets any attribute, `__class__` included, from a state. Here every opcode makes a bounded amount of
memory and takes a bounded time, and what comes out has bounded depth.
"""

from __future__ import annotations

import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from codecs import escape_decode
from collections.abc import Callable, Mapping
from typing import Any

from shardkeep.errors import FormatError
from shardkeep.format.inert import (
    CALLED,
    Builder,
    Limits,
    Reference,
    Registry,
    check_nesting,
    opaque_classes,
)
from shardkeep.types import Opaque

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

DEFAULT_LIMITS = Limits()


def loads(
    data: bytes | memoryview,
    builders: Mapping[str, Builder],
    *,
    file: str = "",
    persistent: Callable[[Any], Any] | None = None,
    limits: Limits = DEFAULT_LIMITS,
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
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[Any, int]:
    """As `loads`; the value, and how many bytes the pickle takes, its STOP included."""
    registry = builders if isinstance(builders, Registry) else Registry(builders)
    machine = _Machine(bytes(data), registry, persistent, limits)
    try:
        value = machine.run()
        check_nesting(value, limits.depth)
    except FormatError as error:
        raise error.within(file=file, place=f"offset {machine.at}") from error
    except _BROKEN as error:
        what = _EARLY if isinstance(error, (IndexError, struct.error)) else f"{error}"
        place = f"offset {machine.at}"
        raise FormatError(f"broken pickle: {what}", file=file, place=place) from error
    return value, machine.end


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

_ROOM = 100
"""Bytes that a container, a memo entry or an instance is counted with."""

_COST = {str: 4, bytes: 2, bytearray: 2, list: 64, tuple: 64, dict: 128, set: 128, frozenset: 128}
"""Bytes that a builder is expected to make at most, for each item of an argument."""

_INT64 = 1 << 63


class _Machine:
    """The state of one run. Opcodes are functions of (machine, position): the next position."""

    __slots__ = (
        "at",
        "buckets",
        "data",
        "end",
        "grown",
        "hashed",
        "limits",
        "marks",
        "memo",
        "persistent",
        "protocol",
        "registry",
        "room",
        "size",
        "stack",
    )

    def __init__(
        self,
        data: bytes,
        registry: Registry,
        persistent: Callable[[Any], Any] | None,
        limits: Limits,
    ) -> None:
        self.data = data
        self.size = len(data)
        self.registry = registry
        self.persistent = persistent
        self.limits = limits
        self.room = limits.memory + limits.growth * len(data)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}  # never a list: an index may be 2**32 - 1
        self.buckets: dict[int, list[Any]] = {}
        self.hashed: dict[int, Opaque] = {}  # stand-ins that are keys: they may not change
        self.grown: dict[int, Any] = {}  # lists and dicts that stand-ins were given items in
        self.protocol = 0
        self.at = 0
        self.end = 0

    def run(self) -> Any:
        data, table, at = self.data, _TABLE, 0
        try:
            while at >= 0:
                start = at
                at = table[data[at]](self, at + 1)
        finally:
            self.at = start
        self.end = start + 1
        return self.stack.pop()

    def take(self, at: int, length: int) -> bytes:
        """`length` bytes of the pickle."""
        if length > self.size - at:
            raise FormatError(f"{length} bytes are announced, {self.size - at} are there")
        return self.data[at : at + length]

    def line(self, at: int) -> tuple[bytes, int]:
        """The bytes up to the next line feed, and where the next line starts."""
        end = self.data.index(b"\n", at)
        return self.data[at:end], end + 1

    def count(self, nbytes: int) -> None:
        """Charge memory that is about to be made."""
        self.room -= nbytes
        if self.room < 0:
            raise FormatError("it makes too much memory for its length")

    def items(self) -> list[Any]:
        """Pop everything above the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def named(self, module: Any, name: Any) -> None:
        """Push a global."""
        if type(module) is not str or type(name) is not str:
            raise FormatError("a global whose name is not text")
        if self.protocol < 3:
            module, name = _renamed(module, name)
        builder = self.registry.get(f"{module}.{name}")
        self.count(2 * _ROOM)
        if builder is not None and builder.value is not CALLED:
            self.stack.append(builder.value)
        else:
            self.stack.append(Reference(module, name, builder=builder))

    def call(self, function: Any, args: Any, kwargs: dict[str, Any], new: bool) -> Any:
        """What a builder makes of the arguments, or a stand-in that keeps them."""
        if type(args) is not tuple:
            raise FormatError(f"arguments in a {type(args).__name__}")
        self.count(2 * _ROOM + 8 * len(args))
        if type(function) is Reference:
            builder = function.builder
            if builder is not None:
                make = (new and builder.new) or builder.make
                if args:
                    self.charge(args)
                if make is not None:
                    made = make(*args, **kwargs)
                    if made is not NotImplemented:
                        return made
            module, name = function.module, function.qualname
        elif isinstance(function, Opaque):
            module, name, args = function.module, f"{function.qualname}()", (function, *args)
        else:
            raise FormatError(f"a {type(function).__name__} is called")
        return Opaque(module, name, (*args, kwargs) if kwargs else args)

    def charge(self, values: tuple[Any, ...]) -> None:
        """Charge what builders make of these values: one list can be an argument many times."""
        for value in values:
            cost = _COST.get(type(value))
            if cost:
                self.count(cost * len(value))

    def build(self, value: Any, state: Any) -> None:
        """Apply a state."""
        fill = self.registry.fills.get(type(value))
        if fill is not None:
            self.charge(state if type(state) is tuple else (state,))
            fill(value, state)
        elif isinstance(value, Opaque):
            self.check_open(value)
            if value.state is not None:
                raise FormatError(f"{value.name} is given its state twice")
            object.__setattr__(value, "state", state)
        else:
            raise FormatError(f"a {type(value).__name__} takes no state")

    def check_open(self, value: Opaque) -> None:
        if id(value) in self.hashed:
            raise FormatError(f"{value.name} changes after it became a key")

    def part_of(self, value: Opaque, kind: type) -> Any:
        """The list or dict at the end of a stand-in's arguments that it was given items in."""
        self.check_open(value)
        last = value.args[-1] if value.args else None
        if type(last) is kind and id(last) in self.grown:
            return last
        part = kind()
        self.grown[id(part)] = part
        self.count(2 * _ROOM + 8 * len(value.args))
        object.__setattr__(value, "args", (*value.args, part))
        return part

    def extend(self, target: Any, items: list[Any]) -> None:
        kind = type(target)
        if kind is not list and kind not in self.registry.lists:
            if not isinstance(target, Opaque):
                raise FormatError(f"items are appended to a {kind.__name__}")
            target = self.part_of(target, list)
        target.extend(items)

    def set_items(self, target: Any, items: list[Any]) -> None:
        """Set items[0]: items[1], items[2]: items[3] and so on."""
        kind = type(target)
        if kind is not dict and kind not in self.registry.dicts:
            if not isinstance(target, Opaque):
                raise FormatError(f"items are set in a {kind.__name__}")
            target = self.part_of(target, dict)
        if len(items) % 2:
            raise FormatError("a key without a value")
        keys = items[::2]
        for key in keys:
            if type(key) is not str:
                self.check_key(key)
        before = len(target)
        dict.update(target, zip(keys, items[1::2], strict=True)) if kind is dict else _put(
            target, keys, items[1::2]
        )
        if len(target) - before != len(keys):
            raise FormatError("a mapping has one key twice")

    def check_key(self, key: Any) -> None:
        """Refuse a mapping's key, or a set's item, that could crash or hang hashing."""
        kind = type(key)
        if kind is str or kind is bytes or kind is float or kind is bool or key is None:
            return
        if kind is int and -_INT64 <= key < _INT64:
            return
        if kind in self.registry.keys and kind.__hash__ is object.__hash__:
            return
        self.check_parts(key, self.limits.key_depth, self.limits.key_items)
        bucket = self.buckets.setdefault(hash(key), [])
        if key not in bucket:
            bucket.append(key)
            self.count(_ROOM)
            if len(bucket) > self.limits.key_clashes:
                raise FormatError("many keys with one hash")

    def check_parts(self, key: Any, depth: int, room: int) -> int:
        """Refuse a key with parts that are not plain; how much of `room` is left."""
        kind = type(key)
        room -= 1
        if room < 0:
            raise FormatError("a key has too many parts")
        if kind in _PLAIN or kind in self.registry.keys:
            return room
        if depth == 0:
            raise FormatError("a key nests too deeply")
        if kind is tuple or kind is frozenset:
            for part in key:
                room = self.check_parts(part, depth - 1, room)
            return room
        if isinstance(key, Opaque) and key.state is None:
            self.hashed[id(key)] = key
            return self.check_parts(key.args, depth - 1, room)
        raise FormatError(f"a {kind.__name__} can't be a key")


_PLAIN = frozenset((str, bytes, int, float, bool, complex, type(None)))


def _put(target: Any, keys: list[Any], values: list[Any]) -> None:
    """One by one: some mappings' `update` does something else (a Counter's adds)."""
    for key, value in zip(keys, values, strict=True):
        target[key] = value


def _renamed(module: str, name: str) -> tuple[str, str]:
    """Protocols 0 to 2 name the standard library as Python 2 did, whoever writes them."""
    renamed = NAME_MAPPING.get((module, name))
    return renamed if renamed else (IMPORT_MAPPING.get(module, module), name)
