"""Conversion between checkpoints and files of `torch.save`.

As a command: `python -m shardkeep.dcp.format_utils`.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.format_utils as stock
from torch.distributed.checkpoint.metadata import (
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list
from torch.futures import Future

from shardkeep.checkpoint import commit, reader
from shardkeep.coordination.solo import Solo
from shardkeep.dcp.bridge.errors import as_torch
from shardkeep.dcp.bridge.full_state import read_full_state
from shardkeep.dcp.bridge.torch_messages import missing_key, not_a_tensor, size_mismatch
from shardkeep.dcp.bridge.torch_modules import forward_to_torch
from shardkeep.dcp.bridge.trust import trusted
from shardkeep.dcp.default_planner import (
    DefaultLoadPlanner,
    _EmptyStateDictLoadPlanner,  # noqa: F401 - as in torch's module: others take it from here
)
from shardkeep.dcp.filesystem import FileSystemReader, FileSystemWriter  # noqa: F401 - the same
from shardkeep.dcp.operations.load import load_state
from shardkeep.dcp.operations.save import save_state
from shardkeep.engine import save
from shardkeep.errors import Mismatch
from shardkeep.state.flatten import flatten
from shardkeep.torch_state.objects import from_bytes
from shardkeep.torch_state.pieces import is_any_tensor

__all__ = [
    "BroadcastingTorchSaveReader",
    "DynamicMetaLoadPlanner",
    "FormatMode",
    "dcp_to_torch_save",
    "torch_save_to_dcp",
]

__getattr__ = forward_to_torch("format_utils")
# Torch's module has these names, and other packages import them from it.
_load_state_dict = load_state
_save_state_dict = save_state


def dcp_to_torch_save(
    dcp_checkpoint_dir: str | os.PathLike[str], torch_save_path: str | os.PathLike[str]
) -> None:
    """Convert a checkpoint to a single file in the format of `torch.save`.

    The state is as it was saved: containers, integer keys, tied tensors. All of it must fit into
    memory. The file appears under its name when it is complete.

    Args:
        dcp_checkpoint_dir: the checkpoint's folder.
        torch_save_path: the file to write; an existing one is replaced.

    Raises:
        CheckpointException: the checkpoint can't be read. It is also a `NotACheckpoint`,
            `Damaged`, `FormatError`, or `Untrusted` for a class that the job does not trust.
        OSError: the file can't be written.

    Example:
        >>> dcp_to_torch_save("run/step_100", "model.pt")
        >>> state = torch.load("model.pt")
    """
    with as_torch(0):
        state = read_full_state(reader.open_reader(dcp_checkpoint_dir), trust=trusted())
    target = Path(torch_save_path)
    beside = target.with_name(f".{target.name}.{commit.new_id()}")
    try:
        with beside.open("xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def torch_save_to_dcp(
    torch_save_path: str | os.PathLike[str], dcp_checkpoint_dir: str | os.PathLike[str]
) -> None:
    """Convert a file of `torch.save` to a checkpoint. Nothing in the file is executed.

    Args:
        torch_save_path: the file, which must hold a mapping.
        dcp_checkpoint_dir: the folder; a checkpoint in it is replaced.

    Raises:
        CheckpointException: the file can't be read, or the state can't be saved. It is also an
            instance of `FormatError`, `Mismatch` if the file holds no mapping, or `Untrusted` for a
            class that the job does not trust.

    Example:
        >>> torch_save_to_dcp("model.pt", "run/step_0")
    """
    with as_torch(0):
        state = _read(torch_save_path)
        save.save(state, dcp_checkpoint_dir, overwrite=True, ranks=Solo())


def _read(path: str | os.PathLike[str]) -> Mapping[Any, Any]:
    """Return the state in a file of `torch.save`, on the CPU."""
    name = os.fspath(path)
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        # Mapped, so that only the tensors take memory.
        data: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    state = from_bytes(data, name=name, trust=trusted())
    if not isinstance(state, Mapping):
        raise Mismatch(f"{name} holds a {type(state).__name__}, not a mapping of names to values")
    return state


class BroadcastingTorchSaveReader(stock.BroadcastingTorchSaveReader):
    """Reads a file of `torch.save` on one rank and broadcasts its tensors to all ranks of the job.

    To be used with `DynamicMetaLoadPlanner`. Only the coordinator needs access to the file. Errors
    in the file or in the state are raised on every rank before anything is sent.

    Example:
        >>> reader = BroadcastingTorchSaveReader()
        >>> dcp.load(state, checkpoint_id="model.pt", storage_reader=reader,
        ...          planner=DynamicMetaLoadPlanner())
    """

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Read the file, on the coordinator.

        Raises:
            ValueError: `checkpoint_id` is missing, or the coordinator is not `coordinator_rank`.
        """
        if self.checkpoint_id is None:
            raise ValueError("checkpoint_id must be the path of the file")
        rank = dist.get_rank() if dist.is_initialized() else 0
        if is_coordinator and rank != self.coordinator_rank:
            raise ValueError(
                f"coordinator_rank is {self.coordinator_rank}, but rank {rank} is the coordinator"
            )
        self.is_coordinator = is_coordinator
        self._held: dict[str, torch.Tensor] = {}
        if is_coordinator:
            leaves = flatten(_read(self.checkpoint_id), is_any_tensor).leaves
            self._held = {leaf.name: leaf.value for leaf in leaves if is_any_tensor(leaf.value)}

    def prepare_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Return plans that tell each rank what will be sent, in which order.

        Raises:
            RuntimeError: a tensor is missing from the file.
            ValueError: a tensor has another size in the file.
        """
        ends: dict[str, list[int]] = {}
        for item in (item for plan in global_plan for item in plan.items):
            reached = [start + length for start, length in _box(item)]
            known = ends.setdefault(item.storage_index.fqn, reached)
            known[:] = map(max, known, reached)
        for name, reached in ends.items():
            if name not in self._held:
                raise RuntimeError(missing_key(name))
            saved, current = self._held[name].shape, torch.Size(reached)
            if saved != current:
                raise ValueError(size_mismatch(name, saved, current))
        sent = {name: (self._held[name].shape, self._held[name].dtype) for name in ends}
        return [LoadPlan(plan.items, sent, plan.planner_data) for plan in global_plan]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Take part in the broadcast of all tensors, and keep what this rank's plan reads."""
        wanted: dict[str, list[Any]] = {}
        for item in plan.items:
            wanted.setdefault(item.storage_index.fqn, []).append(item)
        for name, (shape, dtype) in plan.storage_data.items():
            tensor = self._sent(name, shape, dtype)
            for item in wanted.get(name, ()):
                part = tensor
                for dim, (start, length) in enumerate(_box(item)):
                    part = part.narrow(dim, start, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(part)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _sent(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return a whole tensor on every rank."""
        if not dist.is_initialized():
            return self._held[name]
        device = dist.distributed_c10d._get_pg_default_device()
        if self.is_coordinator:
            tensor = self._held[name].detach().contiguous().to(device)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=device)
        # Sent as bytes, since backends do not support every dtype.
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=self.coordinator_rank)
        return tensor


def _box(item: ReadItem) -> list[tuple[int, int]]:
    """Return (start, length) of an item in its tensor, for each dimension.

    The offsets of an item are relative to its chunk.
    """
    starts = item.storage_index.offset or [0] * len(item.lengths)
    return [
        (start + offset, length)
        for start, offset, length in zip(starts, item.storage_offsets, item.lengths, strict=True)
    ]


class DynamicMetaLoadPlanner(DefaultLoadPlanner):
    """Plans a load by the names, sizes and dtypes of the state, for storage without metadata.

    Example:
        >>> planner = DynamicMetaLoadPlanner()
        >>> dcp.load(state, checkpoint_id="model.pt", storage_reader=reader, planner=planner)
    """

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state to fill.

        Raises:
            RuntimeError: it holds anything but tensors.
        """
        super().set_up_planner(state_dict, metadata, is_coordinator)
        entries: dict[str, Any] = {}
        for name, tensor in self.state_dict.items():
            if not isinstance(tensor, torch.Tensor):
                raise RuntimeError(
                    f"{not_a_tensor(name)}: {type(self).__name__} loads only tensors, and this is "
                    f"a {type(tensor).__name__}"
                )
            properties = TensorProperties(dtype=tensor.dtype)
            chunks = _create_chunk_list(tensor)
            entries[name] = TensorStorageMetadata(properties, tensor.size(), chunks)
        self.metadata = Metadata(state_dict_metadata=entries)


class FormatMode(Enum):
    """The direction of a conversion."""

    TORCH_TO_DCP = "torch_to_dcp"
    DCP_TO_TORCH = "dcp_to_torch"


def _main(arguments: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m shardkeep.dcp.format_utils")
    modes = [mode.value for mode in FormatMode]
    parser.add_argument("mode", choices=modes, help="the direction of the conversion")
    parser.add_argument("src", help="the file, or the checkpoint's folder, to read")
    parser.add_argument("dst", help="the checkpoint's folder, or the file, to write")
    given = parser.parse_args(arguments)
    to_torch = given.mode == FormatMode.DCP_TO_TORCH.value
    if not (os.path.isdir if to_torch else os.path.isfile)(given.src):
        print(f"No checkpoint found at {given.src}: nothing was converted", file=sys.stderr)
        return 1
    print(f"Converting {given.src} to {given.dst} ({given.mode})")
    (dcp_to_torch_save if to_torch else torch_save_to_dcp)(given.src, given.dst)
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
