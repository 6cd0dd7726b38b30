"""`.metadata` of stock torch is read into an index, and invalid or hostile metadata is refused."""

from __future__ import annotations

import pickle
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardkeep.errors import FormatError
from shardkeep.format.dcp.metadata_read import merge_metadata, pickle_length, read_metadata
from shardkeep.types import DType, Index

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from attacks import pickles as p

GOOD = [p.key("w", p.size(0, 0)), p.place("data", 5, 100)]


def one(entry: bytes | None = None, storage: list[bytes] | None = None, **more: Any) -> Index:
    return read_metadata(
        p.metadata({"w": entry or p.tensor()}, GOOD if storage is None else storage, **more)
    )


def boxes(index: Index) -> list[tuple[list[int], list[int]]]:
    chunks = index.chunks
    return [
        (offsets, sizes)
        for offsets, sizes in zip(chunks.offsets.tolist(), chunks.sizes.tolist(), strict=True)
    ]


def test_metadata_made_by_hand() -> None:
    data = p.metadata({"w": p.tensor()}, GOOD)
    index = read_metadata(data + b"trailer")
    assert index.tensors.names == ("w",)
    assert index.tensors.dtype.tolist() == [DType.named("float32").code]
    assert index.tensors.shape.tolist() == [[2, 3]]
    assert boxes(index) == [([0, 0], [2, 3])]
    assert index.files == ("data",)
    assert (index.chunks.item[0], index.chunks.length[0], index.chunks.payload[0]) == (5, 100, -1)
    assert index.extra["pickle_length"] == pickle_length(data) == len(data)
    assert index.structure is not None and index.structure.leaves == {"w": ("w",)}


def test_the_old_module_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(p, "METADATA", "torch.distributed._shard.checkpoint.metadata")
    data = p.metadata({"w": p.tensor()}, [p.key("w", p.size(0, 0)), p.place()])
    assert b"_shard.checkpoint" in data and b"distributed.checkpoint.metadata" not in data
    assert read_metadata(data).tensors.names == ("w",)


def test_properties_of_any_length() -> None:
    for count in (5, 6, 9):
        state = p.sequence(p.named("torch", "int8"), *[p.NONE] * (count - 1))
        index = one(p.tensor(props=p.new(p.METADATA, "TensorProperties", state)))
        assert index.tensors.dtype.tolist() == [DType.named("int8").code]
    short = p.new(p.METADATA, "TensorProperties", p.sequence(p.named("torch", "int8")))
    with pytest.raises(FormatError, match="'w': a tensor without properties"):
        one(p.tensor(props=short))


def test_replicas_count_once_and_empty_boxes_hide_nothing() -> None:
    whole, empty = p.chunk(p.size(0, 0), p.size(2, 3)), p.chunk(p.size(0, 0), p.size(0, 3))
    for chunks in ([whole, whole], [empty, whole], [whole, empty]):
        assert boxes(one(p.tensor(chunks=p.listing(*chunks)))) == [([0, 0], [2, 3])]
    other = p.chunk(p.size(0, 0), p.size(1, 3))
    with pytest.raises(FormatError, match=r"two chunks at one place: \(1, 3\) and \(2, 3\)"):
        one(p.tensor(chunks=p.listing(whole, other)))


def test_empty_tensors_may_have_no_chunk() -> None:
    assert boxes(one(p.tensor(p.size(0, 3), p.listing()), [])) == []
    nowhere = p.listing(p.chunk(p.size(0, 0), p.size(0, 3)))
    assert boxes(one(p.tensor(p.size(0, 3), nowhere), [])) == []


def test_storage_entries_of_other_classes_are_read_by_their_attributes() -> None:
    state = p.attributes(relative_path=p.text("a/b"), offset=p.number(1), length=p.number(2))
    index = one(storage=[GOOD[0], p.new("some.writer", "Place", state)])
    assert index.files == ("a/b",)


def test_transforms() -> None:
    zstd = p.place("data", 0, 9, transform_descriptors=p.listing(p.text("stream.zstd/1")))
    index = one(storage=[GOOD[0], zstd])
    assert index.transforms == ((), ("stream.zstd/1",))
    assert index.chunks.transform.tolist() == [1]


def test_a_legacy_duplicate_is_recognized_by_its_place() -> None:
    entries = {"a.0.x": p.tensor(), "a": p.entry_of_bytes(), "b": p.entry_of_bytes()}
    storage = [p.key("a.0.x", p.size(0, 0)), p.place()]
    storage += [part for name in "ab" for part in (p.key(name), p.place())]
    a, x, zero = p.text("a"), p.text("x"), p.number(0)
    paths = p.mapping(
        p.text("a.0.x"),
        p.sequence(a, zero, x),
        a,
        p.sequence(a),
        p.text("b"),
        p.sequence(p.text("b")),
    )
    index = read_metadata(p.metadata(entries, storage, paths))
    assert index.legacy_duplicates == {"a": ("a",)}
    assert index.structure is not None
    assert index.structure.leaves == {"a.0.x": ("a", 0, "x"), "b": ("b",)}
    assert index.structure.containers == {(): "dict", ("a",): "list", ("a", 0): "dict"}
    assert next(iter(index.structure.containers)) == ()


def test_metadata_without_planner_data() -> None:
    assert one(paths=p.NONE).structure is None


def test_metadata_of_several_ranks_is_merged() -> None:
    def rank(number: int, dtype: str = "float32", shape: tuple[int, ...] = (4, 3)) -> bytes:
        chunk = p.listing(p.chunk(p.size(2 * number, 0), p.size(2, 3)))
        entries = {
            "w": p.tensor(p.size(*shape), chunk, p.properties(p.named("torch", dtype))),
            "step": p.entry_of_bytes(),
        }
        file = f"__{number}_0.distcp"
        storage = [p.key("w", p.size(2 * number, 0)), p.place(file), p.key("step"), p.place(file)]
        return p.metadata(entries, storage)

    index = merge_metadata([("__1.metadata", rank(1)), ("__0.metadata", rank(0))])
    assert boxes(index) == [([0, 0], [2, 3]), ([2, 0], [2, 3])]
    assert index.files == ("__0_0.distcp", "__1_0.distcp")
    assert index.objects.file.tolist() == [0]
    for other, what in ((rank(1, "int8"), "dtype: int8"), (rank(1, shape=(5, 3)), r"\(5, 3\)")):
        with pytest.raises(FormatError, match=rf"__1.metadata, name 'w': ranks disagree .*{what}"):
            merge_metadata([("__0.metadata", rank(0)), ("__1.metadata", other)])


@pytest.mark.torch
def test_metadata_of_torch_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    state = {
        "model": {
            "w": torch.arange(6.0).reshape(2, 3),
            "b": torch.zeros(0, 4),
            "s": torch.tensor(1),
        },
        "list": [torch.ones(2, dtype=torch.bfloat16), {"lr": 0.1}],
        "step": 7,
    }
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    index = read_metadata((tmp_path / "c" / ".metadata").read_bytes())
    shapes = {
        name: tuple(index.tensors.shape[row, : index.tensors.ndim[row]].tolist())
        for row, name in enumerate(index.tensors.names)
    }
    assert shapes == {"model.w": (2, 3), "model.b": (0, 4), "model.s": (), "list.0": (2,)}
    assert set(index.objects.names) == {"list.1.lr", "step"}
    assert index.structure is not None
    assert index.structure.leaves["list.1.lr"] == ("list", 1, "lr")
    assert index.structure.containers["list",] == "list"
    assert index.extra["checkpoint_id"].endswith("c")
    for rows in (index.chunks, index.objects):
        assert (rows.item >= 0).all() and (rows.length > 0).all()


@pytest.mark.torch
def test_the_index_equals_the_objects_that_torch_pickled() -> None:
    torch = pytest.importorskip("torch")
    meta = pytest.importorskip("torch.distributed.checkpoint.metadata")
    files = pytest.importorskip("torch.distributed.checkpoint.filesystem")
    source = random.Random(3)
    entries, storage = {}, {}
    for number in range(200):
        shape = tuple(source.randrange(1, 50) for _ in range(source.randrange(5)))
        name = f"layers.{number}"
        properties = meta.TensorProperties(dtype=source.choice([torch.int8, torch.bfloat16]))
        begin = torch.Size([0] * len(shape))
        chunk = meta.ChunkStorageMetadata(begin, torch.Size(shape))
        entries[name] = meta.TensorStorageMetadata(properties, torch.Size(shape), [chunk])
        place = files._StorageInfo(f"__{number % 7}_0.distcp", number * 64, number)
        storage[meta.MetadataIndex(name, begin, 0)] = place
    data = pickle.dumps(meta.Metadata(entries, None, storage))
    index = read_metadata(data)
    for row, (name, entry) in enumerate(entries.items()):
        ndim = int(index.tensors.ndim[row])
        assert index.tensors.names[row] == name
        assert tuple(index.tensors.shape[row, :ndim]) == tuple(entry.size)
        assert index.tensors.dtype[row] == DType.named(str(entry.properties.dtype)).code
        chunk_row = int(np.flatnonzero(index.chunks.tensor == row)[0])
        place = storage[meta.MetadataIndex(name, torch.Size([0] * ndim))]
        assert index.files[index.chunks.file[chunk_row]] == place.relative_path
        assert index.chunks.item[chunk_row] == place.offset
        assert index.chunks.length[chunk_row] == place.length


def test_mutations_give_an_index_or_a_format_error() -> None:
    source = random.Random(9)
    data = p.metadata(
        {"w": p.tensor(), "o": p.entry_of_bytes()},
        [*GOOD, p.key("o"), p.place("data", 0, 5)],
    )
    errors = 0
    for _ in range(4000):
        broken = bytearray(data)
        for _ in range(source.randint(1, 3)):
            at = source.randrange(len(broken))
            broken[at : at + source.randrange(2)] = source.randbytes(source.randrange(3))
        try:
            read_metadata(bytes(broken))
        except FormatError as error:
            assert str(error).startswith(".metadata")
            errors += 1
    assert 1000 < errors < 4000


def calls_to_read(count: int) -> int:
    """Count the calls of Python functions that reading the metadata of `count` tensors makes."""
    tensors = {f"layers.{n}.weight": p.tensor() for n in range(count)}
    storage = [part for name in tensors for part in (p.key(name, p.size(0, 0)), p.place())]
    data = p.metadata(tensors, storage)
    calls = 0

    def saw(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(saw)
    try:
        index = read_metadata(data)
    finally:
        sys.setprofile(None)
    assert len(index.chunks.tensor) == count
    return calls


def test_many_tensors_take_little_time() -> None:
    """Time is measured in calls: each further tensor costs a bounded number of them."""
    few, more, most = (calls_to_read(count) for count in (100, 1100, 3100))
    assert more - few <= 1000 * 420
    assert most - more <= 2000 * 420
