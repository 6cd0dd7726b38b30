"""Builders for values that contain only data.

Every other class becomes an `Opaque` stand-in, `os.system` and a user's dataclass alike.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any
from uuid import UUID

from shardkeep.errors import FormatError
from shardkeep.format.pickle.numpy_builders import ARRAYS
from shardkeep.format.pickle.registry import Builder, Reference, Registry
from shardkeep.format.pickle.torch_builders import REBUILD
from shardkeep.types import Opaque

__all__ = ["CORE"]


def _only(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {kind.__name__} is wanted, not a {type(value).__name__}")
    return value


def _of(kind: Callable[..., Any], *allowed: type, most: int = 1) -> Callable[..., Any]:
    """Return a builder that calls `kind` with at most `most` arguments of exactly these types."""

    def make(*args: Any) -> Any:
        if len(args) > most or not all(type(arg) in allowed for arg in args):
            return NotImplemented
        return kind(*args)

    return make


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    """Decode bytes of protocols 0 to 2, which store them as text with one letter for each byte."""
    if encoding not in ("latin1", "latin-1", "utf-8", "utf8"):
        raise FormatError("bytes as text in an encoding that no pickle uses")
    data: bytes = _only(str, text).encode(encoding)
    return data


def _bytes(data: Any = b"", encoding: Any = "latin-1") -> bytes:
    return _encode(data, encoding) if type(data) is str else _only(bytes, data)


def _bytearray(data: Any = b"", encoding: Any = "latin-1") -> bytearray:
    return bytearray(_bytes(data, encoding))


_FACTORIES = {
    f"builtins.{kind.__name__}": kind
    for kind in (list, dict, set, tuple, int, float, str, bool, complex, bytes)
}


def _defaultdict(factory: Any = None, *rest: Any) -> Any:
    """Accept only a factory that makes empty values, because reading a missing key calls it."""
    known = _FACTORIES.get(factory.name) if type(factory) is Reference else None
    if rest or (factory is not None and known is None):
        return NotImplemented
    return defaultdict(known)


def _counter(counts: Any = None) -> Counter[Any]:
    made: Counter[Any] = Counter()
    if counts is not None:
        # The class's own `update` would add values of any type.
        dict.update(made, _only(dict, counts))
    return made


def _deque(items: Any = (), size: Any = None) -> deque[Any]:
    if type(items) not in (list, tuple) or not (size is None or type(size) is int):
        raise TypeError("a deque of something else than items")
    return deque(items, size)


def _no_attributes(value: Any, state: Any) -> None:
    """Ignore attributes of an OrderedDict (`_metadata` of modules): not part of its value."""
    _only(dict, state)


def _decimal(text: Any) -> Decimal:
    if len(_only(str, text)) > 1000:
        raise ValueError("a decimal number of more than 1000 letters")
    number = Decimal(text)
    if number.is_finite() and abs(number.adjusted()) > 10_000:
        # Converted to or compared with an int, it takes memory by the size of its exponent.
        raise ValueError(f"a decimal number with the exponent {number.adjusted()}")
    return number


_FRACTION = re.compile(r"-?[0-9]{1,1000}(/[0-9]{1,1000})?")


def _fraction(*parts: Any) -> Any:
    if len(parts) == 1 and type(parts[0]) is str and _FRACTION.fullmatch(parts[0]):
        return Fraction(parts[0])
    return Fraction(*(_only(int, part) for part in parts))


def _fill_uuid(value: UUID, state: Any) -> None:
    number = _only(int, _only(dict, state)["int"])
    object.__setattr__(value, "int", UUID(int=number).int)


def _path(kind: type[PurePath]) -> Builder:
    """Return a builder of paths that cannot access the disk."""
    return Builder(_of(kind, str, most=1000), type=kind, key=True)


def _paths() -> dict[str, Builder]:
    """Return the builders of paths; Python 3.13 names their module `pathlib._local`."""
    kinds = {"Posix": PurePosixPath, "Windows": PureWindowsPath}
    return {
        f"{module}.{pure}{name}Path": _path(kind)
        for module in ("pathlib", "pathlib._local")
        for pure in ("", "Pure")
        for name, kind in kinds.items()
    }


def _clock(data: bytes) -> tuple[int, int, int, int]:
    hour, minute, second = data[:3]
    return hour, minute, second, int.from_bytes(data[3:], "big")


# datetime's own pickle constructors copy their bytes unchecked: they would accept hour 255.


def _date(data: Any) -> date:
    high, low, month, day = _only(bytes, data)
    return date(high << 8 | low, month, day)


def _time(data: Any, zone: Any = None) -> Any:
    if zone is not None and type(zone) is not timezone:
        return NotImplemented
    if len(_only(bytes, data)) != 6:
        raise ValueError("a time of other than 6 bytes")
    fold, first = divmod(data[0], 128)
    return time(*_clock(bytes((first, *data[1:]))), zone, fold=fold)


def _datetime(data: Any, zone: Any = None) -> Any:
    if zone is not None and type(zone) is not timezone:
        return NotImplemented
    if len(_only(bytes, data)) != 10:
        raise ValueError("a datetime of other than 10 bytes")
    fold, month = divmod(data[2], 128)
    return datetime(data[0] << 8 | data[1], month, data[3], *_clock(data[4:]), zone, fold=fold)


def _timezone(offset: Any, name: Any = None) -> timezone:
    offset = _only(timedelta, offset)
    return timezone(offset) if name is None else timezone(offset, _only(str, name))


def _reconstructor(kind: Any, base: Any, state: Any) -> Any:
    """Build an instance of `kind` from a value of the built-in `base`, as protocols 0 and 1 do."""
    if not isinstance(kind, Opaque) or not isinstance(base, Opaque):
        return NotImplemented
    if base.name != "builtins.object":
        return Opaque(kind.module, kind.qualname, (state,))
    builder = kind.builder if type(kind) is Reference else None
    make = (builder.new or builder.make) if builder else None
    return make() if make else Opaque(kind.module, kind.qualname)


CORE: Registry = Registry(
    {
        "_codecs.encode": Builder(_encode),
        "builtins.Ellipsis": Builder(value=...),
        "builtins.bool": Builder(_of(bool, bool, int, float)),
        "builtins.int": Builder(_of(int, int, bool, float)),
        "builtins.float": Builder(_of(float, float, int, bool)),
        "builtins.complex": Builder(_of(complex, float, int, complex, most=2)),
        "builtins.str": Builder(_of(str, str)),
        "builtins.bytes": Builder(_bytes),
        "builtins.bytearray": Builder(_bytearray),
        "builtins.list": Builder(_of(list, list, tuple)),
        "builtins.tuple": Builder(_of(tuple, list, tuple)),
        "builtins.dict": Builder(_of(dict, dict)),
        "builtins.set": Builder(_of(set, list, tuple), hashes=True),
        "builtins.frozenset": Builder(_of(frozenset, list, tuple), hashes=True),
        "builtins.range": Builder(_of(range, int, most=3), type=range, key=True),
        "builtins.slice": Builder(_of(slice, int, float, str, type(None), most=3)),
        "collections.OrderedDict": Builder(
            _of(OrderedDict, most=0), type=OrderedDict, takes="dict", fill=_no_attributes
        ),
        "collections.defaultdict": Builder(_defaultdict, type=defaultdict, takes="dict"),
        "collections.Counter": Builder(_counter, type=Counter, takes="dict"),
        "collections.deque": Builder(_deque, type=deque, takes="list"),
        "copyreg._reconstructor": Builder(_reconstructor),
        "datetime.date": Builder(_date, type=date, key=True),
        "datetime.time": Builder(_time, type=time, key=True),
        "datetime.datetime": Builder(_datetime, type=datetime, key=True),
        "datetime.timedelta": Builder(_of(timedelta, int, most=3), type=timedelta, key=True),
        "datetime.timezone": Builder(_timezone, type=timezone, key=True),
        "decimal.Decimal": Builder(_decimal, type=Decimal, key=True),
        "fractions.Fraction": Builder(_fraction, type=Fraction, key=True),
        "uuid.UUID": Builder(
            _of(lambda: UUID(int=0), most=0), type=UUID, fill=_fill_uuid, key=True
        ),
        **_paths(),
        **ARRAYS,
        **REBUILD,
    }
)
"""Builders of values that contain only data: nothing of torch, no classes of users."""
