"""A judge of the checkpoint in a folder, bit for bit, for very many states of the folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import shardkeep as sk
from shardkeep.stores import MemoryStore
from shardkeep.stores.contract import Listing

__all__ = ["Judge"]


class Seen(MemoryStore):
    """A store that records what a reader looks at."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files=files)
        self.looked: set[str] = set()
        self.listed = False

    def list(self, prefix: str = "", delimiter: Any = "/") -> Listing:
        self.listed = True
        return super().list(prefix, delimiter)

    def _found(self, name: str) -> Any:
        self.looked.add(name)
        return super()._found(name)


class Judge:
    """A function of a folder's files: the name of the intact state, "none", or what is wrong.

    A reader that finds the same content in everything it looks at comes to the same result. So
    results are cached by what the reader looked at, and most folders need not be read.
    """

    def __init__(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        self.states = states
        self.known: list[tuple[dict[str, bytes | None], frozenset[str] | None, str]] = []

    def __call__(self, files: dict[str, bytes]) -> str:
        for looked, names, found in self.known:
            if names in (None, files.keys()) and all(
                files.get(name) == data for name, data in looked.items()
            ):
                return found
        store = Seen(files)
        found = self._look(store)
        looked = {name: files.get(name) for name in store.looked}
        self.known.append((looked, frozenset(files) if store.listed else None, found))
        return found

    def _look(self, store: Seen) -> str:
        try:
            checkpoint = sk.open(store)
        except sk.NotACheckpoint:
            return "none"
        except sk.ShardkeepError as error:
            return f"broken: {error}"
        try:
            report = checkpoint.verify()
        except sk.ShardkeepError as error:
            return f"broken: {error}"
        if not report.ok or report.unchecked:
            return f"damaged: {report.damaged}"
        for which, state in self.states.items():
            values = {
                name: torch.from_numpy(value) if checkpoint.is_tensor(name) else value
                for name in checkpoint
                for value in [checkpoint.read(name)]
            }
            if values.keys() == state.keys() and all(
                torch.equal(value, state[name])
                if isinstance(value, torch.Tensor)
                else value == state[name]
                for name, value in values.items()
            ):
                return which
        return "something else"
