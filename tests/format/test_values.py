"""Small values are restored exactly, and hostile JSON is refused."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections import Counter, OrderedDict, namedtuple
from datetime import datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import IntEnum
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from format.strategies import exact, keys, values
from shardkeep.errors import FormatError
from shardkeep.format.values import (
    LIMIT,
    MAX_DEPTH,
    NotEncodable,
    decode,
    decode_key,
    digest,
    dumps,
    encode,
    encode_key,
    loads,
)
from shardkeep.types import DType, Opaque


def through_text(value):
    return decode(loads(dumps(encode(value))))


@given(values)
@settings(max_examples=200)
def test_values_are_restored_exactly(value):
    assert exact(through_text(value)) == exact(value)


@given(keys | st.tuples(keys, keys))
def test_keys_are_restored_exactly(key):
    assert exact(decode_key(loads(dumps(encode_key(key))))) == exact(key)


@pytest.mark.parametrize(
    "value",
    [
        10**5000,
        -(2**63) - 1,
        2**63,
        -0.0,
        5e-324,
        math.inf,
        math.nan,
        -math.nan,
        struct.unpack("<d", (0x7FF8DEADBEEF0001).to_bytes(8, "little"))[0],
        "\ud800\udc00",
        {1: "int", "1": "str", (1,): "tuple", b"1": "bytes"},
        OrderedDict([("b", 1), ("a", 2)]),
        {"b": 1, "a": 2},
        Path("a/b"),
        datetime(2020, 10, 25, 1, 30, fold=1, tzinfo=timezone.utc),
        Decimal("sNaN12"),
        Decimal("-0E+7"),
        np.float32("nan"),
        np.array(7, ">i2"),
        np.zeros((0, 3), "<c8"),
        np.array(["é", "\U0001f600"]),
        np.array([], ml_dtypes.bfloat16),
        ml_dtypes.float8_e8m0fnu(2.0),
        np.bool_(True),
        np.str_("é"),
        np.datetime64("2020-01-01T00:00:00.000001"),
        [[]] * 0,
        ((), (), ()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_special_value_is_restored_exactly(value):
    assert exact(through_text(value)) == exact(value)


def test_restored_arrays_are_writable():
    array = through_text(np.arange(3))
    array[0] = 9
    assert array.tolist() == [9, 1, 2]


class _Int(int):
    pass


class _Zone(tzinfo):
    pass


_shared: list[int] = []
_cycle: list[object] = []
_cycle.append((_cycle,))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (_Int(1), "_Int is not carried"),
        (IntEnum("Color", "red").red, "Color is not carried"),
        (namedtuple("Pair", "a b")(1, 2), "Pair is not carried"),
        (Counter("a"), "Counter is not carried"),
        (object(), "object is not carried"),
        (len, "builtin_function_or_method is not carried"),
        (int, "builtins.type is not carried"),
        ({"a": [object()]}, "object is not carried"),
        ([_shared, _shared], "one list occurs twice, or inside itself"),
        (_cycle, "one list occurs twice, or inside itself"),
        (np.array([object()]), "dtype object is not carried"),
        (np.zeros(1, [("a", "i4")]), "is not carried"),
        (np.zeros(2, np.longdouble), "is not carried"),
        (np.ma.masked_array([1], [True]), "MaskedArray is not carried"),
        (np.longlong(1) if np.longlong is not np.int64 else object(), "is not carried"),
        (np.str_("a\0"), "is not carried"),
        (datetime(2020, 1, 1, tzinfo=_Zone()), "time zone of type _Zone"),
        (datetime(2020, 1, 1, tzinfo=timezone(timedelta(0), "X")), "time zone of type timezone"),
        (bytes(LIMIT), "too large"),
        ("x" * LIMIT, "too large"),
        (np.zeros(LIMIT), "too large"),
        (10 ** (3 * LIMIT), "too large"),
        (list(range(LIMIT)), "too large"),
        (Opaque("builtins", "eval", ("1",)), "Opaque is not carried"),
        (Opaque("torch", "device", ("cpu", 0, 1)), "Opaque is not carried"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_values_that_cannot_be_stored_exactly_are_refused(value, reason):
    with pytest.raises(NotEncodable, match=reason):
        encode(value)


def test_writer_and_reader_have_the_same_limit_of_depth():
    value, text = 1, "1"
    for _ in range(MAX_DEPTH):
        value, text = [value], f"[{text}]"
    assert exact(through_text(value)) == exact(value)
    with pytest.raises(NotEncodable, match="nested deeper than 64"):
        encode([value])
    with pytest.raises(FormatError, match="nested deeper than 64"):
        decode(json.loads(f"[[{text}]]"))


def test_shared_values_do_not_grow_exponentially():
    value: tuple[object, ...] = ()
    for _ in range(40):
        value = (value, value)
    with pytest.raises(NotEncodable, match="too large"):
        encode(value)


def test_sets_have_one_order_in_every_process():
    program = (
        "from shardkeep.format.values import encode, digest;"
        "print(digest(encode({str(i) for i in range(50)} | {1, 2.5, b'x', None})).hex())"
    )
    outcomes = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outcomes) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        ([1], (1,)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ("1", b"1"),
    ],
)
def test_digests_of_different_values_differ(one, other):
    assert digest(encode(one)) != digest(encode(other))
    assert digest(encode(one)) == digest(encode(one))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        '{"tuple":[' * 50_000 + "]}" * 50_000,
        "NaN",
        "[Infinity]",
        "9" * 10_000,
        "{}",
        '{"list":[],"tuple":[]}',
        '{"eval":"1"}',
        '{"tuple":{}}',
        '{"dict":[[[],1]]}',
        '{"dict":[[1,1],[true,2]]}',
        '{"dict":{"ab":1}}',
        '{"dict":["ab"]}',
        '{"set":[{"dict":[]}]}',
        '{"int":"zz"}',
        '{"int":1}',
        '{"float":"1"}',
        '{"float":"00"}',
        '{"bytes":"!"}',
        '{"str":"//8="}',
        '{"complex":[1]}',
        '{"complex":["a","b"]}',
        '{"range":[1,2,0]}',
        '{"range":[1.5,2,1]}',
        '{"date":"x"}',
        '{"datetime":["2020-01-01",2,null]}',
        '{"datetime":["2020-01-01",0,86400000000]}',
        '{"datetime":["2020-01-01",0]}',
        '{"timedelta":[1e300,0,0]}',
        '{"timedelta":[100000000000,0,0]}',
        '{"Decimal":"x"}',
        '{"array":["|O",[1],"AAAAAAAAAAA="]}',
        '{"array":["<f4,<f4",[1],"AAAAAAAAAAA="]}',
        '{"array":["<f8",[2],"AAAAAAAAAAA="]}',
        '{"array":["<f8",[1,0],"AAAAAAAAAAA="]}',
        '{"array":["<f8",[-1],"AAAAAAAAAAA="]}',
        '{"array":["<f8",[4611686018427387904,0,8],""]}',
        '{"array":["<U1",[1],"/////w=="]}',
        '{"array":["<U99999999999",[0],""]}',
        '{"scalar":["<f8",[1,0],"AAAAAAAAAAA="]}',
        '{"path":["Path","x"]}',
        '{"path":["PosixPath",["x"]]}',
        '{"path":["PosixPath",' * 300 + '"x"' + "]}" * 300,
        '{"complex":[' * 300 + '"x"' + "]}" * 300,
        '{"torch.Size":["x"]}',
        '{"torch.dtype":"load"}',
        '{"torch.device":"../x"}',
        '{"torch.device":7}',
    ],
    ids=lambda t: t[:40],
)
def test_invalid_json_raises_a_format_error(text):
    with pytest.raises(FormatError):
        decode(loads(text, file="m"))


def test_an_error_of_json_names_file_and_place():
    with pytest.raises(FormatError, match=r"^manifest\.npz, values: not valid JSON: "):
        loads("{", file="manifest.npz", place="values")


def test_keys_with_equal_hashes_do_not_stall_the_reader():
    prime = 2**61 - 1  # the hash of an int is its remainder by this number
    keys_ = [[prime * (n + 1), None] for n in range(20_000)]
    with pytest.raises(FormatError, match="equal hashes"):
        decode({"dict": keys_})
    with pytest.raises(FormatError, match="equal hashes"):
        decode({"set": [key for key, _ in keys_]})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                "int float str bytes bytearray complex tuple dict OrderedDict set frozenset slice "
                "range datetime timedelta Decimal array scalar path torch.Size torch.dtype".split()
            ),
            inner,
            min_size=1,
            max_size=1,
        )
    ),
    max_leaves=10,
)


@given(json_values)
@settings(max_examples=200)
def test_any_json_is_a_value_or_a_format_error(value):
    try:
        found = decode(value)
    except FormatError as error:
        assert str(error)
        return
    assert exact(decode(encode(found))) == exact(found)


def test_values_of_torch():
    torch = pytest.importorskip("torch")
    make = {
        "torch.Size": torch.Size,
        "torch.dtype": lambda name: getattr(torch, name),
        "torch.device": torch.device,
    }
    state = {
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "devices": [torch.device("cpu"), torch.device("cuda:1"), torch.device("meta")],
    }
    value = loads(dumps(encode(state)))
    assert exact(decode(value, make)) == exact(state)
    assert decode(value) == {
        "size": (2, 3),
        "dtype": DType.named("bfloat16"),
        "devices": [
            Opaque("torch", "device", ("cpu",)),
            Opaque("torch", "device", ("cuda", 1)),
            Opaque("torch", "device", ("meta",)),
        ],
    }
    assert encode(decode(value)["devices"]) == encode(state["devices"])
    for tensor in (torch.zeros(1), torch.nn.Parameter(torch.zeros(1)), torch.strided):
        with pytest.raises(NotEncodable, match="is not carried"):
            encode(tensor)
