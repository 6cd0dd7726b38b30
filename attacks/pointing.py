"""Metadata that points to data that is missing or must not be read."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from attacks import pickles as p
from attacks.attack import Attack, Attacks, in_metadata

__all__ = ["attacks"]


def _paths() -> Attacks:
    for name, path in {
        "path_up": "../data",
        "path_up_inside": "a/../../data",
        "path_absolute": "/etc/passwd",
        "path_drive": "C:/data",
        "path_backslash": "..\\data",
        "path_nul": "data\0.txt",
        "path_empty": "",
        "path_dot": "./.",
        "path_surrogate": "data\ud800",
        "path_long": "a/" * 5000,
    }.items():
        storage = [p.key("w", p.size(0, 0)), p.place(path, 0, p.GOOD)]
        yield (
            name,
            Attack(
                in_metadata(p.metadata({"w": p.tensor()}, storage)),
                "file name",
                f"A file {path!r:.30}.",
            ),
        )


def _places() -> Attacks:
    for name, offset, length, error in (
        ("offset_beyond_file", 1 << 40, p.GOOD, "ends at"),
        ("length_beyond_file", 0, 1 << 40, "ends at"),
        ("offset_and_length_overflow", (1 << 62) - 1, (1 << 62) - 1, "ends at"),
        ("offset_negative", -1, p.GOOD, "stored at"),
        ("length_negative", 0, -1, "stored at"),
        ("offset_huge", 1 << 1000, p.GOOD, "stored at"),
        ("length_zero", 0, 0, "not a zip|end"),
    ):
        storage = [p.key("w", p.size(0, 0)), p.place("data", offset, length)]
        yield (
            name,
            Attack(
                in_metadata(p.metadata({"w": p.tensor()}, storage)),
                error,
                f"An item at {offset:.3g} with {length:.3g} bytes.",
            ),
        )
    yield (
        "file_missing",
        Attack(
            in_metadata(
                p.metadata({"w": p.tensor()}, [p.key("w", p.size(0, 0)), p.place("x", 0, 9)])
            ),
            "missing",
            "An item in a file that is not there.",
        ),
    )
    yield (
        "item_missing",
        Attack(
            in_metadata(p.metadata({"w": p.tensor()}, [])),
            "no storage location",
            "A chunk without an item.",
        ),
    )
    twice = [p.key("w", p.size(0, 0)), p.place("data", 0, p.GOOD)] * 2
    yield (
        "item_twice",
        Attack(
            in_metadata(p.metadata({"w": p.tensor()}, twice)),
            "two items",
            "Two for one chunk.",
        ),
    )


def _shapes() -> Attacks:
    def one(shape: bytes, chunks: bytes = b"", props: bytes = b"") -> Callable[[Path], None]:
        storage = [p.key("w", p.size(0, 0)), p.place("data", 0, p.GOOD)]
        entry = p.tensor(shape, chunks, props)
        return in_metadata(p.metadata({"w": entry}, storage))

    def chunks(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> bytes:
        return p.listing(p.chunk(p.size(*offsets), p.size(*sizes)))

    huge = (1 << 40, 1 << 40)
    for name, build, error, what in (
        ("shape_product", one(p.size(*huge), chunks((0, 0), huge)), "too many bytes", "2**80."),
        (
            "shape_large",
            one(p.size(1 << 30, 1 << 10), chunks((0, 0), (1 << 30, 1 << 10))),
            "its item holds|can't come out",
            "A terabyte, out of 24 bytes.",
        ),
        (
            "shape_holes",
            one(p.size(1 << 30, 1 << 10)),
            "hole|gap|cover|not covered|missing",
            "A terabyte that one small chunk is said to cover.",
        ),
        ("shape_negative", one(p.size(-2, 3)), "invalid shape", "A negative size."),
        (
            "shape_dimensions",
            one(p.size(*[1] * 100_000)),
            "too many dimensions",
            "100,000 of them.",
        ),
        ("shape_long", one(p.size(1 << 8_000_000)), "integer of", "A size of a million bytes."),
        ("shape_text", one(p.sequence(p.text("2"), p.text("3"))), "invalid shape", "Text."),
        (
            "shape_floats",
            one(p.sequence(b"G" + struct.pack(">d", 2.5))),
            "invalid shape",
            "A size of 2.5.",
        ),
        (
            "shape_empty_overflow",
            one(p.size(0, 1 << 61, 1 << 61), p.listing()),
            "too many bytes",
            "No elements, and still too large.",
        ),
        ("chunk_outside", one(p.size(2, 3), chunks((0, 0), (2, 4))), "leaves its tensor", "Wide."),
        (
            "chunk_negative",
            one(p.size(2, 3), chunks((0, -1), (2, 3))),
            "box|no storage location",
            "Left of 0.",
        ),
        ("chunk_dimensions", one(p.size(2, 3), chunks((0, 0), (6,))), "box", "Of 1 dimension."),
        ("chunk_other_kind", one(p.size(2, 3), p.listing(p.text("x"))), "chunk that is", "Text."),
        (
            "dtype_unknown",
            one(p.size(2, 3), b"", p.properties(p.named("os", "system"))),
            "unknown dtype",
            "A function is the dtype.",
        ),
        (
            "dtype_other",
            one(p.size(2, 3), b"", p.properties(p.named("torch", "float64"))),
            "its item holds",
            "The item says another one.",
        ),
    ):
        yield name, Attack(build, error, what)


def _names() -> Attacks:
    twice = p.mapping(*[p.text("w"), p.tensor()] * 2)
    state = p.attributes(state_dict_metadata=twice, planner_data=p.NONE, storage_data=p.mapping())
    yield (
        "name_twice",
        Attack(
            in_metadata(p.PROTOCOL + p.new(p.METADATA, "Metadata", state) + p.STOP),
            "one key twice",
            "The second one would hide the first.",
        ),
    )
    names = {"w": p.tensor(), "v": p.tensor()}
    storage = [
        part for name in names for part in (p.key(name, p.size(0, 0)), p.place("data", 0, p.GOOD))
    ]
    for name, first, second, error in (
        ("name_one_path", p.sequence(p.text("a")), p.sequence(p.text("a")), "one path"),
        (
            "name_in_a_leaf",
            p.sequence(p.text("a")),
            p.sequence(p.text("a"), p.text("b")),
            "place of a container",
        ),
        ("name_empty_path", p.sequence(), p.sequence(p.text("b")), "invalid path"),
        (
            "name_deep_path",
            p.sequence(*[p.text("a")] * 10_000),
            p.sequence(p.text("b")),
            "invalid path",
        ),
    ):
        paths = p.mapping(p.text("w"), first, p.text("v"), second)
        yield name, Attack(in_metadata(p.metadata(names, storage, paths)), error, "Paths collide.")
    long = p.mapping(
        p.text("w"),
        p.sequence(p.text("l"), p.number((1 << 31) - 1)),
        p.text("v"),
        p.sequence(p.text("v")),
    )
    yield (
        "name_far_in_a_list",
        Attack(in_metadata(p.metadata(names, storage, long)), "", "Item 2,147,483,647 of a list."),
    )


def attacks() -> Attacks:
    """Return all attacks of this module, by name."""
    yield from _paths()
    yield from _places()
    yield from _shapes()
    yield from _names()
