"""Items are read: zips of stock torch, zips made by hand, and invalid zips."""

from __future__ import annotations

import io
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardkeep.errors import Damaged, FormatError
from shardkeep.format.pickle.reader import opaque_classes
from shardkeep.format.torch_zip import container
from shardkeep.types import DType, Opaque

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from attacks import pickles as p

WHERE = {"file": "__0_0.distcp", "place": "w"}


def reader(data: bytes) -> Callable[[int, int], bytes]:
    def read_at(offset: int, length: int) -> bytes:
        assert offset >= 0 and length >= 0 and offset + length <= len(data)
        return data[offset : offset + length]

    return read_at


def stored(data: bytes) -> container.StoredTensor:
    return container.tensor(reader(data), len(data), **WHERE)


def as_array(data: bytes) -> np.ndarray[Any, Any]:
    tensor = stored(data)
    start = tensor.record.offset
    return container.array(tensor, memoryview(data)[start : start + tensor.record.nbytes])


def test_items_made_by_hand() -> None:
    item = p.container(p.tensor_pickle())
    tensor = stored(item)
    assert (tensor.dtype, tensor.shape, tensor.strides) == (DType.named("float32"), (2, 3), (3, 1))
    assert item[tensor.start : tensor.start + 24] == p.PAYLOAD
    assert tensor.record.name == "archive/data/0" and tensor.record.nbytes == 24
    assert as_array(item).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_strides_and_offsets() -> None:
    for shape, strides, offset, expected in (
        ((3, 2), (1, 3), 0, [[0, 3], [1, 4], [2, 5]]),
        ((2, 2), (2, 0), 1, [[1, 1], [3, 3]]),
        ((), (), 5, 5),
        ((2,), (2,), 3, [3, 5]),
    ):
        item = p.container(p.tensor_pickle(shape, strides, offset=offset))
        assert as_array(item).tolist() == expected
    for shape, strides, offset in (((3, 2), (2, 2), 0), ((2,), (1,), 5), ((1,), (1,), 6)):
        with pytest.raises(FormatError, match="reaches beyond its storage of 24 bytes"):
            stored(p.container(p.tensor_pickle(shape, strides, offset=offset)))


def test_records_agree_with_another_reader() -> None:
    item = p.container(p.tensor_pickle(), more=(("archive/é", b"x" * 5000),))
    with zipfile.ZipFile(io.BytesIO(item)) as other:
        expected = {info.filename: (info.file_size, info.CRC) for info in other.infolist()}
        found = container.records(reader(item), len(item), **WHERE)
        assert {r.name: (r.nbytes, r.crc32) for r in found} == expected
        for record in found:
            data = item[record.offset : record.offset + record.nbytes]
            assert data == other.read(record.name)


def test_bytes_after_the_item_and_sizes_after_the_payload() -> None:
    class Forward(io.BytesIO):
        def seekable(self) -> bool:
            return False

    out = Forward()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("x/data.pkl", p.tensor_pickle())
        archive.writestr("x/data/0", p.PAYLOAD)
    assert as_array(out.getvalue() + b"tail").shape == (2, 3)


def test_zip64() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in (("x/data.pkl", p.tensor_pickle()), ("x/data/0", p.PAYLOAD)):
            with archive.open(name, "w", force_zip64=True) as record:
                record.write(data)
        for number in range(70_000):  # more than the plain end record can count
            archive.writestr(f"x/extra/{number}", b"")
    assert as_array(out.getvalue()).shape == (2, 3)


@pytest.mark.parametrize(
    ("item", "what"),
    [
        (b"", "not a zip"),
        (p.container(p.tensor_pickle())[:-1], "not a zip: it has no end record"),
        (p.container(p.tensor_pickle(), compress=True), "is compressed"),
        (p.container(b"\x80\x02N."), "no plain tensor, but a NoneType"),
        (p.container(b"\x80\x02cos\nsystem\n."), "no plain tensor, but a os.system"),
        (p.container(p.tensor_pickle(kind="load")), "unknown class 'torch.load'"),
    ],
)
def test_errors_name_the_item_and_the_place(item: bytes, what: str) -> None:
    with pytest.raises(FormatError) as info:
        stored(item)
    assert what in str(info.value)
    assert str(info.value).startswith("__0_0.distcp, w")


def mutated(data: bytes, source: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(source.randint(1, 3)):
        broken[source.randrange(len(broken))] = source.randrange(256)
    return bytes(broken)


def test_mutations_give_a_tensor_or_an_error() -> None:
    source = random.Random(11)
    pickle = p.tensor_pickle()
    item = p.container(pickle)
    errors = {FormatError: 0, Damaged: 0}
    for number in range(4000):
        # A wrong CRC-32 is refused early, so every second pickle gets a correct one.
        broken = p.container(mutated(pickle, source)) if number % 2 else mutated(item, source)
        try:
            as_array(broken)
        except (FormatError, Damaged) as error:
            errors[type(error)] += 1
    assert errors[FormatError] > 1000
    assert errors[Damaged] > 100
    assert sum(errors.values()) < 4000


@pytest.mark.torch
class TestTorch:
    """Items that stock torch writes."""

    @staticmethod
    def save(value: Any) -> bytes:
        torch = pytest.importorskip("torch")
        out = io.BytesIO()
        torch.save(value, out)
        return out.getvalue()

    def test_tensors_of_every_dtype_are_read(self) -> None:
        torch = pytest.importorskip("torch")
        for name in (
            "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 "
            "float64 complex32 complex64 complex128 float8_e4m3fn float8_e5m2 float8_e4m3fnuz "
            "float8_e5m2fnuz"
        ).split():
            dtype = getattr(torch, name)
            count = 6 * dtype.itemsize
            data = bytes(n % 2 for n in range(count))
            tensor = torch.frombuffer(bytearray(data), dtype=dtype).reshape(2, 3)
            made = as_array(self.save(tensor))
            assert made.dtype == DType.named(name).numpy
            assert made.shape == (2, 3) and made.tobytes() == data

    def test_views_keep_their_stored_strides(self) -> None:
        torch = pytest.importorskip("torch")
        base = torch.arange(24.0).reshape(4, 6)
        for view in (base.T, base[1:, ::2], base[2], base[0, 0], base[:0], base[:1].expand(3, 6)):
            made = as_array(self.save(view))
            assert made.tobytes() == view.contiguous().numpy().tobytes()
            assert made.shape == tuple(view.shape)

    def test_parameters_and_attributes(self) -> None:
        torch = pytest.importorskip("torch")
        parameter = torch.nn.Parameter(torch.ones(2))
        assert stored(self.save(parameter)).requires_grad
        tensor = torch.ones(2)
        tensor.name_of_mine = "x"
        assert stored(self.save(tensor)).note == "saved as a torch.Tensor"

    def test_lazily_conjugated_tensors_are_marked_and_resolved(self) -> None:
        torch = pytest.importorskip("torch")
        tensor = torch.tensor([1 + 2j]).conj()
        assert stored(self.save(tensor)).conj
        assert as_array(self.save(tensor)).tolist() == [1 - 2j]
        assert container.value(self.save([tensor]), **WHERE)[0].tolist() == [1 - 2j]
        negated = torch.tensor([1 + 2j]).conj().imag
        assert container.value(self.save([negated]), **WHERE)[0].tolist() == [-2.0]

    def test_quantized_tensors_keep_their_scale(self) -> None:
        torch = pytest.importorskip("torch")
        tensor = torch.quantize_per_tensor(torch.tensor([0.5, 1.0]), 0.5, 3, torch.qint8)
        made = stored(self.save(tensor))
        assert made.quantizer == ("torch.per_tensor_affine", 0.5, 3)
        assert as_array(self.save(tensor)).tolist() == [4, 5]

    def test_objects(self) -> None:
        torch = pytest.importorskip("torch")
        shared = torch.arange(4)
        value = {
            "t": shared,
            "view": shared[1:3],
            "list": [1, (2.5, "x"), None],
            "sparse": torch.eye(2).to_sparse(),
            "device": torch.device("cuda:1"),
            "dtype": torch.bfloat16,
            "size": torch.Size([1, 2]),
            "generator": np.random.default_rng(1).bit_generator.state,
        }
        made = container.value(self.save(value), **WHERE)
        assert made["t"].tolist() == [0, 1, 2, 3] and made["view"].tolist() == [1, 2]
        assert made["list"] == [1, (2.5, "x"), None]
        assert made["dtype"] == DType.named("bfloat16") and made["size"] == (1, 2)
        assert made["generator"] == value["generator"]
        assert isinstance(made["sparse"], Opaque)
        assert opaque_classes(made)[-1] == "torch.device"

    def test_the_caller_chooses_the_values_of_tensors_inside_objects(self) -> None:
        torch = pytest.importorskip("torch")
        data = self.save([torch.arange(4)[1:]])

        def make(tensor: container.StoredTensor, record: memoryview) -> Any:
            return tensor.shape, tensor.start - tensor.record.offset, len(record)

        assert container.value(data, **WHERE, make_tensor=make) == [((3,), 8, 32)]

    def test_the_format_before_zips_is_read(self) -> None:
        torch = pytest.importorskip("torch")
        out = io.BytesIO()
        torch.save(torch.ones(2), out, _use_new_zipfile_serialization=False)
        with pytest.raises(FormatError, match=r"saved by torch.save of a release before 1\.6"):
            stored(out.getvalue())
