"""Conditional renames with missing system calls, held locks and lost replies."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from shardkeep.stores import LocalStore
from shardkeep.stores.contract import IfMatch, PreconditionFailed
from shardkeep.stores.local import conditions, syscalls
from support.store_files import names_in


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def refuse(number: int) -> Any:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture(params=["renameat2", "link", "neither"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Simulate a file system: NFS has no exclusive rename, FAT has no hard links either."""
    if request.param != "renameat2":
        monkeypatch.setattr(syscalls, "rename_new", lambda *_: False)
    if request.param == "neither":
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    return request.param


def test_a_file_is_created_only_if_it_is_missing(
    store: LocalStore, file_system: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "shardkeep"):
        store.put("x", b"old", mode="create")
        with pytest.raises(FileExistsError) as caught:
            store.put("x", b"new", mode="create")
    assert caught.value.filename == str(store.path / "x")
    assert names_in(store) == ["x"]
    assert store.get_range("x", 0, 9) == b"old"
    assert ("neither exclusive renames nor hard links" in caplog.text) == (file_system == "neither")


def test_a_broken_link_counts_as_a_file_that_exists(store: LocalStore, file_system: str) -> None:
    (store.path / "x").symlink_to("missing")
    with pytest.raises(FileExistsError):
        store.put("x", b"new", mode="create")
    assert (store.path / "x").is_symlink()


def test_a_repeated_hard_link_recognizes_its_own_result(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An NFS client repeats a call whose reply was lost, and finds its own result."""
    monkeypatch.setattr(syscalls, "rename_new", lambda *_: False)
    link = os.link

    def repeated(source: str, target: str) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", repeated)
    store.put("x", b"new", mode="create")
    assert names_in(store) == ["x"]
    assert store.get_range("x", 0, 9) == b"new"


def test_other_errors_of_the_exclusive_rename_are_raised(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syscalls, "rename_new", refuse(errno.EROFS))
    with pytest.raises(OSError, match="Read-only"):
        store.put("x", b"new", mode="create")
    assert names_in(store) == []


def test_the_exclusive_rename_of_this_system(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    with pytest.raises(FileExistsError):
        syscalls.rename_new(str(tmp_path / "a"), str(tmp_path / "b"))
    with pytest.raises(FileNotFoundError):
        syscalls.rename_new(str(tmp_path / "missing"), str(tmp_path / "c"))
    assert syscalls.rename_new(str(tmp_path / "a"), str(tmp_path / "c"))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"b": b"2", "c": b"1"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_versions_are_compared_even_without_file_locks(
    store: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    store.put("x", b"old", mode="create")
    version = store.head("x").version
    with caplog.at_level(logging.WARNING, "shardkeep"):
        store.put("x", b"new", mode=IfMatch(version))
    assert "no file locks" in caplog.text
    with pytest.raises(PreconditionFailed):
        store.put("x", b"newer", mode=IfMatch(version))
    assert store.get_range("x", 0, 9) == b"new"


def test_a_backup_by_hard_links_does_not_change_the_version(store: LocalStore) -> None:
    store.put("x", b"old", mode="create")
    version = store.head("x").version
    (store.path / "backup").hardlink_to(store.path / "x")
    assert store.head("x").version == version
    store.put("x", b"new", mode=IfMatch(version))
    assert store.get_range("backup", 0, 9) == b"old"


def test_a_read_only_file_can_be_replaced(store: LocalStore) -> None:
    store.put("x", b"old", mode="create")
    (store.path / "x").chmod(0o444)
    store.put("x", b"new", mode=IfMatch(store.head("x").version))
    assert store.get_range("x", 0, 9) == b"new"


HOLD = """
import fcntl, sys
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(store: LocalStore) -> Any:
    """Start another process that holds the lock on a file."""
    store.put("x", b"old", mode="create")
    command = [sys.executable, "-c", HOLD, str(store.path / "x")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def test_waiting_too_long_for_a_lock_raises_and_names_the_file(
    store: LocalStore, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditions, "_LOCK_SECONDS", 0.05)
    with pytest.raises(TimeoutError, match="another process has locked it") as caught:
        store.put("x", b"new", mode=IfMatch(store.head("x").version))
    assert caught.value.filename == str(store.path / "x")
    assert names_in(store) == ["x"]
    assert store.get_range("x", 0, 9) == b"old"


def test_the_lock_of_a_killed_process_is_released(
    store: LocalStore, holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = threading.Event()
    monkeypatch.setattr(conditions.time, "sleep", lambda _: waits.set() or waits.wait(0.001))
    version = store.head("x").version
    thread = threading.Thread(target=lambda: store.put("x", b"new", mode=IfMatch(version)))
    thread.start()
    assert waits.wait(30)
    holder.kill()
    thread.join(30)
    assert store.get_range("x", 0, 9) == b"new"
