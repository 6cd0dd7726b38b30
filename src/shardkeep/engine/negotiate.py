"""The messages of a save: what ranks hold, what each of them writes, where it went.

Every rank sends its claim to the coordinator, which assigns a writer to each chunk, or refuses the
save for all ranks. Every rank then reports where its bytes were written, and the coordinator builds
one index of it. No torch, no tensor data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.checkpoint import commit
from shardkeep.checkpoint.commit_record import Admission
from shardkeep.coordination.contract import Session
from shardkeep.coordination.timing import slowest_of
from shardkeep.errors import AlreadyExists, Conflict, ShardkeepError
from shardkeep.format.messages.claims import outline, pack_claim, unpack_claim
from shardkeep.format.messages.columns import pack, unpack
from shardkeep.format.texts import from_json, to_json
from shardkeep.io.write.written import Written, take_blocks
from shardkeep.plan.assign_writers import WritePlan, assign_writers
from shardkeep.types import I64, Chunks, Claim, Index, Objects
from shardkeep.util import gc_pause

__all__ = ["CollectedReports", "WriteAssignment", "negotiate_writers", "report"]

_REFUSALS: dict[str, type[ShardkeepError]] = {
    kind.__name__: kind for kind in (AlreadyExists, Conflict)
}


@dataclass(frozen=True, slots=True, eq=False)
class WriteAssignment:
    """What this rank has to write.

    Attributes:
        save_id: the id of the save, which is part of the names of all its files.
        pieces: rows of this rank's claim, ascending.
        objects: names of objects and legacy duplicates.
        write_plan: the plan of all ranks; on the coordinator only.
        admission: what the save replaces; on the coordinator only.
    """

    save_id: str
    pieces: I64
    objects: tuple[str, ...]
    write_plan: WritePlan | None = None
    admission: Admission | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CollectedReports:
    """What the coordinator learned from the reports of all ranks.

    Attributes:
        index: the index of the checkpoint.
        slowest: the rank that took longest, and its seconds.
    """

    index: Index
    slowest: tuple[int, float]


def negotiate_writers(
    session: Session,
    claim: Claim,
    admit: Callable[[], Admission | None],
    *,
    begin: Callable[[], None] = lambda: None,
    save_id: str | None = None,
    balance_replicas: bool = True,
    require_identical_objects: bool = True,
) -> WriteAssignment:
    """Agree with all ranks on which of them writes what, and return what this one writes.

    Args:
        session: the session of the save.
        claim: what this rank holds.
        admit: called on the coordinator before writers are assigned. It raises what forbids the
            save, and returns what the save replaces.
        begin: called on the coordinator when writers are assigned, before any rank learns of it.
        save_id: the id of the save; None generates one. The coordinator's is used.
        balance_replicas: distribute replicas over the ranks that hold them.
        require_identical_objects: refuse an object whose value differs between ranks.

    Raises:
        Conflict, AlreadyExists: on every rank, with the same message.
    """
    coordinates = session.rank == 0
    # Most ranks of a job have the same names and shapes: only a rank that differs sends its own.
    with gc_pause.paused():
        own_outline = outline(claim) if session.size > 1 else b""
        digest = blake2b(own_outline, digest_size=16).hexdigest()
    hello = {"save_id": save_id or commit.new_id(), "outline": digest}
    agreed, _ = unpack(session.broadcast(pack(hello, {}) if coordinates else None))
    with gc_pause.paused():
        same = agreed["outline"] == digest
        message = b"" if coordinates else pack_claim(claim, None if same else own_outline)
    answers = session.gather(message)
    if answers is None:
        return _unpack_assignment(session.scatter(None))
    try:
        admission = admit()
        with gc_pause.paused():
            write_plan = assign_writers(
                [claim, *(unpack_claim(block, claim) for block in answers[1:])],
                balance_replicas=balance_replicas,
                require_identical_objects=require_identical_objects,
            )
    except tuple(_REFUSALS.values()) as error:
        refusal = pack({"refused": type(error).__name__, "why": str(error)}, {})
        return _unpack_assignment(session.scatter([refusal] * session.size))
    begin()
    with gc_pause.paused():
        assignments = _pack_assignments(write_plan, agreed["save_id"], session.size)
    own_assignment = _unpack_assignment(session.scatter(assignments))
    return replace(own_assignment, write_plan=write_plan, admission=admission)


def report(
    session: Session, assignment: WriteAssignment, written: Written, seconds: float = 0.0
) -> CollectedReports | None:
    """Tell the coordinator where this rank's bytes were written.

    Args:
        session: the session of the save.
        assignment: what this rank had to write.
        written: where it was written: the pieces of the assignment, then its objects.
        seconds: how long that took this rank.

    Returns:
        The index of the checkpoint, on the coordinator; None on other ranks.
    """
    with gc_pause.paused():
        message = _pack_report(written, seconds)
    messages = session.gather(message)
    if messages is None or assignment.write_plan is None:
        return None
    with gc_pause.paused():
        reports = [unpack(block) for block in messages]
        return CollectedReports(
            index=_index(assignment.write_plan, reports),
            slowest=slowest_of([head["seconds"] for head, _ in reports]),
        )


def _pack_report(written: Written, seconds: float) -> bytes:
    return pack(
        {"files": list(written.files), "seconds": seconds},
        {
            "file": written.file,
            "item": written.item,
            "length": written.length,
            "payload": written.payload,
            "block": written.block,
            "digests": written.checksums,
            "crc": written.crc,
        },
    )


def _pack_assignments(write_plan: WritePlan, save_id: str, ranks: int) -> list[bytes]:
    return [
        pack({"save_id": save_id, "objects": to_json(objects)}, {"pieces": pieces})
        for pieces, objects in write_plan.orders(ranks)
    ]


def _unpack_assignment(block: bytes) -> WriteAssignment:
    head, columns = unpack(block)
    if "refused" in head:
        raise _REFUSALS[head["refused"]](head["why"])
    return WriteAssignment(head["save_id"], columns["pieces"], from_json(head["objects"]))


def _index(
    write_plan: WritePlan, reports: Sequence[tuple[dict[str, Any], dict[str, NDArray[Any]]]]
) -> Index:
    """Build one index from the reports of all ranks."""
    files: list[str] = []
    for head, columns in reports:
        columns["file"] = columns["file"] + len(files)
        files += head["files"]
    everything = {
        name: np.concatenate([columns[name] for _, columns in reports])
        for name in ("file", "item", "length", "payload", "digests", "crc")
    }
    counts = np.concatenate([np.diff(columns["block"]) for _, columns in reports])
    place, object_place = _report_rows(write_plan)
    rows = place[write_plan.payload]
    block, checksums = take_blocks(counts, everything["digests"], rows)
    return Index(
        files=tuple(files),
        tensors=write_plan.tensors,
        chunks=Chunks(
            tensor=write_plan.tensor,
            offsets=write_plan.offsets,
            sizes=write_plan.sizes,
            file=everything["file"][rows].astype(np.int32),
            item=everything["item"][rows],
            length=everything["length"][rows],
            payload=everything["payload"][rows],
            transform=np.zeros(len(rows), dtype=np.int16),
            block=block,
            checksums=checksums,
        ),
        objects=Objects(
            names=(*write_plan.objects, *write_plan.legacy_duplicates),
            file=everything["file"][object_place].astype(np.int32),
            item=everything["item"][object_place],
            length=everything["length"][object_place],
            transform=np.zeros(len(object_place), dtype=np.int16),
            crc=everything["crc"][object_place].astype(np.int64),
            values=write_plan.values,
        ),
        structure=write_plan.structure,
        legacy_duplicates=write_plan.legacy_duplicates,
    )


def _report_rows(write_plan: WritePlan) -> tuple[I64, I64]:
    """Return the row of each payload, and of each object, in the concatenated reports."""
    pieces, objects = write_plan.writer, write_plan.object_writer
    writer = np.concatenate([pieces, objects])
    # Each rank reports its pieces, ascending, and then its objects.
    kind = np.repeat([0, 1], [len(pieces), len(objects)])
    within = np.concatenate([write_plan.piece, np.arange(len(objects))])
    place = np.empty(len(writer), dtype=np.int64)
    place[np.lexsort((within, kind, writer))] = np.arange(len(writer))
    return place[: len(pieces)], place[len(pieces) :]
