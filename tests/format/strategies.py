"""Hypothesis strategies for values and indexes, and functions that compare them exactly."""

from __future__ import annotations

import dataclasses
import struct
from collections import OrderedDict
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from math import prod
from pathlib import PurePosixPath, PureWindowsPath

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from shardkeep.format.values import encode
from shardkeep.settings import BLOCK
from shardkeep.types import DTYPES, Chunks, DType, Index, Objects, Opaque, Structure, Tensors


def exact(value):
    """Return a form in which values are equal only if their types, order and bits are equal."""
    kind = type(value)
    if kind in (list, tuple):
        return kind, [exact(v) for v in value]
    if kind in (dict, OrderedDict):
        return kind, [(exact(k), exact(v)) for k, v in value.items()]
    if kind in (set, frozenset):
        return kind, sorted(map(repr, map(exact, value)))
    if kind is float:
        return kind, struct.pack("<d", value)
    if kind is complex:
        return kind, struct.pack("<2d", value.real, value.imag)
    if isinstance(value, np.ndarray | np.generic):
        return kind, value.dtype, value.dtype.str, value.shape, value.tobytes()
    if kind is slice:
        return kind, exact([value.start, value.stop, value.step])
    if kind is datetime:
        return kind, value.isoformat(), value.fold
    if kind is Decimal:
        return kind, value.as_tuple()
    return kind, value


texts = st.text(st.characters(), max_size=20) | st.text(
    st.sampled_from('a\ud800\udc00\x00é\U0001f600\\"'), max_size=6
)
bits = st.integers(0, 2**64 - 1).map(lambda n: struct.unpack("<d", struct.pack("<Q", n))[0])
zones = st.none() | st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone)
keys = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    texts,
    st.binary(max_size=9),
    st.complex_numbers(allow_nan=False),
    st.dates(),
    st.datetimes(timezones=zones),
    st.timedeltas(),
    st.decimals(allow_nan=False),
    texts.filter(lambda t: "\0" not in t).map(PurePosixPath),
    texts.map(PureWindowsPath).filter(lambda p: PureWindowsPath(str(p)).parts == p.parts),
    st.builds(range, st.integers(), st.integers(), st.integers().filter(bool)),
)
numpy_dtypes = st.one_of(
    nps.boolean_dtypes(),
    nps.integer_dtypes(endianness="?"),
    nps.unsigned_integer_dtypes(endianness="?"),
    nps.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    nps.complex_number_dtypes(endianness="?", sizes=(64, 128)),
    nps.datetime64_dtypes(),
    nps.timedelta64_dtypes(),
    nps.byte_string_dtypes(max_len=4),
    nps.unicode_string_dtypes(max_len=4),
)
arrays = nps.arrays(numpy_dtypes, nps.array_shapes(min_dims=0, min_side=0, max_side=3))
extended = st.sampled_from([ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
scalars = nps.arrays(numpy_dtypes, ()).map(lambda a: a[()]).filter(lambda s: s.dtype.itemsize > 0)
leaf_values = st.one_of(
    keys,
    bits,
    st.builds(complex, bits, bits),
    st.binary(max_size=9).map(bytearray),
    arrays,
    st.builds(lambda d, b: np.frombuffer(b + b, d), extended, st.binary(max_size=6)),
    scalars,
    st.builds(lambda d, x: d(x), extended, st.floats(-4, 4)),
    st.builds(slice, st.none() | st.integers(), st.none() | st.integers(), st.integers()),
    st.sampled_from([DType.named("bfloat16"), Opaque("torch", "device", ("cuda", 1))]),
)
values = st.recursive(
    leaf_values,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys | st.tuples(keys, keys), inner, max_size=4).map(OrderedDict),
        st.sets(keys, max_size=4),
        st.frozensets(keys, max_size=4),
    ),
    max_leaves=12,
)
"""Values that `values.encode` accepts."""

files = st.lists(
    st.text(st.sampled_from("_0aé "), min_size=1, max_size=4).map(lambda t: f"sub/{t}.distcp"),
    min_size=1,
    max_size=3,
    unique=True,
).map(tuple)
transforms = st.sampled_from([((),), ((), ("stream.zstd/1",), ("a", "b"))])
path_keys = st.text(max_size=3) | st.integers() | st.sampled_from([None, True, 1.5, b"x", (1, "a")])


def column(rows, dtype=np.int64):
    return np.array(rows, dtype)


def padded(rows, width, fill):
    return column([(*row, *[fill] * (width - len(row))) for row in rows]).reshape(len(rows), width)


@st.composite
def boxes(draw, shape):
    """Return the offsets and sizes of a box inside a shape."""
    offsets = [draw(st.integers(0, size)) for size in shape]
    sizes = [draw(st.integers(0, size - start)) for size, start in zip(shape, offsets, strict=True)]
    return draw(
        st.sampled_from([((0,) * len(shape), tuple(shape)), (tuple(offsets), tuple(sizes))])
    )


@st.composite
def items(draw, nbytes):
    """Return where an item is stored: start, length, and payload, which may be unknown."""
    start, length = draw(st.integers(0, 2**62)), nbytes + draw(st.integers(0, 3000))
    payload = draw(st.just(-1) | st.integers(0, length - nbytes).map(lambda n: start + n))
    return start, length, payload


@st.composite
def structures(draw, names):
    """Return a structure whose leaves are some of the names."""
    containers = {(): draw(st.sampled_from(["dict", "list", "OrderedDict"]))}
    leaves, empties = {}, {}
    for name in names:
        parent = draw(st.sampled_from(list(containers)))
        path = (*parent, draw(path_keys))
        if path in containers or path in leaves.values():
            continue
        if draw(st.booleans()):
            leaves[name] = path
        else:
            containers[path] = draw(st.sampled_from(["dict", "list", "OrderedDict"]))
            if draw(st.booleans()):
                empties[path] = len(leaves)
    return Structure(leaves, containers, empties)


@st.composite
def indexes(draw):
    """Return any `Index` that keeps the promises of its documentation."""
    names = draw(st.lists(texts, max_size=8, unique=True))
    count = draw(st.integers(0, len(names)))
    tensor_names, object_names = tuple(names[:count]), tuple(names[count:])
    file_names, kinds = draw(files), draw(transforms)
    size = st.integers(0, 5) | st.sampled_from([0, 1, 2**16])
    shapes = [tuple(draw(st.lists(size, max_size=3))) for _ in tensor_names]
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in tensor_names]
    dims = max(map(len, shapes), default=0)
    chunks = []
    for row, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        for offsets, sizes in draw(st.lists(boxes(shape), max_size=3)):
            nbytes = prod(sizes) * dtype.itemsize
            blocks = -(-nbytes // BLOCK)
            if blocks > 3 or draw(st.booleans()):
                blocks = 0
            chunks.append((row, offsets, sizes, *draw(items(nbytes)), blocks))
    places = st.integers(0, len(file_names) - 1), st.integers(0, len(kinds) - 1)
    blocks = np.concatenate([[0], np.cumsum([c[6] for c in chunks])]).astype(np.int64)
    total = int(blocks[-1])
    checksums = draw(st.lists(st.integers(0, 2**32 - 1), min_size=total, max_size=total))
    found = [draw(items(0)) for _ in object_names]
    known = draw(st.sets(st.sampled_from(object_names))) if object_names else ()
    legacy_duplicates = (
        draw(st.lists(st.sampled_from(object_names), unique=True)) if object_names else ()
    )
    return Index(
        file_names,
        Tensors(
            tensor_names,
            column([dtype.code for dtype in dtypes], np.uint8),
            column([len(shape) for shape in shapes], np.uint8),
            padded(shapes, dims, 1),
        ),
        Chunks(
            column([c[0] for c in chunks]),
            padded([c[1] for c in chunks], dims, 0),
            padded([c[2] for c in chunks], dims, 1),
            column([draw(places[0]) for _ in chunks], np.int32),
            column([c[3] for c in chunks]),
            column([c[4] for c in chunks]),
            column([c[5] for c in chunks]),
            column([draw(places[1]) for _ in chunks], np.int16),
            blocks,
            column(checksums, np.uint32),
        ),
        Objects(
            object_names,
            column([draw(places[0]) for _ in found], np.int32),
            column([item[0] for item in found]),
            column([item[1] for item in found]),
            column([draw(places[1]) for _ in found], np.int16),
            column([draw(st.integers(-1, 2**32 - 1)) for _ in found]),
            {name: encode(draw(values)) for name in object_names if name in known},
        ),
        kinds,
        draw(st.none() | structures(names)),
        {name: tuple(draw(st.lists(path_keys, max_size=3))) for name in legacy_duplicates},
        draw(st.dictionaries(st.text(max_size=4), st.none() | st.integers() | texts, max_size=3)),
    )


def plain(value):
    """Return a form of an index, or a part of it, that is equal only if all details are equal."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return exact(value)
    if hasattr(value, "items"):
        return [(exact(k), plain(v)) for k, v in value.items()]
    return exact(value)
