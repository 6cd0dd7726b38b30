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
from functools import lru_cache, partial
from multiprocessing import connection, reduction
from secrets import token_hex
from socket import AF_UNIX, SOCK_STREAM, socket
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from shardkeep import settings
from shardkeep.coordination.contract import Ranks, Session
from shardkeep.coordination.keyvalue.ranks import KeyValueRanks
from shardkeep.coordination.keyvalue.torch_store import TorchKeyValueStore
from shardkeep.coordination.solo import Solo
from shardkeep.dcp.bridge.engine_choice import plain_save
from shardkeep.dcp.bridge.errors import as_torch
from shardkeep.dcp.bridge.lazy_metadata import CommittedSave, lazy_metadata, pending_build
from shardkeep.dcp.bridge.shared_memory import Blocks, pack, unpack
from shardkeep.dcp.bridge.storage import writer_for
from shardkeep.torch_state.describe import describe_state
from shardkeep.torch_state.objects import to_bytes

__all__ = ["Save", "Venue", "save", "venue"]

_stores: Any = dist
_AT_ONCE = 64
"""Descriptors that are sent in one message."""


@dataclass(frozen=True)
class Save:
    """What to save with, as the caller of `async_save` says it; it can be pickled if that can."""

    checkpoint_id: Any
    storage_writer: Any
    planner: Any
    use_collectives: bool

    @property
    def name(self) -> str:
        """What the ranks call it."""
        named = self.checkpoint_id or getattr(self.storage_writer, "checkpoint_id", None)
        return str(named or type(self.storage_writer).__qualname__)

    def is_plain(self) -> bool:
        """Whether nothing of it is the user's own."""
        writer = self.storage_writer or writer_for(None, self.checkpoint_id)
        return self.use_collectives and plain_save(self.planner, writer)


@dataclass(frozen=True)
class Venue:
    """Where the processes of the ranks meet.

    Attributes:
        members: global ranks of those that save.
        store: the job's: ("tcp", host, port) or ("file", path); None for one alone.
    """

    members: tuple[int, ...]
    store: tuple[str, ...] | None


@dataclass(frozen=True)
class _Orders:
    """What goes to the process ahead of a state.

    Attributes:
        files: how many descriptors of memory follow.
        rank: this rank, counted among the members.
        where: it meets the other ranks' processes.
        name: sets this save apart from all others there.
        group: the process group to be in; "" if it does not matter.
    """

    files: int
    rank: int
    where: Venue
    name: str
    group: str


def venue(job: Ranks, ranks: Sequence[int] | Ranks | None) -> Venue:
    """Where the processes of the ranks that save will meet: in the job's store.

    Args:
        job: who saves.
        ranks: the same, as it was said to `detect_ranks`.

    Raises:
        NotImplementedError: other processes can't reach the store, or there is none.
    """
    if job.size == 1:
        return Venue((job.rank,), None)
    assert not isinstance(ranks, Ranks)
    return Venue(tuple(range(job.size) if ranks is None else ranks), _address())


def _address() -> tuple[str, ...]:
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


def save(state: Any, *, what: Save, job: Ranks, where: Venue, blocks: Blocks) -> Metadata:
    """Save a state in the other process; called by one thread at a time.

    Args:
        state: staged, best of all into the blocks, which are closed.
        job: the ranks that save; here they only find out whether all of them can.

    Raises:
        CheckpointException: as `shardkeep.dcp.save`; it is a RuntimeError with the exit code if the
            process has died: the next save starts another one.
    """
    with as_torch(job.rank):
        try:
            with job.session("start", what.name) as session:
                session.phase("stage")
                plain = what.is_plain()
                body = _packed(state, what, blocks, plain)
                session.phase("start")
                process = _running()
                name, group = _agree(session, process.group, not plain)
                session.phase("hand over")
                orders = _Orders(len(blocks.files), job.rank, where, name, group)
                process.prepare(orders, body, blocks.files)
        finally:
            blocks.close()
        # Now all of them are ready: they will meet.
        return process.save()


def _packed(state: Any, what: Save, blocks: Blocks, plain: bool) -> bytes:
    try:
        return pack((state, what), blocks, as_shards=plain)
    except Exception:
        if plain:  # Which one can't be pickled is known to who saves them one by one.
            for name, value in describe_state(state).objects.items():
                to_bytes(value, name=name)
        raise


def _agree(session: Session, group: str, wanted: bool) -> tuple[str, str]:
    """A name for the save; the group that all processes must be in, if any of them wants one."""
    said = session.gather(json.dumps([group, wanted]).encode())
    answer = None
    if said is not None:
        groups, wants = zip(*map(json.loads, said), strict=True)
        fresh = len(set(groups)) > 1 or not group
        answer = json.dumps([token_hex(16), (token_hex(16) if fresh else group) * any(wants)])
    name, group = json.loads(session.broadcast(None if answer is None else answer.encode()))
    return name, group


_alive: list[_Process] = []
"""The process, once it was needed."""


def _running() -> _Process:
    if not _alive or not _alive[0].is_alive():
        _alive[:] = []
        _alive.append(_Process())
    return _alive[0]


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

    def prepare(self, orders: _Orders, body: bytes, files: list[int]) -> None:
        """Hand it a save, in place of one that it has not begun; returns when it is ready."""
        try:
            self._pipe.send(orders)
            with _socket_of(self._pipe) as end:
                for first in range(0, len(files), _AT_ONCE):
                    reduction.sendfds(end, files[first : first + _AT_ONCE])
            self._pipe.send_bytes(body)
        except OSError:
            raise self._death() from None
        self._answer()
        self.group = orders.group or self.group

    def save(self) -> Metadata:
        """Let it do what it was handed."""
        try:
            self._pipe.send(None)
        except OSError:
            raise self._death() from None
        answer = self._answer()
        if isinstance(answer, CommittedSave):
            return lazy_metadata(answer)
        return answer  # type: ignore[no-any-return]

    def _answer(self) -> Any:
        try:
            failed, result = self._pipe.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if failed:
            raise result
        return result

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
    """Its life. It answers (False, result) or (True, error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides.
    threading.Thread(target=_end_with_parent, name="shardkeep-parent", daemon=True).start()
    server = _Server(pipe)
    _send(pipe, (False, None))
    while True:
        try:
            orders = pipe.recv()
            work = partial(server.prepare, orders) if orders is not None else server.save
            answer: tuple[bool, Any]
            try:
                answer = False, work()
            except EOFError:
                raise
            except BaseException as error:
                answer = True, error
            _send(pipe, answer)
            del answer
        except EOFError:
            os._exit(0)  # Not through what threads and groups would do on the way out.


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Server:
    """What was prepared, and the process group that this process is in."""

    def __init__(self, pipe: connection.Connection) -> None:
        self._pipe = pipe
        self._group = ""
        self._prepared: Any = None

    def prepare(self, orders: _Orders) -> None:
        self._prepared = None
        files = self._receive(orders.files)
        try:
            body = self._pipe.recv_bytes()
            if orders.group and orders.group != self._group:
                _join(orders)
                self._group = orders.group
            self._prepared = (*unpack(body, files), _ranks(orders))
        finally:
            for file in files:
                os.close(file)

    def save(self) -> Metadata | CommittedSave:
        from shardkeep.dcp.state_dict_saver import _save_put_off

        prepared, self._prepared = self._prepared, None
        saved = _save_put_off(*prepared)
        # Not its metadata: the pickle of that would be built in full, and hardly anyone reads it.
        return pending_build(saved) or saved

    def _receive(self, count: int) -> list[int]:
        files: list[int] = []
        with _socket_of(self._pipe) as end:
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


def _ranks(orders: _Orders) -> Ranks:
    members, store = orders.where.members, orders.where.store
    if store is None:
        return Solo()
    return KeyValueRanks(
        TorchKeyValueStore(_store(store), len(members)), orders.rank, members, scope=orders.name
    )


@lru_cache(maxsize=1)
def _store(at: tuple[str, ...]) -> Any:
    if at[0] == "file":
        return _stores.FileStore(at[1], -1)
    wait = timedelta(seconds=settings.deadline_seconds())
    return _stores.TCPStore(
        at[1], int(at[2]), is_master=False, wait_for_workers=False, timeout=wait
    )  # fmt: skip


def _join(orders: _Orders) -> None:
    """Form a group with the processes of the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
    at = orders.where.store
    store: Any = _stores.HashStore() if at is None else _store(at)
    dist.init_process_group(
        "gloo",
        store=_stores.PrefixStore(f"shardkeep/background/{orders.group}", store),
        rank=orders.rank,
        world_size=len(orders.where.members),
        timeout=timedelta(seconds=settings.deadline_seconds()),
    )
