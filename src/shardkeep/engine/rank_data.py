"""The data that one rank writes: chunks of tensors, and pickled objects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardkeep.engine.negotiate import WriteAssignment
from shardkeep.format.torch_zip.container_write import TensorFraming
from shardkeep.io.arena import Arena, allocate_huge_pages
from shardkeep.io.checksums import crc32
from shardkeep.io.contract import Payloads
from shardkeep.io.write.files import copy_threads
from shardkeep.io.write.staging import StagingLayout, stage_payloads
from shardkeep.io.write.windows import BlockChecksums, FileWindows, checksum_memory, lay_out_files
from shardkeep.plan.distinct import distinct
from shardkeep.plan.memory_budget import MemoryBudget
from shardkeep.torch_state.describe import LocalState
from shardkeep.torch_state.devices import pinned
from shardkeep.torch_state.objects import to_bytes
from shardkeep.torch_state.payloads import StatePayloads
from shardkeep.types import DTYPES, ITEMSIZES

__all__ = ["RankData"]


class RankData:
    """The chunks that this rank writes, followed by its objects.

    Args:
        local: what this rank holds.
        assignment: which of it this rank writes.
        stable: True if the state does not change until everything is written; False if it may
            change once everything has been copied.

    Attributes:
        stable: whether the bytes can be read again, for another attempt to write them.
        staged_nbytes: bytes of memory that the data was copied to; None before that.
    """

    def __init__(self, local: LocalState, assignment: WriteAssignment, *, stable: bool) -> None:
        claim, rows = local.claim, assignment.pieces
        objects = [to_bytes(local.objects[name], name=name) for name in assignment.objects]
        tensor, sizes = claim.piece[rows], claim.sizes[rows]
        codes, ndim = claim.tensors.dtype[tensor], claim.tensors.ndim[tensor]
        kind, first = distinct([codes, ndim, *sizes.T])
        self._framings = [
            TensorFraming(DTYPES[codes[row]], tuple(sizes[row, : ndim[row]].tolist()))
            for row in first.tolist()
        ] + [None]  # of objects
        self._kind = np.concatenate([kind, np.full(len(objects), len(first), dtype=np.int64)])
        self._nbytes = np.concatenate(
            [
                sizes.prod(axis=1) * ITEMSIZES[codes],
                np.array([len(data) for data in objects], dtype=np.int64),
            ]
        )
        self._crcs = {row: crc32(data) for row, data in enumerate(objects, len(rows))}
        memory = [local.memory[row] for row in rows.tolist()]
        source = StatePayloads(memory, local.addresses[rows], objects)
        self._on_cuda = any(device.type == "cuda" for device in source.devices)
        self._payloads: Payloads = source
        self._checksums: BlockChecksums = checksum_memory
        self.stable = stable
        self.staged_nbytes: int | None = None

    def stage(self, arena: Arena, budget: int | None, ranks_here: int) -> bool:
        """Copy everything to memory of the arena, and forget the state.

        Args:
            arena: memory to copy to.
            budget: bytes that the copy and the buffers for writing may take; None means no limit.
            ranks_here: how many ranks share this machine's cores.

        Returns:
            False if the copy would exceed the budget; then nothing was copied.
        """
        layout = StagingLayout(self._payloads, self._nbytes)
        if not MemoryBudget.of(budget).can_stage(layout.nbytes):
            return False
        memory = arena.take(layout.nbytes, pinned if self._on_cuda else allocate_huge_pages)
        staged = stage_payloads(self._payloads, layout, memory, threads=copy_threads(ranks_here))
        self._payloads, self._checksums = staged, staged.checksums
        self.stable, self.staged_nbytes = True, layout.nbytes
        return True

    def file_count(self, wanted: int | None) -> int:
        """Return the number of files: by default one, or none if there is nothing to write."""
        return min(1, len(self._kind)) if wanted is None else wanted

    def lay_out(self, names: Sequence[str], window_nbytes: int) -> list[FileWindows]:
        """Return the layout of these files, in windows of at most so many bytes."""
        return lay_out_files(
            names,
            self._nbytes,
            self._kind,
            self._framings,
            self._payloads,
            self._crcs,
            window_nbytes,
            in_place=self.stable,
            checksums=self._checksums,
        )
