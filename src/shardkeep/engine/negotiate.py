"""What the ranks of a save tell each other: claims, orders, reports. No torch, no tensor data.

Every rank sends what it holds; the coordinator settles who writes what, or refuses for all; every
rank reports where its bytes went; the coordinator makes one index of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardkeep.checkpoint import commit
from shardkeep.coordination.contract import Session
from shardkeep.errors import AlreadyExists, Conflict, ShardkeepError
from shardkeep.format.messages.claims import outline, pack_claim, unpack_claim
from shardkeep.format.messages.columns import pack, unpack
from shardkeep.format.texts import from_json, to_json
from shardkeep.io.write.written import Written, take_blocks
from shardkeep.plan.assign_writers import WritePlan, assign_writers
from shardkeep.types import I64, Chunks, Claim, Index, Objects

__all__ = ["WriteAssignment", "negotiate_writers", "report"]

_REFUSALS: dict[str, type[ShardkeepError]] = {
    kind.__name__: kind for kind in (AlreadyExists, Conflict)
}


@dataclass(frozen=True, slots=True, eq=False)
class WriteAssignment:
    """What this rank has to write.

    Attributes:
        save_id: the id of the save, in the names of all its files.
        pieces: rows of this rank's claim, ascending.
        objects: names of objects and twins.
        write_plan: the whole picture, on the coordinator only.
    """

    save_id: str
    pieces: I64
    objects: tuple[str, ...]
    write_plan: WritePlan | None = None


def negotiate_writers(
    session: Session,
    claim: Claim,
    admit: Callable[[], None],
    *,
    begin: Callable[[], None] = lambda: None,
    save_id: str | None = None,
    balance_replicas: bool = True,
    require_identical_objects: bool = True,
) -> WriteAssignment:
    """Settle with all ranks who writes what.

    Args:
        claim: what this rank has to save.
        admit: called on the coordinator before anything is settled; raises what forbids the save.
        begin: called on the coordinator when all is settled, before any rank learns what to write.
        save_id: the save's id, if the coordinator's caller has one; never used before.
        balance_replicas, require_identical_objects: as of `plan.settle`.

    Raises:
        Conflict, AlreadyExists: on every rank, with the same message.
    """
    lead = session.rank == 0
    # Ranks of one job mostly have the same names and shapes: only who differs sends them.
    mine = outline(claim) if session.size > 1 else b""
    digest = blake2b(mine, digest_size=16).hexdigest()
    hello = pack({"save_id": save_id or commit.new_id(), "outline": digest}, {}) if lead else None
    known, _ = unpack(session.broadcast(hello))
    same = known["outline"] == digest
    answers = session.gather(b"" if lead else pack_claim(claim, None if same else mine))
    if answers is None:
        return _order(session.scatter(None))
    try:
        admit()
        write_plan = assign_writers(
            [claim, *(unpack_claim(block, claim) for block in answers[1:])],
            balance_replicas=balance_replicas,
            require_identical_objects=require_identical_objects,
        )
    except tuple(_REFUSALS.values()) as error:
        refusal = pack({"refused": type(error).__name__, "why": str(error)}, {})
        return _order(session.scatter([refusal] * session.size))
    begin()
    orders = [
        pack({"save_id": known["save_id"], "objects": to_json(objects)}, {"pieces": pieces})
        for pieces, objects in write_plan.orders(session.size)
    ]
    return replace(_order(session.scatter(orders)), write_plan=write_plan)


def report(session: Session, order: WriteAssignment, written: Written) -> Index | None:
    """Tell the coordinator where this rank's bytes went; there, the index of the checkpoint.

    The rows of `written` are the pieces of the order, then its objects.
    """
    reports = session.gather(
        pack(
            {"files": list(written.files)},
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
    )
    if reports is None or order.write_plan is None:
        return None
    return _index(order.write_plan, [unpack(block) for block in reports])


def _order(block: bytes) -> WriteAssignment:
    head, columns = unpack(block)
    if "refused" in head:
        raise _REFUSALS[head["refused"]](head["why"])
    return WriteAssignment(head["save_id"], columns["pieces"], from_json(head["objects"]))


def _index(
    write_plan: WritePlan, reports: Sequence[tuple[dict[str, Any], dict[str, NDArray[Any]]]]
) -> Index:
    """One index from where every rank's bytes went."""
    files: list[str] = []
    for head, columns in reports:
        columns["file"] = columns["file"] + len(files)
        files += head["files"]
    everything = {
        name: np.concatenate([columns[name] for _, columns in reports])
        for name in ("file", "item", "length", "payload", "digests", "crc")
    }
    counts = np.concatenate([np.diff(columns["block"]) for _, columns in reports])
    place, object_place = _places(write_plan)
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


def _places(write_plan: WritePlan) -> tuple[I64, I64]:
    """Row of each payload, and of each object, in the reports of all ranks one after the other."""
    pieces, objects = write_plan.writer, write_plan.object_writer
    writer = np.concatenate([pieces, objects])
    # As each rank reports: its pieces, ascending, then its objects.
    kind = np.repeat([0, 1], [len(pieces), len(objects)])
    within = np.concatenate([write_plan.piece, np.arange(len(objects))])
    place = np.empty(len(writer), dtype=np.int64)
    place[np.lexsort((within, kind, writer))] = np.arange(len(writer))
    return place[: len(pieces)], place[len(pieces) :]
