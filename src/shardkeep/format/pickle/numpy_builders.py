"""Builders of numpy arrays, scalars and dtypes: bytes with a shape, never objects."""

from __future__ import annotations

import re
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from shardkeep.errors import FormatError
from shardkeep.format.excerpt import shown
from shardkeep.format.pickle.registry import Builder, Reference

__all__ = ["ARRAYS"]

_CODE = re.compile(r"[biufcSUVmM?][0-9]{0,9}")
_UNITS = ("Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as", "generic")
_MAX_DIMS = 32
"""The limit of numpy 1."""


def _small(name: str) -> Any:
    return getattr(ml_dtypes, name)


_SMALL = tuple(
    name
    for name in ml_dtypes.__all__
    if isinstance(_small(name), type) and issubclass(_small(name), np.generic)
)
"""The dtypes of ml_dtypes, by name."""


def _dtype(code: Any, align: Any = False, copy: Any = False) -> Any:
    """Return a new dtype, never a shared one, because its state is set in place."""
    if type(code) is Reference and code.module.partition(".")[0] == "ml_dtypes":
        return np.dtype(_small(code.qualname)) if code.qualname in _SMALL else NotImplemented
    if type(code) is not str or not _CODE.fullmatch(code):
        return NotImplemented
    return np.dtype(code, False, True)


def _fill_dtype(dtype: np.dtype[Any], state: Any) -> None:
    """Set byte order, fields or unit: make a dtype of checked parts, and copy its state."""
    if type(state) is not tuple or not 8 <= len(state) <= 9 or dtype.kind == "O":
        raise FormatError("a numpy dtype with an unknown state")
    if dtype.type.__name__ in _SMALL:
        return  # Shared, and without variants.
    _, order, base, names, fields, itemsize, *_ = state
    if type(order) is not str or order not in ("<", ">", "=", "|") or base is not None:
        raise FormatError("a numpy dtype with an unknown state")
    made: np.dtype[Any] = dtype
    if names is not None:
        made = _structured(names, fields, itemsize)
    elif dtype.kind in "mM" and len(state) == 9:
        made = np.dtype(f"{dtype.kind}8[{_unit(state[8])}]")
    if order in ("<", ">"):
        made = made.newbyteorder(order)  # type: ignore[arg-type]
    if made.itemsize != dtype.itemsize:
        raise FormatError("a numpy dtype of two sizes")
    reduced: Any = made.__reduce__()
    dtype.__setstate__(reduced[2])  # type: ignore[attr-defined]


def _structured(names: Any, fields: Any, itemsize: Any) -> np.dtype[Any]:
    if type(names) is not tuple or type(fields) is not dict or type(itemsize) is not int:
        raise FormatError("a numpy dtype with unknown fields")
    formats, offsets = [], []
    for name in names:
        field = fields[name]
        if type(name) is not str or type(field) is not tuple or not isinstance(field[0], np.dtype):
            raise FormatError("a numpy dtype with unknown fields")
        formats.append(field[0])
        offsets.append(field[1])
    if not all(type(offset) is int and offset >= 0 for offset in offsets):
        raise FormatError("a numpy dtype has fields outside its size")
    return np.dtype(
        {"names": list(names), "formats": formats, "offsets": offsets, "itemsize": itemsize}
    )


def _unit(state: Any) -> str:
    unit, number, *_ = state[1]
    name = unit.decode("ascii") if type(unit) is bytes else ""
    if name not in _UNITS or type(number) is not int or not 0 < number < 1 << 31:
        raise FormatError("a numpy time of an unknown unit")
    return f"{number}{name}" if name != "generic" else name


def _checked(shape: Any, dtype: Any, data: Any) -> NDArray[Any]:
    """Return the array, in its own memory, after checking that all of its bytes are there."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject or dtype.itemsize == 0:
        raise FormatError("a numpy array of objects, or of nothing")
    if type(shape) is not tuple or len(shape) > _MAX_DIMS:
        raise FormatError("a numpy array has an invalid shape")
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in shape):
        raise FormatError("a numpy array has an invalid shape")
    if type(data) not in (bytes, bytearray) or prod(shape) * dtype.itemsize != len(data):
        raise FormatError(f"a numpy array of shape {shown(shape)} with other than its bytes")
    if prod(max(size, 1) for size in shape) >= 1 << 62:
        raise FormatError(f"an empty numpy array of shape {shown(shape)}")
    array: NDArray[Any] = np.frombuffer(bytes(data), dtype)
    return array


def _reconstruct(kind: Any, shape: Any, code: Any) -> Any:
    if type(kind) is not Reference or kind.name != "numpy.ndarray":
        return NotImplemented  # A subclass: matrix, recarray, masked array.
    return np.ndarray((0,), "b")


def _fill_array(array: NDArray[Any], state: Any) -> None:
    _, shape, dtype, fortran, data = state
    checked = _checked(shape, dtype, data)
    if type(fortran) is not bool:
        raise FormatError("a numpy array in an unknown order")
    # Every part of the state is known by now, so the class may apply it itself.
    known: Any = (1, shape, checked.dtype, fortran, bytes(data))
    array.__setstate__(known)


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Any:
    flat = _checked(shape, dtype, data)
    # numpy 2.4 stores the elements in the order of memory, and the permutation of the axes.
    if axes is not None:
        if type(axes) is not tuple or not all(type(axis) is int for axis in axes):
            raise FormatError("a numpy array with unknown axes")
        return flat.reshape(shape).transpose(axes).copy("K")
    if order not in ("C", "F"):
        raise FormatError("a numpy array in an unknown order")
    return flat.reshape(shape, order=order).copy("K")


def _scalar(dtype: Any, data: Any = b"") -> Any:
    return _checked((), dtype, data)[0]


_MODULES = ("numpy.core", "numpy._core")
_KINDS = {type(np.dtype(code)) for code in (*"?bhilqBHILQefdgFDGSUVmM", *map(_small, _SMALL))}

ARRAYS: dict[str, Builder] = {
    "numpy.dtype": Builder(_dtype),
    "numpy.ndarray": Builder(type=np.ndarray, fill=_fill_array),
    **{f"{module}.multiarray._reconstruct": Builder(_reconstruct) for module in _MODULES},
    **{f"{module}.multiarray.scalar": Builder(_scalar) for module in _MODULES},
    **{f"{module}.numeric._frombuffer": Builder(_frombuffer) for module in _MODULES},
    **{f"numpy.dtypes.{kind.__name__}": Builder(type=kind, fill=_fill_dtype) for kind in _KINDS},
}
"""The names of numpy that a pickle may use."""
