"""One tree of exceptions. Each one says what happened, to which file, tensor and rank."""

from __future__ import annotations

from typing import Any

from shardkeep.filenames import data_file_parts

__all__ = [
    "AlreadyExists",
    "AsyncSaveFailed",
    "Conflict",
    "Damaged",
    "FormatError",
    "LeaseLost",
    "Mismatch",
    "NotACheckpoint",
    "RankFailed",
    "ShardkeepError",
    "Untrusted",
]


class ShardkeepError(Exception):
    """Base of everything that Shardkeep raises on purpose. All of them can be pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        reduced: Any = super().__reduce__()
        kind, args, *_ = reduced
        return _made_again, (kind, args, self.__dict__)


class NotACheckpoint(ShardkeepError):
    """The path holds no committed checkpoint of any kind that Shardkeep reads."""


class AlreadyExists(ShardkeepError):
    """The path already holds a checkpoint, and `overwrite` was not asked for."""


class AsyncSaveFailed(ShardkeepError):
    """An asynchronous save failed, and nobody had asked for its result until the next save.

    That one was not begun; the error itself is the cause.

    Args:
        path: where the failed save went.
        why: its error, in a line.
    """

    def __init__(self, path: str, why: str) -> None:
        self.path, self.why = path, why
        super().__init__(
            f"an asynchronous save to {path} failed, and nobody asked for its result: {why}; "
            "the save that was called now was not begun"
        )


class FormatError(ShardkeepError):
    """The structure of a file is broken or hostile. Nothing of it was used.

    Args:
        what: what is wrong, in words.
        file: the file, relative to the checkpoint.
        place: where in the file: an offset, a record, a key, a tensor's name.
    """

    def __init__(self, what: str, *, file: str | None = None, place: str | None = None) -> None:
        self.what, self.file, self.place = what, file, place
        where = ", ".join(part for part in (file, place) if part)
        super().__init__(f"{where}: {what}" if where else what)

    def within(self, *, file: str | None = None, place: str | None = None) -> FormatError:
        """The same error, naming the file or the place where it did not know them yet."""
        return FormatError(self.what, file=self.file or file, place=self.place or place)


class Damaged(ShardkeepError):
    """Bytes do not match their checksum, or are missing: named, never returned as data.

    Args:
        what: what does not match.
        file: the data file.
        name: the tensor or object, if one is known.
        block: number of the checksum block inside the payload, counted from 0.
    """

    def __init__(
        self, what: str, *, file: str, name: str | None = None, block: int | None = None
    ) -> None:
        self.what, self.file, self.name, self.block = what, file, name, block
        tensor = f", {name!r}" if name is not None else ""
        place = f", block {block}" if block is not None else ""
        super().__init__(f"{file}{tensor}{place}: {what}")

    @property
    def rank(self) -> int | None:
        """The rank that wrote the file, as data files are named; None for others."""
        found = data_file_parts(self.file)
        return found[0] if found else None


class Conflict(ShardkeepError):
    """The state to save contradicts itself: two things under one name, overlaps or holes."""


class LeaseLost(ShardkeepError):
    """A save gave no sign of life for so long that another one took it for dead. Save again."""


class Mismatch(ShardkeepError):
    """The template and the checkpoint differ. `report` is the whole `LoadReport`."""

    def __init__(self, message: str, report: object = None) -> None:
        self.report = report
        super().__init__(message)


class Untrusted(ShardkeepError):
    """An object holds classes that were not trusted by name.

    Args:
        name: the object's name in the checkpoint.
        classes: full names (`module.Class`) of what was not trusted.
        how: what to do to trust them; by default the argument of `load`.
    """

    def __init__(self, name: str, classes: tuple[str, ...], how: str | None = None) -> None:
        self.name, self.classes = name, classes
        how = how or "pass trust=[" + ", ".join(f'"{one}"' for one in classes) + "]"
        super().__init__(
            f"object {name!r} holds classes that are not trusted: {', '.join(classes)}; "
            f"if you trust this checkpoint's author with them, {how}"
        )


class RankFailed(ShardkeepError):
    """Another rank failed; raised on every other rank.

    Args:
        rank: the rank that failed.
        host: its host name.
        phase: what it was doing: "describe", "own", "write", "report", "commit", "read", ...
        path: the checkpoint's path.
        cause: the original error with its traceback, as text.
    """

    def __init__(self, rank: int, host: str, phase: str, path: str, cause: str) -> None:
        self.rank, self.host, self.phase, self.path, self.cause = rank, host, phase, path, cause
        last = cause.strip().splitlines()[-1] if cause.strip() else "unknown error"
        super().__init__(f"rank {rank} on {host} failed in phase {phase!r} of {path}: {last}")
        if len(cause.strip().splitlines()) > 1:
            # Shown below a traceback, from Python 3.11 on.
            self.__notes__ = [f"On rank {rank}:\n{cause.rstrip()}"]


def _made_again(kind: Any, args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    """What was pickled: constructors take other arguments than the message that they make."""
    made = kind.__new__(kind, *args)
    made.__dict__.update(state)
    return made
