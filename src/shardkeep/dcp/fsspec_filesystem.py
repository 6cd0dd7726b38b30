"""Readers and writers of URLs that fsspec supports."""

from __future__ import annotations

from functools import wraps
from typing import Any

from shardkeep.dcp.bridge.torch_modules import forward_to_torch, torch_module
from shardkeep.dcp.filesystem import FileSystemReader, FileSystemWriter

__all__ = ["FsspecReader", "FsspecWriter"]

__getattr__ = forward_to_torch("fsspec_filesystem", "_fsspec_filesystem")
_stock: Any = torch_module("fsspec_filesystem", "_fsspec_filesystem")


class _Absent:
    """Takes the place of torch's classes if fsspec is not installed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ModuleNotFoundError("fsspec is not installed: pip install fsspec", name="fsspec")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Return False: no URL is supported."""
        return False


_Reader: Any = getattr(_stock, "FsspecReader", _Absent)
_Writer: Any = getattr(_stock, "FsspecWriter", _Absent)


class FsspecWriter(FileSystemWriter, _Writer):  # type: ignore[misc]
    """Writes checkpoints to a URL that fsspec supports; a subclass of torch's writer.

    A checkpoint that is replaced can be loaded until the new one is committed.

    Args:
        args: the URL, and the options of `FileSystemWriter`.
        kwargs: the options of `FileSystemWriter`; others are passed to fsspec.

    Example:
        >>> writer = dcp.FsspecWriter("s3://bucket/run/step_100", thread_count=4)
        >>> dcp.save(state, storage_writer=writer)
    """

    @wraps(_Writer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class FsspecReader(FileSystemReader, _Reader):  # type: ignore[misc]
    """Reads checkpoints from a URL that fsspec supports; a subclass of torch's reader.

    Args:
        args: the URL.
        kwargs: passed to fsspec.

    Example:
        >>> reader = dcp.FsspecReader("s3://bucket/run/step_100")
        >>> dcp.load(state, storage_reader=reader)
    """

    @wraps(_Reader.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
