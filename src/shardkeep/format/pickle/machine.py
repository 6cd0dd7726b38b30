"""The state of a running pickle, and the operations that it may apply to it, within budgets."""

from __future__ import annotations

from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Sequence
from typing import Any

from shardkeep.errors import FormatError
from shardkeep.format.pickle.registry import CALLED, Limits, Reference, Registry
from shardkeep.types import Opaque

__all__ = ["ROOM", "Machine", "Opcode"]

Opcode = Callable[["Machine", int], int]
"""Takes the position after its byte; returns that of the next opcode, or a negative one to stop."""

ROOM = 100
"""Bytes charged for a container, a memo entry or an instance."""

_COST: dict[type, int] = {
    str: 4,
    bytes: 2,
    bytearray: 2,
    list: 64,
    tuple: 64,
    dict: 128,
    set: 128,
    frozenset: 128,
}
"""Bytes charged for what a builder may make from each item of an argument."""

_NAME = 1000
"""Maximum length of a global's name: each mention of a global builds its full name anew."""

_INT64 = 1 << 63


class Machine:
    """The state of one run, which the opcodes change."""

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
        self.memo: dict[int, Any] = {}  # A dict, not a list: an index may be 2**32 - 1.
        self.buckets: dict[int, list[Any]] = {}
        self.hashed: dict[int, Opaque] = {}  # Stand-ins that are used as keys: they may not change.
        # Lists and dicts that hold items which the pickle added to stand-ins.
        self.grown: dict[int, Any] = {}
        self.protocol = 0
        self.at = 0
        self.end = 0

    def run(self, table: Sequence[Opcode]) -> Any:
        """Run the pickle with these opcodes up to its STOP, and return its value."""
        data, at, start = self.data, 0, 0
        try:
            while at >= 0:
                start = at
                at = table[data[at]](self, at + 1)
        finally:
            self.at = start
        self.end = start + 1
        return self.stack.pop()

    def take(self, at: int, length: int) -> bytes:
        """Return `length` bytes of the pickle."""
        if length > self.size - at:
            raise FormatError(f"{length} bytes are announced, but only {self.size - at} follow")
        return self.data[at : at + length]

    def line(self, at: int) -> tuple[bytes, int]:
        """Return the bytes up to the next line feed, and where the next line starts."""
        end = self.data.index(b"\n", at)
        return self.data[at:end], end + 1

    def count(self, nbytes: int) -> None:
        """Charge memory before it is allocated."""
        self.room -= nbytes
        if self.room < 0:
            raise FormatError("it allocates too much memory for its length")

    def items(self) -> list[Any]:
        """Pop and return everything above the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def named(self, module: Any, name: Any) -> None:
        """Push a global."""
        if type(module) is not str or type(name) is not str:
            raise FormatError("a global whose name is not text")
        if len(module) + len(name) > _NAME:
            raise FormatError(f"a global with a name of {len(module) + len(name)} letters")
        if self.protocol < 3:
            module, name = _renamed(module, name)
        builder = self.registry.get(f"{module}.{name}")
        self.count(2 * ROOM)
        if builder is not None and builder.value is not CALLED:
            self.stack.append(builder.value)
        else:
            self.stack.append(Reference(module, name, builder=builder))

    def call(self, function: Any, args: Any, kwargs: dict[str, Any], new: bool) -> Any:
        """Return what a builder makes of the arguments, or a stand-in that holds them."""
        if type(args) is not tuple:
            raise FormatError(f"arguments in a {type(args).__name__}")
        self.count(2 * ROOM + 8 * len(args))
        if type(function) is Reference:
            builder = function.builder
            if builder is not None:
                make = (new and builder.new) or builder.make
                if args:
                    self.charge(args)
                    if builder.hashes:
                        self.check_items(args)
                if make is not None:
                    made = make(*args, **kwargs)
                    if made is not NotImplemented:
                        return made
            module, name = function.module, function.qualname
        elif isinstance(function, Opaque):
            name = function.qualname.removesuffix("()") + "()"
            module, args = function.module, (function, *args)
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
        """Apply a state to a value."""
        fill = self.registry.fills.get(type(value))
        if fill is not None:
            if type(state) is dict:
                self.count(16 * len(state))
            elif type(state) is tuple:
                self.charge(state)
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
        """Return the list or dict, last of a stand-in's arguments, of items added to it."""
        self.check_open(value)
        last = value.args[-1] if value.args else None
        if type(last) is kind and id(last) in self.grown:
            return last
        part = kind()
        self.grown[id(part)] = part
        self.count(2 * ROOM + 8 * len(value.args))
        object.__setattr__(value, "args", (*value.args, part))
        return part

    def extend(self, target: Any, items: list[Any]) -> None:
        kind = type(target)
        if kind is not list and kind not in self.registry.list_types:
            if not isinstance(target, Opaque):
                raise FormatError(f"items are appended to a {kind.__name__}")
            target = self.part_of(target, list)
        target.extend(items)

    def set_items(self, target: Any, items: list[Any]) -> None:
        """Set items[0] to items[1], items[2] to items[3], and so on."""
        kind = type(target)
        if kind is not dict and kind not in self.registry.dict_types:
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
        if kind is dict:
            target.update(zip(keys, items[1::2], strict=True))
        else:  # One by one: the `update` of some mappings does something else (a Counter's adds).
            for key, item in zip(keys, items[1::2], strict=True):
                target[key] = item
        if len(target) - before != len(keys):
            raise FormatError("a mapping has one key twice")

    def check_key(self, key: Any) -> None:
        """Refuse a key of a mapping, or an item of a set, that could crash or hang hashing."""
        kind = type(key)
        if kind is str or kind is bytes or kind is float or kind is bool or key is None:
            return
        if kind is int and -_INT64 <= key < _INT64:
            return
        if kind in self.registry.identity_types:
            return
        self.check_parts(key, self.limits.key_depth, self.limits.key_items)
        bucket = self.buckets.setdefault(hash(key), [])
        if key not in bucket:
            bucket.append(key)
            self.count(ROOM)
            if len(bucket) > self.limits.key_clashes:
                raise FormatError("many keys with one hash")

    def check_items(self, args: tuple[Any, ...]) -> None:
        for arg in args:
            if type(arg) in (list, tuple):
                for item in arg:
                    self.check_key(item)

    def check_parts(self, key: Any, depth: int, room: int) -> int:
        """Refuse a key with parts that are not plain; return how much of `room` is left."""
        kind = type(key)
        room -= 1
        if room < 0:
            raise FormatError("a key has too many parts")
        if kind in _PLAIN or kind in self.registry.key_types:
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
        raise FormatError(f"a {kind.__name__} cannot be used as a key")


_PLAIN = frozenset((str, bytes, int, float, bool, complex, type(None)))


def _renamed(module: str, name: str) -> tuple[str, str]:
    """Return a global's present name: protocols 0 to 2 use the names of Python 2."""
    renamed = NAME_MAPPING.get((module, name))
    return renamed if renamed else (IMPORT_MAPPING.get(module, module), name)
