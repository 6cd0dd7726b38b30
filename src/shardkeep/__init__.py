"""Shardkeep: a checkpoint engine for PyTorch's distributed checkpoint format (DCP).

Save and load a training state (needs torch; every rank calls these):

    import shardkeep as sk

    sk.save(state, "run/step_100")
    sk.load(state, "run/step_100")

Look into a checkpoint, without torch:

    with sk.open("run/step_100") as ckpt:
        ckpt.tensor("model.0.weight").shape
        ckpt.read("model.0.weight", sk.Box((0, 0), (2, 64)))

Keep the checkpoints of a run:

    run = sk.Manager("run", keep=sk.KeepLast(3) | sk.KeepBest("loss"), every=100)

`shardkeep.dcp` has the names of `torch.distributed.checkpoint`. All names are imported on first
use, so that reading never imports torch.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from shardkeep.version import __version__ as __version__

try:
    import fcntl as _fcntl  # noqa: F401 - commits rely on what only POSIX systems have
except ModuleNotFoundError:
    raise ImportError(
        "Shardkeep runs on Linux and, as best effort, on macOS, but not on Windows: its commits "
        "rely on POSIX file locks and atomic renames. On Windows, use it inside WSL."
    ) from None

if TYPE_CHECKING:
    from shardkeep import dcp as dcp
    from shardkeep.checkpoint.mapping import Checkpoint, open
    from shardkeep.checkpoint.verify import VerifyReport
    from shardkeep.coordination.contract import Ranks
    from shardkeep.coordination.events import (
        CheckpointLoaded,
        Event,
        EventHook,
        FilesWritten,
        ProgressMade,
        ReplacedFilesRemoved,
        Retried,
        SaveBegan,
        SaveCommitted,
        StateStaged,
        StepPassedOver,
        StepRemoved,
        StepRestored,
        WaitingForRanks,
        WorkFailed,
    )
    from shardkeep.engine.async_save import async_save, release_memory
    from shardkeep.engine.handles import SaveHandle
    from shardkeep.engine.load import load
    from shardkeep.engine.load_options import LoadOptions
    from shardkeep.engine.load_report import LoadReport
    from shardkeep.engine.options import AsyncSaveOptions, SaveOptions
    from shardkeep.engine.reports import SaveReport
    from shardkeep.engine.save import save
    from shardkeep.errors import (
        AlreadyExists,
        AsyncSaveFailed,
        Conflict,
        Damaged,
        FormatError,
        LeaseLost,
        Mismatch,
        NotACheckpoint,
        RankFailed,
        Replaced,
        ShardkeepError,
        Untrusted,
    )
    from shardkeep.run.manager import Manager, StepHandle
    from shardkeep.run.policies import KeepBest, KeepEvery, KeepLast, KeepPolicy
    from shardkeep.run.restore import Restored
    from shardkeep.state.markers import PerRank, Replicated
    from shardkeep.stores.contract import Store
    from shardkeep.stores.local.store import LocalStore
    from shardkeep.stores.memory import MemoryStore
    from shardkeep.torch_state.shards import Shards
    from shardkeep.types import (
        Box,
        ByteRange,
        Chunk,
        DType,
        ObjectInfo,
        Opaque,
        Progress,
        Step,
        TensorInfo,
    )

_NAMES_BY_MODULE = {
    "checkpoint.mapping": ("Checkpoint", "open"),
    "checkpoint.verify": ("VerifyReport",),
    "coordination.contract": ("Ranks",),
    "coordination.events": (
        "CheckpointLoaded",
        "Event",
        "EventHook",
        "FilesWritten",
        "ProgressMade",
        "ReplacedFilesRemoved",
        "Retried",
        "SaveBegan",
        "SaveCommitted",
        "StateStaged",
        "StepPassedOver",
        "StepRemoved",
        "StepRestored",
        "WaitingForRanks",
        "WorkFailed",
    ),
    "engine.async_save": ("async_save", "release_memory"),
    "engine.handles": ("SaveHandle",),
    "engine.load": ("load",),
    "engine.load_options": ("LoadOptions",),
    "engine.load_report": ("LoadReport",),
    "engine.options": ("AsyncSaveOptions", "SaveOptions"),
    "engine.reports": ("SaveReport",),
    "engine.save": ("save",),
    "errors": (
        "AlreadyExists",
        "AsyncSaveFailed",
        "Conflict",
        "Damaged",
        "FormatError",
        "LeaseLost",
        "Mismatch",
        "NotACheckpoint",
        "RankFailed",
        "Replaced",
        "ShardkeepError",
        "Untrusted",
    ),
    "run.manager": ("Manager", "StepHandle"),
    "run.policies": ("KeepBest", "KeepEvery", "KeepLast", "KeepPolicy"),
    "run.restore": ("Restored",),
    "state.markers": ("PerRank", "Replicated"),
    "stores.contract": ("Store",),
    "stores.local.store": ("LocalStore",),
    "stores.memory": ("MemoryStore",),
    "torch_state.shards": ("Shards",),
    "types": (
        "Box",
        "ByteRange",
        "Chunk",
        "DType",
        "ObjectInfo",
        "Opaque",
        "Progress",
        "Step",
        "TensorInfo",
    ),
}
_MODULES = {
    name: f"shardkeep.{module}" for module, names in _NAMES_BY_MODULE.items() for name in names
}

__all__ = [
    "AlreadyExists",
    "AsyncSaveFailed",
    "AsyncSaveOptions",
    "Box",
    "ByteRange",
    "Checkpoint",
    "CheckpointLoaded",
    "Chunk",
    "Conflict",
    "DType",
    "Damaged",
    "Event",
    "EventHook",
    "FilesWritten",
    "FormatError",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepPolicy",
    "LeaseLost",
    "LoadOptions",
    "LoadReport",
    "LocalStore",
    "Manager",
    "MemoryStore",
    "Mismatch",
    "NotACheckpoint",
    "ObjectInfo",
    "Opaque",
    "PerRank",
    "Progress",
    "ProgressMade",
    "RankFailed",
    "Ranks",
    "Replaced",
    "ReplacedFilesRemoved",
    "Replicated",
    "Restored",
    "Retried",
    "SaveBegan",
    "SaveCommitted",
    "SaveHandle",
    "SaveOptions",
    "SaveReport",
    "ShardkeepError",
    "Shards",
    "StateStaged",
    "Step",
    "StepHandle",
    "StepPassedOver",
    "StepRemoved",
    "StepRestored",
    "Store",
    "TensorInfo",
    "Untrusted",
    "VerifyReport",
    "WaitingForRanks",
    "WorkFailed",
    "async_save",
    "load",
    "open",
    "release_memory",
    "save",
]


def __getattr__(name: str) -> Any:
    if name != "dcp" and name not in _MODULES:
        raise AttributeError(f"module 'shardkeep' has no attribute {name!r}")
    try:
        if name == "dcp":
            return _import_module("shardkeep.dcp")
        value = getattr(_import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from shardkeep.util.without_torch import stand_in, stand_in_module

        value = (
            stand_in_module("shardkeep.dcp") if name == "dcp" else stand_in(_MODULES[name], name)
        )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "dcp"])
