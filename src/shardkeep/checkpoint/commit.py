"""Commit of a checkpoint in one atomic step, and detection of what is committed.

`.metadata` is the commit record. Its pickle is followed by a trailer, which `pickle.load` does not
read and which names the manifest. So one atomic replacement of one file switches both stock torch
and Shardkeep to the new checkpoint. Data files and manifests always get new names, so a checkpoint
that is being overwritten stays complete until then.
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

_MAX_INDEX_BYTES = 1 << 28


def new_id() -> str:
    """Return a new, unique save id of 32 hexadecimal digits."""
    return secrets.token_hex(16)


def rank_of(file: str) -> int:
    """Return the rank that wrote a data file."""
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
        file: The file that was recognized, for errors.
        outline: Reads names, dtypes, shapes and structure; the columns of chunks may be missing.
        index: Reads everything.
        files: Reads the names of the data files, and as little else as possible.
        trailer: The trailer of `.metadata`, for the kind "shardkeep".
    """

    kind: str
    file: str
    outline: Callable[[], Index | Outline]
    index: Callable[[], Index]
    files: Callable[[], tuple[str, ...]]
    trailer: Trailer | None = None

    @staticmethod
    def whole(kind: str, file: str, read: Callable[[], Index]) -> Found:
        """Return a checkpoint whose metadata can only be read as a whole."""
        # The three functions share one result: reading takes seconds for a large checkpoint.
        once = cache(read)
        return Found(kind, file, once, once, lambda: once().files)


def find(store: Store, *, manifest: bool = True, rank: tuple[int, int] | None = None) -> Found:
    """Return the checkpoint that is committed in a store.

    Args:
        store: The folder.
        manifest: Whether to read the manifest; False reads only `.metadata`.
        rank: The rank that reads, and the number of ranks. If each of as many ranks saved metadata
            of its own, the result is what this rank saved. By default, it is what all ranks saved.

    Raises:
        NotACheckpoint: No checkpoint is committed there.
        FormatError: The commit record is broken.
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
    version = record_version(store)  # before all else, so that the commit notices later changes
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

    The data files of `index` and their names must be durable. The caller must call this inside
    `undone_on_failure`.

    Args:
        store: The folder.
        save_id: The id of the save.
        index: The saved tensors and objects.
        header: Further entries of the manifest's header.
        yield_gil: Called between pieces of work.
        admission: The checkpoint that may be replaced; by default none.
        confirm: Called just before the commit; an exception that it raises prevents the commit.

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
    """Remove the data files of a save if the block fails, so that they do not fill the disk.

    A rank must leave the block before it reports that its files are complete. After that, only the
    coordinator knows whether they are committed. The coordinator removes the files of all ranks,
    because other ranks may have died.
    """
    try:
        yield
    except BaseException:
        with suppress(OSError):
            _remove_files(store, save_id, rank or None)
        raise


@contextmanager
def undone_on_failure(store: Store, save_id: str, *, leads: bool = True) -> Iterator[None]:
    """Remove the files of a save, of all ranks, if the block fails before the commit.

    Only the commit record tells whether the save is committed. The exception does not: a commit may
    succeed and still report an error, over a network or when the folder is synced.

    Args:
        store: The folder.
        save_id: The id of the save.
        leads: Whether this rank commits. If not, nothing is removed, because this rank cannot know
            whether the save is committed.
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

    After other errors it is unknown whether the save is committed. The files then stay until
    garbage is collected.

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
    """Return whether this save is committed. A broken commit record belongs to an older save."""
    try:
        trailer = read_trailer(store)[1]
    except FormatError:
        return False
    return trailer is not None and trailer.save_id == save_id


def _remove_files(store: Store, save_id: str, rank: int | None = None) -> None:
    """Remove the data files of a save that is not committed, of one rank or of all ranks."""
    for name in store.list().files:
        parts = data_file_parts(name)
        if parts and parts[1] == save_id and rank in (None, parts[0]):
            store.delete(name)


def files_of(store: Store) -> frozenset[str]:
    """Return the files of the committed checkpoint without `.metadata`; none if it is unreadable.

    Callers remove only the files that are returned, so files of an unreadable checkpoint stay.
    """
    try:
        return committed_files(store)
    except ShardkeepError:
        return frozenset()


def committed_files(store: Store) -> frozenset[str]:
    """Return the files of the committed checkpoint, without `.metadata`.

    Raises:
        NotACheckpoint: No checkpoint is committed there.
        FormatError: The metadata is broken.
        Damaged: The metadata does not match its checksum.
    """
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
    """Remove the files of the replaced checkpoint; the new checkpoint must be durable."""
    if not old:
        return  # without reading the new checkpoint's metadata
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
        NotACheckpoint: The committed checkpoint has no manifest, or there is no checkpoint.
        FormatError: The commit record is broken.
        Damaged: The manifest is missing or does not match its checksum.
    """
    trailer = find(store).trailer
    if trailer is None:
        raise NotACheckpoint(
            f"{store.url}: no checkpoint with a Shardkeep manifest is committed there"
        )
    return trailer.save_id, _manifest(store, trailer)


def parse_manifest(manifest: bytes, save_id: str) -> Index:
    """Return the index in the bytes of a manifest, which must belong to this save."""
    return _parsed(read_manifest, manifest, save_id)


def _metadata(store: Store, trailer: Trailer | None) -> Index:
    """Return the index in the pickle of `.metadata`, verified if there is a trailer."""
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
    """Return whether a file exists."""
    return size_of(store, name) is not None


def _whole(store: Store, name: str) -> bytes:
    return store.get_range(name, 0, store.head(name).size)


def _safetensors(store: Store, names: list[str]) -> Index:
    return parse.index_of(headers(store, names), weights(store))


def headers(store: Store, names: Iterable[str]) -> dict[str, parse.Header]:
    """Return the headers of safetensors files, by file name.

    Raises:
        FormatError: A header is broken or hostile.
    """
    return {
        name: parse.read_header(
            lambda offset, length, name=name: store.get_range(name, offset, length),  # type: ignore[misc]
            store.head(name).size,
            file=name,
        )
        for name in names
    }


def weights(store: Store) -> dict[str, str] | None:
    """Return the weight map of a set of safetensors files; None if there is no index file.

    Raises:
        FormatError: The index file is broken or too large.
    """
    listing = parse.INDEX
    if not exists(store, listing):
        return None
    if store.head(listing).size > _MAX_INDEX_BYTES:
        raise FormatError(f"the index is larger than {_MAX_INDEX_BYTES} bytes", file=listing)
    return parse.weight_map(_whole(store, listing))
