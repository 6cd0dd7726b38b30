"""The nesting of a checkpoint's names, from the paths that `.metadata` gives them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from shardkeep.errors import FormatError
from shardkeep.format.excerpt import shown
from shardkeep.types import Path, Structure

__all__ = ["structure_of"]

_DEPTH = 100
"""Maximum number of keys of a path, as for any nesting."""


def structure_of(
    paths: Mapping[Any, Any], tensors: Collection[str], objects: Collection[str]
) -> tuple[Structure, dict[str, Path]]:
    """Return the structure, and the legacy duplicates: objects that repeat a container of leaves.

    Paths of names that are not stored are left out (up to 2.3 only the coordinator's objects were
    stored). Names without a path are placed at the root.

    Args:
        paths: `planner_data`: name -> path. Ints are positions in lists; keys of mappings are text.
        tensors, objects: names that are stored.

    Raises:
        FormatError: an invalid path, one path for two names, or a tensor at the place of a
            container.
    """
    leaves: dict[str, Path] = {}
    for name, path in paths.items():
        if name in tensors or name in objects:
            leaves[name] = _path(name, path)
    for names in (tensors, objects):
        for name in names:
            leaves.setdefault(name, (name,))
    children = _children(leaves.values())
    legacy_duplicates = {name: path for name, path in leaves.items() if path in children}
    for name in legacy_duplicates:
        if name in tensors:
            raise FormatError("it is at the place of a container", place=f"name {shown(name)}")
        del leaves[name]
    if len(set(leaves.values())) != len(leaves):
        raise FormatError(f"two names have one path: {_clash(leaves)}")
    containers = {path: _kind(keys) for path, keys in sorted(children.items(), key=_depth)}
    containers[()] = "dict"
    return Structure(leaves, containers), legacy_duplicates


def _depth(item: tuple[Path, Any]) -> int:
    return len(item[0])


def _path(name: str, path: Any) -> Path:
    if type(path) is tuple and 0 < len(path) <= _DEPTH and set(map(type, path)) <= {str, int}:
        return path
    raise FormatError(f"invalid path: {shown(path)}", place=f"name {shown(name)}")


def _children(paths: Iterable[Path]) -> dict[Path, dict[Any, None]]:
    """Return the keys of each container. Climbs each path only as far as it is new."""
    children: dict[Path, dict[Any, None]] = {(): {}}
    for path in paths:
        here = path
        while here:
            key, here = here[-1], here[:-1]
            known = children.get(here)
            if known is not None:
                known[key] = None
                break
            children[here] = {key: None}
    return children


def _kind(keys: Collection[Any]) -> str:
    in_list = all(type(key) is int for key in keys) and max(keys, default=0) < len(keys)
    return "list" if in_list and keys else "dict"


def _clash(leaves: Mapping[str, Path]) -> str:
    seen: dict[Path, str] = {}
    for name, path in leaves.items():
        other = seen.setdefault(path, name)
        if other != name:
            return f"{shown(other)} and {shown(name)}"
    raise AssertionError("no clash")
