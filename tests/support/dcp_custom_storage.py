"""Storage and extensions as users write them against torch; see `dcp_custom`."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint._extension import (
    ExtensionRegistry,
    StreamTransformExtension,
    ZStandard,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from support.dcp_custom_case import Base, Made, case, state

# --- storage -------------------------------------------------------------------------------------


def done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


def folder_storage(base: Base, path: str, *, old: bool = False) -> tuple[Any, Any]:
    """Return a writer and a reader that keep a file per rank, and the metadata as a pickle.

    With `old`, their set-up methods take no `**kwargs`, as before torch 2.9.
    """

    class Writer(base.StorageWriter):
        def __init__(self):
            super().__init__()
            self.set_up = None

        def reset(self, checkpoint_id=None):
            pass

        def set_up_storage_writer(self, is_coordinator, *args, **kwargs):
            self.set_up = kwargs

        def prepare_local_plan(self, plan):
            Path(path).mkdir(parents=True, exist_ok=True)
            return plan

        def prepare_global_plan(self, plans):
            return [replace(plan, storage_data=f"part{i}.pt") for i, plan in enumerate(plans)]

        def write_data(self, plan, planner):
            kept, results = {}, []
            for item in plan.items:
                data = planner.resolve_data(item)
                tensor = item.type != WriteItemType.BYTE_IO
                key = (item.index.fqn, item.index.offset)
                kept[key] = data.detach().clone() if tensor else data.getvalue()
                results.append(WriteResult(item.index, 1, (plan.storage_data, key)))
            torch.save(kept, Path(path) / plan.storage_data)
            return done(results)

        def finish(self, metadata, results):
            metadata.storage_data = {one.index: one.storage_data for r in results for one in r}
            (Path(path) / "metadata.pickle").write_bytes(pickle.dumps(metadata))

        @classmethod
        def validate_checkpoint_id(cls, checkpoint_id):
            return True

    class Reader(base.StorageReader):
        def reset(self, checkpoint_id=None):
            pass

        def read_metadata(self):
            return pickle.loads((Path(path) / "metadata.pickle").read_bytes())

        def set_up_storage_reader(self, metadata, is_coordinator, *args, **kwargs):
            self.places = metadata.storage_data

        def prepare_local_plan(self, plan):
            return plan

        def prepare_global_plan(self, plans):
            return plans

        def read_data(self, plan, planner):
            for item in plan.items:
                file, key = self.places[item.storage_index]
                found = torch.load(Path(path) / file, weights_only=True)[key]
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, io.BytesIO(found))
                    continue
                for dim, start in enumerate(item.storage_offsets):
                    found = found.narrow(dim, start, item.lengths[dim])
                target = planner.resolve_tensor(item).detach()
                target.copy_(found)
                planner.commit_tensor(item, target)
            return done(None)

        @classmethod
        def validate_checkpoint_id(cls, checkpoint_id):
            return True

    class OldWriter(Writer):
        def set_up_storage_writer(self, is_coordinator):
            self.set_up = {}

    class OldReader(Reader):
        def set_up_storage_reader(self, metadata, is_coordinator):
            self.places = metadata.storage_data

    return (OldWriter(), OldReader()) if old else (Writer(), Reader())


@case
def stores_from_scratch(base: Base, path: str, rank: int, size: int) -> Made:
    writer, reader = folder_storage(base, path)

    def then() -> None:
        assert writer.set_up == {"rank": rank, "use_collectives": True}

    made = state(rank, size)
    return Made(made, {"storage_writer": writer}, {"storage_reader": reader}, then=then)


@case
def stores_with_old_signatures(base: Base, path: str, rank: int, size: int) -> Made:
    writer, reader = folder_storage(base, path, old=True)
    return Made(state(rank, size), {"storage_writer": writer}, {"storage_reader": reader})


class Forwarding:
    """A wrapper that forwards every call."""

    inner: Any

    def reset(self, checkpoint_id=None):
        self.inner.reset(checkpoint_id)

    def prepare_local_plan(self, plan):
        return self.inner.prepare_local_plan(plan)

    def prepare_global_plan(self, plans):
        return self.inner.prepare_global_plan(plans)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id):
        return True


@case
def wraps_storage(base: Base, path: str, rank: int, size: int) -> Made:
    """Wrap torch's or Shardkeep's storage and forward all calls, as metrics tools do."""

    class Writer(Forwarding, base.StorageWriter):
        def __init__(self):
            self.inner = base.FileSystemWriter(path)

        def set_up_storage_writer(self, is_coordinator, *args, **kwargs):
            self.inner.set_up_storage_writer(is_coordinator, *args, **kwargs)

        def write_data(self, plan, planner):
            return self.inner.write_data(plan, planner)

        def finish(self, metadata, results):
            self.inner.finish(metadata, results)

        def storage_meta(self):
            return self.inner.storage_meta()

    class Reader(Forwarding, base.StorageReader):
        def __init__(self):
            self.inner = base.FileSystemReader(path)

        def read_metadata(self, *args, **kwargs):
            return self.inner.read_metadata(*args, **kwargs)

        def set_up_storage_reader(self, metadata, is_coordinator, *args, **kwargs):
            self.inner.set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)

        def read_data(self, plan, planner):
            return self.inner.read_data(plan, planner)

    return Made(state(rank, size), {"storage_writer": Writer()}, {"storage_reader": Reader()})


@case
def extends_the_file_system(base: Base, path: str, rank: int, size: int) -> Made:
    """Derive from the file system's reader and writer, do something more, and call super."""
    log: list[str] = []

    class Writer(base.FileSystemWriter):
        def write_data(self, plan, planner):
            log.append("write")
            return super().write_data(plan, planner)

        def finish(self, metadata, results):
            (Path(path) / "before.txt").write_text("about to finish")
            super().finish(metadata, results)
            (Path(path) / "after.txt").write_text(f"{sum(map(len, results))} items")

    class Reader(base.FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            metadata = super().read_metadata(*args, **kwargs)
            log.append("metadata")
            return metadata

        def read_data(self, plan, planner):
            log.append("read")
            return super().read_data(plan, planner)

    def then() -> None:
        assert log == ["write", "metadata", "read"]
        # w, skipped and step once; of each rank a shard, a position and names.
        assert (Path(path) / "after.txt").read_text() == f"{3 + 3 * size} items"

    return Made(
        state(rank, size),
        {"storage_writer": Writer(path)},
        {"storage_reader": Reader(path)},
        then=then,
    )


@case
def has_a_file_system_of_its_own(base: Base, path: str, rank: int, size: int) -> Made:
    """Replace only `fs`, by a subclass of `FileSystemBase`."""
    log: list[str] = []

    class Flipped(io.FileIO):
        """A file that stores other bytes than those that were written."""

        def write(self, data):
            super().write(bytes(memoryview(data).cast("B")).translate(FLIP))
            return len(memoryview(data).cast("B"))

        def read(self, size=-1):
            return super().read(size).translate(FLIP)

        def readinto(self, buffer):
            data = self.read(len(buffer))
            memoryview(buffer).cast("B")[: len(data)] = data
            return len(data)

    class Files(stock.filesystem.FileSystemBase):
        @contextmanager
        def create_stream(self, path, mode) -> Iterator[IO[bytes]]:
            log.append(mode)
            with Flipped(path, mode.replace("b", "")) as stream:
                yield stream

        def concat_path(self, path, suffix):
            return str(Path(path) / suffix)

        def rename(self, path, new_path):
            Path(path).replace(new_path)

        def init_path(self, path):
            return str(path)

        def mkdir(self, path):
            Path(path).mkdir(parents=True, exist_ok=True)

        @classmethod
        def validate_checkpoint_id(cls, checkpoint_id):
            return True

        def exists(self, path):
            return Path(path).exists()

        def rm_file(self, path):
            Path(path).unlink()

    class Writer(base.FileSystemWriter):
        def __init__(self, path):
            super().__init__(path)
            self.fs = Files()
            self.path = self.fs.init_path(path)

    class Reader(base.FileSystemReader):
        def __init__(self, path):
            super().__init__(path)
            self.fs = Files()
            self.path = self.fs.init_path(path)

    def then() -> None:
        assert {"wb", "rb"} <= set(log)
        assert (Path(path) / ".metadata").read_bytes()[0] == 0x80 ^ 0xFF

    return Made(
        state(rank, size),
        {"storage_writer": Writer(path)},
        {"storage_reader": Reader(path)},
        then=then,
    )


FLIP = bytes(byte ^ 0xFF for byte in range(256))


class Xor(StreamTransformExtension):
    """An insecure cipher, for tests only."""

    @staticmethod
    def registry_name() -> str:
        return "stream.xor"

    @staticmethod
    def from_descriptor(version: str) -> Xor:
        assert version == "1"
        return Xor()

    def get_descriptor(self) -> str:
        return "stream.xor/1"

    def transform_to(self, output):
        class Out(io.RawIOBase):
            def writable(self):
                return True

            def write(self, data):
                output.write(bytes(data).translate(FLIP))
                return len(data)

            def close(self):
                output.close()

        return Out()

    def transform_from(self, input):
        class In(io.RawIOBase):
            def readable(self):
                return True

            def readinto(self, buffer):
                data = input.read(len(buffer)).translate(FLIP)
                buffer[: len(data)] = data
                return len(data)

        return io.BufferedReader(In())


@case
def enciphers(base: Base, path: str, rank: int, size: int) -> Made:
    """Use a customized stream extension, which the reader finds through a registry."""
    registry = ExtensionRegistry()
    registry.register(Xor)

    def then() -> None:
        (file, *_) = Path(path).glob("*.distcp")
        assert b"PK".translate(FLIP) in file.read_bytes()[:8]

    return Made(
        state(rank, size),
        {"storage_writer": base.FileSystemWriter(path, _extensions=[Xor()])},
        {"storage_reader": base.FileSystemReader(path, _extension_registry=registry)},
        then=then,
    )


@case
def compresses(base: Base, path: str, rank: int, size: int) -> Made:
    """Use torch's own extension, which every reader has."""
    return Made(
        state(rank, size),
        {"storage_writer": base.FileSystemWriter(path, _extensions=[ZStandard()])},
        {"storage_reader": base.FileSystemReader(path)},
    )
