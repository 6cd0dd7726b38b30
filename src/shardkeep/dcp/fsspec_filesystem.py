"""Readers and writers of whatever fsspec reaches: torch's classes, with Shardkeep's bytes."""

from __future__ import annotations

from functools import wraps
from typing import Any

from shardkeep.dcp.bridge.torch_modules import forward_to_torch, torch_module
from shardkeep.dcp.filesystem import FileSystemReader, FileSystemWriter

__all__ = ["FsspecReader", "FsspecWriter"]

__getattr__ = forward_to_torch("fsspec_filesystem", "_fsspec_filesystem")
_stock: Any = torch_module("fsspec_filesystem", "_fsspec_filesystem")


class _Absent:
    """Stands for torch's classes where fsspec is not installed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ModuleNotFoundError("fsspec is not installed: pip install fsspec", name="fsspec")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Nothing can be reached."""
        return False


_Reader: Any = getattr(_stock, "FsspecReader", _Absent)
_Writer: Any = getattr(_stock, "FsspecWriter", _Absent)


class FsspecWriter(FileSystemWriter, _Writer):  # type: ignore[misc]
    """Torch's writer for URLs; see `FileSystemWriter`. More options go to fsspec."""

    @wraps(_Writer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class FsspecReader(FileSystemReader, _Reader):  # type: ignore[misc]
    """Torch's reader for URLs; see `FileSystemReader`. More options go to fsspec."""

    @wraps(_Reader.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
