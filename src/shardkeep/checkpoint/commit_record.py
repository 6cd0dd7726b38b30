"""The commit record: the file whose appearance commits a checkpoint.

It is `.metadata`, or the metadata file that a writer of torch's names. It is written only if
nothing has been committed there since the save was admitted. So at most one of several saves to one
path commits, and only the files that this save replaced are ever removed.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardkeep.errors import AlreadyExists, FormatError, Replaced
from shardkeep.filenames import METADATA
from shardkeep.format.dcp.trailer import TRAILER_SIZE, Trailer
from shardkeep.stores.contract import Buffer, IfMatch, PreconditionFailed, Store

__all__ = ["Admission", "put_record", "read_trailer", "record_version", "size_of"]


@dataclass(frozen=True, slots=True)
class Admission:
    """What a save found at its path when it began, which is all that it may replace.

    Attributes:
        overwrite: Whether a checkpoint may be replaced.
        version: The version of the commit record; None if there was none.
        files: The files of the checkpoint that is to be replaced, without the record.
    """

    overwrite: bool = False
    version: str | None = None
    files: frozenset[str] = frozenset()


def record_version(store: Store, name: str = METADATA) -> str | None:
    """Return the version of a commit record; None if there is none."""
    try:
        return store.head(name).version
    except FileNotFoundError:
        return None


def put_record(store: Store, data: Buffer, admission: Admission, *, name: str = METADATA) -> None:
    """Write a commit record if the record is still the one that was admitted, or is still missing.

    Raises:
        AlreadyExists: A checkpoint has been committed meanwhile, and may not be replaced.
        Replaced: The checkpoint that was to be replaced has been replaced or removed meanwhile.
        OSError: The store failed. The record may have been written all the same.
    """
    version = admission.version
    try:
        store.put(name, data, mode="create" if version is None else IfMatch(version))
    except (FileExistsError, PreconditionFailed) as error:
        # A network store may repeat a call whose answer was lost, and then find its own record.
        if not _contains(store, name, data):
            raise _conflict(store, admission) from error


def _contains(store: Store, name: str, data: Buffer) -> bool:
    size = size_of(store, name)
    return size == len(data) and store.get_range(name, 0, size) == bytes(data)


def _conflict(store: Store, admission: Admission) -> AlreadyExists | Replaced:
    """Return the error of a save that cannot commit because another one did."""
    if not admission.overwrite:
        return AlreadyExists(
            f"{store.url}: another save committed a checkpoint there while this one was being "
            "written; that checkpoint was not changed, and nothing of this save was committed. "
            "Save to another path, or pass overwrite=True to replace it"
        )
    what = "committed a checkpoint" if admission.version is None else "replaced the checkpoint"
    if admission.version is not None and record_version(store) is None:
        what = "or a clean-up removed the checkpoint"
    return Replaced(
        f"{store.url}: another save {what} there while this one was being written; what is there "
        "now was not changed, and nothing of this save was committed. Make sure that only one job "
        "writes to this path, then save again"
    )


def read_trailer(store: Store) -> tuple[bool, Trailer | None]:
    """Return whether there is a commit record, and its trailer if Shardkeep wrote it.

    A record without a complete trailer is read again until its size stays the same. Otherwise a
    record of Shardkeep's that replaces one of stock torch's during the read could be taken for one
    of stock torch's, and the checkpoint would be read without its checksums.

    Raises:
        FormatError: The trailer is damaged.
    """
    size = size_of(store, METADATA)
    while size is not None:
        start = max(0, size - TRAILER_SIZE)
        trailer, wrong = None, None
        try:
            trailer = Trailer.parse(store.get_range(METADATA, start, size - start), size)
        except FormatError as error:
            wrong = error
        before, size = size, size_of(store, METADATA) if trailer is None else size
        if size == before:
            if wrong is not None:
                raise wrong
            return True, trailer
    return False, None


def size_of(store: Store, name: str) -> int | None:
    """Return the size of a file in bytes; None if it does not exist."""
    try:
        return store.head(name).size
    except FileNotFoundError:
        return None
