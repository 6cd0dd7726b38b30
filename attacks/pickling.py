"""Pickles that try to crash, hang or exhaust memory."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from attacks import pickles as p
from attacks.attack import Attack, Attacks, in_metadata, in_object, nested

__all__ = ["attacks"]


def _pickles() -> Attacks:
    yield (
        "pickle_memo_index",
        Attack(
            in_metadata(b"\x80\x02]r\xff\xff\xff\xff."),
            "not of DCP's",
            "Nine bytes for 32 GB of memo.",
        ),
    )
    yield (
        "pickle_truncated",
        Attack(
            in_metadata(p.metadata({"w": p.tensor()}, [])[:-20]),
            "invalid pickle|announced",
            "Cut off.",
        ),
    )
    yield (
        "pickle_no_stop",
        Attack(in_metadata(p.metadata({"w": p.tensor()}, [])[:-1]), "cut short", "No STOP."),
    )
    yield "pickle_empty", Attack(in_metadata(b""), "cut short", "No byte at all.")
    yield (
        "pickle_text_length",
        Attack(
            in_object(b"\x8d" + struct.pack("<Q", 1 << 62) + b"x"),
            "announced",
            "A text of 2**62 bytes.",
        ),
    )
    yield (
        "pickle_frame_length",
        Attack(in_object(b"\x95" + struct.pack("<Q", 1 << 62)), "frame", "A frame of 2**62 bytes."),
    )
    yield (
        "pickle_bytes_length",
        Attack(
            in_object(b"\x96" + struct.pack("<Q", 1 << 40)), "announced", "A terabyte of bytearray."
        ),
    )
    yield (
        "pickle_decimal_long",
        Attack(
            in_object(b"L" + b"9" * 300_000 + b"L\n"),
            "digits",
            "An int of 300,000 digits.",
        ),
    )
    yield (
        "pickle_deep_list",
        Attack(in_object(b"]" * 100_000 + b"a" * 99_999), "nest", "100,000 nested lists."),
    )
    yield (
        "pickle_deep_tuple",
        Attack(in_object(b")" + b"\x85" * 100_000), "nest", "100,000 tuples inside each other."),
    )
    yield (
        "pickle_deep_opaque",
        Attack(
            in_object((p.named("a", "b") + b")\x81") * 5000 + b"b" * 4999),
            "nest",
            "5,000 objects inside each other.",
        ),
    )
    yield "pickle_cyclic_list", Attack(in_object(b"]\x94h\x00a"), "contains itself", "A list.")
    yield (
        "pickle_cyclic_dict",
        Attack(in_object(b"}\x94" + p.text("x") + b"h\x00s"), "contains itself", "A dict."),
    )
    yield (
        "pickle_cyclic_tuple",
        Attack(in_object(b"]\x94(h\x00tah\x00"), "contains itself", "A list in a tuple in it."),
    )
    yield "pickle_laughs", Attack(in_object(nested(90)), "shared", "2**90 items in 90 objects.")
    yield (
        "pickle_sets",
        Attack(
            in_object(b"\x8f\x94" * 200_000 + p.NONE),
            "memory",
            "As many empty sets as fit in a file.",
        ),
    )
    yield (
        "pickle_argument_again",
        Attack(
            in_object(
                p.listing(*[p.NONE] * 20_000)
                + b"\x940"
                + p.named("builtins", "list")
                + b"\x940"
                + (b"h\x01h\x00\x85R0") * 100_000
                + p.NONE
            ),
            "memory",
            "One long list is copied 100,000 times.",
        ),
    )
    yield (
        "pickle_decimal",
        Attack(
            in_object(p.call("decimal", "Decimal", p.text("1e999999999"))),
            "exponent",
            "A number whose int has a billion digits.",
        ),
    )
    array = p.call(
        "numpy.core.multiarray",
        "_reconstruct",
        p.named("numpy", "ndarray"),
        p.sequence(p.number(0)),
        b"C\x01b",
    )
    dtype = p.call("numpy", "dtype", p.text("f8"), b"\x89", b"\x88")
    state = p.sequence(p.number(1), p.sequence(p.number(1 << 40)), dtype, b"\x89", b"C\x01x")
    yield (
        "pickle_array_shape",
        Attack(in_object(array + state + p.BUILD), "numpy array of shape", "8 TB out of one byte."),
    )
    objects = p.call("numpy", "dtype", p.text("O8"), b"\x89", b"\x88")
    state = p.sequence(p.number(1), p.sequence(p.number(1)), objects, b"\x89", p.listing(p.NONE))
    yield (
        "pickle_array_objects",
        Attack(in_object(array + state + p.BUILD), "array of objects", "Pointers from a file."),
    )


_PRIME_1, _PRIME_2, _PRIME_5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
_64 = (1 << 64) - 1


def _clashing(count: int) -> Iterator[tuple[int, int]]:
    """Yield pairs of ints whose tuples have equal hashes in 64-bit CPython from 3.8 on."""
    inverse, first = pow(_PRIME_2, -1, 1 << 64), 0
    while count:
        first += 1
        lane = (_PRIME_5 + first * _PRIME_2) & _64
        lane = ((lane << 31 | lane >> 33) & _64) * _PRIME_1 & _64
        second = (12345 - lane) * inverse & _64
        second -= (second >> 63) << 64
        if abs(second) < (1 << 61) - 1 and second != -1:
            count -= 1
            yield first, second


def _keys() -> Attacks:
    deep = b")" + b"\x85" * 10_000
    yield (
        "key_deep_tuple",
        Attack(in_object(b"}" + deep + b"Ns"), "key nests", "Hashing it crashes the interpreter."),
    )
    yield (
        "key_shared_tuple",
        Attack(in_object(b"}" + nested(60) + b"Ns"), "key", "Hashing it takes 2**60 steps."),
    )
    yield (
        "key_shared_in_set",
        Attack(in_object(b"\x8f(" + nested(60) + b"\x90"), "key", "The same in a set."),
    )
    yield (
        "key_shared_in_frozenset",
        Attack(
            in_object(p.call("builtins", "frozenset", p.listing(nested(60)))), "key", "By a call."
        ),
    )
    yield "key_list", Attack(in_object(b"}]Ns"), "cannot be used as a key", "A list is a key.")
    keys = [p.sequence(p.number(a), p.number(b)) + p.NONE for a, b in _clashing(20_000)]
    yield (
        "key_clashing_tuples",
        Attack(
            in_object(p.mapping(*keys)),
            "one hash",
            "20,000 keys with one hash: 200 million comparisons.",
        ),
    )
    keys = [p.number(n * ((1 << 61) - 1)) + p.NONE for n in range(1, 20_000)]
    yield (
        "key_clashing_ints",
        Attack(in_object(p.mapping(*keys)), "one hash", "With ints."),
    )
    paths = p.mapping(p.text("w"), nested(60))
    storage = [p.key("w", p.size(0, 0)), p.place("data", 0, p.GOOD)]
    yield (
        "key_path",
        Attack(
            in_metadata(p.metadata({"w": p.tensor()}, storage, paths)),
            "path",
            "A path, used as a key.",
        ),
    )
    storage = [
        p.new(p.METADATA, "MetadataIndex", p.attributes(fqn=p.text("w"), offset=nested(60))),
        p.place("data", 0, p.GOOD),
    ]
    yield (
        "key_offsets",
        Attack(
            in_metadata(p.metadata({"w": p.tensor()}, storage)),
            "offsets",
            "Offsets as a key.",
        ),
    )


def attacks() -> Attacks:
    """Return all attacks of this module, by name."""
    yield from _pickles()
    yield from _keys()
