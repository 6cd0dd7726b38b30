"""The key-value stores: in memory, and through a store of the job."""

from __future__ import annotations

import threading
import time

import pytest

from shardkeep.ranks.keys import MemoryKeys
from shardkeep.ranks.store import StoreKeys


def test_values() -> None:
    keys = MemoryKeys()
    with pytest.raises(KeyError):
        keys.get("a")
    keys.set("a", b"1")
    keys.set("a", b"2")
    assert keys.get("a") == b"2"
    keys.delete(["a", "b"])
    assert len(keys) == 0


def test_wait_gives_the_first_in_order() -> None:
    keys = MemoryKeys()
    keys.set("b", b"")
    keys.set("c", b"")
    assert keys.wait(["a", "b", "c"], 0) == "b"
    assert keys.wait(["a", "c"], 10) == "c"


def test_wait_ends_with_its_time() -> None:
    keys, began = MemoryKeys(), time.monotonic()
    assert keys.wait(["a"], -1) is None
    assert keys.wait(["a"], 0.1) is None
    assert 0.1 <= time.monotonic() - began < 5
    assert not keys._waiting


def test_wait_is_woken() -> None:
    keys = MemoryKeys()
    timer = threading.Timer(0.05, lambda: (keys.set("other", b""), keys.set("b", b"")))
    timer.start()
    assert keys.wait(["a", "b"], 30) == "b"
    timer.join()
    assert not keys._waiting


class Vanishing:
    """A store whose key goes between the look and the answer, as TCPStore shows it."""

    def check(self, keys):
        return True

    def get(self, key):
        return b""


def test_a_key_that_goes_while_it_is_read_is_missing_not_empty():
    with pytest.raises(KeyError, match="message/0"):
        StoreKeys(Vanishing(), 2).get("message/0")


class Late:
    """A store to which a message comes, and a failure after it, just after a look for the first."""

    def __init__(self):
        self.there = set()

    def check(self, keys):
        (key,) = keys
        found = key in self.there
        self.there |= {"message", "failed"}
        return found


def test_a_message_wins_over_a_failure_that_came_after_it():
    assert StoreKeys(Late(), 2).wait(["message", "failed"], 10) == "message"
    assert StoreKeys(Late(), 2).wait(["other", "failed"], 10) == "failed"
