"""Manifests are read as they were written, by range, and invalid ones raise a `FormatError`."""

from __future__ import annotations

import io
import json
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from format.strategies import column, indexes, plain
from shardkeep.errors import Damaged, FormatError
from shardkeep.format.manifest.read import read_files, read_manifest, read_outline, write_manifest
from shardkeep.format.values import NotEncodable, decode
from shardkeep.settings import BLOCK
from shardkeep.types import Chunks, DType, Index, Objects, Structure, Tensors

SAVE = "0123456789abcdef" * 2


def read(data, reader=read_manifest, **more):
    return reader(
        lambda offset, length: data[offset : offset + length], len(data), file="m", **more
    )


def sample(count=3):
    """Return an index of tensors of two chunks each, two objects and a structure."""
    names = tuple(f"layers.{n}.weight" for n in range(count))
    rows = np.arange(2 * count)
    return Index(
        ("__0_0.distcp", "__1_0.distcp"),
        Tensors(
            names,
            np.full(count, DType.named("float32").code, np.uint8),
            np.full(count, 2, np.uint8),
            np.tile(column([8, 4]), (count, 1)),
        ),
        Chunks(
            rows // 2,
            np.stack([rows % 2 * 4, rows * 0], axis=1),
            np.full((2 * count, 2), 4),
            (rows % 2).astype(np.int32),
            rows * 1000,
            np.full(2 * count, 1000),
            rows * 1000 + 600,
            np.zeros(2 * count, np.int16),
            np.arange(2 * count + 1),
            (rows * 7919).astype(np.uint32),
        ),
        Objects(
            ("lr", "step"),
            np.zeros(2, np.int32),
            column([10**6, 10**6 + 500]),
            column([500, 400]),
            np.zeros(2, np.int16),
            column([5, -1]),
            {"lr": 0.5, "step": {"tuple": [1]}},
        ),
        structure=Structure(
            {**{name: ("layers", n, "weight") for n, name in enumerate(names)}, "lr": ("lr",)},
            {
                (): "dict",
                ("layers",): "list",
                **{("layers", n): "dict" for n in range(count)},
                ("none",): "dict",
            },
            {("none",): 1},
        ),
        legacy_duplicates={"lr": ("a", 0)},
        extra={"torch": "2.13.0"},
    )


@given(indexes())
@settings(max_examples=100)
def test_every_index_is_read_as_it_was_written(index):
    data = write_manifest(index, {"save_id": SAVE})
    assert plain(read(data, save_id=SAVE)) == plain(index)
    assert write_manifest(read(data), {"save_id": SAVE}) == data
    assert read(data, read_files, save_id=SAVE) == index.files


@given(st.data())
@settings(max_examples=150)
def test_changed_bytes_are_detected(data):
    index = sample()
    good = write_manifest(index, {"save_id": SAVE})
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(bad) - 1))
        bad[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.just(len(bad)) | st.integers(0, len(bad)))
    try:
        found = read(bytes(bad[:cut]))
        plain(found)
    except (FormatError, Damaged) as error:
        assert str(error).startswith("m")
    else:
        assert plain(found) == plain(index)


@pytest.mark.parametrize("start", [0, 3])
def test_a_flipped_byte_is_detected_or_changes_nothing(start):
    index = sample(1)
    good = write_manifest(index, {"save_id": SAVE})
    expected = plain(index)
    for place in range(start, len(good), 7):
        bad = bytearray(good)
        bad[place] ^= 0x41
        try:
            found = plain(read(bytes(bad)))
        except (FormatError, Damaged):
            continue
        assert found == expected, place


def test_an_outline_reads_no_columns_of_chunks():
    index = sample(1000)
    rows = len(index.chunks.tensor)
    noise = np.random.default_rng(0).integers(0, 2**32, 2_000_000, dtype=np.uint32)
    blocks = np.zeros(rows + 1, np.int64)
    tensors = Tensors(("t", *index.tensors.names[1:]), *_columns(index.tensors))
    tensors.shape[0] = 2_000_000, 65536  # float32: two million blocks
    index.chunks.sizes[0] = tensors.shape[0]
    index.chunks.length[0] = 2_000_000 * 65536 * 4 + 600
    index.chunks.item[1:] += index.chunks.length[0]
    index.chunks.payload[1:] += index.chunks.length[0]
    blocks[1:] = len(noise)
    columns = {name: getattr(index.chunks, name) for name in Chunks.__slots__}
    chunks = Chunks(**{**columns, "block": blocks, "checksums": noise})
    big = Index(
        index.files,
        tensors,
        chunks,
        index.objects,
        structure=None,
        legacy_duplicates=index.legacy_duplicates,
    )
    data = write_manifest(big, {"save_id": SAVE, "tool": "x"})
    reads = []

    def read_at(offset, length):
        reads.append(length)
        return data[offset : offset + length]

    outline = read_outline(read_at, len(data), file="m")
    assert sum(reads) < 2_000_000 < len(data)
    assert outline.tensors.names == tensors.names
    assert outline.counts.tolist() == [2] * 1000
    assert outline.nbytes == 2_000_000 * 65536 * 4 + 999 * 8 * 4 * 4
    assert outline.header == {"save_id": SAVE, "tool": "x"}
    assert decode(outline.objects.values["step"]) == (1,)
    assert plain(outline.index()) == plain(big)


def _columns(table):
    return [getattr(table, name).copy() for name in type(table).__slots__[1:]]


def test_numpy_opens_a_manifest():
    members = np.load(io.BytesIO(write_manifest(sample(), {})), allow_pickle=False)
    assert members["tensors.shape"].tolist() == [[8, 4]] * 3
    assert json.loads(members["header.json"])["files"] == ["__0_0.distcp", "__1_0.distcp"]


def test_file_names_are_read_without_columns_and_are_checked():
    members = members_of(write_manifest(sample(), {"save_id": SAVE}))
    head = {"header.json": members["header.json"]}
    assert read(packed(head), read_files) == sample().files
    with pytest.raises(FormatError, match=r"m, header\.json: belongs to save"):
        read(packed(head), read_files, save_id="ff")
    known = json.loads(members["header.json"])
    known["files"] = ["../away"]
    with pytest.raises(FormatError, match=r"m.*\.\./away"):
        read(packed({"header.json": json.dumps(known).encode()}), read_files)


def test_equal_indexes_give_equal_files():
    assert write_manifest(sample(), {"save_id": SAVE}) == write_manifest(
        sample(), {"save_id": SAVE}
    )


def test_a_manifest_of_another_save_is_refused():
    data = write_manifest(sample(), {"save_id": SAVE})
    with pytest.raises(FormatError, match=r"m, header\.json: belongs to save '0123.*, not 'ff'"):
        read(data, save_id="ff")
    with pytest.raises(FormatError, match="belongs to save None"):
        read(write_manifest(sample(), {}), save_id=SAVE)


def test_an_index_that_cannot_be_written_is_refused():
    index = sample()
    with pytest.raises(NotEncodable):
        write_manifest(index, {"tool": object()})
    for leaves, containers, what in [
        ({"lr": ("a", "b")}, {(): "dict"}, r"names \('a',\), which is not there"),
        ({"other": ("a",)}, {(): "dict"}, "names 'other', which is not there"),
        ({}, {("a",): "dict", (): "dict"}, "no root"),
        ({}, {(): "dict", ("a", "b"): "dict", ("a",): "dict"}, "outer before inner"),
        ({"lr": ()}, {(): "dict"}, "a leaf at its root"),
        ({"lr": ("a",) * 101}, {("a",) * n: "dict" for n in range(101)}, "too long"),
    ]:
        broken = Index(
            index.files,
            index.tensors,
            index.chunks,
            index.objects,
            structure=Structure(leaves, containers),
        )
        with pytest.raises(ValueError, match=what):
            write_manifest(broken, {})


def members_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def npy(array, **more):
    out = io.BytesIO()
    np.save(out, array, **more)
    return out.getvalue()


def forged(changes, head=None):
    """Return a manifest with changed members and correct checksums."""
    members = members_of(write_manifest(sample(), {"save_id": SAVE}))
    if head:
        members["header.json"] = json.dumps({**json.loads(members["header.json"]), **head}).encode()
    members.update(changes)
    return packed(members)


def packed(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)
    return out.getvalue()


ROWS = range(6)
HUGE = (
    b"\x93NUMPY\x01\x00\x76\x00"
    + b"{'descr': '<i8', 'fortran_order': False, 'shape': (6,), }".ljust(117)
    + b"\n"
)


@pytest.mark.parametrize(
    ("changes", "head", "message"),
    [
        ({"header.json": None}, {}, "m, header.json: is missing"),
        ({"header.json": b"[]"}, {}, "m, header.json: is not the header of a manifest"),
        ({"header.json": b"["}, {}, "m, header.json: not valid JSON"),
        ({"header.json": b"[" * 200_000}, {}, "m, header.json: not valid JSON"),
        ({}, {"version": 2}, "version 2 is not known; a newer Shardkeep wrote it"),
        ({}, {"tensors": -1}, "has no number of tensors"),
        ({}, {"tensors": 2**50}, "has no number of tensors"),
        ({}, {"tensors": True}, "has no number of tensors"),
        ({}, {"tensors": 2**39}, "m, names.lengths.npy: holds uint8 of shape (5,), not"),
        ({}, {"chunks": 2**39}, "m, tensors.chunks.npy: does not count all chunks"),
        ({}, {"digests": 7}, "m, chunks.blocks.npy: does not fit"),
        ({}, {"dims": 3}, "holds uint8 of shape (3, 2), not integers of (3, 3)"),
        ({}, {"dims": 65}, "has tensors of 65 dimensions"),
        ({}, {"names": 7}, "m, names.lengths.npy: holds a number out of range"),
        ({}, {"dtypes": ["float31"]}, "m, header.json: unknown dtype 'float31'"),
        ({}, {"dtypes": "float32"}, "m, header.json: has no list 'dtypes'"),
        ({}, {"dtypes": [1]}, "m, header.json: holds something else in place of a text"),
        ({}, {"dtypes": []}, "m, tensors.dtype.npy: holds a number out of range"),
        ({}, {"files": ["../x", "y"]}, "m: file name '../x' leaves the checkpoint's folder"),
        ({}, {"files": ["x"]}, "m, chunks.file.npy: holds a number out of range"),
        ({}, {"files": []}, "m, objects.file.npy: holds a number out of range"),
        ({}, {"transforms": []}, "m, header.json: does not list transforms"),
        ({}, {"transforms": [[], "a"]}, "m, header.json: does not list transforms"),
        ({}, {"twins": [["none", []]]}, "lists a duplicate 'none', but no such object"),
        ({}, {"twins": [["lr", ["a"] * 101]]}, "lists a duplicate 'lr'"),
        ({}, {"twins": [["lr"]]}, "has an invalid list of legacy duplicates"),
        ({}, {"twins": [["lr", [{"list": []}]]]}, "unknown kind 'list'"),
        ({}, {"extra": [1]}, "m, header.json: has no mapping 'extra'"),
        ({}, {"extra": {"eval": 1}}, "m, header.json: a value is of unknown kind 'eval'"),
        ({}, {"header": {"dict": [[1, 1]]}}, "m, header.json: has no mapping 'header'"),
        ({}, {"structure": []}, "has no number of containers"),
        ({}, {"structure": {"containers": 0, "leaves": 0, "empties": 0}}, "shape (6,), not"),
        ({"keys.json": b"{}"}, {}, "m, keys.json: is not a list"),
        ({"keys.json": b'[{"dict":[]}]'}, {}, "m, keys.json: a key cannot be hashed"),
        ({"keys.json": b"[]"}, {}, "m, containers.key.npy: holds a number out of range"),
        ({"keys.json": b"[1,1,1,1,1,1,1]"}, {}, "m, keys.json: a key occurs twice"),
        ({"containers.parent.npy": npy(column([4, 1, 1, 1, 0]))}, {}, "out of range"),
        ({"containers.kind.npy": npy(column([3, 1, 0, 0, 0, 0]))}, {}, "out of range"),
        ({"leaves.parent.npy": npy(column([6, 3, 4, 0]))}, {}, "out of range"),
        ({"leaves.name.npy": npy(column([5, 1, 2, 3]))}, {}, "out of range"),
        ({"leaves.name.npy": npy(column([1, 1, 2, 3]))}, {}, "holds a name twice"),
        ({"empties.container.npy": npy(column([6]))}, {}, "out of range"),
        ({"empties.before.npy": npy(column([5]))}, {}, "out of range"),
        ({"names.npy": npy(column([0xFF] * 51, np.uint8))}, {}, "names.npy: is not valid UTF-8"),
        ({"names.lengths.npy": npy(column([51, 0, 0, 0, 0]))}, {}, "names.npy: holds a name twice"),
        ({"names.lengths.npy": npy(column([51, 1, 0, 0, 0]))}, {}, "does not sum up to 51 bytes"),
        ({"values.lengths.npy": npy(column([-1, 16]))}, {}, "holds a number out of range"),
        ({"tensors.shape.npy": npy(column([[8, 4]] * 2 + [[-8, 4]]))}, {}, "does not fit"),
        ({"tensors.shape.npy": npy(column([[8, 4]] * 2 + [[2**31, 2**31]]))}, {}, "2**62 bytes"),
        ({"tensors.shape.npy": npy(column([[8, 4]] * 2 + [[2**63 - 1] * 2]))}, {}, "2**62 bytes"),
        ({"tensors.ndim.npy": npy(column([2, 2, 1]))}, {}, "does not fit the numbers of dim"),
        ({"tensors.ndim.npy": npy(column([2, 2, 258]))}, {}, "number outside the range of uint8"),
        ({"tensors.ndim.npy": npy(column([1, 1, 1]))}, {}, "does not fit the numbers of dim"),
        ({"tensors.chunks.npy": npy(column([2, 2, 1]))}, {}, "does not count all chunks"),
        ({"tensors.chunks.npy": npy(column([7, -1, 0]))}, {}, "holds a number out of range"),
        ({"chunks.offsets.npy": npy(column([[5, 0]] * 6))}, {}, "a box outside its tensor"),
        ({"chunks.offsets.npy": npy(column([[-1, 0]] * 6))}, {}, "a box outside its tensor"),
        ({"chunks.sizes.npy": npy(column([[9, 4]] * 6))}, {}, "a box outside its tensor"),
        ({"chunks.sizes.npy": npy(column([[2**63 - 1] * 2] * 6))}, {}, "a box outside its"),
        ({"chunks.length.npy": npy(column([-5] * 6))}, {}, "an item outside every file"),
        ({"chunks.gap.npy": npy(column([-5] * 6))}, {}, "an item outside every file"),
        ({"chunks.gap.npy": npy(column([2**63 - 1] * 6))}, {}, "an item outside every file"),
        ({"chunks.payload.npy": npy(column([937] * 6))}, {}, "a payload outside its item"),
        ({"chunks.payload.npy": npy(column([-2] * 6))}, {}, "a payload outside its item"),
        ({"chunks.file.npy": npy(column([-1] * 6))}, {}, "chunks.file.npy: holds a number out"),
        ({"chunks.file.npy": npy(column([2**31] * 6))}, {}, "number outside the range of int32"),
        ({"chunks.transform.npy": npy(column([1] * 6))}, {}, "out of range"),
        ({"chunks.blocks.npy": npy(column([2, 0] * 3))}, {}, "does not fit the payloads"),
        (
            {"chunks.digests.npy": npy(column([2**32] * 6))},
            {},
            "number outside the range of uint32",
        ),
        ({"objects.crc.npy": npy(column([2**32, 0]))}, {}, "objects.crc.npy: holds a number out"),
        ({"objects.item.npy": npy(column([2**63 - 1, 0]))}, {}, "an item outside every file"),
        (
            {"objects.crc.npy": npy(np.array([2**63, 0], np.uint64))},
            {},
            "outside the range of int64",
        ),
        ({"objects.crc.npy": npy(np.zeros(2))}, {}, "holds float64 of shape (2,)"),
        ({"objects.crc.npy": npy(np.zeros(2, "V8"))}, {}, "of shape (2,), not integers"),
        ({"objects.crc.npy": npy(column([[0, 0]]))}, {}, "holds int64 of shape (1, 2)"),
        ({"objects.crc.npy": npy(np.array([{}, 0]), allow_pickle=True)}, {}, "holds object"),
        ({"objects.crc.npy": npy(column([0, 0]))[:-1]}, {}, "does not hold 2 numbers"),
        ({"objects.crc.npy": npy(column([0, 0])) + b"0"}, {}, "does not hold 2 numbers"),
        ({"objects.crc.npy": npy(column([0, 0])) + bytes(999)}, {}, "more than it needs"),
        ({"objects.crc.npy": b"PK"}, {}, "not a column"),
        ({"objects.crc.npy": b""}, {}, "not a column"),
        ({"objects.crc.npy": b"\x93NUMPY\x01\x00\x20\x00" + b"(" * 32}, {}, "not a column"),
        ({"objects.crc.npy": b"\x93NUMPY\x02\x00\x02\x00\x00\x00{}"}, {}, "unknown version"),
        ({"chunks.gap.npy": HUGE}, {}, "does not hold 6 numbers"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_forged_manifest_raises_a_format_error(changes, head, message):
    with pytest.raises(FormatError) as caught:
        plain(read(forged(changes, head)))
    assert message in str(caught.value)


def wrapping():
    """Return an index whose counts of checksums overflow 64 bits, so that their sum is one.

    Its two large tensors have chunks of 2**61 bytes, and together 2**64 blocks. Between them is a
    small tensor, whose only checksum would be read at a negative offset.
    """
    elements = 2**58
    chunks = 2**64 // (elements * 8 // BLOCK)
    sizes = np.full((chunks + 1, 1), elements)
    sizes[chunks // 2 + 1] = 1
    nbytes = sizes[:, 0] * 8
    rows = np.zeros(chunks + 1, np.int64)
    tensor = rows.copy()
    tensor[chunks // 2 + 1 :] = 1
    tensor[chunks // 2 + 2 :] = 2
    return Index(
        ("f.distcp",),
        Tensors(
            ("a", "small", "b"),
            np.full(3, DType.named("float64").code, np.uint8),
            np.ones(3, np.uint8),
            column([[elements], [1], [elements]]),
        ),
        Chunks(
            tensor,
            rows[:, None],
            sizes,
            rows.astype(np.int32),
            rows,
            nbytes,
            rows,
            rows.astype(np.int16),
            np.concatenate([rows[:1], np.cumsum(-(-nbytes // BLOCK))]),
            np.array([123], np.uint32),
        ),
        Objects(
            (),
            rows[:0].astype(np.int32),
            rows[:0],
            rows[:0],
            rows[:0].astype(np.int16),
            rows[:0],
            {},
        ),
    )


def test_counts_whose_sum_overflows_are_refused():
    index = wrapping()
    assert index.chunks.block[-1] == 1
    assert index.chunks.block[index.chunks.tensor.searchsorted(1)] < 0
    data = write_manifest(index, {})
    assert len(data) < 1 << 20
    with pytest.raises(
        FormatError, match=r"chunks\.blocks\.npy: does not fit the payloads or the dig"
    ):
        read(data)


def test_an_error_of_a_value_names_its_object():
    data = forged({"values.npy": npy(np.frombuffer(b'0.5{"tuple":[1}}', np.uint8))})
    values = read(data).objects.values
    assert values["lr"] == 0.5
    with pytest.raises(FormatError, match=r"m, the value of 'step': not valid JSON"):
        values["step"]


def test_columns_in_fortran_order_are_refused():
    shape = np.asfortranarray(column([[8, 4]] * 3))
    with pytest.raises(FormatError, match=r"tensors\.shape\.npy: holds int64 of shape \(3, 2\)"):
        read(forged({"tensors.shape.npy": npy(shape)}))


def test_deep_structures_take_no_memory():
    count = 20_000
    structure = {"containers": count + 1, "leaves": 0, "empties": 0}
    none = npy(np.zeros(0, np.int64))
    changes = {
        "containers.kind.npy": npy(np.zeros(count + 1, np.int64)),
        "containers.parent.npy": npy(np.arange(count)),
        "containers.key.npy": npy(np.zeros(count, np.int64)),
        **{f"{name}.npy": none for name in ("leaves.parent", "leaves.key", "leaves.name")},
        **{f"{name}.npy": none for name in ("empties.container", "empties.before")},
    }
    with pytest.raises(FormatError, match=r"containers\.parent\.npy: nests too deeply"):
        read(forged(changes, {"structure": structure}))


def test_a_decompression_bomb_is_refused():
    bomb = forged({"objects.crc.npy": npy(np.zeros(200_000_000, np.uint8))})
    assert len(bomb) < 300_000
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"unpacks to \d+ bytes, which is too much"):
            read(bomb)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_member_with_a_false_size_is_refused():
    data = bytearray(write_manifest(sample(), {}))
    entry = data.rfind(b"keys.json") - 46
    data[entry + 24 : entry + 28] = (100).to_bytes(4, "little")
    with pytest.raises(Damaged, match=r"^m: member keys\.json is cut"):
        read(bytes(data))


def test_damage_and_forgery_raise_different_errors():
    data = bytearray(write_manifest(sample(), {}))
    start = data.find(b"chunks.digests.npy") + 18 + 128
    data[start] ^= 1
    read(bytes(data), read_outline)
    with pytest.raises(Damaged, match=r"^m: member chunks\.digests\.npy does not match its CRC-32"):
        read(bytes(data))


def test_an_error_of_the_store_is_raised_unchanged():
    data = write_manifest(sample(), {})

    def read_at(offset, length):
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        read_outline(read_at, len(data), file="m")


@pytest.mark.parametrize("data", [b"", b"PK", b"PK\x05\x06" + bytes(18), bytes(100)])
def test_a_file_that_is_not_an_archive_is_refused(data):
    with pytest.raises(FormatError, match=r"^m"):
        read(data)


def test_many_tensors_are_quick():
    index = sample(20_000)
    start = time.process_time()
    data = write_manifest(index, {})
    written = time.process_time()
    outline = read(data, read_outline)
    done = time.process_time()
    assert len(outline.tensors.names) == 20_000
    # A fifth of the promise for 100,000, with a margin for a slow machine.
    assert written - start < 1.2
    assert done - written < 0.6
