"""The `Metadata` that a save returns, built when it is first used.

Torch's metadata takes one Python object per tensor and another per chunk: for 100,000 small
tensors, building it takes longer than the save. Few callers look at what `save` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch.distributed.checkpoint.metadata import Metadata

from shardkeep.checkpoint import commit
from shardkeep.dcp.bridge.metadata import metadata_of_save
from shardkeep.stores.contract import Store
from shardkeep.util import gc_pause

__all__ = ["CommittedSave", "committed_save", "lazy_metadata", "pending_build"]

_BUILD = "_shardkeep_build"


@dataclass(frozen=True, slots=True)
class CommittedSave:
    """What the metadata of a save is built from; it can be pickled.

    The bytes are kept, not the name of a file: the next save may remove the file before the
    metadata is used.

    Attributes:
        manifest: the verified bytes of the manifest.
        save_id: the save that the manifest belongs to.
        checkpoint_id: where the checkpoint was saved.
    """

    manifest: bytes
    save_id: str
    checkpoint_id: Any

    def __call__(self) -> Metadata:
        """Build the metadata."""
        with gc_pause.paused():
            index = commit.parse_manifest(self.manifest, self.save_id)
            return metadata_of_save(index, self.checkpoint_id, self.save_id)


def committed_save(store: Store, checkpoint_id: Any) -> CommittedSave:
    """Read what the metadata of the checkpoint that Shardkeep has just committed is built from.

    Raises:
        NotACheckpoint: the checkpoint has been removed since.
        Damaged: its manifest is missing or does not match its checksum.
    """
    save_id, manifest = commit.manifest_bytes(store)
    return CommittedSave(manifest, save_id, checkpoint_id)


class _LazyMetadata(Metadata):  # type: ignore[misc, unused-ignore]
    """An instance of torch's class without its attributes; the first access fills them in.

    By then it is an instance of torch's class itself, not of this one: pickles and copies do not
    depend on Shardkeep. `isinstance` and `__class__` alone build nothing.
    """

    def __init__(self, build: Callable[[], Metadata]) -> None:
        object.__setattr__(self, _BUILD, build)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return Metadata
        _fill_in(self)
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _fill_in(self)
        setattr(self, name, value)

    def __delattr__(self, name: str) -> None:
        _fill_in(self)
        delattr(self, name)


def _fill_in(lazy: _LazyMetadata) -> None:
    """Build the metadata and turn `lazy` into it.

    Threads may do this at the same time. There is no lock that a fork could leave held: they agree
    by `setdefault`, which is atomic, on the metadata that was built first.
    """
    attributes: dict[str, Any] = object.__getattribute__(lazy, "__dict__")
    build = attributes.get(_BUILD)
    if build is not None:
        made = attributes.get("made") or attributes.setdefault("made", build())
        object.__setattr__(lazy, "__dict__", vars(made))
    object.__setattr__(lazy, "__class__", Metadata)


def lazy_metadata(build: Callable[[], Metadata]) -> Metadata:
    """Return metadata that `build` is called for when it is first used."""
    return cast("Metadata", _LazyMetadata(build))


def pending_build(metadata: Any) -> Any:
    """Return what a lazy metadata will be built by, or None if it is not lazy or is built."""
    if type(metadata) is not _LazyMetadata:
        return None
    return object.__getattribute__(metadata, "__dict__").get(_BUILD)
