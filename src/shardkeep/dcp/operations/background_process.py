"""Saves in another process, which each rank starts once and keeps between its saves.

The staged state is in memory that both processes map. The saving processes of all ranks coordinate
through the job's own key-value store, as the ranks themselves do. They form a process group (gloo)
only if a planner or storage of the user's own takes part, since such code may ask for its rank or
call collectives.
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
from shardkeep.dcp.bridge.errors import as_torch
from shardkeep.dcp.bridge.lazy_metadata import CommittedSave, lazy_metadata, pending_build
from shardkeep.dcp.operations.save import SaveRequest
from shardkeep.dcp.operations.shared_memory import SharedMemory, pack, unpack
from shardkeep.engine.save_queue import StateSource
from shardkeep.torch_state.describe import describe_state
from shardkeep.torch_state.objects import to_bytes

__all__ = ["Rendezvous", "rendezvous_of", "save"]

_stores: Any = dist
_MAX_DESCRIPTORS_PER_MESSAGE = 64


@dataclass(frozen=True)
class Rendezvous:
    """Where the saving processes of the ranks meet.

    Attributes:
        members: global ranks of those that save.
        store: the address of the job's store: ("tcp", host, port) or ("file", path); None for a
            process that saves alone.
    """

    members: tuple[int, ...]
    store: tuple[str, ...] | None


@dataclass(frozen=True)
class _SaveMessage:
    """What the saving process is sent ahead of a state.

    Attributes:
        files: the number of descriptors of shared memory that follow.
        rank: this rank, counted among the members.
        rendezvous: where the saving processes of all ranks meet.
        name: distinguishes this save from all others there.
        group: the name of the process group to be in; "" if none is needed.
    """

    files: int
    rank: int
    rendezvous: Rendezvous
    name: str
    group: str


def rendezvous_of(job: Ranks, ranks: Sequence[int] | Ranks | None) -> Rendezvous:
    """Return where the saving processes of these ranks can meet: in the job's store.

    Args:
        job: the ranks that save.
        ranks: the same, as given to `detect_ranks`.

    Raises:
        NotImplementedError: the job has no store, or one that other processes can't reach.
    """
    if job.size == 1:
        return Rendezvous((job.rank,), None)
    assert not isinstance(ranks, Ranks)
    return Rendezvous(tuple(range(job.size) if ranks is None else ranks), _store_address())


def _store_address() -> tuple[str, ...]:
    group: Any = dist.group.WORLD
    is_public = hasattr(group, "get_group_store")
    store = group.get_group_store() if is_public else dist.distributed_c10d._get_default_store()
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
    state: StateSource,
    *,
    request: SaveRequest,
    ranks: Ranks,
    rendezvous: Rendezvous,
    memory: SharedMemory,
) -> Metadata:
    """Save a state in the other process. Must be called by one thread at a time.

    Args:
        state: gives the staged state; what is not in `memory` is copied to it.
        request: what to save with.
        ranks: the ranks that save. Here they only agree that all of them are able to start.
        rendezvous: where the saving processes meet.
        memory: is closed.

    Raises:
        CheckpointException: the save failed. If the saving process has died, this is a
            RuntimeError as well, with its exit code, and the next save starts another process.
    """
    with as_torch(ranks.rank):
        try:
            with ranks.session("start", request.name) as session:
                session.phase("stage")
                by_engine = request.is_engine_save()
                body = _pack(state(), request, memory, by_engine)
                session.phase("start")
                process = _running_process()
                name, group = _agree(session, process.group, not by_engine)
                session.phase("hand over")
                message = _SaveMessage(len(memory.files), ranks.rank, rendezvous, name, group)
                process.prepare(message, body, memory.files)
        finally:
            memory.close()
        # All saving processes are ready, so none of them waits in vain for another.
        return process.save()


def _pack(state: Any, request: SaveRequest, memory: SharedMemory, by_engine: bool) -> bytes:
    try:
        return pack((state, request), memory, as_shards=by_engine)
    except Exception:
        if by_engine:  # Raises an error that names the object which can't be pickled.
            for name, value in describe_state(state).objects.items():
                to_bytes(value, name=name)
        raise


def _agree(session: Session, group: str, needs_group: bool) -> tuple[str, str]:
    """Return a name for the save, and the process group that all saving processes must be in.

    Args:
        session: of the ranks that save.
        group: the group that this rank's saving process is in; "" if none.
        needs_group: whether this rank's planner or storage may need a group.
    """
    answers = session.gather(json.dumps([group, needs_group]).encode())
    decision = None
    if answers is not None:
        groups, needs = zip(*map(json.loads, answers), strict=True)
        is_new = len(set(groups)) > 1 or not group
        agreed = (token_hex(16) if is_new else group) if any(needs) else ""
        decision = json.dumps([token_hex(16), agreed])
    name, group = json.loads(session.broadcast(None if decision is None else decision.encode()))
    return name, group


_processes: list[_SavingProcess] = []
"""The saving process, once one was needed; at most one."""


def _running_process() -> _SavingProcess:
    if not _processes or not _processes[0].is_alive():
        _processes[:] = []
        _processes.append(_SavingProcess())
    return _processes[0]


class _SavingProcess:
    """A saving process, as seen from the rank that started it.

    Attributes:
        group: the process group that it was last told to be in.
    """

    def __init__(self) -> None:
        self.group = ""
        context = multiprocessing.get_context("spawn")
        self._pipe, child_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child_end,), name="shardkeep-save", daemon=True
        )
        self._process.start()
        child_end.close()
        self._receive()  # Sent as soon as it is able to save.

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def prepare(self, message: _SaveMessage, body: bytes, files: list[int]) -> None:
        """Send a save, in place of one that was sent but not started; return when it is ready."""
        try:
            self._pipe.send(message)
            with _socket_of(self._pipe) as end:
                for first in range(0, len(files), _MAX_DESCRIPTORS_PER_MESSAGE):
                    reduction.sendfds(end, files[first : first + _MAX_DESCRIPTORS_PER_MESSAGE])
            self._pipe.send_bytes(body)
        except OSError:
            raise self._died() from None
        self._receive()
        self.group = message.group or self.group

    def save(self) -> Metadata:
        """Run the save that was sent."""
        try:
            self._pipe.send(None)
        except OSError:
            raise self._died() from None
        saved = self._receive()
        if isinstance(saved, CommittedSave):
            return lazy_metadata(saved)
        return saved  # type: ignore[no-any-return]

    def _receive(self) -> Any:
        try:
            has_failed, result = self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if has_failed:
            raise result
        return result

    def _died(self) -> RuntimeError:
        """End the process, which does not answer any more; return the error to raise."""
        self._process.join(1.0)
        self._process.kill()
        self._process.join()
        code = self._process.exitcode
        self._pipe.close()
        return RuntimeError(f"the process that saves in the background ended: exit code {code}")


def _socket_of(pipe: connection.Connection) -> socket:
    return socket(AF_UNIX, SOCK_STREAM, fileno=os.dup(pipe.fileno()))


# --- in the saving process -----------------------------------------------------------------------


def _serve(pipe: connection.Connection) -> None:
    """Run the saving process: answer each message with (False, result) or (True, error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides when to end.
    threading.Thread(target=_end_with_parent, name="shardkeep-parent", daemon=True).start()
    server = _Server(pipe)
    _send(pipe, (False, None))
    while True:
        try:
            message = pipe.recv()
            work = partial(server.prepare, message) if message is not None else server.save
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
            os._exit(0)  # Skips exit handlers of threads and process groups, which could hang.


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _Server:
    """The save that was prepared, and the process group that this process is in."""

    def __init__(self, pipe: connection.Connection) -> None:
        self._pipe = pipe
        self._group = ""
        self._prepared: tuple[Any, SaveRequest, Ranks] | None = None

    def prepare(self, message: _SaveMessage) -> None:
        self._prepared = None
        files = self._receive_descriptors(message.files)
        try:
            body = self._pipe.recv_bytes()
            if message.group and message.group != self._group:
                _join_group(message)
                self._group = message.group
            state, request = unpack(body, files)
            self._prepared = state, request, _ranks_of(message)
        finally:
            for file in files:
                os.close(file)

    def save(self) -> Metadata | CommittedSave:
        assert self._prepared is not None
        state, request, ranks = self._prepared
        self._prepared = None
        saved = request.run(lambda: state, ranks)
        # Pickling the metadata would build all of it, and hardly any caller looks at it.
        return pending_build(saved) or saved

    def _receive_descriptors(self, count: int) -> list[int]:
        files: list[int] = []
        with _socket_of(self._pipe) as end:
            while len(files) < count:
                files += reduction.recvfds(
                    end, min(_MAX_DESCRIPTORS_PER_MESSAGE, count - len(files))
                )
        return files


def _send(pipe: connection.Connection, answer: tuple[bool, Any]) -> None:
    try:
        pipe.send(answer)
    except (pickle.PicklingError, TypeError, AttributeError):
        has_failed, value = answer
        text = f"{type(value).__name__}: {value}" if has_failed else "its metadata can't be pickled"
        pipe.send((True, RuntimeError(text)))


def _ranks_of(message: _SaveMessage) -> Ranks:
    members, address = message.rendezvous.members, message.rendezvous.store
    if address is None:
        return Solo()
    store = TorchKeyValueStore(_connected_store(address), len(members))
    return KeyValueRanks(store, message.rank, members, scope=message.name)


@lru_cache(maxsize=1)
def _connected_store(address: tuple[str, ...]) -> Any:
    if address[0] == "file":
        return _stores.FileStore(address[1], -1)
    timeout = timedelta(seconds=settings.deadline_seconds())
    return _stores.TCPStore(
        address[1], int(address[2]), is_master=False, wait_for_workers=False, timeout=timeout
    )


def _join_group(message: _SaveMessage) -> None:
    """Form a process group with the saving processes of the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()
    address = message.rendezvous.store
    store: Any = _stores.HashStore() if address is None else _connected_store(address)
    dist.init_process_group(
        "gloo",
        store=_stores.PrefixStore(f"shardkeep/background/{message.group}", store),
        rank=message.rank,
        world_size=len(message.rendezvous.members),
        timeout=timedelta(seconds=settings.deadline_seconds()),
    )
