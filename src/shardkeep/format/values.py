"""Small values as typed JSON, exact in both directions.

None, booleans, ints below 2**63, finite floats and strings represent themselves, a JSON array is a
list, and everything else is an object with one member, `{kind: content}`. This module does not
import torch: torch's values are identified by the names of their types, and the reader chooses what
makes them.
"""

from __future__ import annotations

import json
import math
import re
import struct
from base64 import b64decode, b64encode
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from hashlib import blake2b
from os import name as system
from pathlib import PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any

import numpy as np

from shardkeep.errors import FormatError, ShardkeepError
from shardkeep.types import DTYPES, MAX_DIMS, DType, Opaque

__all__ = [
    "CORE_MAKERS",
    "LIMIT",
    "MAX_DEPTH",
    "NotEncodable",
    "decode",
    "decode_key",
    "digest",
    "dumps",
    "encode",
    "encode_key",
    "loads",
    "unique_keys",
]

Json = Any
"""What `json.loads` returns: None, bool, int, float, str, list, or dict with str keys."""

Maker = Callable[[Any], Any]

MAX_DEPTH = 64
"""Maximum nesting of values, so that neither hostile nor honest ones exhaust the stack."""

LIMIT = 1 << 20
"""A value is small up to about this many bytes. Larger ones are stored in their items only."""

_DEVICE = re.compile(r"([a-z_][a-z0-9_]*)(?::([0-9]{1,9}))?", re.ASCII)
_NUMPY = re.compile(
    r"\|b1|\|[iu]1|[<>]([iuf][248]|c8|c16|[mM]8(\[\d*[a-zA-Z]+\])?|U[1-9]\d*)|\|S[1-9]\d*",
    re.ASCII,
)
"""Dtypes of numpy that their name fully describes: no objects, no fields, no padding."""
_EXTENDED = {dtype.numpy: dtype.name for dtype in DTYPES if dtype.numpy.isbuiltin == 2}
_EXTENDED_NAMED = {name: dtype for dtype, name in _EXTENDED.items()}
_NAN = struct.pack(">d", math.nan).hex()
_PATHS = {kind.__name__: kind for kind in (PurePosixPath, PureWindowsPath, PosixPath, WindowsPath)}


_BROKEN = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    struct.error,
)
"""What Python and numpy raise for content that does not fit its kind."""


class NotEncodable(ShardkeepError):
    """The value cannot be encoded exactly, or is not small."""


def _core_device(name: str) -> Opaque:
    kind, _, index = name.partition(":")
    return Opaque("torch", "device", (kind, int(index)) if index else (kind,))


CORE_MAKERS: Mapping[str, Maker] = {
    "torch.Size": tuple,
    "torch.dtype": DType.named,
    "torch.device": _core_device,
}
"""What makes torch's values without torch, from a list of ints, the name of a dtype in `DTYPES`, or
a name such as "cuda:0"."""


def encode(value: Any, *, limit: int = LIMIT) -> Json:
    """Return a value as typed JSON.

    Only exact types are accepted: an instance of a subclass may carry more than its base shows.

    Raises:
        NotEncodable: a part of an unknown type, a cycle or a mutable part that occurs twice (both
            would be restored as copies), nesting deeper than `MAX_DEPTH`, or more than `limit`
            bytes.
    """
    return _Encoder(limit).encode(value, 0)


def decode(value: Json, make: Mapping[str, Maker] = CORE_MAKERS) -> Any:
    """Return the value that `encode` was given. Raises FormatError for anything else."""
    try:
        return _Decoder(make).decode(value, 0)
    except FormatError:
        raise
    except _BROKEN as error:
        raise FormatError(f"invalid value: {error}") from None


def encode_key(key: Any) -> Json:
    """Encode a key of a path: any hashable value that `encode` accepts."""
    return key if type(key) is str and key.isascii() else encode(key)


def decode_key(value: Json, make: Mapping[str, Maker] = CORE_MAKERS) -> Any:
    """Invert `encode_key`; raises FormatError also for a value that cannot be a key."""
    if type(value) is str or type(value) is int:
        return value
    return unique_keys([decode(value, make)])[0]


def dumps(value: Json) -> str:
    """Return the text of some JSON: the same for the same value, on every machine."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def loads(text: str | bytes, *, file: str | None = None, place: str | None = None) -> Json:
    """Return the JSON that a text contains. Raises FormatError, naming file and place."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not valid JSON: {error}", file=file, place=place) from None


def digest(value: Json) -> bytes:
    """Return 16 bytes that differ if values differ, for ranks to compare. Order in dicts counts."""
    return blake2b(dumps(value).encode(), digest_size=16).digest()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


class _Encoder:
    def __init__(self, limit: int) -> None:
        self._left = limit
        self._seen: set[int] = set()

    def encode(self, value: Any, depth: int) -> Json:
        kind = type(value)
        if value is None or kind is bool:
            return self._spend(8, value)
        if kind is int:
            self._spend(value.bit_length() // 4 + 8)
            return value if -(2**63) <= value < 2**63 else {"int": hex(value)}
        if kind is float:
            return self._spend(16, value if math.isfinite(value) else {"float": _not_finite(value)})
        if kind is str:
            self._spend(len(value) + 8)
            return value if _is_unicode(value) else {"str": _base64(_surrogates(value))}
        if depth >= MAX_DEPTH:
            raise NotEncodable(f"nested deeper than {MAX_DEPTH}")
        if kind in _MUTABLE:
            if id(value) in self._seen:
                raise NotEncodable(f"one {kind.__name__} occurs twice, or inside itself")
            self._seen.add(id(value))
        known = _ENCODERS.get(kind)
        if known is not None:
            tag, content = known
            return (
                {tag: content(self, value, depth + 1)} if tag else content(self, value, depth + 1)
            )
        return self._other(value, kind)

    def many(self, values: Collection[Any], depth: int) -> list[Json]:
        self._spend(8)
        return [self.encode(value, depth) for value in values]

    def pairs(self, values: Mapping[Any, Any], depth: int) -> list[Json]:
        self._spend(8)
        return [[self.encode(k, depth), self.encode(v, depth)] for k, v in values.items()]

    def ordered(self, values: Collection[Any], depth: int) -> list[Json]:
        """Return the elements of a set, in an order that does not depend on the process."""
        return sorted(self.many(values, depth), key=dumps)

    def data(self, value: bytes | bytearray, _: int) -> str:
        self._spend(len(value) * 4 // 3 + 8)
        return _base64(value)

    def text(self, value: Any, _: int) -> str:
        text = str(value)
        return str(self._spend(len(text) + 8, text))

    def array(self, value: Any, _: int) -> list[Json]:
        name = _EXTENDED.get(value.dtype, value.dtype.str)
        if _numpy_dtype(name) != value.dtype:
            raise NotEncodable(f"numpy's dtype {value.dtype} is not carried")
        self._spend(value.nbytes * 4 // 3 + 32)
        return [name, list(value.shape), _base64(value.tobytes())]

    def datetime(self, value: datetime, _: int) -> list[Json]:
        zone = value.tzinfo
        if zone is not None and (type(zone) is not timezone or _is_named(zone)):
            raise NotEncodable(f"a time zone of type {type(zone).__name__} is not carried")
        offset = value.utcoffset()
        microseconds = None if offset is None else offset // timedelta(microseconds=1)
        return [self.text(value.replace(tzinfo=None).isoformat(), 0), value.fold, microseconds]

    def path(self, value: PurePath, depth: int) -> list[Json]:
        again = type(value)(str(value))
        if (again.parts, str(again)) != (value.parts, str(value)):
            raise NotEncodable("a path that is another one when it is read")  # Some of Windows.
        return [type(value).__name__, self.encode(str(value), depth)]

    def _other(self, value: Any, kind: type) -> Json:
        """Encode values of numpy and torch."""
        if issubclass(kind, np.generic):
            scalar = np.asarray(value)
            content = self.array(scalar, 0)
            dtype = _numpy_dtype(content[0])
            # Some types share a dtype's name, and strings lose zeros at their end.
            if dtype and dtype.type is kind and (dtype.kind not in "SU" or scalar[()] == value):
                return {"scalar": content}
        elif kind is DType or (kind.__module__, kind.__name__) == ("torch", "dtype"):
            name = str(value).removeprefix("torch.")
            if any(name == dtype.name for dtype in DTYPES):
                return {"torch.dtype": self.text(name, 0)}
        elif (kind.__module__, kind.__name__) == ("torch", "Size"):
            return {"torch.Size": self.many([int(size) for size in value], 0)}
        elif (kind.__module__, kind.__name__) == ("torch", "device"):
            if _DEVICE.fullmatch(str(value)):
                return {"torch.device": self.text(value, 0)}
        elif kind is Opaque and value == _reopened(value):
            return {"torch.device": self.text(":".join(map(str, value.args)), 0)}
        raise NotEncodable(f"a value of type {kind.__module__}.{kind.__qualname__} is not carried")

    def _spend(self, cost: int, value: Any = None) -> Any:
        self._left -= cost
        if self._left < 0:
            raise NotEncodable("the value is too large")
        return value


def _reopened(value: Opaque) -> Opaque | None:
    """Return the stand-in for a device with the same name as this one, if it is one."""
    name = ":".join(map(str, value.args))
    return _core_device(name) if value.name == "torch.device" and _DEVICE.fullmatch(name) else None


_Content = Callable[[_Encoder, Any, int], Json]

_MUTABLE = frozenset({list, dict, OrderedDict, set, bytearray, np.ndarray})

_ENCODERS: dict[type, tuple[str, _Content]] = {
    list: ("", _Encoder.many),
    tuple: ("tuple", _Encoder.many),
    dict: ("dict", _Encoder.pairs),
    OrderedDict: ("OrderedDict", _Encoder.pairs),
    set: ("set", _Encoder.ordered),
    frozenset: ("frozenset", _Encoder.ordered),
    bytes: ("bytes", _Encoder.data),
    bytearray: ("bytearray", _Encoder.data),
    complex: ("complex", lambda e, v, d: e.many((v.real, v.imag), d)),
    slice: ("slice", lambda e, v, d: e.many((v.start, v.stop, v.step), d)),
    range: ("range", lambda e, v, d: e.many((v.start, v.stop, v.step), d)),
    datetime: ("datetime", _Encoder.datetime),
    date: ("date", lambda e, v, d: e.text(v.isoformat(), d)),
    timedelta: ("timedelta", lambda e, v, d: e.many((v.days, v.seconds, v.microseconds), d)),
    Decimal: ("Decimal", _Encoder.text),
    np.ndarray: ("array", _Encoder.array),
    **dict.fromkeys(_PATHS.values(), ("path", _Encoder.path)),
}


class _Decoder:
    def __init__(self, make: Mapping[str, Maker]) -> None:
        self._make = make

    def decode(self, value: Json, depth: int) -> Any:
        kind = type(value)
        if depth > MAX_DEPTH:
            raise FormatError(f"a value is nested deeper than {MAX_DEPTH}")
        if kind is list:
            return self.many(value, depth + 1)
        if kind is not dict:
            return value
        if len(value) != 1:
            raise FormatError("invalid value: not one kind")
        ((tag, content),) = value.items()
        known = _DECODERS.get(tag)
        if known is None:
            raise FormatError(f"a value is of unknown kind {tag[:50]!r}")
        return known(self, content, depth + 1)

    def many(self, values: Json, depth: int) -> list[Any]:
        if type(values) is not list:
            raise FormatError("invalid value: not a list")
        return [self.decode(value, depth) for value in values]

    def keys(self, values: Json, depth: int) -> list[Any]:
        return unique_keys(self.many(values, depth))

    def pairs(self, values: Json, depth: int) -> list[tuple[Any, Any]]:
        if type(values) is not list or any(type(pair) is not list for pair in values):
            raise FormatError("invalid value: not a list of pairs")
        keys = self.keys([key for key, _ in values], depth)
        return list(zip(keys, self.many([value for _, value in values], depth), strict=True))

    def exactly(self, values: Json, kind: type, count: int, depth: int) -> list[Any]:
        parts = self.many(values, depth)
        if len(parts) != count or not all(isinstance(part, kind) for part in parts):
            raise FormatError(f"invalid value: not {count} of type {kind.__name__}")
        return parts

    def array(self, values: Json, depth: int) -> np.ndarray[Any, Any]:
        name, shape, data = values
        dtype = _numpy_dtype(name)
        shape = self.exactly(shape, int, len(shape), depth)
        if dtype is None or len(shape) > MAX_DIMS or min(shape, default=0) < 0:
            raise FormatError("invalid value: an array's dtype or shape")
        # The bytes are read already, and numpy refuses those that do not fill the shape.
        array = np.frombuffer(bytearray(b64decode(data, validate=True)), dtype).reshape(shape)
        if dtype.kind == "U":
            order = "be" if name[0] == ">" else "le"  # Numbers that are not characters crash later.
            array.tobytes().decode(f"utf-32-{order}", "surrogatepass")
        return array

    def scalar(self, values: Json, depth: int) -> Any:
        return self.array(values, depth)[()]

    def datetime(self, values: Json, _: int) -> datetime:
        text, fold, offset = values
        zone = None if offset is None else timezone(timedelta(microseconds=offset))
        return datetime.fromisoformat(text).replace(fold=fold, tzinfo=zone)

    def path(self, values: Json, depth: int) -> PurePath:
        name, text = values
        if name == ("PosixPath" if system == "nt" else "WindowsPath"):
            name = f"Pure{name}"  # The other system's path cannot be made here.
        return _PATHS[name](self.decode(text, depth))

    def size(self, values: Json, depth: int) -> Any:
        return self._make["torch.Size"](self.exactly(values, int, len(values), depth))

    def dtype(self, name: Json, _: int) -> Any:
        return self._make["torch.dtype"](DType.named(name).name)

    def device(self, name: Json, _: int) -> Any:
        if not _DEVICE.fullmatch(name):
            raise FormatError(f"invalid value: device {name[:50]!r}")
        return self._make["torch.device"](name)


_DECODERS: dict[str, Callable[[_Decoder, Json, int], Any]] = {
    "int": lambda d, v, n: int(v, 16),
    "float": lambda d, v, n: _from_not_finite(v),
    "str": lambda d, v, n: b64decode(v, validate=True).decode("utf-8", "surrogatepass"),
    "bytes": lambda d, v, n: b64decode(v, validate=True),
    "bytearray": lambda d, v, n: bytearray(b64decode(v, validate=True)),
    "complex": lambda d, v, n: complex(*d.exactly(v, float, 2, n)),
    "tuple": lambda d, v, n: tuple(d.many(v, n)),
    "dict": lambda d, v, n: dict(d.pairs(v, n)),
    "OrderedDict": lambda d, v, n: OrderedDict(d.pairs(v, n)),
    "set": lambda d, v, n: set(d.keys(v, n)),
    "frozenset": lambda d, v, n: frozenset(d.keys(v, n)),
    "slice": lambda d, v, n: slice(*d.exactly(v, object, 3, n)),
    "range": lambda d, v, n: range(*d.exactly(v, int, 3, n)),
    "datetime": _Decoder.datetime,
    "date": lambda d, v, n: date.fromisoformat(v),
    "timedelta": lambda d, v, n: timedelta(*d.exactly(v, int, 3, n)),
    "Decimal": lambda d, v, n: Decimal(str(v)),
    "array": _Decoder.array,
    "scalar": _Decoder.scalar,
    "path": _Decoder.path,
    "torch.Size": _Decoder.size,
    "torch.dtype": _Decoder.dtype,
    "torch.device": _Decoder.device,
}


def unique_keys(keys: list[Any]) -> list[Any]:
    """Return the same keys, checked to be safe as keys of one dict; raise FormatError otherwise.

    Keys with one hash are compared with each other one by one. Hashes of strings are salted, but
    those
    of numbers are not: thousands of equal ones are an attack that would take minutes.
    """
    try:
        hashes = Counter(map(hash, keys))
    except TypeError:
        raise FormatError("a key cannot be hashed") from None
    if max(hashes.values(), default=0) > 100:
        raise FormatError("the keys have equal hashes")
    if len(set(keys)) != len(keys):
        raise FormatError("a key occurs twice")
    return keys


def _numpy_dtype(name: str) -> np.dtype[Any] | None:
    """Return the dtype of that name; None for those that are not encoded."""
    return _EXTENDED_NAMED.get(name) or (np.dtype(name) if _NUMPY.fullmatch(name) else None)


def _not_finite(value: float) -> str:
    bits = struct.pack(">d", value).hex()
    return bits if math.isnan(value) and bits != _NAN else str(value)


def _from_not_finite(text: Json) -> float:
    if text in ("nan", "inf", "-inf"):
        return float(text)
    (value,) = struct.unpack(">d", bytes.fromhex(text))
    return float(value)


def _is_unicode(value: str) -> bool:
    """Return whether JSON can carry it: a pair of lone surrogates would become one character."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _surrogates(value: str) -> bytes:
    return value.encode("utf-8", "surrogatepass")


def _base64(data: bytes | bytearray) -> str:
    return b64encode(data).decode("ascii")


def _is_named(zone: timezone) -> bool:
    """Return whether a time zone has a name of its own, which its offset does not tell."""
    return len(zone.__getinitargs__()) > 1  # type: ignore[attr-defined]
