"""Key-value stores: in memory, and through the job's store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from shardkeep.coordination.keyvalue import clients
from shardkeep.coordination.keyvalue.memory import MemoryKeyValueStore
from shardkeep.coordination.keyvalue.torch_store import TorchKeyValueStore
from support.waiting import PROMPT_SECONDS


def test_values() -> None:
    keys = MemoryKeyValueStore()
    with pytest.raises(KeyError):
        keys.get("a")
    keys.set("a", b"1")
    keys.set("a", b"2")
    assert keys.get("a") == b"2"
    keys.delete(["a", "b"])
    assert len(keys) == 0


def test_wait_gives_the_first_in_order() -> None:
    keys = MemoryKeyValueStore()
    keys.set("b", b"")
    keys.set("c", b"")
    assert keys.wait(["a", "b", "c"], 0) == "b"
    assert keys.wait(["a", "c"], 10) == "c"


def test_wait_ends_with_its_time() -> None:
    keys, began = MemoryKeyValueStore(), time.monotonic()
    assert keys.wait(["a"], -1) is None
    assert keys.wait(["a"], 0.1) is None
    assert 0.1 <= time.monotonic() - began < PROMPT_SECONDS
    assert not keys._waiting


def test_wait_is_woken() -> None:
    keys = MemoryKeyValueStore()
    timer = threading.Timer(0.05, lambda: (keys.set("other", b""), keys.set("b", b"")))
    timer.start()
    assert keys.wait(["a", "b"], 30) == "b"
    timer.join()
    assert not keys._waiting


class Vanishing:
    """A store whose key is removed between the look and the answer, as TCPStore reports it."""

    def check(self, keys):
        return True

    def get(self, key):
        return b""


def test_a_key_that_is_removed_while_it_is_read_is_missing_not_empty():
    with pytest.raises(KeyError, match="message/0"):
        TorchKeyValueStore(Vanishing(), 2).get("message/0")


class Late:
    """A store in which a message and then a failure are set just after the look for the message."""

    def __init__(self):
        self.there = set()

    def check(self, keys):
        (key,) = keys
        found = key in self.there
        self.there |= {"message", "failed"}
        return found


def test_a_message_wins_over_a_failure_that_came_after_it():
    assert TorchKeyValueStore(Late(), 2).wait(["message", "failed"], 10) == "message"
    assert TorchKeyValueStore(Late(), 2).wait(["other", "failed"], 10) == "failed"


HOST = """
import sys
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hosted() -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """A process that hosts a store, and a client of the store."""
    dist = pytest.importorskip("torch.distributed")
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", HOST], stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield process, dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        process.kill()


@pytest.mark.torch
@pytest.mark.parametrize("call", ["get", "wait", "delete"])
def test_a_host_that_is_frozen_is_noticed_after_one_timeout(
    hosted: tuple[subprocess.Popen[str], Any], call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`get` of torch would take two timeouts: it waits for the key, and then for the value."""
    monkeypatch.setattr(clients, "_MIN_ANSWER_SECONDS", 3.0)
    monkeypatch.setenv("SHARDKEEP_HEARTBEAT_SECONDS", "0.2")
    process, store = hosted
    keys = TorchKeyValueStore(store, 2)
    keys.set("a", b"1")
    assert keys.get("a") == b"1"
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)  # all its threads
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="no answer for 3 s"):
        {
            "get": lambda: keys.get("a"),
            "wait": lambda: keys.wait(["b", "a"], 60),
            "delete": lambda: keys.delete(["a"]),
        }[call]()
    assert 2.9 < time.monotonic() - began < 5.9  # twice would be 6 s and more


@pytest.mark.torch
def test_a_key_that_is_missing_is_known_at_once(
    hosted: tuple[subprocess.Popen[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "_MIN_ANSWER_SECONDS", 100.0)
    keys, began = TorchKeyValueStore(hosted[1], 2), time.monotonic()
    for _ in range(2):
        with pytest.raises(KeyError):
            keys.get("a")
    assert keys.wait(["a"], 0) is None
    value = bytes(range(256)) * 4096
    keys.set("a", value)
    assert keys.get("a") == value
    assert time.monotonic() - began < PROMPT_SECONDS
