"""A model of a disk that loses power, by the rules of POSIX: its possible contents afterwards.

POSIX promises little. The content of a file is certain once the file was synced. Until then, any
part of it may be on the disk. A name is certain once its folder was synced. Until then, any subset
of the changes to its names may be on the disk, but a rename happens as a whole or not at all. Real
file systems promise more, so what is safe here is safe there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import PurePosixPath

__all__ = [
    "Create",
    "Folder",
    "HardLink",
    "Operation",
    "Rename",
    "Sync",
    "Truncate",
    "Unlink",
    "Write",
    "states",
]

Files = dict[str, bytes]
"""Path -> content, of all files that can be reached by a name."""


@dataclass(frozen=True)
class Folder:
    """mkdir"""

    path: str


@dataclass(frozen=True)
class Create:
    """open with O_CREAT: a new file, numbered `file`, under a name."""

    path: str
    file: int


@dataclass(frozen=True)
class Write:
    file: int
    offset: int
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Truncate:
    file: int
    size: int


@dataclass(frozen=True)
class Sync:
    """fsync of a file or of a folder."""

    what: int | str


@dataclass(frozen=True)
class Rename:
    source: str
    target: str


@dataclass(frozen=True)
class HardLink:
    source: str
    target: str


@dataclass(frozen=True)
class Unlink:
    path: str


Operation = Folder | Create | Write | Truncate | Sync | Rename | HardLink | Unlink
_Entry = int | str | None
"""The target of a name: a file, a folder (by its path), or nothing."""
_Change = tuple[tuple[str, _Entry], ...]
"""Names that change together."""


class _Disk:
    """The certain content of a disk, and the pending changes."""

    def __init__(self, before: Files) -> None:
        self.names: dict[str, _Entry] = {}
        self.contents: dict[int, bytes] = {}
        self.changes: dict[str, list[_Change]] = {}
        self.writes: dict[int, list[Write | Truncate]] = {}
        self.now: dict[str, _Entry] = {}
        for number, (path, content) in enumerate(sorted(before.items()), 1):
            self.contents[-number] = content
            self.names[path] = -number
            for folder in _above(path):
                self.names[folder] = folder
        self.now.update(self.names)

    def do(self, operation: Operation) -> None:
        match operation:
            case Folder(path):
                self._change(path, ((path, path),))
            case Create(path, file):
                self.contents[file] = b""
                self._change(path, ((path, file),))
            case Write(file) | Truncate(file):
                self.writes.setdefault(file, []).append(operation)
            case Rename(source, target):
                assert _folder(source) == _folder(target)
                self._change(target, ((source, None), (target, self.now[source])))
            case HardLink(source, target):
                assert _folder(source) == _folder(target)
                self._change(target, ((target, self.now[source]),))
            case Unlink(path):
                self._change(path, ((path, None),))
            case Sync(int(file)):
                for write in self.writes.pop(file, []):
                    self.contents[file] = _written(self.contents[file], write)
            case Sync(str(folder)):
                for change in self.changes.pop(folder, []):
                    self.names.update(change)

    def _change(self, path: str, change: _Change) -> None:
        self.now.update(change)
        self.changes.setdefault(_folder(path), []).append(change)

    def states(self) -> Iterator[Files]:
        """Yield every possible content after a power failure at this moment."""
        changes = list(chain.from_iterable(self.changes.values()))
        files = [file for file in self.writes if self._may_be_linked(file, changes)]
        contents = [sorted(_torn(self.contents[file], self.writes[file])) for file in files]
        for done in product((False, True), repeat=len(changes)):
            names = dict(self.names)
            for change, is_done in zip(changes, done, strict=True):
                names.update(change if is_done else ())
            reached = {
                path: entry
                for path, entry in names.items()
                if isinstance(entry, int) and all(names.get(f) == f for f in _above(path))
            }
            there = [file in reached.values() for file in files]
            few = [
                some if is_there else some[:1]
                for some, is_there in zip(contents, there, strict=True)
            ]
            for chosen in product(*few):
                now = {**self.contents, **dict(zip(files, chosen, strict=True))}
                yield {path: now[entry] for path, entry in reached.items()}

    def _may_be_linked(self, file: int, changes: Iterable[_Change]) -> bool:
        entries = chain(self.names.items(), chain.from_iterable(changes))
        return any(entry == file for _, entry in entries)


def states(operations: Sequence[Operation], before: Files) -> Iterator[tuple[int, Files]]:
    """Yield (n, files) for every possible content of the disk after the first n operations.

    Args:
        operations: in the order in which they were made. One that had not yet returned counts as
            not made, or as made and pending.
        before: the content that was certain before. The folders above these files are certain, too.
    """
    disk = _Disk(before)
    yield from ((0, files) for files in disk.states())
    for number, operation in enumerate(operations, 1):
        disk.do(operation)
        yield from ((number, files) for files in disk.states())


def _torn(content: bytes, writes: Sequence[Write | Truncate]) -> set[bytes]:
    """Return every possible content of a file."""
    found = {content}
    for write in writes:
        found |= {_written(before, part) for before in found for part in _parts(write)}
    return found


def _parts(write: Write | Truncate) -> Iterator[Write | Truncate]:
    """Yield the possible results of a write: all, either half, or space without content."""
    yield write
    if isinstance(write, Write) and write.data:
        data, half = write.data, len(write.data) // 2
        for begin, end in ((0, half), (half, len(data)), (0, len(data) - 1), (1, len(data))):
            yield Write(write.file, write.offset + begin, data[begin:end])
        yield Write(write.file, write.offset, bytes(len(data)))


def _written(content: bytes, write: Write | Truncate) -> bytes:
    if isinstance(write, Truncate):
        return content[: write.size].ljust(write.size, b"\0")
    end = write.offset + len(write.data)
    return content[: write.offset].ljust(write.offset, b"\0") + write.data + content[end:]


def _folder(path: str) -> str:
    return str(PurePosixPath(path).parent)


def _above(path: str) -> list[str]:
    return [str(folder) for folder in PurePosixPath(path).parents if str(folder) not in (".", "/")]
