"""The commit: publish a checkpoint in one step, and find what is committed.

`.metadata` is the commit record. Behind its pickle, where `pickle.load` stops reading, a trailer
says which manifest belongs to it; so one atomic replace of one file switches stock torch and
Shardkeep to the new checkpoint at the same instant. Data files and manifests have names that were
never used before: the checkpoint that is being overwritten stays whole until then.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from shardkeep.checkpoint.commit_record import (
    Admission,
    put_record,
    read_trailer,
    record_version,
    size_of,
)
from shardkeep.errors import (
    AlreadyExists,
    Damaged,
    FormatError,
    NotACheckpoint,
    Replaced,
    ShardkeepError,
)
from shardkeep.filenames import METADATA, data_file, data_file_parts, of_ranks
from shardkeep.format.dcp.metadata_read import merge_metadata, read_metadata
from shardkeep.format.dcp.metadata_write import metadata_bytes
from shardkeep.format.dcp.trailer import Trailer, manifest_name
from shardkeep.format.manifest.read import (
    Outline,
    read_files,
    read_manifest,
    read_outline,
    write_manifest,
)
from shardkeep.format.paths import names_of, paths_of
from shardkeep.format.safetensors import parse
from shardkeep.stores.contract import Store
from shardkeep.types import Index, YieldGil, never_yield

__all__ = [
    "METADATA",
    "Admission",
    "Found",
    "admit",
    "committed_files",
    "data_file",
    "find",
    "headers",
    "manifest_bytes",
    "new_id",
    "parse_manifest",
    "publish",
    "put_record",
    "rank_of",
    "record_version",
    "remove_replaced",
    "removed_if_refused",
    "removed_on_failure",
    "size_of",
    "undone_on_failure",
    "weights",
]

T = TypeVar("T")

_MAX_INDEX_JSON = 1 << 28


def new_id() -> str:
    """An id that no other save has: 32 hexadecimal digits."""
    return secrets.token_hex(16)


def rank_of(file: str) -> int:
    """The rank that wrote a data file."""
    parts = data_file_parts(file)
    if parts is None:
        raise ValueError(f"{file!r} is not the name of a data file")
    return parts[0]


@dataclass(frozen=True, slots=True)
class Found:
    """A committed checkpoint.

    Attributes:
        kind: "shardkeep" (with a manifest), "dcp" (`.metadata` of stock torch), "dcp-per-rank"
            (`use_collectives=False`), or "safetensors".
        outline: reads names, dtypes, shapes and structure; chunk columns may be missing.
        index: reads everything.
        files: reads the names of data files, and as little else as it can.
        file: what says so, for errors.
        trailer: what ends `.metadata`, for the kind "shardkeep".
    """

    kind: str
    file: str
    outline: Callable[[], Index | Outline]
    index: Callable[[], Index]
    files: Callable[[], tuple[str, ...]]
    trailer: Trailer | None = None

    @staticmethod
    def whole(kind: str, file: str, read: Callable[[], Index]) -> Found:
        """One of which nothing can be read but all."""
        once = cache(read)  # for all three of them: reading it twice takes seconds
        return Found(kind, file, once, once, lambda: once().files)


def find(store: Store, *, manifest: bool = True, rank: tuple[int, int] | None = None) -> Found:
    """What is committed in this store.

    Args:
        store: the folder.
        manifest: False reads `.metadata` alone.
        rank: who asks: a rank, of so many. If as many ranks saved, each with metadata of its own,
            it sees what it saved itself; anybody else sees what all of them saved, as one.

    Raises:
        NotACheckpoint: nothing.
        FormatError: the commit record is broken.
    """
    there, trailer = read_trailer(store)
    if trailer is not None and manifest:
        return _with_manifest(store, trailer)
    if there:
        return Found.whole("dcp", METADATA, lambda: _metadata(store, trailer))
    listing = store.list()
    names = sorted(listing.files)
    per_rank = of_ranks(names)
    if per_rank and rank is not None and [n for n, _ in per_rank] == list(range(rank[1])):
        own = per_rank[rank[0]][1]
        return Found.whole("dcp-per-rank", own, lambda: read_metadata(_whole(store, own), file=own))
    if per_rank:
        return Found.whole(
            "dcp-per-rank",
            per_rank[0][1],
            lambda: merge_metadata([(name, _whole(store, name)) for _, name in per_rank]),
        )
    tensors = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if tensors:
        return Found.whole("safetensors", tensors[0], lambda: _safetensors(store, tensors))
    empty = not names and not listing.prefixes
    what = "is empty or does not exist" if empty else "has no .metadata and no .safetensors file"
    raise NotACheckpoint(f"{store.url} {what}: no checkpoint is committed there")


def admit(store: Store, *, overwrite: bool) -> Admission:
    """Check that a checkpoint may be saved, and return what it may replace.

    Args:
        store: The folder.
        overwrite: Whether a checkpoint that is there may be replaced.

    Raises:
        AlreadyExists: There is a checkpoint, and `overwrite` is False.
    """
    version = record_version(store)  # first: what changes after this is noticed by the commit
    try:
        find(store)
    except NotACheckpoint:
        return Admission(overwrite, version)
    except ShardkeepError as error:
        if not overwrite:
            raise AlreadyExists(
                f"{store.url} holds a checkpoint that can't be read: {error}"
            ) from None
    if not overwrite:
        raise AlreadyExists(
            f"{store.url} already holds a checkpoint; pass overwrite=True to replace it"
        )
    return Admission(overwrite, version, files_of(store))


def publish(
    store: Store,
    save_id: str,
    index: Index,
    header: Mapping[str, Any],
    yield_gil: YieldGil = never_yield,
    *,
    admission: Admission = Admission(),  # noqa: B008 - frozen
    confirm: Callable[[], None] | None = None,
) -> None:
    """Commit: write the manifest, then `.metadata` with its trailer in one atomic step.

    The data files that `index` names are already durable, names and all. To be called inside of
    `undone_on_failure`.

    Args:
        store: The folder.
        save_id: The id of the save.
        index: What was saved.
        header: What else the manifest says about it.
        yield_gil: Called between pieces of work.
        admission: What may be replaced; by default nothing.
        confirm: Called just before the commit; what it raises prevents that.

    Raises:
        AlreadyExists: Another save has committed meanwhile, and may not be replaced.
        Replaced: The checkpoint that was to be replaced has been replaced or removed meanwhile.
        OSError: The store failed.
    """
    paths = paths_of(index.structure, names_of(index)) if index.structure else None
    manifest = write_manifest(index, {"save_id": save_id, **header}, paths, yield_gil)
    pickle = metadata_bytes(index, paths, yield_gil)
    trailer = Trailer.of(save_id, pickle, manifest)
    yield_gil()
    with store.open_writer(manifest_name(save_id)) as writer:
        writer.write(manifest)
    yield_gil()
    store.sync()
    yield_gil()
    if confirm is not None:
        confirm()
    put_record(store, pickle + trailer.to_bytes(), admission)


@contextmanager
def removed_on_failure(store: Store, save_id: str, rank: int) -> Iterator[None]:
    """What this rank can't finish does not stay, or a full disk would stay full.

    To be left before anybody is told that the files are there: from then on, only the coordinator
    knows whether they are committed. It removes all ranks' files: some of them may be dead.
    """
    try:
        yield
    except BaseException:
        with suppress(OSError):
            _remove_files(store, save_id, rank or None)
        raise


@contextmanager
def undone_on_failure(store: Store, save_id: str, *, leads: bool = True) -> Iterator[None]:
    """What was not committed does not stay, of any rank.

    Only who commits can know: False for `leads` does nothing.

    The commit record itself says whether it came about: an error of its publishing does not, as
    one over a network may come after the fact, and so does that of a folder's sync.
    """
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if leads and not _is_committed(store, save_id):
                _remove_files(store, save_id)
                store.delete(manifest_name(save_id))
        raise


@contextmanager
def removed_if_refused(store: Store, save_id: str, *, rank: int | None = None) -> Iterator[None]:
    """Remove the files of a save that lost the commit to another one.

    Other errors tell nothing about the commit, so after them the files stay: who collects garbage
    decides.

    Args:
        store: The folder.
        save_id: The id of the save.
        rank: The rank whose files are removed; by default those of all ranks.
    """
    try:
        yield
    except (AlreadyExists, Replaced):
        with suppress(OSError):
            _remove_files(store, save_id, rank)
        raise


def _is_committed(store: Store, save_id: str) -> bool:
    """Whether the commit record is that save's. One that is broken is an older one's."""
    try:
        trailer = read_trailer(store)[1]
    except FormatError:
        return False
    return trailer is not None and trailer.save_id == save_id


def _remove_files(store: Store, save_id: str, rank: int | None = None) -> None:
    """Remove the data files of a save that is not committed: of one rank, or of all of them."""
    for name in store.list().files:
        parts = data_file_parts(name)
        if parts and parts[1] == save_id and rank in (None, parts[0]):
            store.delete(name)


def files_of(store: Store) -> frozenset[str]:
    """The files that the committed checkpoint is made of, without `.metadata`; none if unreadable.

    What can't be read is not understood, and what is not understood is never removed.
    """
    try:
        return committed_files(store)
    except ShardkeepError:
        return frozenset()


def committed_files(store: Store) -> frozenset[str]:
    """As `files_of`, but raises as `find` and reading the index do."""
    found = find(store)
    if found.kind == "safetensors":
        return frozenset()
    files = set(found.files())
    if found.trailer is not None:
        files.add(manifest_name(found.trailer.save_id))
    if found.kind == "dcp-per-rank":
        files.update(name for _, name in of_ranks(store.list().files))
    return frozenset(files)


def remove_replaced(store: Store, old: frozenset[str]) -> None:
    """Remove the files of the checkpoint that was there before, after the new one is durable."""
    if not old:
        return  # and do not read again what was just written
    for name in sorted(old - files_of(store) - {METADATA}):
        store.delete(name)


def _with_manifest(store: Store, trailer: Trailer) -> Found:
    name = manifest_name(trailer.save_id)

    def read_at(offset: int, length: int) -> bytes:
        return store.get_range(name, offset, length)

    def checked(read: Callable[..., T]) -> T:
        return _parsed(read, _manifest(store, trailer), trailer.save_id)

    def outline() -> Outline:
        return read_outline(read_at, trailer.manifest_length, file=name, save_id=trailer.save_id)

    try:
        size = store.head(name).size
    except FileNotFoundError:
        raise Damaged(f"the manifest is missing{_HINT}", file=name) from None
    if size != trailer.manifest_length:
        raise Damaged(
            f"the manifest has {size} bytes, not {trailer.manifest_length}{_HINT}", file=name
        )
    return Found(
        "shardkeep",
        name,
        outline,
        lambda: checked(read_manifest),
        lambda: checked(read_files),
        trailer,
    )


def _parsed(read: Callable[..., T], manifest: bytes, save_id: str) -> T:
    return read(
        lambda offset, length: manifest[offset : offset + length],
        len(manifest),
        file=manifest_name(save_id),
        save_id=save_id,
    )


def manifest_bytes(store: Store) -> tuple[str, bytes]:
    """Return the id of the committed save and the bytes of its manifest, verified.

    Raises:
        NotACheckpoint: no checkpoint of Shardkeep's is committed there.
        FormatError: the commit record is broken.
        Damaged: the manifest is missing or does not match its checksum.
    """
    trailer = find(store).trailer
    if trailer is None:
        raise NotACheckpoint(f"{store.url} holds no checkpoint with a manifest of Shardkeep's")
    return trailer.save_id, _manifest(store, trailer)


def parse_manifest(manifest: bytes, save_id: str) -> Index:
    """Return the index in the bytes of a manifest, which must belong to this save."""
    return _parsed(read_manifest, manifest, save_id)


def _metadata(store: Store, trailer: Trailer | None) -> Index:
    """The pickle's index; a trailer has its checksum, whoever reads it."""
    data = _whole(store, METADATA)
    if trailer is not None:
        trailer.check_pickle(data[: trailer.pickle_length])
    return read_metadata(data, file=METADATA)


_HINT = "; open(path, manifest=False) reads .metadata alone, as stock torch does"


def _manifest(store: Store, trailer: Trailer) -> bytes:
    name = manifest_name(trailer.save_id)
    data = store.get_range(name, 0, trailer.manifest_length)
    try:
        trailer.check_manifest(data)
    except Damaged as error:
        raise Damaged(f"the manifest does not match its checksum{_HINT}", file=name) from error
    return data


def exists(store: Store, name: str) -> bool:
    """Whether there is a file of that name."""
    return size_of(store, name) is not None


def _whole(store: Store, name: str) -> bytes:
    return store.get_range(name, 0, store.head(name).size)


def _safetensors(store: Store, names: list[str]) -> Index:
    return parse.index_of(headers(store, names), weights(store))


def headers(store: Store, names: Iterable[str]) -> dict[str, parse.Header]:
    """The headers of safetensors files. FormatError if one is broken or hostile."""
    return {
        name: parse.read_header(
            lambda offset, length, name=name: store.get_range(name, offset, length),  # type: ignore[misc]
            store.head(name).size,
            file=name,
        )
        for name in names
    }


def weights(store: Store) -> dict[str, str] | None:
    """What the index of a set of safetensors files says, if there is one. FormatError as above."""
    listing = parse.INDEX
    if not exists(store, listing):
        return None
    if store.head(listing).size > _MAX_INDEX_JSON:
        raise FormatError("larger than any index can be", file=listing)
    return parse.weight_map(_whole(store, listing))
