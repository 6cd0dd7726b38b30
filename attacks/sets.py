"""Safetensors files with false information."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from attacks import pickles as p
from attacks.attack import Attack, Attacks

__all__ = ["attacks"]


def _sets() -> Attacks:
    def file(data: bytes, listing: bytes | None = None) -> Callable[[Path], None]:
        def build(folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(data)
            if listing is not None:
                (folder / "model.safetensors.index.json").write_bytes(listing)

        return build

    def entry(begin: int, end: int, shape: tuple[int, ...] = (4,), kind: str = "U8") -> object:
        return {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}

    good = p.safetensors({"a": entry(0, 4)}, b"1234")
    up = json.dumps({"weight_map": {"a": "../model.safetensors"}}).encode()
    other = json.dumps({"weight_map": {"b": "model.safetensors"}}).encode()
    many = b'{"a":' + b"[" * 200_000
    twice = b'"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
    for name, build, error, what in (
        ("set_header_length", file(p.safetensors({}, length=1 << 60)), "header of", "An exabyte."),
        ("set_header_truncated", file(b"\x10\0\0\0"), "too short", "Four bytes."),
        ("set_header_json", file(p.safetensors(b"{nothing")), "broken JSON", "Not JSON."),
        ("set_header_deep", file(p.safetensors(many)), "broken JSON", "200,000 levels of JSON."),
        (
            "set_header_digits",
            file(p.safetensors(b'{"a":' + b"9" * 200_000 + b"}")),
            "broken JSON|invalid entry",
            "A number of 200,000 digits.",
        ),
        (
            "set_name_twice",
            file(p.safetensors(b"{%b,%b}" % (twice, twice), b"1234")),
            "twice",
            "One hides.",
        ),
        (
            "set_overlap",
            file(p.safetensors({"a": entry(0, 4), "b": entry(2, 6)}, b"123456")),
            "in no tensor, or in two",
            "Two tensors share bytes.",
        ),
        (
            "set_hole",
            file(p.safetensors({"a": entry(0, 4), "b": entry(6, 10)}, b"1234567890")),
            "in no tensor, or in two",
            "Bytes that hide between tensors.",
        ),
        ("set_tail", file(good + b"hidden"), "the file at", "Bytes that hide behind them."),
        (
            "set_beyond",
            file(p.safetensors({"a": entry(0, 1 << 40, (1 << 40,))})),
            "the file at",
            "A terabyte that is not there.",
        ),
        ("set_shape", file(p.safetensors({"a": entry(0, 4, (5,))}, b"1234")), "bytes for", "Five."),
        ("set_negative", file(p.safetensors({"a": entry(-4, 0)}, b"")), "offsets", "Before it."),
        (
            "set_dtype",
            file(p.safetensors({"a": entry(0, 4, (4,), "os.system")}, b"1234")),
            "unknown dtype",
            "No dtype.",
        ),
        ("set_index_up", file(good, up), "file name", "The index points out of the folder."),
        ("set_index_missing", file(good, other), "should be here", "At what is not there."),
        ("set_index_json", file(good, b"[" * 100_000), "broken JSON", "Deep JSON."),
    ):
        yield name, Attack(build, error, what)


def attacks() -> Attacks:
    """Return all attacks of this module, by name."""
    yield from _sets()
