"""Description of tensors on one rank."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from shardkeep.errors import Conflict
from shardkeep.state.flatten import flatten
from shardkeep.torch_state.describe import describe_tensors
from shardkeep.torch_state.pieces import describe_tensor, is_any_tensor, is_sharded, is_tensor
from shardkeep.torch_state.shards import Shards
from shardkeep.types import DTYPES, Box, DType


def one(value: Any) -> Any:
    (described,) = describe_tensor("x", value)
    return described


def quantized() -> Any:
    return torch.quantize_per_tensor(torch.ones(3), 0.5, 1, torch.quint8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(12).view(3, 4),
        lambda: torch.nn.Parameter(torch.rand(3, 4)),
        lambda: torch.rand(3, 4, requires_grad=True) * 2,
        lambda: torch.rand(4, 3).t(),
        lambda: torch.rand(6, 8)[::2, 1:5],
        lambda: torch.rand(4).expand(3, 4),
        lambda: torch.tensor(1.5),
        lambda: torch.zeros(0, 3),
        lambda: torch.rand(2, dtype=torch.complex64).conj(),
    ],
)
def test_a_plain_tensor_is_one_piece_on_its_memory(make: Any) -> None:
    value = make()
    described = one(value)
    (piece,) = described.pieces
    assert is_tensor(value)
    assert described.name == "x"
    assert described.shape == tuple(value.shape)
    assert described.dtype == DType.named(str(value.dtype))
    assert piece.box == Box.whole(tuple(value.shape))
    assert not piece.local.requires_grad
    assert type(piece.local) is torch.Tensor
    assert piece.local.data_ptr() == value.data_ptr()
    assert piece.local.stride() == value.stride()
    assert torch.equal(piece.local, value.detach())


def test_buffers_inference_tensors_and_simple_subclasses() -> None:
    class Named(torch.Tensor):
        pass

    with torch.inference_mode():
        inference = torch.ones(2)
    values = [inference, torch.ones(2).as_subclass(Named)]
    if hasattr(torch.nn, "Buffer"):  # 2.5 and later
        values.append(torch.nn.Buffer(torch.ones(2)))
    for value in values:
        (piece,) = one(value).pieces
        assert type(piece.local) is torch.Tensor
        assert piece.local.data_ptr() == value.data_ptr()


def test_every_dtype_of_torch_is_known() -> None:
    missing = [
        name
        for name in dir(torch)
        if isinstance(getattr(torch, name), torch.dtype)
        and str(getattr(torch, name)).removeprefix("torch.") not in {d.name for d in DTYPES}
    ]
    assert missing == []


def test_a_flattening_subclass_is_described_by_its_inner_tensors() -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    a, b, c = torch.rand(2), torch.rand(2), torch.rand(2)
    nested = two_tensor(two_tensor(a, b), c)
    assert is_tensor(nested)
    found = describe_tensor("w", nested)
    assert [d.name for d in found] == ["w.a.a", "w.a.b", "w.b"]
    assert [d.pieces[0].local.data_ptr() for d in found] == [t.data_ptr() for t in (a, b, c)]
    with pytest.raises(Conflict, match=r"'w\.b'.*rename the other"):
        describe_tensors(flatten({"w": nested, "w.b": c}, is_any_tensor))
    with pytest.raises(Conflict, match=r"'w\.a\.a'"):
        describe_tensors(flatten({"w": nested, "w.a.a": "an object"}, is_any_tensor))
    rows, objects, inner = describe_tensors(flatten({"v": c, "u": 1, "w.b": c}, is_any_tensor))
    assert (rows.names, objects, inner) == (["v", "w.b"], {"u": 1}, False)


def test_objects_are_not_tensors() -> None:
    sparse = torch.eye(3).to_sparse()
    for value in (sparse, sparse.to_sparse_csr(), quantized()):
        assert is_any_tensor(value)
        assert not is_tensor(value)
        with pytest.raises(Conflict, match=r"'x' is .*: it is saved as an object"):
            describe_tensor("x", value)
    for other in ((torch.ones(1),), [torch.ones(1)], 1.0, None, torch.Size([1]), torch.float32):
        assert not is_any_tensor(other)
        assert not is_tensor(other)


def meta() -> Any:
    return torch.empty(3, device="meta")


def fake() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(3)


def jagged() -> Any:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def strided_nested() -> Any:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def lazy() -> Any:
    return torch.nn.LazyLinear(3).weight


def wrapper() -> Any:
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            raise NotImplementedError

    return torch.Tensor._make_wrapper_subclass(Wrapper, (3,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (meta, "'layer.w' is on the meta device or fake"),
        (fake, "'layer.w' is on the meta device or fake"),
        (jagged, "'layer.w' is nested"),
        (strided_nested, "'layer.w' is nested"),
        (lazy, "'layer.w' is not initialized yet"),
        (wrapper, "'layer.w' is a .*Wrapper, whose memory cannot be accessed"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Lazy modules")
def test_tensors_without_plain_memory_are_refused_by_name(make: Any, message: str) -> None:
    value = make()
    assert is_any_tensor(value)
    assert is_tensor(value)
    with pytest.raises(Conflict, match=message):
        describe_tensor("layer.w", value)


def test_shards_by_hand() -> None:
    top, rest = torch.rand(2, 4), torch.rand(3, 2)
    value = Shards((5, 4), [((0, 0), top), (Box((2, 2), (3, 2)), rest)])
    assert is_tensor(value)
    assert is_any_tensor(value)
    assert is_sharded(value)
    described = one(value)
    assert (described.dtype.name, described.shape) == ("float32", (5, 4))
    assert [p.box for p in described.pieces] == [Box((0, 0), (2, 4)), Box((2, 2), (3, 2))]
    assert [p.local.data_ptr() for p in described.pieces] == [top.data_ptr(), rest.data_ptr()]
    nothing = one(Shards([5, 4], [], dtype=torch.bfloat16))
    assert (nothing.dtype.name, nothing.shape, nothing.pieces) == ("bfloat16", (5, 4), ())
    assert one(Shards((5, 4), [((5, 0), torch.rand(0, 4))])).pieces == ()


@pytest.mark.parametrize(
    ("parts", "dtype", "message"),
    [
        ([], None, "without a part need a dtype"),
        (
            [((4, 0), (2, 4))],
            None,
            r"\(2, 4\) at \[4:6, 0:4\] is not inside the global shape \(5, 4\)",
        ),
        ([((-1, 0), (2, 4))], None, "is not inside the global"),
        ([((0,), (2, 4))], None, "2 dimensions"),
        ([(Box((0, 0), (2, 3)), (2, 4))], None, "is not inside the global"),
        (
            [((0, 0), (2, 4))],
            "int64",
            r"has the dtype torch\.float32, but the Shards have torch\.int64",
        ),
    ],
)
def test_shards_that_do_not_fit_are_refused(parts: Any, dtype: Any, message: str) -> None:
    made = [(place, torch.zeros(shape)) for place, shape in parts]
    with pytest.raises(Conflict, match=message):
        Shards((5, 4), made, dtype=getattr(torch, dtype) if dtype else None)
