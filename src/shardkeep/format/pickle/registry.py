"""Inputs and outputs of the inert pickle reader: builders, stand-ins, budgets.

A pickle is a program. Here it cannot do anything: a class that it names is looked up in a short
list of builders and nowhere else. A class that is not in the list becomes a stand-in.
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
    """The budgets of one pickle.

    Attributes:
        depth: nesting of containers; the result can be walked by recursion.
        parts: parts of the result, with shared ones counted as often as they appear: a value that
            is small in memory may take forever to print or compare. Each byte of the pickle adds
            16.
        memory: bytes that any pickle may allocate.
        growth: bytes that it may allocate beyond that, for each byte of its own. Real metadata
            takes about 15; a list of empty dicts 80, an endless row of empty sets 300.
        int_bytes: bytes of one integer. Python refuses to print more than 4,300 digits.
        key_depth, key_items: limits of a tuple that is a mapping's key: hashing it visits every
            item of every level each time, shared or not.
        key_clashes: different keys with one hash. Tuples and integers with equal hashes are easy to
            make, and n of them in one mapping take n * n comparisons.
    """

    depth: int = 100
    parts: int = 1 << 22
    memory: int = 32 << 20
    growth: int = 64
    int_bytes: int = 1024
    key_depth: int = 4
    key_items: int = 256
    key_clashes: int = 16


CALLED: Any = object()
"""The `value` of a builder whose global is called."""


@dataclass(frozen=True, slots=True)
class Builder:
    """How to build the values of one global. Its functions must not trust their arguments.

    They may raise TypeError, ValueError, ArithmeticError or LookupError for invalid arguments,
    which becomes a `FormatError`. `make` and `new` may return NotImplemented for an `Opaque`.

    Attributes:
        make: called with the pickle's arguments (REDUCE).
        new: the same for an instance without `__init__` (NEWOBJ); None uses `make`.
        type: the exact type of the result; needed for everything below. One type has one behaviour,
            whichever builder it came from.
        fill: applies a state in place (BUILD), instead of `__setstate__` and attributes.
        takes: "list" if it is extended item by item, "dict" if it takes items by key.
        key: whether the result may be a mapping's key: permanently hashable, at little cost.
        hashes: whether `make` hashes the items of its arguments: they are checked as keys first.
        value: the value of the global itself, if it is not called.
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
    """Builders by full name (`module.qualname`), with tables that the reader works from.

    `reader.loads` accepts any mapping; a registry is prepared once for many pickles.
    """

    def __init__(self, builders: Mapping[str, Builder]) -> None:
        self._builders = dict(builders)
        known = list(self._builders.values())
        self.fills = {b.type: b.fill for b in known if b.type is not None and b.fill is not None}
        self.list_types = frozenset(b.type for b in known if b.takes == "list")
        self.dict_types = frozenset(b.type for b in known if b.takes == "dict")
        self.key_types = frozenset(b.type for b in known if b.key)
        self.identity_types = frozenset(  # Hashed by identity, so their hashes cannot clash.
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
"""How to walk a container. Any other type is a leaf that its builder has checked."""


def check_nesting(value: Any, depth: int, parts: int) -> None:
    """Refuse a value that contains itself, nests too deeply or shares too much.

    An `Opaque` ends the nesting and starts a new one. Stand-ins for ordinary object graphs, where a
    child refers to its parent, can be read as long as no list or dict contains itself.

    Args:
        value: the value that was read.
        depth: maximum nesting of containers.
        parts: maximum number of parts, with shared ones counted as often as they appear.

    Raises:
        FormatError: the value exceeds a limit.
    """
    measured: dict[int, tuple[int, int]] = {}
    roots: list[Any] = [value]
    for _ in range(depth):
        found: dict[int, Opaque] = {}
        for root in roots:
            _measure(root, depth, parts, measured, found)
        roots = [part for opaque in found.values() for part in (opaque.args, opaque.state)]
        if not roots:
            return
    raise FormatError(f"objects nest more than {depth} levels deep")


_OPEN = (0, 0)


def _measure(
    root: Any,
    depth: int,
    parts: int,
    measured: dict[int, tuple[int, int]],
    found: dict[int, Opaque],
) -> None:
    """Walk one nesting depth first, without recursion.

    Args:
        root: where to start.
        depth, parts: the limits.
        measured: levels and parts of each container, by id; extended here.
        found: collects the stand-ins on the way.
    """
    # A level is [id, its remaining parts, levels and parts of it so far]. The first level is
    # the root, so that the root is treated like any other part.
    path: list[list[Any]] = [[0, iter((root,)), 0, 0]]
    while True:
        level = path[-1]
        for part in level[1]:
            kind = type(part)
            walk = _PARTS.get(kind)
            if walk is None:
                level[3] += 1 + (len(part) >> 6 if kind is str or kind is bytes else 0)
                if isinstance(part, Opaque) and id(part) not in measured:
                    measured[id(part)] = _OPEN
                    found[id(part)] = part
                continue
            known = measured.get(id(part))
            if known is None:
                if len(path) > depth:
                    raise FormatError(f"containers nest more than {depth} levels deep")
                measured[id(part)] = _OPEN
                path.append([id(part), iter(walk(part)), 0, 0])
                break
            if known is _OPEN:
                raise FormatError(f"a {kind.__name__} contains itself")
            level[2] = max(level[2], known[0])
            level[3] += known[1]
        else:
            _, _, levels, weight = path.pop()
            if not path:
                return
            if levels >= depth:
                raise FormatError(f"containers nest more than {depth} levels deep")
            if weight > parts:
                raise FormatError(f"it has more than {parts} parts, most of them shared")
            measured[level[0]] = levels + 1, weight + 1
            path[-1][2] = max(path[-1][2], levels + 1)
            path[-1][3] += weight + 1


def opaque_classes(value: Any) -> tuple[str, ...]:
    """Return the full names of the classes that stand-ins in a value represent, in order.

    Safe for any value that the reader returns, deep or cyclic.
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
