"""A custom store that implements only the six required members."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Literal

import pytest

import shardkeep as sk
from shardkeep.stores.contract import Buffer, FileInfo, IfMatch, Listing, PutMode, Store
from shardkeep.stores.errors import file_exists, file_missing, version_changed
from shardkeep.stores.names import checked_name, checked_prefix, checked_range, group_names
from shardkeep.testing import StoreTests


class DatabaseStore(Store):
    """Files as rows of an SQLite database. Each method is one transaction."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._connect() as rows:
            rows.execute("CREATE TABLE IF NOT EXISTS files (name PRIMARY KEY, data, version)")

    @property
    def url(self) -> str:
        return f"sqlite:{self._path}"

    def list(self, prefix: str = "", delimiter: Literal["/"] | None = "/") -> Listing:
        with self._connect() as rows:
            names = [name for (name,) in rows.execute("SELECT name FROM files")]
        return group_names(names, checked_prefix(prefix), delimiter)

    def head(self, name: str) -> FileInfo:
        return FileInfo(*self._row(name, "length(data), version"))

    def get_range(self, name: str, start: int, length: int) -> bytes:
        checked_range(start, length)
        (data,) = self._row(name, "data")
        return data[start : start + length]

    def put(self, name: str, data: Buffer, *, mode: PutMode) -> None:
        name = checked_name(name)
        with self._connect() as rows:
            rows.execute("BEGIN IMMEDIATE")
            found = rows.execute("SELECT version FROM files WHERE name = ?", [name]).fetchone()
            if mode == "create" and found:
                raise file_exists(f"{self.url}/{name}")
            if isinstance(mode, IfMatch) and found != (mode.version,):
                raise version_changed(f"{self.url}/{name}", mode.version, found and found[0])
            rows.execute(
                "REPLACE INTO files VALUES (?, ?, hex(randomblob(16)))", [name, bytes(data)]
            )

    def delete(self, name: str) -> None:
        with self._connect() as rows:
            rows.execute("DELETE FROM files WHERE name = ?", [checked_name(name)])

    def _row(self, name: str, columns: str) -> tuple:
        query = f"SELECT {columns} FROM files WHERE name = ?"
        with self._connect() as rows:
            found = rows.execute(query, [checked_name(name)]).fetchone()
        if found is None:
            raise file_missing(f"{self.url}/{name}")
        return found

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=60)


class TestDatabaseStore(StoreTests):
    def make_store(self, folder: Path) -> Store:
        return DatabaseStore(folder / "files.db")


@pytest.mark.torch
def test_a_checkpoint_is_saved_to_and_loaded_from_a_custom_store(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    store = DatabaseStore(tmp_path / "files.db")
    state = {"w": torch.arange(1000.0), "n": 3, "set": {1, 2}}
    sk.save(state, store)
    with pytest.raises(sk.AlreadyExists):
        sk.save(state, store)
    state["w"] += 1
    sk.save(state, store, overwrite=True)
    assert len(store.list().files) == 3  # data, manifest, commit record
    loaded = {"w": torch.zeros(1000), "n": 0, "set": set()}
    sk.load(loaded, store)
    assert torch.equal(loaded["w"], state["w"])
    assert (loaded["n"], loaded["set"]) == (3, {1, 2})


def test_an_incomplete_store_is_refused_at_once() -> None:
    class Incomplete(Store):
        @property
        def url(self) -> str:
            return "incomplete"

    with pytest.raises(TypeError, match="abstract"):
        Incomplete()
