"""Shardkeep keeps the shards: a checkpoint engine for PyTorch's distributed format.

Reading needs no torch. Every name comes on its first use, so that what needs torch imports it only
then, and the command starts fast.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from shardkeep.version import __version__ as __version__

if TYPE_CHECKING:
    from shardkeep.checkpoint.reader import Checkpoint, open
    from shardkeep.checkpoint.verify import VerifyReport
    from shardkeep.engine.async_save import SaveHandle, async_save, release_memory
    from shardkeep.engine.load import LoadReport, load
    from shardkeep.engine.save import SaveReport, save
    from shardkeep.errors import (
        AlreadyExists,
        Conflict,
        Damaged,
        FormatError,
        LeaseLost,
        Mismatch,
        NotACheckpoint,
        RankFailed,
        ShardkeepError,
        Untrusted,
    )
    from shardkeep.run.manager import Manager
    from shardkeep.run.policies import KeepBest, KeepEvery, KeepLast
    from shardkeep.state.markers import PerRank, Replicated
    from shardkeep.torch_state.shards import Shards
    from shardkeep.types import Box, DType, ObjectInfo, Opaque, TensorInfo

_ROOMS = {
    "engine.async_save": ("SaveHandle", "async_save", "release_memory"),
    "checkpoint.reader": ("Checkpoint", "open"),
    "errors": (
        "AlreadyExists",
        "Conflict",
        "Damaged",
        "FormatError",
        "LeaseLost",
        "Mismatch",
        "NotACheckpoint",
        "RankFailed",
        "ShardkeepError",
        "Untrusted",
    ),
    "engine.load": ("LoadReport", "load"),
    "run.policies": ("KeepBest", "KeepEvery", "KeepLast"),
    "run.manager": ("Manager",),
    "state.markers": ("PerRank", "Replicated"),
    "engine.save": ("SaveReport", "save"),
    "torch_state.shards": ("Shards",),
    "types": ("Box", "DType", "ObjectInfo", "Opaque", "TensorInfo"),
    "checkpoint.verify": ("VerifyReport",),
}
_HOMES = {name: f"shardkeep.{room}" for room, names in _ROOMS.items() for name in names}

__all__ = [
    "AlreadyExists",
    "Box",
    "Checkpoint",
    "Conflict",
    "DType",
    "Damaged",
    "FormatError",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "LeaseLost",
    "LoadReport",
    "Manager",
    "Mismatch",
    "NotACheckpoint",
    "ObjectInfo",
    "Opaque",
    "PerRank",
    "RankFailed",
    "Replicated",
    "SaveHandle",
    "SaveReport",
    "ShardkeepError",
    "Shards",
    "TensorInfo",
    "Untrusted",
    "VerifyReport",
    "async_save",
    "load",
    "open",
    "release_memory",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shardkeep' has no attribute {name!r}")
    try:
        value = getattr(_import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        why = f"shardkeep.{name} needs torch: pip install 'shardkeep[torch]'"
        raise ModuleNotFoundError(why, name="torch") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
