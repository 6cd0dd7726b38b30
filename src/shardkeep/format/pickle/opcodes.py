"""The opcodes of pickle protocols 0 to 5, as functions of (machine, position).

Each returns the next position. Python's `pickletools` documents their meanings.
"""

from __future__ import annotations

import struct
from codecs import escape_decode
from collections.abc import Callable
from typing import Any, NoReturn

from shardkeep.errors import FormatError
from shardkeep.format.pickle.machine import ROOM, Machine, Opcode

__all__ = ["TABLE"]


def _unknown(m: Machine, at: int) -> NoReturn:
    raise FormatError(
        f"byte {m.data[at - 1]:#04x} at offset {at - 1} is not an opcode; is the file damaged?"
    )


TABLE: list[Opcode] = [_unknown] * 256


def _op(*codes: bytes) -> Callable[[Opcode], Opcode]:
    def enter(function: Opcode) -> Opcode:
        for code in codes:
            TABLE[code[0]] = function
        return function

    return enter


def _pushes(code: bytes, value: Any) -> None:
    def push(m: Machine, at: int) -> int:
        m.stack.append(value)
        return at

    TABLE[code[0]] = push


_pushes(b"N", None)
_pushes(b"\x88", True)
_pushes(b"\x89", False)
_pushes(b")", ())


@_op(b"\x80")
def _proto(m: Machine, at: int) -> int:
    if m.data[at] > 5:
        raise FormatError(f"pickle protocol {m.data[at]} is not known")
    m.protocol = m.data[at]
    return at + 1


@_op(b"\x95")
def _frame(m: Machine, at: int) -> int:
    (length,) = struct.unpack_from("<Q", m.data, at)
    if length > m.size - at - 8:
        raise FormatError(
            f"a frame of {length} bytes is announced, but only {m.size - at - 8} follow"
        )
    return at + 8


@_op(b".")
def _stop(m: Machine, at: int) -> int:
    return -1


# Numbers


def _int_op(code: bytes, form: str) -> None:
    number = struct.Struct(form)

    def push(m: Machine, at: int) -> int:
        m.stack.append(number.unpack_from(m.data, at)[0])
        return at + number.size

    TABLE[code[0]] = push


_int_op(b"M", "<H")
_int_op(b"J", "<i")
_int_op(b"G", ">d")


@_op(b"K")
def _binint1(m: Machine, at: int) -> int:
    m.stack.append(m.data[at])
    return at + 1


def _long(m: Machine, at: int, length: int) -> int:
    if not 0 <= length <= m.limits.int_bytes:
        raise FormatError(f"an integer of {length} bytes")
    m.stack.append(int.from_bytes(m.take(at, length), "little", signed=True))
    return at + length


@_op(b"\x8a")
def _long1(m: Machine, at: int) -> int:
    return _long(m, at + 1, m.data[at])


@_op(b"\x8b")
def _long4(m: Machine, at: int) -> int:
    return _long(m, at + 4, struct.unpack_from("<i", m.data, at)[0])


@_op(b"I", b"L")
def _decimal(m: Machine, at: int) -> int:
    line, end = m.line(at)
    if m.data[at - 1] == ord("I") and line in (b"00", b"01"):
        m.stack.append(line == b"01")
        return end
    if len(line) > 2 * m.limits.int_bytes:
        raise FormatError(f"an integer of {len(line)} digits")
    m.stack.append(int(line.removesuffix(b"L")))
    return end


@_op(b"F")
def _float(m: Machine, at: int) -> int:
    line, end = m.line(at)
    m.stack.append(float(line))
    return end


# Text and bytes


def _text_op(code: bytes, form: str, decode: Callable[[bytes], Any]) -> None:
    prefix = struct.Struct(form)

    def push(m: Machine, at: int) -> int:
        start = at + prefix.size
        length: int = prefix.unpack_from(m.data, at)[0]
        m.stack.append(decode(m.take(start, length)))
        return start + length

    TABLE[code[0]] = push


def _utf8(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


@_op(b"\x8c")
def _short_text(m: Machine, at: int) -> int:
    at += 1
    end = at + m.data[at - 1]
    if end > m.size:
        raise FormatError("a text is cut short")
    m.stack.append(m.data[at:end].decode("utf-8", "surrogatepass"))
    return end


_text_op(b"X", "<I", _utf8)
_text_op(b"\x8d", "<Q", _utf8)
_text_op(b"C", "<B", bytes)
_text_op(b"B", "<I", bytes)
_text_op(b"\x8e", "<Q", bytes)
_text_op(b"\x96", "<Q", bytearray)
_text_op(b"U", "<B", _utf8)  # Of Python 2.
_text_op(b"T", "<i", _utf8)


@_op(b"V")
def _unicode(m: Machine, at: int) -> int:
    line, end = m.line(at)
    m.stack.append(line.decode("raw-unicode-escape"))
    return end


@_op(b"S")
def _quoted(m: Machine, at: int) -> int:
    line, end = m.line(at)
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise FormatError("a text without its quotes")
    m.stack.append(_utf8(escape_decode(line[1:-1])[0]))
    return end


# Containers


@_op(b"(")
def _mark(m: Machine, at: int) -> int:
    m.marks.append(len(m.stack))
    return at


@_op(b"\x85")
def _tuple1(m: Machine, at: int) -> int:
    m.count(ROOM)
    m.stack[-1] = (m.stack[-1],)
    return at


@_op(b"\x86")
def _tuple2(m: Machine, at: int) -> int:
    m.count(ROOM)
    last = m.stack.pop()
    m.stack[-1] = (m.stack[-1], last)
    return at


@_op(b"\x87")
def _tuple3(m: Machine, at: int) -> int:
    m.count(ROOM)
    last = m.stack.pop()
    middle = m.stack.pop()
    m.stack[-1] = (m.stack[-1], middle, last)
    return at


@_op(b"t")
def _tuple(m: Machine, at: int) -> int:
    m.count(ROOM)
    m.stack.append(tuple(m.items()))
    return at


@_op(b"]")
def _empty_list(m: Machine, at: int) -> int:
    m.count(ROOM)
    m.stack.append([])
    return at


@_op(b"l")
def _list(m: Machine, at: int) -> int:
    m.count(ROOM)
    m.stack.append(m.items())
    return at


@_op(b"}")
def _empty_dict(m: Machine, at: int) -> int:
    m.count(ROOM)
    m.stack.append({})
    return at


@_op(b"d")
def _dict(m: Machine, at: int) -> int:
    m.count(ROOM)
    target: dict[Any, Any] = {}
    m.set_items(target, m.items())
    m.stack.append(target)
    return at


@_op(b"\x8f")
def _empty_set(m: Machine, at: int) -> int:
    m.count(3 * ROOM)
    m.stack.append(set())
    return at


@_op(b"\x91")
def _frozenset(m: Machine, at: int) -> int:
    m.count(3 * ROOM)
    items = m.items()
    for item in items:
        m.check_key(item)
    m.stack.append(frozenset(items))
    return at


@_op(b"a")
def _append(m: Machine, at: int) -> int:
    item = m.stack.pop()
    m.extend(m.stack[-1], [item])
    return at


@_op(b"e")
def _appends(m: Machine, at: int) -> int:
    items = m.items()
    m.extend(m.stack[-1], items)
    return at


@_op(b"s")
def _setitem(m: Machine, at: int) -> int:
    value, key = m.stack.pop(), m.stack.pop()
    m.set_items(m.stack[-1], [key, value])
    return at


@_op(b"u")
def _setitems(m: Machine, at: int) -> int:
    items = m.items()
    m.set_items(m.stack[-1], items)
    return at


@_op(b"\x90")
def _additems(m: Machine, at: int) -> int:
    items = m.items()
    if type(m.stack[-1]) is not set:
        raise FormatError(f"items are added to a {type(m.stack[-1]).__name__}")
    for item in items:
        m.check_key(item)
    m.stack[-1].update(items)
    return at


# Stack and memo


@_op(b"0")
def _pop(m: Machine, at: int) -> int:
    if m.marks and m.marks[-1] == len(m.stack):
        m.marks.pop()
    else:
        m.stack.pop()
    return at


@_op(b"1")
def _pop_mark(m: Machine, at: int) -> int:
    m.items()
    return at


@_op(b"2")
def _dup(m: Machine, at: int) -> int:
    m.stack.append(m.stack[-1])
    return at


@_op(b"\x94")
def _memoize(m: Machine, at: int) -> int:
    m.room -= ROOM
    if m.room < 0:
        m.count(0)
    m.memo[len(m.memo)] = m.stack[-1]
    return at


def _recall(m: Machine, index: int) -> None:
    try:
        m.stack.append(m.memo[index])
    except KeyError:
        raise FormatError(f"memo entry {index} was never made") from None


@_op(b"q")
def _binput(m: Machine, at: int) -> int:
    m.count(ROOM)
    m.memo[m.data[at]] = m.stack[-1]
    return at + 1


@_op(b"r")
def _long_binput(m: Machine, at: int) -> int:
    m.count(ROOM)
    m.memo[struct.unpack_from("<I", m.data, at)[0]] = m.stack[-1]
    return at + 4


@_op(b"h")
def _binget(m: Machine, at: int) -> int:
    index = m.data[at]
    if index not in m.memo:
        _recall(m, index)
    m.stack.append(m.memo[index])
    return at + 1


@_op(b"j")
def _long_binget(m: Machine, at: int) -> int:
    _recall(m, struct.unpack_from("<I", m.data, at)[0])
    return at + 4


def _memo_line(m: Machine, at: int) -> tuple[int, int]:
    line, end = m.line(at)
    if len(line) > 20:
        raise FormatError("a memo index of more than 20 digits")
    return int(line), end


@_op(b"p")
def _put(m: Machine, at: int) -> int:
    m.count(ROOM)
    index, end = _memo_line(m, at)
    m.memo[index] = m.stack[-1]
    return end


@_op(b"g")
def _get(m: Machine, at: int) -> int:
    index, end = _memo_line(m, at)
    _recall(m, index)
    return end


# Globals and what is built from them


@_op(b"c")
def _global(m: Machine, at: int) -> int:
    module, at = m.line(at)
    name, at = m.line(at)
    m.named(_utf8(module), _utf8(name))
    return at


@_op(b"\x93")
def _stack_global(m: Machine, at: int) -> int:
    name, module = m.stack.pop(), m.stack.pop()
    m.named(module, name)
    return at


@_op(b"R")
def _reduce(m: Machine, at: int) -> int:
    args = m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], args, {}, False)
    return at


@_op(b"\x81")
def _newobj(m: Machine, at: int) -> int:
    args = m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], args, {}, True)
    return at


@_op(b"\x92")
def _newobj_ex(m: Machine, at: int) -> int:
    kwargs, args = m.stack.pop(), m.stack.pop()
    if type(kwargs) is not dict or not all(type(name) is str for name in kwargs):
        raise FormatError("named arguments without names")
    m.charge((kwargs,))
    m.stack[-1] = m.call(m.stack[-1], args, kwargs, True)
    return at


@_op(b"i")
def _inst(m: Machine, at: int) -> int:
    module, at = m.line(at)
    name, at = m.line(at)
    args = tuple(m.items())
    m.named(_utf8(module), _utf8(name))
    m.stack[-1] = m.call(m.stack[-1], args, {}, False)
    return at


@_op(b"o")
def _obj(m: Machine, at: int) -> int:
    function, *args = m.items()
    m.stack.append(m.call(function, tuple(args), {}, False))
    return at


@_op(b"b")
def _build(m: Machine, at: int) -> int:
    state = m.stack.pop()
    m.build(m.stack[-1], state)
    return at


# Opcodes that no checkpoint needs


@_op(b"P")
def _persid(m: Machine, at: int) -> int:
    line, end = m.line(at)
    m.stack.append(_persistent(m, line.decode("ascii")))
    return end


@_op(b"Q")
def _binpersid(m: Machine, at: int) -> int:
    m.stack.append(_persistent(m, m.stack.pop()))
    return at


def _persistent(m: Machine, key: Any) -> Any:
    if m.persistent is None:
        raise FormatError("a persistent id, which means nothing here")
    return m.persistent(key)


@_op(b"\x82", b"\x83", b"\x84")
def _extension(m: Machine, at: int) -> NoReturn:
    raise FormatError("a class by its number in a registry of extensions")


@_op(b"\x97", b"\x98")
def _buffer(m: Machine, at: int) -> NoReturn:
    raise FormatError("a buffer from outside the pickle")
