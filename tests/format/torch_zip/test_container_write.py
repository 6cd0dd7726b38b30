"""Every zip reader and every `torch.load` reads a written item: head, payload and tail."""

from __future__ import annotations

import io
import pickletools
import random
import time
import warnings
import zipfile
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.format.torch_zip.container_write import TensorItem
from shardkeep.types import DTYPES, DType

SHAPES = [(), (1,), (7,), (0,), (3, 0, 2), (0, 5), (2, 3, 4, 5, 6), (300, 5)]
POSITIONS = [0, 1, 63, 64, 1000, 2**33 + 5]
CARRIERS = {"uint16": "int16", "uint32": "int32", "uint64": "int64"}
PLAIN = [dtype for dtype in DTYPES if not dtype.name.startswith("q")]
FLOAT = DType.named("float32")

shapes = st.lists(st.integers(0, 6), max_size=5).map(tuple)


def payload_of(item):
    data = random.Random(item.nbytes).randbytes(item.nbytes)
    return bytes(byte & 1 for byte in data) if item.dtype.name == "bool" else data


def stored(item, payload, position=0):
    return item.head(position) + payload + item.tail(position, crc32(payload))


@given(st.sampled_from(PLAIN), shapes, st.integers(0, 2**50), st.sampled_from([1, 2, 3, 64, 4096]))
def test_every_item_is_a_zip_with_an_aligned_payload(dtype, shape, position, alignment):
    item = TensorItem(dtype, shape, alignment)
    payload = payload_of(item)
    data = stored(item, payload, position)
    assert len(data) == item.length(position)
    offset = len(item.head(position))
    assert (position + offset) % alignment == 0
    assert data[offset : offset + item.nbytes] == payload
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [
            "archive/data.pkl",
            "archive/version",
            "archive/byteorder",
            "archive/data/0",
        ]
        assert archive.read("archive/data/0") == payload
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"


def test_sizes_and_crc_after_the_payload_can_be_read_without_the_directory():
    item = TensorItem(FLOAT, (3,))
    payload = payload_of(item)
    behind = stored(item, payload)[len(item.head(0)) + 12 :]
    expected = b"PK\x07\x08" + crc32(payload).to_bytes(4, "little") + (12).to_bytes(4, "little") * 2
    assert behind.startswith(expected)


def test_a_wrong_crc_is_detected():
    item = TensorItem(FLOAT, (3,))
    data = item.head(0) + bytes(12) + item.tail(0, 1)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() == "archive/data/0"


class _Sparse(io.RawIOBase):
    """A file of head, zeros and tail that takes no memory for the zeros."""

    def __init__(self, head, zeros, tail):
        self.head, self.tail_at, self.tail, self.at = head, len(head) + zeros, tail, 0

    def seekable(self):
        return True

    def seek(self, offset, whence=0):
        self.at = offset + (0, self.at, self.tail_at + len(self.tail))[whence]
        return self.at

    def tell(self):
        return self.at

    def read(self, count=-1):
        end = self.tail_at + len(self.tail)
        stop = end if count < 0 else min(self.at + count, end)
        assert stop - self.at < 1 << 20
        data = self.head[self.at : stop]
        data += bytes(max(0, min(stop, self.tail_at) - self.at - len(data)))
        data += self.tail[max(0, self.at + len(data) - self.tail_at) :][
            : stop - self.at - len(data)
        ]
        self.at = stop
        return data


@pytest.mark.parametrize("nbytes", [2**32 - 5000, 2**32 - 500, 2**32 - 2, 2**32 - 1, 2**32, 2**40])
def test_large_payloads(nbytes):
    item = TensorItem(DType.named("uint8"), (nbytes,))
    head, tail = item.head(100), item.tail(100, 0x12345678)
    assert len(head) + nbytes + len(tail) == item.length(100)
    archive = zipfile.ZipFile(_Sparse(head, nbytes, tail))
    info = archive.getinfo("archive/data/0")
    assert (info.file_size, info.compress_size, info.CRC) == (nbytes, nbytes, 0x12345678)
    with archive.open("archive/data/0") as record:
        assert record.read(10) == bytes(10)
    assert archive.read("archive/version") == b"3\n"
    large = nbytes >= 2**32 - 1
    assert (b"\x01\x00\x10\x00" in head[-100:]) == large  # the zip64 field, where it is needed
    wide = nbytes.to_bytes(8 if large else 4, "little")
    assert tail.startswith(b"PK\x07\x08\x78\x56\x34\x12" + wide + wide)


@pytest.mark.parametrize("name", ["qint8", "quint8", "qint32", "quint4x2", "quint2x4"])
def test_quantized_tensors_are_refused(name):
    with pytest.raises(ValueError, match=f"a tensor of dtype {name} needs its scale"):
        TensorItem(DType.named(name), (2,))


def test_tensors_that_cannot_be_an_item_are_refused():
    with pytest.raises(ValueError, match=r"negative size in shape \(2, -1\)"):
        TensorItem(FLOAT, (2, -1))
    for alignment in (0, 32769):
        with pytest.raises(ValueError, match=r"is not in 1\.\.32768"):
            TensorItem(FLOAT, (2,), alignment)


def test_many_small_items_are_cheap():
    start = time.process_time()
    position = 0
    for number in range(20_000):
        item = TensorItem(FLOAT, (16, 16))
        item.head(position)
        item.tail(position, number)
        position += item.length(position)
    # The promise is 10 us each. This leaves a margin for a slow machine.
    assert time.process_time() - start < 20_000 * 25e-6


@pytest.mark.parametrize("dtype", PLAIN, ids=str)
@pytest.mark.torch
def test_torch_loads_every_dtype_and_shape(dtype):
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype.name, None)
    if kind is None:
        pytest.skip(f"this torch has no {dtype}")
    warnings.filterwarnings("ignore", message="ComplexHalf")
    for number, shape in enumerate(SHAPES):
        item = TensorItem(dtype, shape)
        payload = payload_of(item)
        for position in POSITIONS:
            data = stored(item, payload, position)
            safe = (number + position) % 2 == 0
            tensor = torch.load(io.BytesIO(data), weights_only=safe)
            assert tensor.dtype == getattr(torch, CARRIERS.get(dtype.name, dtype.name))
            assert tuple(tensor.shape) == shape
            assert tensor.stride() == torch.empty(shape, dtype=kind).stride()
            assert not tensor.requires_grad
            assert bytes(tensor.untyped_storage()) == payload


@pytest.mark.parametrize("dtype", PLAIN, ids=str)
@pytest.mark.torch
def test_torch_rebuilds_from_the_same_opcodes(dtype):
    """The pickle of an item differs from that of `torch.save` only in its memo."""
    torch = pytest.importorskip("torch")
    warnings.filterwarnings("ignore", message="ComplexHalf")
    for shape in SHAPES:
        out = io.BytesIO()
        try:
            kind = getattr(torch, CARRIERS.get(dtype.name, dtype.name))
            torch.save(torch.empty(shape, dtype=kind), out)
        except (KeyError, AttributeError, RuntimeError):
            pytest.skip(f"this torch cannot save {dtype}")
        with zipfile.ZipFile(out) as archive:
            theirs = _opcodes(archive.read("archive/data.pkl"))
        item = TensorItem(dtype, shape)
        with zipfile.ZipFile(io.BytesIO(stored(item, payload_of(item)))) as archive:
            assert _opcodes(archive.read("archive/data.pkl")) == theirs


def _opcodes(pickle):
    """Return the opcodes and arguments of a pickle without its memo."""
    memo, found, last = {}, [], None
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = last
            continue
        last = memo[argument] if opcode.name == "BINGET" else (opcode.name, argument)
        found.append(last)
    return found
