"""Objects as torch writes them: exact in both directions, and no class built without trust."""

from __future__ import annotations

import datetime
import enum
import io
import pickle
import sys
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from shardkeep.errors import Conflict, FormatError, Mismatch, Untrusted
from shardkeep.format import values
from shardkeep.torch_state.objects import TORCH_MAKERS, from_bytes, to_bytes
from shardkeep.torch_state.shards import Shards
from shardkeep.types import DTYPES

HERE = "objects_of_a_user"


class Color(enum.Enum):
    RED = 1


class Options(dict):  # type: ignore[type-arg]
    pass


class Items(list):  # type: ignore[type-arg]
    pass


class Slotted:
    __slots__ = ("a",)


class Custom:
    def __setstate__(self, state: Any) -> None:
        self.seen = state

    def __getstate__(self) -> Any:
        return ("state", 1)


@dataclass
class Config:
    rate: float
    inner: Any = field(default_factory=list)


@dataclass(frozen=True)
class Point:
    x: int


Pair = namedtuple("Pair", "left right")
OF_A_USER = (Color, Options, Items, Slotted, Custom, Config, Point, Pair)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the classes into a module: pickle looks for them there, and cannot find this file."""
    module = type(sys)(HERE)
    for one in OF_A_USER:
        monkeypatch.setattr(one, "__module__", HERE)
        setattr(module, one.__name__, one)
    monkeypatch.setitem(sys.modules, HERE, module)


def back(value: Any, trust: tuple[str, ...] = ()) -> Any:
    return from_bytes(to_bytes(value, name="x"), name="x", trust=trust)


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal, with types, dtypes and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.layout is not torch.strided or a.is_quantized:
            return repr(a) == repr(b) and a.shape == b.shape
        bits = [t.detach().resolve_conj().contiguous().view(torch.uint8) for t in (a, b) if t.ndim]
        return (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad) and (
            torch.equal(*bits) if bits else a.item() == b.item()
        )
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


VALUES = {
    "none": None, "bool": True, "int": 3, "large int": 2**70, "float": 1.5, "complex": 1 + 2j,
    "text": "é", "bytes": b"\x00\xff", "empty tuple": (), "nested tuple": (1, (2,)),
    "set": {1, 2}, "frozenset": frozenset("ab"),
    "OrderedDict": OrderedDict(a=1), "defaultdict": defaultdict(list, {1: [2]}),
    "slice": slice(1, None), "range": range(3),
    "datetime": datetime.datetime(2026, 1, 2), "path": PurePosixPath("a/b"),
    "size": torch.Size([1, 2]), "float32": torch.float32, "bfloat16": torch.bfloat16,
    "cuda device": torch.device("cuda:1"), "cpu device": torch.device("cpu"),
    "layout": torch.strided, "dtype as key": {torch.float32: torch.Size([])},
    "random states": (torch.get_rng_state(), np.random.get_state()),
    "array": np.arange(6, dtype="i2").reshape(2, 3), "numpy scalar": np.float32(2),
    "array of text": np.array(["a", "bc"]),
    "tensor in a tuple": (torch.ones(2), "a"), "transposed": torch.arange(6.0).view(2, 3).t(),
    "empty tensor": torch.zeros(0, 3), "scalar tensor": torch.tensor(3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
    "sparse": torch.eye(3).to_sparse(), "coalesced": torch.eye(3).to_sparse().coalesce(),
    "sparse csr": torch.eye(3).to_sparse_csr(),
    "quantized": torch.quantize_per_tensor(torch.ones(3), 0.5, 1, torch.quint8),
    "quantized per channel": torch.quantize_per_channel(
        torch.ones(2, 3), torch.tensor([0.5, 0.25]), torch.tensor([1, 2]), 0, torch.qint8
    ),
}  # fmt: skip


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_values_come_back_exactly_here_and_in_stock_torch(value: Any) -> None:
    data = to_bytes(value, name="x")
    assert same(from_bytes(data, name="x"), value)
    assert same(torch.load(io.BytesIO(data), weights_only=False), value)


@pytest.mark.parametrize("name", [d.name for d in DTYPES if hasattr(torch, d.name)])
def test_every_dtype_comes_back(name: str) -> None:
    dtype = getattr(torch, name)
    assert back(dtype) is dtype
    if name.startswith(("q", "uint")) and name not in ("uint8", "uint16", "uint32", "uint64"):
        return  # quantized ones need a scale; torch can't save the others
    if name.startswith(("int", "bits")) and name not in ("int8", "int16", "int32", "int64"):
        return
    tensor = torch.zeros(6 * dtype.itemsize, dtype=torch.uint8).random_(0, 2).view(dtype)
    try:
        torch.save(tensor, io.BytesIO())
    except KeyError:
        pytest.skip("this torch can't save it")
    assert same(back((tensor,)), (tensor,))


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text()
        | st.binary()
        | st.floats(allow_nan=False),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.text() | st.integers(-5, 5), inner, max_size=3)
        ),
        max_leaves=10,
    )
)
@settings(max_examples=40)
def test_plain_values_come_back(value: Any) -> None:
    assert same(back(value), value)


def test_tensors_are_detached_and_saved_without_the_rest_of_their_storage() -> None:
    large = torch.zeros(1_000_000)
    graph = torch.ones(2, requires_grad=True) * 2
    data = to_bytes((large[5:7], graph), name="x")
    assert len(data) < 4000
    first, second = from_bytes(data, name="x")
    assert not second.requires_grad
    assert torch.equal(second, torch.tensor([2.0, 2.0]))
    first[0] = 1  # memory of its own
    assert large.sum() == 0


def test_a_tensor_that_occurs_twice_stays_one_object() -> None:
    tensor = torch.ones(3)
    first, second = back((tensor, tensor))
    assert first is second


@pytest.mark.parametrize(
    "value",
    [
        Color.RED, Options(a=1), Items([1, 2]), Config(0.1, [Config(0.2)]), Point(3), Pair(1, (2,)),
        [Config, {"kind": Color}], (Config(1.0, torch.ones(2)),), Config(1, Point), Point(Point(2)),
    ],
    ids=[
        "enum", "dict", "list", "dataclass", "frozen dataclass", "namedtuple", "classes",
        "dataclass with a tensor", "dataclass with a class", "nested frozen dataclass",
    ],
)  # fmt: skip
def test_classes_are_built_only_if_they_are_trusted(value: Any) -> None:
    data = to_bytes(value, name="cfg")
    with pytest.raises(Untrusted) as caught:
        from_bytes(data, name="cfg")
    assert caught.value.name == "cfg"
    needed = caught.value.classes
    assert all(name.startswith(f"{HERE}.") for name in needed)
    for trust in (needed, [f"{HERE}.*"]):
        made = from_bytes(data, name="cfg", trust=trust)
        assert repr(made) == repr(value)
        assert type(made) is type(value)
    with pytest.raises(Untrusted):
        from_bytes(data, name="cfg", trust=["objects_of.*", "objects_of_a_user.Other"])


def test_state_is_set_as_pickle_does_it() -> None:
    slotted = Slotted()
    slotted.a = 1
    trust = (f"{HERE}.*",)
    assert back(slotted, trust).a == 1
    assert back(Custom(), trust).seen == ("state", 1)


def test_untrusted_names_only_the_classes_that_are_not_trusted() -> None:
    data = to_bytes([Config(1.0, Color.RED), Point(1)], name="cfg")
    with pytest.raises(Untrusted) as caught:
        from_bytes(data, name="cfg", trust=[f"{HERE}.Color"])
    assert caught.value.classes == (f"{HERE}.Config", f"{HERE}.Point")
    with pytest.raises(TypeError, match="trust must be a list of names"):
        from_bytes(data, name="cfg", trust=f"{HERE}.Color")


class Evil:
    def __reduce__(self) -> Any:
        return eval, ("1/0",)


def test_nothing_runs_unless_it_is_trusted() -> None:
    data = to_bytes([Evil()], name="x")
    with pytest.raises(Untrusted, match=r"builtins\.eval"):
        from_bytes(data, name="x", trust=["builtins.exec", "os.*"])
    with pytest.raises(Mismatch, match=r"'x' needs builtins\.eval: ZeroDivisionError"):
        from_bytes(data, name="x", trust=["builtins.eval"])


def test_a_trusted_class_that_no_longer_exists_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = to_bytes(Config(1.0), name="cfg")
    monkeypatch.delattr(sys.modules[HERE], "Config")
    with pytest.raises(Mismatch, match=rf"'cfg' needs {HERE}\.Config: AttributeError"):
        from_bytes(data, name="cfg", trust=[f"{HERE}.Config"])
    monkeypatch.delitem(sys.modules, HERE)
    with pytest.raises(Mismatch, match=rf"'cfg' needs {HERE}\.Config: ModuleNotFoundError"):
        from_bytes(data, name="cfg", trust=[f"{HERE}.Config"])


def deep() -> Any:
    value: Any = ()
    for _ in range(10_000):
        value = (value,)
    return value


def cyclic() -> Any:
    value: list[Any] = []
    value.append((value,))
    return value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lambda: 1, r"object 'cfg' cannot be pickled: \w+: Can't"),
        (lambda: (i for i in ()), "object 'cfg' cannot be pickled: TypeError: cannot pickle"),
        (deep, "object 'cfg' cannot be saved: containers nest more than 100 levels deep"),
        (cyclic, "object 'cfg' cannot be saved: a list contains itself"),
        (lambda: (torch.empty(2, device="meta"),), "'cfg' cannot be pickled: .* meta device"),
        (lambda: (Shards((2,), [((0,), torch.ones(1))]),), "'cfg' holds a Shards.*use a list"),
    ],
)
def test_objects_that_cannot_be_saved_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(Conflict, match=message):
        to_bytes(make(), name="cfg")


def dtensors(rank: int, size: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.tensor import Shard, distribute_tensor
    except ImportError:  # 2.4
        from torch.distributed._tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,))
    made = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    messages = []
    for value in ((made,), {"a": {made}}, torch.nn.Parameter(made)):
        try:
            to_bytes(value, name="cfg")
        except Conflict as error:
            messages.append(str(error))
    return messages


def test_a_distributed_tensor_inside_an_object_is_refused(gloo: Any) -> None:
    for messages in gloo.run(dtensors, size=2):
        assert len(messages) == 3
        assert all("'cfg' holds a DTensor" in m and "use a list" in m for m in messages)


def container(pickled: bytes, *records: bytes) -> bytes:
    """Return a container around a pickle."""
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("archive/data.pkl", pickled)
        for number, record in enumerate(records):
            made.writestr(f"archive/data/{number}", record)
        made.writestr("archive/version", "3\n")
    return out.getvalue()


class Call:
    """Pickles as a call of a function with any arguments."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


HOSTILE = {
    "device": Call(torch.device, "nonsense"),
    "devices": Call(torch.device, ["cpu"]),
    "sparse out of range": Call(
        torch._utils._rebuild_sparse_tensor,
        torch.sparse_coo,
        (torch.tensor([[5]]), torch.ones(1), torch.Size([2]), True),
    ),
    "compressed out of range": Call(
        torch._utils._rebuild_sparse_tensor,
        torch.sparse_csr,
        (torch.tensor([0, 1]), torch.tensor([9]), torch.ones(1), torch.Size([1, 2])),
    ),
    "sparse of nothing": Call(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, (1, 2, 3)),
    "layout": Call(torch.serialization._get_layout, "torch.nothing"),
    "size": Call(torch.Size, ["x"]),
    "size of text": Call(torch.Size, "ab"),
    "parameter": Call(torch._utils._rebuild_parameter, "no tensor", True, {}),
    "float parameter": Call(torch._utils._rebuild_parameter, 1.5, True, {}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_arguments_are_refused(kind: str) -> None:
    data = to_bytes([HOSTILE[kind]], name="x")
    with pytest.raises((FormatError, Untrusted)) as caught:
        from_bytes(data, name="x")
    assert "object 'x'" in str(caught.value)


def test_a_broken_container_names_the_object() -> None:
    good = to_bytes([torch.ones(3)], name="x")
    for bad in (b"", b"PK", good[: len(good) // 2], container(pickle.dumps([1])[:-3])):
        with pytest.raises(FormatError, match="object 'x'"):
            from_bytes(bad, name="x")


def test_typed_values_of_torch_are_decoded() -> None:
    for value in (torch.Size([2, 3]), torch.bfloat16, torch.device("cuda:1"), torch.device("cpu")):
        made = values.decode(values.encode(value), {**values.CORE_MAKERS, **TORCH_MAKERS})
        assert made == value
        assert type(made) is type(value)
    with pytest.raises(FormatError):
        values.decode({"torch.dtype": "float33"}, {**values.CORE_MAKERS, **TORCH_MAKERS})
    with pytest.raises(FormatError):
        values.decode({"torch.dtype": "Tensor"}, {**values.CORE_MAKERS, **TORCH_MAKERS})
