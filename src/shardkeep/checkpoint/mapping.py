"""`shardkeep.open` and `Checkpoint`, a committed checkpoint as a mapping; independent of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from os import PathLike
from types import TracebackType
from typing import Any

from shardkeep.checkpoint.reader import CheckpointReader, open_reader
from shardkeep.checkpoint.verify import VerifyReport
from shardkeep.stores.contract import Store
from shardkeep.types import ITEMSIZES, Box, ObjectInfo, Progress, TensorInfo
from shardkeep.util.formatting import count, human_bytes

__all__ = ["Checkpoint", "open"]


def open(
    path: str | PathLike[str] | Store,
    *,
    manifest: bool = True,
    rank: tuple[int, int] | None = None,
) -> Checkpoint:
    """Return the checkpoint that is committed at `path`, as a mapping; needs no torch.

    Only metadata is read. Checkpoints of Shardkeep, of every release of
    `torch.distributed.checkpoint` from 2.0 on, and folders of safetensors files are recognized.

    Args:
        path: a folder, or a store.
        manifest: False reads only `.metadata`, as stock torch does, even if there is a manifest of
            Shardkeep's: for a checkpoint whose manifest is lost or damaged.
        rank: (rank, number of ranks). In a folder where each rank saved a checkpoint of its own
            (`use_collectives=False` in DCP), opens the one of this rank, if as many ranks saved
            it. By default everything that any rank saved.

    Returns:
        A `Checkpoint`. Close it, or use it in a `with` block, to close its files early.

    Raises:
        NotACheckpoint: no checkpoint is committed there.
        FormatError: the metadata is broken or hostile; nothing of it was executed.
        Damaged: the metadata does not match its checksum.

    Example:
        >>> import shardkeep as sk
        >>> with sk.open("run/step_100") as ckpt:  # doctest: +SKIP
        ...     weight = ckpt.read("model.0.weight")
        ...     lr = ckpt.value("optim.param_groups.0.lr")
    """
    reader = open_reader(path, manifest=manifest, rank=rank)
    return Checkpoint(reader, owns_store=reader.store is not path)


class Checkpoint(Mapping[str, TensorInfo | ObjectInfo]):
    """A committed checkpoint: what is stored under each flat name. Returned by `shardkeep.open`.

    As a mapping, it maps the name of a tensor to its `TensorInfo` and the name of an object to its
    `ObjectInfo`. Only `read` reads tensor data, and only the requested bytes. It may be used from
    several threads.

    Example:
        >>> import shardkeep as sk
        >>> ckpt = sk.open("run/step_100")  # doctest: +SKIP
        >>> ckpt.tensor("model.0.weight").shape  # doctest: +SKIP
        (256, 64)
        >>> ckpt.read("model.0.weight", sk.Box((0, 0), (2, 64))).shape  # doctest: +SKIP
        (2, 64)
        >>> ckpt.value("epoch")  # doctest: +SKIP
        3
    """

    def __init__(self, reader: CheckpointReader, *, owns_store: bool) -> None:
        self._open_reader: CheckpointReader | None = reader
        self._url = reader.url
        self._owns_store = owns_store

    @property
    def url(self) -> str:
        """Return the checkpoint's path or URL."""
        return self._url

    @property
    def kind(self) -> str:
        """Return which software wrote the checkpoint.

        It is "shardkeep", "dcp" (`torch.distributed.checkpoint`), "dcp-per-rank" (the same, with a
        `.metadata` file for each rank) or "safetensors".
        """
        return self._reader.kind

    def __len__(self) -> int:
        return len(self._reader)

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader)

    def __contains__(self, name: object) -> bool:
        return name in self._reader

    def __getitem__(self, name: str) -> TensorInfo | ObjectInfo:
        if name in self._reader.tensor_rows:
            return self._reader.tensor(name)
        if name in self._reader.object_rows:
            return self._reader.object(name)
        raise KeyError(name)

    def is_tensor(self, name: str) -> bool:
        """Return whether a name belongs to a tensor; otherwise it belongs to an object.

        Raises:
            KeyError: the checkpoint has no such name.

        Example:
            >>> [name for name in ckpt if ckpt.is_tensor(name)]  # doctest: +SKIP
            ['model.0.weight', 'model.0.bias']
        """
        return self._reader.is_tensor(name)

    def tensor(self, name: str) -> TensorInfo:
        """Return the dtype, the global shape and the chunks of a tensor.

        Args:
            name: flat name of the tensor.

        Raises:
            KeyError: the checkpoint has no such name, or it belongs to an object.

        Example:
            >>> info = ckpt.tensor("model.0.weight")  # doctest: +SKIP
            >>> info.dtype.name, info.shape, info.nbytes  # doctest: +SKIP
            ('float32', (256, 64), 65536)
        """
        if not self._reader.is_tensor(name):
            raise KeyError(f"{name!r} is an object, not a tensor: use value({name!r})")
        return self._reader.tensor(name)

    def value(self, name: str) -> Any:
        """Return the value of an object.

        No code of the checkpoint is executed: values of classes that Shardkeep does not know are
        replaced by `Opaque` objects.

        Args:
            name: flat name of the object.

        Raises:
            KeyError: the checkpoint has no such name, or it belongs to a tensor.
            Damaged: bytes are missing or do not match their checksum.

        Example:
            >>> ckpt.value("epoch")  # doctest: +SKIP
            3
        """
        if self._reader.is_tensor(name):
            raise KeyError(f"{name!r} is a tensor, not an object: use read({name!r})")
        return self._reader.value(name)

    def read(self, name: str, box: Box | None = None, *, verify: bool = True) -> Any:
        """Return a tensor, or a box of it, as a numpy array; or the value of an object.

        Args:
            name: flat name of the tensor or object.
            box: the part of the tensor to read, in global coordinates. Only its bytes are read.
            verify: whether to check the checksums of what is read.

        Returns:
            For a tensor, an array with the sizes of the box and the dtype `DType.numpy`. If numpy
            lacks the tensor's dtype, the array holds its bits, as described in `DType.note`.

        Raises:
            KeyError: the checkpoint has no such name.
            ValueError: the box extends beyond the tensor, or the name belongs to an object.
            Damaged: bytes are missing or do not match their checksum.

        Example:
            >>> first_rows = ckpt.read("model.0.weight", sk.Box((0, 0), (2, 64)))  # doctest: +SKIP
            >>> first_rows.shape  # doctest: +SKIP
            (2, 64)
        """
        return self._reader.read(name, box, verify=verify)

    def tree(self) -> Any:
        """Return the nested state as it was saved, with a `TensorInfo` in place of each tensor.

        Returns:
            Nested dicts and lists with the values of all objects, which are read from the store.

        Raises:
            Damaged: bytes of an object are missing or do not match their checksum.

        Example:
            >>> ckpt.tree()["optim"]["param_groups"][0]["lr"]  # doctest: +SKIP
            0.001
        """
        return self._reader.tree()

    def verify(
        self, *, threads: int | None = None, progress: Progress | None = None
    ) -> VerifyReport:
        """Check every byte that has a checksum, and return a report; damage is not raised.

        Args:
            threads: number of threads that read; by default `SHARDKEEP_READ_THREADS`.
            progress: called with the number of bytes checked so far and the number to check.

        Example:
            >>> report = ckpt.verify()  # doctest: +SKIP
            >>> print(report)  # doctest: +SKIP
            run/step_100: whole; 430.2 KiB of 1 file checked
        """
        return self._reader.verify(threads=threads, progress=progress)

    def close(self) -> None:
        """Close the files of the checkpoint, which must not be used afterwards.

        A store that was passed to `open` stays open, since the caller may go on using it.

        Example:
            >>> ckpt.close()  # doctest: +SKIP
        """
        reader, self._open_reader = self._open_reader, None
        if reader is not None and self._owns_store:
            close = getattr(reader.store, "close", None)
            if close is not None:
                close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        reader = self._open_reader
        if reader is None:
            return f"<Checkpoint {self._url}: closed>"
        tensors, objects = len(reader.tensor_rows), len(reader.object_rows)
        return (
            f"<Checkpoint {self._url} ({reader.kind}): {count(tensors, 'tensor')}, "
            f"{human_bytes(_nbytes(reader))}, {count(objects, 'object')}>"
        )

    @property
    def _reader(self) -> CheckpointReader:
        if self._open_reader is None:
            raise ValueError(f"the checkpoint {self._url} is closed; open it again")
        return self._open_reader


def _nbytes(reader: CheckpointReader) -> int:
    """Return the bytes of all tensors, in Python integers: hostile shapes must not overflow."""
    tensors = reader.outline.tensors
    shapes, itemsizes = tensors.shape.tolist(), ITEMSIZES[tensors.dtype].tolist()
    return sum(prod(shape) * itemsize for shape, itemsize in zip(shapes, itemsizes, strict=True))
