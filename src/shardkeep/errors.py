"""The exceptions of Shardkeep, in one tree below `ShardkeepError`.

Each names what it knows: file, tensor, rank, phase. Attributes have the names as they are in the
checkpoint; messages have them escaped, so that a hostile name can't rewrite a terminal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardkeep.filenames import data_file_parts
from shardkeep.util.escaping import escape, one_line

if TYPE_CHECKING:
    from shardkeep.engine.load_report import LoadReport

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
    "Replaced",
    "ShardkeepError",
    "Untrusted",
]


class ShardkeepError(Exception):
    """Base class of all errors that Shardkeep raises on purpose. They can be pickled.

    Errors of the operating system (`OSError`) and wrong arguments (`TypeError`, `ValueError`) are
    raised as they are.

    Example:
        >>> import shardkeep as sk
        >>> try:
        ...     sk.open("run/step_100")
        ... except sk.ShardkeepError as error:
        ...     print(type(error).__name__)
        NotACheckpoint
    """

    def __reduce__(self) -> tuple[Any, ...]:
        reduced: Any = super().__reduce__()
        kind, args, *_ = reduced
        return _rebuild, (kind, args, self.__dict__)


class NotACheckpoint(ShardkeepError):
    """The path has no committed checkpoint of any kind that Shardkeep reads.

    Check the path. A save that was killed before its commit leaves none; `shardkeep gc` lists the
    files that it left.

    Example:
        `run/step_100 is empty or does not exist`
    """


class AlreadyExists(ShardkeepError):
    """The path already has a checkpoint, and `overwrite=True` was not given.

    Save to another path, or pass `overwrite=True`. Nothing was written.

    Example:
        `run/step_100 already holds a checkpoint; pass overwrite=True to replace it`
    """


class AsyncSaveFailed(ShardkeepError):
    """An earlier asynchronous save failed, and its result was never requested.

    The next save raises this and writes nothing. `__cause__` is the error of the earlier save. Call
    `result()` of each handle to see the error of the save that failed.

    Attributes:
        path: where the failed save wrote to.
        why: its error, in a line.

    Example:
        `an asynchronous save to run/step_100 failed, and its result was never retrieved:
        OSError: [Errno 28] No space left on device; this save was not started`
    """

    path: str
    why: str

    def __init__(self, path: str, why: str) -> None:
        self.path, self.why = path, why
        super().__init__(
            f"an asynchronous save to {path} failed, and its result was never retrieved: {why}; "
            "this save was not started"
        )


class FormatError(ShardkeepError):
    """The structure of a file is broken or hostile. Nothing of the file was used.

    Restore the file from a copy, or load another checkpoint.

    Attributes:
        what: what is wrong.
        file: the file, relative to the checkpoint, if known.
        place: where in the file, if known: an offset, a record, a key, a tensor's name.

    Example:
        `.metadata, byte 0: 0xd8 is not a pickle opcode`
    """

    what: str
    file: str | None
    place: str | None

    def __init__(self, what: str, *, file: str | None = None, place: str | None = None) -> None:
        self.what, self.file, self.place = what, file, place
        where = ", ".join(one_line(part) for part in (file, place) if part)
        super().__init__(f"{where}: {one_line(what)}" if where else one_line(what))

    def within(self, *, file: str | None = None, place: str | None = None) -> FormatError:
        """Return the same error, with the file and the place filled in where it has none.

        Example:
            >>> str(FormatError("no opcode", place="byte 0").within(file=".metadata"))
            '.metadata, byte 0: no opcode'
        """
        return FormatError(self.what, file=self.file or file, place=self.place or place)


class Damaged(ShardkeepError):
    """Bytes are missing or do not match their checksum. They were not returned as data.

    `shardkeep verify` lists all damage of a checkpoint. Load another checkpoint, or restore the
    file from a copy; `Manager.restore` goes back to the newest step that is whole.

    Attributes:
        what: what does not match, or is missing.
        file: the data file, relative to the checkpoint.
        name: the tensor or object, if known.
        block: number of the checksum block in the payload, from 0, if known.

    Example:
        `__0_0_95a58….distcp, 'model.w', block 3: its bytes have CRC-32 d1fa8325, not 597a3dda`
    """

    what: str
    file: str
    name: str | None
    block: int | None

    def __init__(
        self, what: str, *, file: str, name: str | None = None, block: int | None = None
    ) -> None:
        self.what, self.file, self.name, self.block = what, file, name, block
        tensor = f", {name!r}" if name is not None else ""
        place = f", block {block}" if block is not None else ""
        super().__init__(f"{one_line(file)}{tensor}{place}: {one_line(what)}")

    @property
    def rank(self) -> int | None:
        """The rank that wrote the file, by the file's name; None for files named otherwise."""
        found = data_file_parts(self.file)
        return found[0] if found else None


class Conflict(ShardkeepError):
    """The state to save contradicts itself, or ranks contradict one another.

    Two values have one name, boxes of a tensor overlap or leave a hole, or ranks save different
    steps. Correct the state; nothing was committed.

    Example:
        `a part of shape (2, 4) does not fit at [7:9, 0:4] into (8, 4)`
    """


class LeaseLost(ShardkeepError):
    """A save did not renew its lease for so long that it may be taken for dead; it was given up.

    Nothing was committed. Save again; raise `SHARDKEEP_LEASE_SECONDS` if the storage stalls often.

    Example:
        >>> try:
        ...     shardkeep.save(state, "run/step_100")
        ... except shardkeep.LeaseLost:
        ...     shardkeep.save(state, "run/step_100")
    """


class Replaced(ShardkeepError):
    """The checkpoint that was to be overwritten has been replaced or removed by another save.

    Nothing of this save was committed, and what is there now was not changed. Make sure that only
    one job writes to the path, then save again.

    Example:
        >>> try:
        ...     shardkeep.save(state, "run/latest", overwrite=True)
        ... except shardkeep.Replaced as error:
        ...     raise SystemExit(f"another job writes to run/latest: {error}")
    """


class Mismatch(ShardkeepError):
    """The template and the checkpoint do not match. Nothing was read into the template.

    Correct the template, or allow the difference: `strict=False` for missing names, `dtype="cast"`
    for dtypes.

    Attributes:
        report: what matches and what does not, if `load` has compared all names.

    Example:
        >>> import shardkeep as sk
        >>> try:
        ...     sk.load(state, "run/step_100")
        ... except sk.Mismatch as error:
        ...     print(error.report.missing)  # doctest: +SKIP
        ('model.head.weight',)
    """

    report: LoadReport | None

    def __init__(self, message: str, report: LoadReport | None = None) -> None:
        self.report = report
        super().__init__(message)


class Untrusted(ShardkeepError):
    """An object has classes that are not trusted; nothing of them was imported or executed.

    Attributes:
        name: the object's name in the checkpoint.
        classes: full names (`module.Class`) of the classes that are not trusted.

    Example:
        `object 'config' holds classes that are not trusted: mymodule.Config; if you trust this
        checkpoint's author with them, pass trust=["mymodule.Config"]`
    """

    name: str
    classes: tuple[str, ...]

    def __init__(self, name: str, classes: tuple[str, ...], how: str | None = None) -> None:
        """Make the error; `how` tells how to trust the classes (default: an argument of `load`)."""
        self.name, self.classes = name, classes
        shown = [escape(class_name) for class_name in classes]
        how = how or "pass trust=[" + ", ".join(f'"{class_name}"' for class_name in shown) + "]"
        super().__init__(
            f"object {name!r} holds classes that are not trusted: {', '.join(shown)}; "
            f"if you trust this checkpoint's author with them, {how}"
        )


class RankFailed(ShardkeepError):
    """Another rank failed; every rank but that one raises this.

    The failed rank's traceback is shown below this one's (Python 3.11 or newer) and is in `cause`.

    Attributes:
        rank: the global rank that failed.
        host: its host name.
        phase: what it was doing, such as "describe", "write", "commit" or "read".
        path: the checkpoint's path.
        cause: the original error with its traceback, as text.

    Example:
        `rank 3 on node-17 failed in phase 'write' of run/step_100: OSError: [Errno 28] No space
        left on device`
    """

    rank: int
    host: str
    phase: str
    path: str
    cause: str

    def __init__(self, rank: int, host: str, phase: str, path: str, cause: str) -> None:
        self.rank, self.host, self.phase, self.path, self.cause = rank, host, phase, path, cause
        lines = cause.strip().splitlines()
        last = one_line(lines[-1]) if lines else "unknown error"
        super().__init__(f"rank {rank} on {host} failed in phase {phase!r} of {path}: {last}")
        if len(lines) > 1:
            # Shown below a traceback, from Python 3.11 on.
            self.__notes__ = [f"On rank {rank}:\n{cause.rstrip()}"]


def _rebuild(kind: Any, args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    """Return an unpickled error: constructors take other arguments than the message."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error
