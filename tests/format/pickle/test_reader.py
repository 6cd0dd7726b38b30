"""The inert pickle reader equals Python's on harmless pickles, and is bounded on hostile ones."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import io
import pathlib
import pickle
import random
import uuid
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.errors import FormatError
from shardkeep.format.pickle.builders import CORE
from shardkeep.format.pickle.reader import (
    Builder,
    Limits,
    Reference,
    loads,
    loads_prefix,
    opaque_classes,
)
from shardkeep.types import DType, Opaque

PROTOCOLS = range(6)

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(exclude_categories=())),
    st.binary(),
    st.binary().map(bytearray),
    st.datetimes(timezones=st.sampled_from([None, datetime.timezone.utc])),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.decimals(),
    st.fractions(),
    st.uuids(),
    st.slices(20),
    st.ranges() if hasattr(st, "ranges") else st.builds(range, st.integers(-9, 9)),
)
keys = st.one_of(
    st.text(), st.integers(), st.binary(), st.none(), st.dates(), st.decimals("0", "9")
)
keys |= st.tuples(keys, keys)
values = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(keys, inner),
        st.dictionaries(keys, inner).map(collections.OrderedDict),
        st.lists(inner).map(collections.deque),
        st.sets(keys),
        st.frozensets(keys),
        st.dictionaries(keys, inner).map(lambda d: collections.defaultdict(list, d)),
        st.lists(inner, min_size=1).map(lambda items: [items[0], *items, items]),
    ),
    max_leaves=30,
)


@settings(max_examples=300)
@given(values, st.sampled_from(PROTOCOLS))
def test_values_equal_those_of_pythons_unpickler(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    # The representation also distinguishes types, order, and the signs of zeros and NaNs.
    assert repr(loads(data, CORE)) == repr(pickle.loads(data))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_values_that_hypothesis_rarely_generates(protocol: int) -> None:
    for value in (
        list(range(3000)),
        {n: str(n) for n in range(3000)},
        "é" * 70_000,
        bytes(70_000),
        collections.Counter("abracadabra"),
        collections.deque([1, 2], maxlen=2),
        {(1, (2, ("x",))): 1, frozenset({1, 2}): 2, 1.5: 3},
        Ellipsis,
        -(2**70),
    ):
        made = loads(pickle.dumps(value, protocol), CORE)
        assert made == value and type(made) is type(value)
    shared = [1]
    first, second = loads(pickle.dumps([shared, shared], protocol), CORE)
    assert first is second


def test_paths_become_pure_ones() -> None:
    made = loads(pickle.dumps(pathlib.Path("run/step_1")), CORE)
    assert made == pathlib.PurePosixPath("run/step_1")
    renamed = pickle.dumps(pathlib.Path("a"), 4).replace(b"\x07pathlib", b"\x0epathlib._local")
    assert loads(renamed[:2] + renamed[11:], CORE) == pathlib.PurePosixPath("a")
    assert type(loads(pickle.dumps(pathlib.PureWindowsPath("c:/x")), CORE)).__name__ == (
        "PureWindowsPath"
    )


ARRAYS = [
    np.arange(6.0).reshape(2, 3),
    np.arange(6, dtype=">f4").reshape(2, 3).T,
    np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1),
    np.array(3),
    np.zeros((0, 3), "i1"),
    np.array(["ab", "c"]),
    np.array([b"ab"]),
    np.array([1, 2], "M8[25s]"),
    np.array([(1, 2)], [("a", "<f4"), ("b", ">i2")]),
    np.arange(3).astype(ml_dtypes.bfloat16),
    np.arange(3).astype(ml_dtypes.float8_e4m3fn),
    np.array([True]),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: str(array.dtype))
def test_arrays(array: np.ndarray[Any, Any], protocol: int) -> None:
    data = pickle.dumps(array, protocol)
    made, real = loads(data, CORE), pickle.loads(data)
    assert (made.dtype, made.shape, made.tobytes()) == (real.dtype, real.shape, real.tobytes())
    assert loads(pickle.dumps(array.dtype, protocol), CORE) == array.dtype
    if array.size:
        scalar = array.ravel()[0]
        made = loads(pickle.dumps(scalar, protocol), CORE)
        assert made == scalar and type(made) is type(scalar)


def test_dtypes_of_numpy_itself_stay_as_they_are() -> None:
    loads(pickle.dumps(np.dtype(">f4")), CORE)
    assert np.dtype("f4").byteorder == "="


class Settings:
    """A class that the reader must not import."""

    def __init__(self) -> None:
        self.rate = 0.1


class Names(list):  # type: ignore[type-arg]
    """A user's own list."""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_unknown_classes_become_stand_ins(protocol: int) -> None:
    value = [Settings(), Settings, Names("ab"), len, uuid.UUID(int=1)]
    one, kind, names, function, known = loads(pickle.dumps(value, protocol), CORE)
    assert (one.qualname, one.state) == ("Settings", {"rate": 0.1})
    assert type(kind) is Reference and kind.qualname == "Settings"
    assert names.args == (["a", "b"],)
    assert function.name == "builtins.len"
    assert known == uuid.UUID(int=1)
    assert opaque_classes([one, {1: (function,)}]) == (one.name, "builtins.len")


def test_a_cycle_through_a_stand_in_is_read() -> None:
    parent = Settings()
    parent.rate = parent  # type: ignore[assignment]
    made = loads(pickle.dumps(parent), CORE)
    assert made.state["rate"] is made
    assert opaque_classes(made) == (made.name,)


def test_stand_ins_as_keys() -> None:
    made = loads(pickle.dumps({decimal.ROUND_UP: 1, datetime.date: 2}), CORE)
    assert list(made.values()) == [1, 2]
    with pytest.raises(FormatError, match="a Opaque cannot be used as a key"):
        loads(pickle.dumps({Settings(): 1}), CORE)


def test_classes_of_torch_are_read_without_torch() -> None:
    dtype = b"\x80\x02ctorch\nbfloat16\n."
    assert loads(dtype, CORE) == DType.named("bfloat16")
    assert loads(b"\x80\x02ctorch\nSize\nK\x02K\x03\x86\x85R.", CORE) == (2, 3)
    device = loads(b"\x80\x02ctorch\ndevice\nX\x04\x00\x00\x00cuda\x85R.", CORE)
    assert (device.name, device.args) == ("torch.device", ("cuda",))


def test_builders_are_called_in_place_of_classes() -> None:
    class Box:
        def __init__(self, *args: Any) -> None:
            self.args, self.state = args, None

    def fill(box: Box, state: Any) -> None:
        box.state = state

    name = f"{Settings.__module__}.Settings"
    made = loads(pickle.dumps(Settings()), {name: Builder(Box, type=Box, fill=fill)})
    assert (type(made), made.args, made.state) == (Box, (), {"rate": 0.1})


def test_bytes_after_the_pickle() -> None:
    data = pickle.dumps([1])
    assert loads_prefix(data + b"trailer", CORE) == ([1], len(data))


def test_persistent_ids_go_to_their_handler() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", 7) if value is Ellipsis else None

    out = io.BytesIO()
    Pickler(out, 2).dump([...])
    assert loads(out.getvalue(), CORE, persistent=lambda key: key[1]) == [7]
    with pytest.raises(FormatError, match="persistent id, which means nothing here"):
        loads(out.getvalue(), CORE, file="x")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "offset 0: invalid pickle: it is cut short"),
        (b"\x80\x09.", "protocol 9"),
        (b"\xff", "0xff at offset 0 is not an opcode"),
        (b"]]", "cut short"),
        (b"h\x05.", "memo entry 5"),
        (b"}]Ns.", "a list cannot be used as a key"),
        (b"}(K\x01NK\x01Nu.", "one key twice"),
        (b"}K\x01a.", "appended to a dict"),
        (b"K\x01K\x02R.", "arguments in a int"),
        (b"K\x01)R.", "a int is called"),
        (b"]}b.", "a list takes no state"),
        (b"]\x94h\x00a.", "a list contains itself"),
        (b"\x8b\xff\xff\xff\x7f", "an integer of 2147483647 bytes"),
        (b"I" + b"1" * 5000 + b"\n.", "an integer of 5000 digits"),
        (b"cbuiltins\nbytes\nK\x05\x85R.", "bytes is wanted, not a int"),
        (b"c_codecs\nencode\nVx\nVrot13\n\x86R.", "encoding"),
        (b"(cbuiltins\ncomplex\nK\x01K\x02K\x03o.", None),
    ],
)
def test_invalid_pickles_are_refused(data: bytes, what: str | None) -> None:
    if what is None:
        assert isinstance(loads(data, CORE), Opaque)
        return
    with pytest.raises(FormatError) as info:
        loads(data, CORE, file=".metadata")
    assert what in str(info.value)
    assert str(info.value).startswith(".metadata, offset ")


def test_the_caller_sets_the_limits() -> None:
    nested = pickle.dumps([[[1]]])
    assert loads(nested, CORE, limits=Limits(depth=3)) == [[[1]]]
    with pytest.raises(FormatError, match="more than 2 levels deep"):
        loads(nested, CORE, limits=Limits(depth=2))
    with pytest.raises(FormatError, match="too much memory"):
        loads(nested, CORE, limits=Limits(memory=0, growth=1))
    shared = pickle.dumps([[1] * 1000] * 1000)
    with pytest.raises(FormatError, match="most of them shared"):
        loads(shared, CORE, limits=Limits(parts=1000))


def _benign(source: random.Random) -> bytes:
    value = {
        "a": [1, 2.5, "x", b"y", (1, 2), {3, 4}],
        "b": collections.OrderedDict(x=Settings()),
        "c": datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone.utc),
        "d": np.arange(3.0),
        "e": fractions.Fraction(1, 3),
    }
    return pickle.dumps(value, source.choice(PROTOCOLS))


def test_mutations_give_a_value_or_a_format_error() -> None:
    source = random.Random(7)
    outcomes = collections.Counter[str]()
    for _ in range(4000):
        data = bytearray(_benign(source))
        for _ in range(source.randint(1, 4)):
            at = source.randrange(len(data))
            action = source.randrange(3)
            if action == 0:
                data[at] = source.randrange(256)
            elif action == 1:
                del data[at : at + source.randrange(1, 9)]
            else:
                data[at:at] = source.choice(_OPCODES) * source.randint(1, 3)
        try:
            loads(bytes(data), CORE)
            outcomes["value"] += 1
        except FormatError:
            outcomes["error"] += 1
    assert min(outcomes["value"], outcomes["error"]) > 100


_OPCODES = [
    bytes([code]) for code in b"(.0125abcdegijlopqrstu}]\x80\x81\x85\x86\x87\x8f\x90\x91\x93\x94"
]


def test_noise_gives_a_value_or_a_format_error() -> None:
    source, refused = random.Random(8), 0
    for _ in range(4000):
        data = b"".join(source.choices(_OPCODES, k=source.randrange(1, 40))) + b"."
        try:
            loads(data, CORE)
        except FormatError:
            refused += 1
    assert 0 < refused < 4000
