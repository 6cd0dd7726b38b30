"""A recording of the system calls of `LocalStore` on real files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardkeep.stores.local import syscalls
from shardkeep.stores.local.descriptors import Descriptor
from support.disk import (
    Create,
    Folder,
    HardLink,
    Operation,
    Rename,
    Sync,
    Truncate,
    Unlink,
    Write,
)

__all__ = ["recorded"]

_CALLS = "open close write pwritev ftruncate fsync mkdir replace rename link unlink".split()


class _Recorder:
    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.operations: list[Operation] = []
        self.files: dict[int, int | str] = {}
        self.real = {name: getattr(os, name) for name in _CALLS}
        self.real_end = Descriptor.close
        self.real_rename_new = syscalls.rename_new
        self.count = 0

    def inner(self, path: Any) -> str | None:
        """Return the path below the root; "." for the root itself."""
        if isinstance(path, int):
            return None
        text = os.path.relpath(os.path.realpath(os.fspath(path)), self.root)
        return None if text.startswith("..") else text

    def open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        inner = self.inner(path)
        fd = self.real["open"](path, flags, *args, **kwargs)
        if inner is not None and flags & os.O_DIRECTORY:
            self.files[fd] = inner
        elif inner is not None and flags & os.O_CREAT:
            assert flags & os.O_EXCL, "a file must be created with O_EXCL"
            self.count += 1
            self.files[fd] = self.count
            self.operations.append(Create(inner, self.count))
        return fd

    def close(self, fd: int) -> None:
        self.files.pop(fd, None)
        self.real["close"](fd)

    def end(self, file: Descriptor) -> None:
        if not file.closed:
            self.files.pop(file.fileno(), None)
        self.real_end(file)

    def write(self, fd: int, data: Any) -> int:
        if fd not in self.files:
            return self.real["write"](fd, data)
        offset = os.lseek(fd, 0, os.SEEK_CUR)
        done = self.real["write"](fd, data)
        self._wrote(fd, offset, data, done)
        return done

    def pwritev(self, fd: int, parts: Any, offset: int) -> int:
        done = self.real["pwritev"](fd, parts, offset)
        self._wrote(fd, offset, b"".join(parts), done)
        return done

    def _wrote(self, fd: int, offset: int, data: Any, done: int) -> None:
        file = self.files.get(fd)
        if isinstance(file, int):
            self.operations.append(Write(file, offset, bytes(memoryview(data).cast("B")[:done])))

    def ftruncate(self, fd: int, size: int) -> None:
        self.real["ftruncate"](fd, size)
        file = self.files.get(fd)
        if isinstance(file, int):
            self.operations.append(Truncate(file, size))

    def fsync(self, fd: int) -> None:
        self.real["fsync"](fd)
        if fd in self.files:
            self.operations.append(Sync(self.files[fd]))

    def mkdir(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self.real["mkdir"](path, *args, **kwargs)
        if (inner := self.inner(path)) is not None:
            self.operations.append(Folder(inner))

    def replace(self, source: Any, target: Any, **kwargs: Any) -> None:
        self.real["replace"](source, target, **kwargs)
        inner, to = self.inner(source), self.inner(target)
        if inner is not None and to is not None:
            self.operations.append(Rename(inner, to))

    def rename_new(self, source: str, target: str) -> bool:
        """Record a rename that refuses to replace, which is one step like a rename."""
        done = self.real_rename_new(source, target)
        inner, to = self.inner(source), self.inner(target)
        if done and inner is not None and to is not None:
            self.operations.append(Rename(inner, to))
        return done

    def link(self, source: Any, target: Any, **kwargs: Any) -> None:
        self.real["link"](source, target, **kwargs)
        inner, to = self.inner(source), self.inner(target)
        if inner is not None and to is not None:
            self.operations.append(HardLink(inner, to))

    def rename(self, source: Any, target: Any, **kwargs: Any) -> None:
        raise AssertionError("use os.replace: a rename is not recorded")

    def unlink(self, path: Any, **kwargs: Any) -> None:
        self.real["unlink"](path, **kwargs)
        if (inner := self.inner(path)) is not None:
            self.operations.append(Unlink(inner))


@contextmanager
def recorded(root: Path) -> Iterator[list[Operation]]:
    """Yield the list of this process's operations on files below `root`, in order.

    Only one thread at a time may work: operations of several threads at once have no order.
    """
    recorder = _Recorder(root)
    for name in _CALLS:
        setattr(os, name, getattr(recorder, name))

    def end(file: Descriptor) -> None:
        recorder.end(file)

    Descriptor.close = end
    syscalls.rename_new = recorder.rename_new
    try:
        yield recorder.operations
    finally:
        del Descriptor.close
        syscalls.rename_new = recorder.real_rename_new
        for name, call in recorder.real.items():
            setattr(os, name, call)
