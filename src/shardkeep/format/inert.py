"""What the inert pickle reader is told, and what it hands out: builders, stand-ins, budgets.

A pickle is a program. Here it runs without the power to do anything: a class that it names is
looked up in a short list of builders and nowhere else, and what is not there becomes a stand-in.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shardkeep.errors import FormatError
from shardkeep.types import Opaque

__all__ = [
    "CALLED",
    "Builder",
    "Limits",
    "Reference",
    "Registry",
    "check_nesting",
    "opaque_classes",
]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one pickle may take.

    Attributes:
        depth: containers inside each other; what comes out can be walked by recursion.
        memory: bytes that any pickle may make.
        growth: bytes that it may make beyond that, for each byte of itself. Real metadata takes
            about 15; a list of empty dicts 80, an endless row of empty sets 300.
        int_bytes: of one integer. Python refuses to print more than 4,300 digits.
        key_depth, key_items: of a tuple that is a mapping's key: hashing it visits every item of
            every level each time, shared or not.
        key_clashes: different keys with one hash. Tuples and integers with equal hashes are easy
            to make, and n of them in one mapping take n * n comparisons.
    """

    depth: int = 100
    memory: int = 64 << 20
    growth: int = 64
    int_bytes: int = 1024
    key_depth: int = 4
    key_items: int = 256
    key_clashes: int = 16


CALLED: Any = object()
"""The `value` of a builder whose global is there to be called."""


@dataclass(frozen=True, slots=True)
class Builder:
    """How one global comes to life. None of its functions may trust what it is given.

    They may raise TypeError, ValueError, ArithmeticError or LookupError for arguments that make no
    sense: that becomes a `FormatError`. `make` and `new` may return NotImplemented: an `Opaque`.

    Attributes:
        make: called with the pickle's arguments (REDUCE).
        new: the same for an instance without `__init__` (NEWOBJ); None: as `make`.
        type: exact type of what is made; needed for everything below. One type has one behaviour,
            whichever builder it came from.
        fill: applies a state in place (BUILD), in place of `__setstate__` and attributes.
        takes: "list" if it is extended item by item, "dict" if it takes items by key.
        key: whether what is made may be a mapping's key: hashable for good, at little cost.
        hashes: whether `make` hashes the items of its arguments: they are checked as keys first.
        value: what the global itself is, where it is not there to be called.
    """

    make: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None
    type: type | None = None
    fill: Callable[[Any, Any], None] | None = None
    takes: str = ""
    key: bool = False
    hashes: bool = False
    value: Any = CALLED


class Registry(Mapping[str, Builder]):
    """Builders by full name (`module.qualname`), with the tables that the reader works from.

    Any mapping will do for `unpickle.loads`; this one is prepared once for many pickles.
    """

    def __init__(self, builders: Mapping[str, Builder]) -> None:
        self._builders = dict(builders)
        known = list(self._builders.values())
        self.fills = {b.type: b.fill for b in known if b.type is not None and b.fill is not None}
        self.list_types = frozenset(b.type for b in known if b.takes == "list")
        self.dict_types = frozenset(b.type for b in known if b.takes == "dict")
        self.key_types = frozenset(b.type for b in known if b.key)
        self.identity_types = frozenset(  # hashed by identity: nothing can clash
            kind for kind in self.key_types if getattr(kind, "__hash__", None) is object.__hash__
        )

    def __getitem__(self, name: str) -> Builder:
        return self._builders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._builders)

    def __len__(self) -> int:
        return len(self._builders)


@dataclass(frozen=True, slots=True, repr=False)
class Reference(Opaque):
    """A global that a pickle names and does not call: inert, whether its class is known or not."""

    builder: Builder | None = field(default=None, compare=False)


_PARTS: dict[type, Callable[[Any], Iterable[Any]]] = {
    **dict.fromkeys((list, tuple, set, frozenset, deque), iter),
    **dict.fromkeys((dict, OrderedDict, defaultdict, Counter), dict.values),
}
"""How to walk a container. Whatever is not here is a leaf: its builder answers for its inside."""


def check_nesting(value: Any, limit: int) -> None:
    """Refuse what contains itself or nests deeper than `limit`: walking it would crash or hang.

    An `Opaque` ends the nesting and starts a new one: stand-ins of ordinary object graphs, where a
    child knows its parent, may be read, as long as no list or dict contains itself.

    Raises:
        FormatError: a container contains itself, or nests too deeply.
    """
    heights: dict[int, int] = {}  # by id: levels below and including it; 0 while it is open
    roots: list[Any] = [value]
    for generation in range(limit + 1):
        found: dict[int, Opaque] = {}
        for root in roots:
            _measure(root, limit, heights, found)
        roots = [part for opaque in found.values() for part in (opaque.args, opaque.state)]
        if not roots:
            return
        assert generation <= limit
    raise FormatError(f"objects nest more than {limit} levels deep")


def _measure(root: Any, limit: int, heights: dict[int, int], found: dict[int, Opaque]) -> None:
    """Walk one nesting depth first, without recursion."""
    # A level is [id, what is left of its parts, height of the highest part so far]. The first one
    # stands outside, so that the root is looked at as any other part.
    path: list[list[Any]] = [[0, iter((root,)), 0]]
    while path:
        level = path[-1]
        for part in level[1]:
            walk = _PARTS.get(type(part))
            if walk is None:
                if isinstance(part, Opaque) and id(part) not in heights:
                    heights[id(part)] = 1
                    found[id(part)] = part
                continue
            height = heights.get(id(part))
            if height is None:
                if len(path) > limit:
                    raise FormatError(f"containers nest more than {limit} levels deep")
                heights[id(part)] = 0
                path.append([id(part), iter(walk(part)), 0])
                break
            if height == 0:
                raise FormatError(f"a {type(part).__name__} contains itself")
            level[2] = max(level[2], height)
        else:
            path.pop()
            height = level[2] + 1
            if not path:
                return
            if height > limit:
                raise FormatError(f"containers nest more than {limit} levels deep")
            heights[level[0]] = height
            path[-1][2] = max(path[-1][2], height)


def opaque_classes(value: Any) -> tuple[str, ...]:
    """Full names of all classes that are only stood for in a value, in the order they are met.

    Safe for any value that the reader gives, deep or cyclic.
    """
    names: dict[str, None] = {}
    seen: set[int] = set()
    pending = [value]
    while pending:
        part = pending.pop()
        walk = _PARTS.get(type(part))
        is_opaque = isinstance(part, Opaque)
        if (walk is None and not is_opaque) or id(part) in seen:
            continue
        seen.add(id(part))
        if is_opaque:
            names[part.name] = None
            pending += (part.state, part.args)
        elif walk is not None:
            inside = list(walk(part))
            if isinstance(part, dict):
                inside += part.keys()
            pending += reversed(inside)
    return tuple(names)
