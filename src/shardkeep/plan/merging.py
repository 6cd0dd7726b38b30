"""Merging of the structures of all ranks' states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shardkeep.errors import Conflict
from shardkeep.state.flatten import show
from shardkeep.types import Path, Structure

__all__ = ["merge"]


@dataclass(slots=True)
class _Node:
    """A place of the merged state: a container (with its kind), or a leaf (with its name)."""

    rank: int
    kind: str | None = None
    name: str = ""
    children: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        return f"a {self.kind}" if self.kind else "a value"


def merge(structures: Sequence[Structure]) -> Structure:
    """Merge the structures of all ranks, given in rank order.

    The order is that of first appearance. A dict on one rank may be an OrderedDict on another.

    Raises:
        Conflict: a path is a leaf on one rank and a container on another, or a mapping here and a
            list there; or one name stands for two paths.
    """
    # Most ranks have the same structure, which is one object then and needs no merging.
    distinct = [
        (rank, structure)
        for rank, structure in enumerate(structures)
        if not rank or structure is not structures[rank - 1]
    ]
    if len(distinct) == 1:
        return structures[0]
    nodes: dict[Path, _Node] = {(): _Node(0, "dict")}
    names: dict[str, Path] = {}
    if structures:
        nodes[()].kind = structures[0].containers[()]
    for rank, structure in distinct:
        for path, kind in structure.containers.items():
            if path in nodes and nodes[path].kind != kind:
                _agree(path, nodes[path], _Node(rank, kind))
        for path, event in _events(structure):
            if event is not None:
                if names.get(event) == path:
                    continue
                if event in names:
                    raise Conflict(
                        f"{show(names[event])} and {show(path)} (rank {rank}) would both be saved "
                        f"under the name {event!r}"
                    )
                names[event] = path
            _graft(nodes, path, event, rank, structure.containers)
    return _linear(nodes)


def _events(structure: Structure) -> Iterator[tuple[Path, str | None]]:
    """Yield leaves, with their names, and empty containers, in the order of the state."""
    empties = sorted(structure.empties.items(), key=lambda item: item[1])[::-1]
    for count, (name, path) in enumerate(structure.leaves.items()):
        while empties and empties[-1][1] <= count:
            yield empties.pop()[0], None
        yield path, name
    while empties:
        yield empties.pop()[0], None


def _graft(
    nodes: dict[Path, _Node], path: Path, name: str | None, rank: int, kinds: Mapping[Path, str]
) -> None:
    """Add a leaf, or a container if `name` is None, and the containers around it."""
    node = _Node(rank, kinds[path]) if name is None else _Node(rank, name=name)
    child: Path | None = None
    while True:
        known = nodes.setdefault(path, node)
        if known is not node:
            _agree(path, known, node)
        if child is not None:
            known.children.append(child)
        if known is not node:
            return
        child, path = path, path[:-1]
        node = _Node(rank, kinds[path])


def _agree(path: Path, known: _Node, node: _Node) -> None:
    if known.kind is None and node.kind is None:
        raise Conflict(f"{known.name!r} and {node.name!r} (rank {node.rank}) have the same path")
    if None in (known.kind, node.kind) or (known.kind == "list") != (node.kind == "list"):
        raise Conflict(
            f"{show(path)} is {known} on rank {known.rank}, but {node} on rank {node.rank}"
        )


def _linear(nodes: Mapping[Path, _Node]) -> Structure:
    leaves: dict[str, Path] = {}
    containers: dict[Path, str] = {}
    empties: dict[Path, int] = {}
    stack: list[Path] = [()]
    while stack:
        path = stack.pop()
        node = nodes[path]
        if node.kind is None:
            leaves[node.name] = path
            continue
        containers[path] = node.kind
        if not node.children:
            empties[path] = len(leaves)
        ordered = (
            sorted(node.children, key=lambda p: p[-1]) if node.kind == "list" else node.children
        )
        stack += reversed(ordered)
    return Structure(leaves, containers, empties)
