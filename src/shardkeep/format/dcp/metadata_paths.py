"""The paths of `planner_data`, as columns of a pickle's constants."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from shardkeep.format.paths import Paths, names_of, paths_of
from shardkeep.format.pickle.writer import Pickle, integer
from shardkeep.types import I64, Index, Path, Structure

__all__ = ["dcp_path", "path_columns"]

_FLAT = Structure({}, {(): "dict"})


def dcp_path(path: Path, containers: Mapping[Path, str]) -> tuple[int | str, ...]:
    """Return a path as DCP has it: list positions are ints, keys of mappings are strings."""
    return tuple(
        key if containers.get(path[:depth]) == "list" and type(key) is int else str(key)
        for depth, key in enumerate(path)
    )


def path_columns(pickle: Pickle, index: Index, paths: Paths | None) -> tuple[I64, I64]:
    """Return the path of each name; for a name outside the structure, the name itself.

    Args:
        pickle: collects the constants.
        index: the index of the names, in the order of `names_of`.
        paths: the paths of its structure, if they are known already.

    Returns:
        [N, D] the numbers of the constants that each path consists of, and [N] their count.
    """
    names, structure = names_of(index), index.structure or _FLAT
    paths = paths or paths_of(structure, names)
    numbers, depths = _leaves(pickle, structure, paths)
    alone = np.ones(len(names), np.bool_)
    alone[paths.names] = False
    if index.legacy_duplicates:
        alone |= np.fromiter(map(index.legacy_duplicates.__contains__, names), np.bool_, len(names))
    others: dict[int, list[int]] = {}
    for place in np.flatnonzero(alone).tolist():
        name = names[place]
        path = index.legacy_duplicates.get(name) or structure.leaves.get(name) or (name,)
        others[place] = [
            pickle.text(key) if isinstance(key, str) else pickle.constant(integer(key))
            for key in dcp_path(path, structure.containers)
        ]
    width = max(map(len, others.values()), default=0)
    width = max(width, numbers.shape[1])
    found = np.zeros((len(names), width), np.int64)
    length = np.zeros(len(names), np.int64)
    found[paths.names, : numbers.shape[1]], length[paths.names] = numbers, depths
    for place, keys in others.items():
        found[place, : len(keys)], length[place] = keys, len(keys)
    return found, length


def _leaves(pickle: Pickle, structure: Structure, paths: Paths) -> tuple[I64, I64]:
    """Return the same for each leaf of the structure."""
    parents, last = paths.containers[0], _keys(pickle, structure, paths)
    depth = [0]
    for parent in parents.tolist():
        depth.append(depth[parent] + 1)
    depths = np.array(depth)
    outer = np.zeros((len(depths), max(depth) + 1), np.int64)
    for level in range(1, max(depth) + 1):
        rows = np.flatnonzero(depths == level)
        outer[rows, : level - 1] = outer[parents[rows - 1], : level - 1]
        outer[rows, level - 1] = last[rows - 1]
    numbers = outer[paths.leaves[0]]
    above = depths[paths.leaves[0]]
    numbers[np.arange(len(numbers)), above] = last[len(parents) :]
    return numbers, above + 1


def _keys(pickle: Pickle, structure: Structure, paths: Paths) -> I64:
    """Return the number of the last key of each container (except the root), and of each leaf."""
    both = zip(paths.containers, paths.leaves, strict=True)
    parents, keys = (np.concatenate(columns) for columns in both)
    in_list = np.array([kind == "list" for kind in structure.containers.values()])[parents]
    whole = np.array([type(key) is int for key in paths.keys], np.bool_)[keys] & in_list
    numbers = np.zeros((2, len(paths.keys)), np.int64)
    texts, ints = _used(keys[~whole], paths), _used(keys[whole], paths)
    numbers[0, texts] = pickle.texts([str(paths.keys[row]) for row in texts.tolist()])
    numbers[1, ints] = [pickle.constant(integer(paths.keys[row])) for row in ints.tolist()]
    found: I64 = numbers[whole.astype(np.int64), keys]
    return found


def _used(keys: I64, paths: Paths) -> NDArray[np.intp]:
    used = np.zeros(len(paths.keys), np.bool_)
    used[keys] = True
    return np.flatnonzero(used)
