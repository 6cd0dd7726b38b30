"""Saves in a process of their own, which lives as long as this one: one for each rank.

The state lies in memory that both map. The processes of the ranks meet in the job's own key-value
store, as the ranks themselves do. Only where a planner or storage of the user's own takes part,
they also form a process group (gloo), as these may ask for their rank, or call collectives.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from multiprocessing import connection, reduction
from secrets import token_hex
from socket import AF_UNIX, SOCK_STREAM, socket
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from shardkeep import knobs
from shardkeep.contracts import Ranks, Session
from shardkeep.dcp.bridge.blocks import Blocks, pack, unpack
from shardkeep.dcp.bridge.errors import as_torch
from shardkeep.ranks.keyed import KeyRanks
from shardkeep.ranks.solo import Solo
from shardkeep.ranks.store import StoreKeys

__all__ = ["Address", "Save", "address", "save"]

Address = tuple[str, ...]
"""A store: ("tcp", host, port) or ("file", path)."""

_AT_ONCE = 64
"""Descriptors that are sent in one message."""


@dataclass(frozen=True)
class Save:
    """What to save with, as the caller of `async_save` says it; it can be pickled if that can.

    Attributes:
        plain: nothing of it is the user's own.
    """

    checkpoint_id: Any
    storage_writer: Any
    planner: Any
    use_collectives: bool
    plain: bool

    @property
    def where(self) -> str:
        """What the ranks call it."""
        named = self.checkpoint_id or getattr(self.storage_writer, "checkpoint_id", None)
        return str(named or type(self.storage_writer).__qualname__)


@dataclass(frozen=True)
class _Orders:
    """What goes to the process ahead of a state.

    Attributes:
        files: how many descriptors of memory follow.
        rank: this rank, counted among the members.
        members: global ranks of those that save.
        store: where they meet; None for one alone.
        name: sets this save apart from all others there.
        group: the process group to be in; "" if it does not matter.
    """

    files: int
    rank: int
    members: tuple[int, ...]
    store: Address | None
    name: str
    group: str


def address() -> Address:
    """The job's store, for a process that takes no part in the job yet.

    Raises:
        NotImplementedError: other processes can't reach it, or there is none.
    """
    group: Any = dist.group.WORLD
    known = hasattr(group, "get_group_store")
    store = group.get_group_store() if known else dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if hasattr(store, "host") and hasattr(store, "port"):
        return ("tcp", store.host, str(store.port))
    if hasattr(store, "path"):
        return ("file", store.path)
    raise NotImplementedError(
        f"AsyncCheckpointerType.PROCESS needs a job with a TCPStore or FileStore, not {store!r}"
    )


def save(
    state: Any, blocks: Blocks, what: Save, job: Ranks, members: Sequence[int], store: Address | None
) -> Metadata:
    """Save a state in the other process; called by one thread at a time.

    Args:
        state: staged, best of all into the blocks, which are closed.
        job: the ranks that save; only to find out whether all of them can.
        members: their global ranks.
        store: where the processes meet; None for one alone.

    Raises:
        CheckpointException: as `shardkeep.dcp.save`; of class RuntimeError with the exit code if
            the process has died: the next save starts another one.
    """
    with as_torch(job.rank):
        try:
            with job.session("start", what.where) as session:
                session.phase("stage")
                body = pack((state, what), blocks, as_shards=what.plain)
                session.phase("start")
                process = _running()
                name, group = _agree(session, process.group, not what.plain)
            orders = _Orders(len(blocks.files), job.rank, tuple(members), store, name, group)
            process.group = group or process.group
            return process.save(orders, body, blocks.files)
        finally:
            blocks.close()


def _agree(session: Session, group: str, wanted: bool) -> tuple[str, str]:
    """A name for the save; the group that all processes must be in, if any of them wants one."""
    said = session.gather(json.dumps([group, wanted]).encode())
    answer = None
    if said is not None:
        groups, wants = zip(*map(json.loads, said), strict=True)
        fresh = len(set(groups)) > 1 or not group
        answer = json.dumps([token_hex(16), (token_hex(16) if fresh else group) * any(wants)])
    name, group = json.loads(session.broadcast(answer and answer.encode()))
    return name, group


_process: _Process | None = None


def _running() -> _Process:
    global _process
    if _process is None or not _process.is_alive():
        _process = None
        _process = _Process()
    return _process


class _Process:
    """This process's end of the other one.

    Attributes:
        group: the last process group that it was told to be in.
    """

    def __init__(self) -> None:
        self.group = ""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs,), name="shardkeep-save", daemon=True
        )
        self._process.start()
        theirs.close()
        self._answer()  # It has come up.

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def save(self, orders: _Orders, body: bytes, files: Sequence[int]) -> Metadata:
        try:
            self._pipe.send(orders)
            with _socket_of(self._pipe) as end:
                for first in range(0, len(files), _AT_ONCE):
                    reduction.sendfds(end, files[first : first + _AT_ONCE])
            self._pipe.send_bytes(body)
        except OSError:
            raise self._death() from None
        failed, result = self._answer()
        if failed:
            raise result
        return result  # type: ignore[no-any-return]

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None

    def _death(self) -> RuntimeError:
        """It does not answer any more."""
        self._process.join(1.0)
        self._process.kill()
        self._process.join()
        code = self._process.exitcode
        self._pipe.close()
        return RuntimeError(f"the process that saves in the background ended: exit code {code}")


def _socket_of(pipe: connection.Connection) -> socket:
    return socket(AF_UNIX, SOCK_STREAM, fileno=os.dup(pipe.fileno()))


# --- in the other process ------------------------------------------------------------------------


def _serve(pipe: connection.Connection) -> None:
    """Its life. It answers (False, metadata) or (True, error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides.
    threading.Thread(target=_end_with_parent, name="shardkeep-parent", daemon=True).start()
    pipe.send("ready")
    group = ""
    while True:
        try:
            orders: _Orders = pipe.recv()
            files = _receive_files(pipe, orders.files)
            body = pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)  # Not through what threads and groups would do on the way out.
        answer: tuple[bool, Any]
        try:
            if orders.group and orders.group != group:
                _join(orders)
                group = orders.group
            answer = False, _save(orders, body, files)
        except BaseException as error:
            answer = True, error
        del body
        _send(pipe, answer)
        del answer


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _receive_files(pipe: connection.Connection, count: int) -> list[int]:
    files: list[int] = []
    with _socket_of(pipe) as end:
        while len(files) < count:
            files += reduction.recvfds(end, min(_AT_ONCE, count - len(files)))
    return files


def _send(pipe: connection.Connection, answer: tuple[bool, Any]) -> None:
    try:
        pipe.send(answer)
    except (pickle.PicklingError, TypeError, AttributeError):
        failed, value = answer
        told = f"{type(value).__name__}: {value}" if failed else "its metadata can't be pickled"
        pipe.send((True, RuntimeError(told)))


def _save(orders: _Orders, body: bytes, files: Sequence[int]) -> Metadata:
    from shardkeep.dcp.state_dict_saver import _save_put_off

    ranks: Ranks = Solo()
    if orders.store is not None:
        size = len(orders.members)
        keys = StoreKeys(_store(orders.store), size)
        ranks = KeyRanks(keys, orders.rank, orders.members, scope=orders.name)
    with as_torch(orders.rank):
        try:
            state, what = unpack(body, files)
        finally:
            for file in files:
                os.close(file)
    return _save_put_off(state, what, ranks)


@lru_cache(maxsize=1)
def _store(at: Address) -> Any:
    if at[0] == "file":
        return dist.FileStore(at[1], -1)
    wait = timedelta(seconds=knobs.deadline())
    return dist.TCPStore(
        at[1], int(at[2]), is_master=False, wait_for_workers=False, timeout=wait
    )  # fmt: skip


def _join(orders: _Orders) -> None:
    """Form a group with the processes of the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
    store: Any = dist.HashStore() if orders.store is None else _store(orders.store)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"shardkeep/background/{orders.group}", store),
        rank=orders.rank,
        world_size=len(orders.members),
        timeout=timedelta(seconds=knobs.deadline()),
    )
