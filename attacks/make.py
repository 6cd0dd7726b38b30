"""Malicious checkpoints. `python attacks/make.py FOLDER` writes each into a folder of its name.

Each one must be refused with an error that names the file and the place, or open inert; within a
second, in little memory, and with nothing executed. `tests/attacks/test_attacks.py` holds that.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pickles as p
import zstandard

__all__ = ["ATTACKS", "CANARY", "Attack"]

CANARY = "executed"
"""A file of this name appears in the current folder if code from a checkpoint runs."""

_COMMAND = f"touch {CANARY}"


@dataclass(frozen=True)
class Attack:
    """A malicious checkpoint.

    Attributes:
        build: writes it into an empty folder.
        error: what a message must match; "" where it opens, inert.
        what: what it tries, in one sentence.
    """

    build: Callable[[Path], None]
    error: str
    what: str


def _attacks() -> Iterator[tuple[str, Attack]]:
    for group in (_execution, _paths, _places, _shapes, _pickles, _keys, _names, _zips, _sets):
        yield from group()


def _object(pickle: bytes) -> Callable[[Path], None]:
    return lambda folder: p.with_object(folder, p.PROTOCOL + pickle + p.STOP)


def _metadata(data: bytes) -> Callable[[Path], None]:
    return lambda folder: p.with_metadata(folder, data)


def _item(item: bytes, entry: bytes = b"", **more: bytes) -> Callable[[Path], None]:
    return lambda folder: p.with_tensor(folder, item, entry, **more)


_Attacks = Iterator[tuple[str, Attack]]


def _execution() -> _Attacks:
    system = p.call("os", "system", p.text(_COMMAND))
    source = f"__import__('pathlib').Path({CANARY!r}).touch()"
    inert = [
        ("object_os_system", system, "An object calls os.system."),
        ("object_posix_system", p.call("posix", "system", p.text(_COMMAND)), "By another name."),
        ("object_eval", p.call("builtins", "eval", p.text(source)), "An object evaluates code."),
        ("object_exec", p.call("builtins", "exec", p.text(source)), "An object executes code."),
        (
            "object_getattr_chain",
            p.call(
                "builtins",
                "getattr",
                p.call("builtins", "__import__", p.text("os")),
                p.text("system"),
            )
            + p.sequence(p.text(_COMMAND))
            + p.REDUCE,
            "The function to call is the result of a call.",
        ),
        (
            "object_qualified_name",
            p.call("pathlib", "Path.touch", p.call("pathlib", "PosixPath", p.text(CANARY))),
            "A method by its qualified name.",
        ),
        (
            "object_inst",
            p.MARK + p.text(_COMMAND) + b"ios\nsystem\n",
            "The opcode INST of protocol 0 calls by name.",
        ),
        (
            "object_obj",
            p.MARK + p.named("os", "system") + p.text(_COMMAND) + b"o",
            "The opcode OBJ calls what is on the stack.",
        ),
        (
            "object_newobj_ex",
            p.named("subprocess", "Popen")
            + p.sequence(p.listing(p.text("touch"), p.text(CANARY)))
            + p.mapping()
            + b"\x92",
            "A process as a new instance.",
        ),
        (
            "object_slot_state",
            p.new(
                "collections",
                "UserDict",
                p.sequence(p.NONE, p.attributes(__class__=p.named("os", "_wrap_close"))),
            ),
            "A state for slots sets __class__.",
        ),
        (
            "object_partial",
            p.call("functools", "partial", p.named("os", "system"), p.text(_COMMAND)) + b")R",
            "A partial function is made, and called.",
        ),
        (
            "object_torch_load",
            p.call("torch", "load", p.text(CANARY)),
            "torch.load inside torch.load.",
        ),
        (
            "object_defaultdict",
            p.call("collections", "defaultdict", p.named("os", "getpid")),
            "Reading a missing key calls the factory.",
        ),
    ]
    for name, pickle, what in inert:
        yield name, Attack(_object(pickle), "", what)
    entries = {"w": p.tensor()}
    good = [p.key("w", p.size(0, 0)), p.place("data", 0, p.GOOD)]
    paths = p.mapping(p.text("w"), system)
    yield (
        "metadata_os_system",
        Attack(
            _metadata(p.metadata(entries, good, paths)),
            "path",
            "A path is the result of os.system.",
        ),
    )
    yield (
        "metadata_is_a_call",
        Attack(_metadata(p.PROTOCOL + system + p.STOP), "not of DCP's Metadata", "Only the call."),
    )
    yield (
        "metadata_class_state",
        Attack(
            _metadata(
                p.PROTOCOL
                + p.new(
                    p.METADATA,
                    "Metadata",
                    p.sequence(p.NONE, p.attributes(__class__=p.named("os", "_wrap_close"))),
                )
                + p.STOP
            ),
            "without its attributes",
            "A slot state for Metadata sets __class__.",
        ),
    )
    yield (
        "object_list_state",
        Attack(
            _object(p.listing() + p.mapping() + p.BUILD),
            "takes no state",
            "A list is given a state.",
        ),
    )
    yield (
        "object_extension",
        Attack(_object(b"\x82\x01"), "registry of extensions", "A class by its number."),
    )
    yield (
        "object_persistent_id",
        Attack(
            _object(p.text("file:///etc/passwd") + b"Q"), "not a storage", "A free persistent id."
        ),
    )
    yield (
        "metadata_persistent_id",
        Attack(
            _metadata(p.PROTOCOL + p.text("x") + b"Q" + p.STOP), "persistent id", "In the metadata."
        ),
    )
    yield (
        "object_buffer",
        Attack(_object(b"\x97"), "buffer from outside", "A buffer that is not in the pickle."),
    )


def _paths() -> _Attacks:
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
                _metadata(p.metadata({"w": p.tensor()}, storage)),
                "file name",
                f"A file {path!r:.30}.",
            ),
        )


def _places() -> _Attacks:
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
                _metadata(p.metadata({"w": p.tensor()}, storage)),
                error,
                f"An item at {offset:.3g} with {length:.3g} bytes.",
            ),
        )
    yield (
        "file_missing",
        Attack(
            _metadata(
                p.metadata({"w": p.tensor()}, [p.key("w", p.size(0, 0)), p.place("x", 0, 9)])
            ),
            "missing",
            "An item in a file that is not there.",
        ),
    )
    yield (
        "item_missing",
        Attack(
            _metadata(p.metadata({"w": p.tensor()}, [])),
            "stored nowhere",
            "A chunk without an item.",
        ),
    )
    twice = [p.key("w", p.size(0, 0)), p.place("data", 0, p.GOOD)] * 2
    yield (
        "item_twice",
        Attack(
            _metadata(p.metadata({"w": p.tensor()}, twice)), "two items", "A chunk with two items."
        ),
    )


def _shapes() -> _Attacks:
    def one(shape: bytes, chunks: bytes = b"", props: bytes = b"") -> Callable[[Path], None]:
        storage = [p.key("w", p.size(0, 0)), p.place("data", 0, p.GOOD)]
        entry = p.tensor(shape, chunks, props)
        return _metadata(p.metadata({"w": entry}, storage))

    def chunks(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> bytes:
        return p.listing(p.chunk(p.size(*offsets), p.size(*sizes)))

    huge = (1 << 40, 1 << 40)
    for name, build, error, what in (
        ("shape_product", one(p.size(*huge), chunks((0, 0), huge)), "no memory holds", "2**80."),
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
        ("shape_negative", one(p.size(-2, 3)), "shape that is none", "A negative size."),
        (
            "shape_dimensions",
            one(p.size(*[1] * 100_000)),
            "too many dimensions",
            "100,000 of them.",
        ),
        ("shape_long", one(p.size(1 << 8_000_000)), "integer of", "A size of a million bytes."),
        ("shape_text", one(p.sequence(p.text("2"), p.text("3"))), "shape that is none", "Text."),
        (
            "shape_floats",
            one(p.sequence(b"G" + struct.pack(">d", 2.5))),
            "shape that is none",
            "A size of 2.5.",
        ),
        (
            "shape_empty_overflow",
            one(p.size(0, 1 << 61, 1 << 61), p.listing()),
            "no memory holds",
            "No elements, and still too large.",
        ),
        ("chunk_outside", one(p.size(2, 3), chunks((0, 0), (2, 4))), "leaves its tensor", "Wide."),
        ("chunk_negative", one(p.size(2, 3), chunks((0, -1), (2, 3))), "box|nowhere", "Left of 0."),
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


def _nested(count: int) -> bytes:
    """A tuple of two of the tuple before it, and so on: 2 ** count items in `count` objects."""
    return p.NONE + b"2\x86" * count


def _pickles() -> _Attacks:
    yield (
        "pickle_memo_index",
        Attack(
            _metadata(b"\x80\x02]r\xff\xff\xff\xff."),
            "not of DCP's",
            "Nine bytes for 32 GB of memo.",
        ),
    )
    yield (
        "pickle_truncated",
        Attack(
            _metadata(p.metadata({"w": p.tensor()}, [])[:-20]),
            "broken pickle|announced",
            "Cut off.",
        ),
    )
    yield (
        "pickle_no_stop",
        Attack(_metadata(p.metadata({"w": p.tensor()}, [])[:-1]), "cut short", "No STOP."),
    )
    yield "pickle_empty", Attack(_metadata(b""), "cut short", "No byte at all.")
    yield (
        "pickle_text_length",
        Attack(
            _object(b"\x8d" + struct.pack("<Q", 1 << 62) + b"x"),
            "announced",
            "A text of 2**62 bytes.",
        ),
    )
    yield (
        "pickle_frame_length",
        Attack(_object(b"\x95" + struct.pack("<Q", 1 << 62)), "frame", "A frame of 2**62 bytes."),
    )
    yield (
        "pickle_bytes_length",
        Attack(
            _object(b"\x96" + struct.pack("<Q", 1 << 40)), "announced", "A terabyte of bytearray."
        ),
    )
    yield (
        "pickle_decimal_long",
        Attack(
            _object(b"L" + b"9" * 300_000 + b"L\n"), "digits", "An int that takes a minute to read."
        ),
    )
    yield (
        "pickle_deep_list",
        Attack(_object(b"]" * 100_000 + b"a" * 99_999), "nest", "100,000 lists inside each other."),
    )
    yield (
        "pickle_deep_tuple",
        Attack(_object(b")" + b"\x85" * 100_000), "nest", "100,000 tuples inside each other."),
    )
    yield (
        "pickle_deep_opaque",
        Attack(
            _object(
                b"N"
                + (b"\x85" + p.named("a", "b") + b"0") * 0
                + b"".join([p.named("a", "b") + b")\x81"] * 5000)
                + b"b" * 4999
            ),
            "nest",
            "5,000 objects inside each other.",
        ),
    )
    yield "pickle_cyclic_list", Attack(_object(b"]\x94h\x00a"), "contains itself", "A list.")
    yield (
        "pickle_cyclic_dict",
        Attack(_object(b"}\x94" + p.text("x") + b"h\x00s"), "contains itself", "A dict."),
    )
    yield (
        "pickle_cyclic_tuple",
        Attack(_object(b"]\x94(h\x00tah\x00"), "contains itself", "A list in a tuple in it."),
    )
    yield (
        "pickle_laughs",
        Attack(
            _object(_nested(90)), "", "2**90 items, shared: harmless as long as nobody walks them."
        ),
    )
    yield (
        "pickle_sets",
        Attack(
            _object(b"\x8f\x94" * 400_000 + p.NONE),
            "memory",
            "As many empty sets as fit in a file.",
        ),
    )
    yield (
        "pickle_argument_again",
        Attack(
            _object(
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
            _object(p.call("decimal", "Decimal", p.text("1e999999999"))),
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
        Attack(_object(array + state + p.BUILD), "numpy array of shape", "8 TB out of one byte."),
    )
    objects = p.call("numpy", "dtype", p.text("O8"), b"\x89", b"\x88")
    state = p.sequence(p.number(1), p.sequence(p.number(1)), objects, b"\x89", p.listing(p.NONE))
    yield (
        "pickle_array_objects",
        Attack(_object(array + state + p.BUILD), "array of objects", "Pointers from a file."),
    )


_PRIME_1, _PRIME_2, _PRIME_5 = 11400714785074694791, 14029467366897019727, 2870177450012600261
_64 = (1 << 64) - 1


def _clashing(count: int) -> Iterator[tuple[int, int]]:
    """Pairs of ints whose tuples have one hash, in CPython of 64 bits from 3.8 on."""
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


def _keys() -> _Attacks:
    deep = b")" + b"\x85" * 10_000
    yield (
        "key_deep_tuple",
        Attack(_object(b"}" + deep + b"Ns"), "key nests", "Hashing it crashes the interpreter."),
    )
    yield (
        "key_shared_tuple",
        Attack(_object(b"}" + _nested(60) + b"Ns"), "key", "Hashing it takes 2**60 steps."),
    )
    yield (
        "key_shared_in_set",
        Attack(_object(b"\x8f(" + _nested(60) + b"\x90"), "key", "The same in a set."),
    )
    yield (
        "key_shared_in_frozenset",
        Attack(
            _object(p.call("builtins", "frozenset", p.listing(_nested(60)))), "key", "By a call."
        ),
    )
    yield "key_list", Attack(_object(b"}]Ns"), "can't be a key", "A list is a key.")
    keys = [p.sequence(p.number(a), p.number(b)) + p.NONE for a, b in _clashing(20_000)]
    yield (
        "key_clashing_tuples",
        Attack(
            _object(p.mapping(*keys)),
            "one hash",
            "20,000 keys with one hash: 200 million comparisons.",
        ),
    )
    keys = [p.number(n * ((1 << 61) - 1)) + p.NONE for n in range(1, 20_000)]
    yield "key_clashing_ints", Attack(_object(p.mapping(*keys)), "one hash", "The same with ints.")
    paths = p.mapping(p.text("w"), _nested(60))
    storage = [p.key("w", p.size(0, 0)), p.place("data", 0, p.GOOD)]
    yield (
        "key_path",
        Attack(
            _metadata(p.metadata({"w": p.tensor()}, storage, paths)),
            "path",
            "A path, used as a key.",
        ),
    )
    storage = [
        p.new(p.METADATA, "MetadataIndex", p.attributes(fqn=p.text("w"), offset=_nested(60))),
        p.place("data", 0, p.GOOD),
    ]
    yield (
        "key_offsets",
        Attack(
            _metadata(p.metadata({"w": p.tensor()}, storage)), "offsets", "Offsets, used as a key."
        ),
    )


def _names() -> _Attacks:
    twice = p.mapping(*[p.text("w"), p.tensor()] * 2)
    state = p.attributes(state_dict_metadata=twice, planner_data=p.NONE, storage_data=p.mapping())
    yield (
        "name_twice",
        Attack(
            _metadata(p.PROTOCOL + p.new(p.METADATA, "Metadata", state) + p.STOP),
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
        ("name_empty_path", p.sequence(), p.sequence(p.text("b")), "path is none"),
        (
            "name_deep_path",
            p.sequence(*[p.text("a")] * 10_000),
            p.sequence(p.text("b")),
            "path is none",
        ),
    ):
        paths = p.mapping(p.text("w"), first, p.text("v"), second)
        yield name, Attack(_metadata(p.metadata(names, storage, paths)), error, "Paths collide.")
    long = p.mapping(
        p.text("w"),
        p.sequence(p.text("l"), p.number((1 << 31) - 1)),
        p.text("v"),
        p.sequence(p.text("v")),
    )
    yield (
        "name_far_in_a_list",
        Attack(_metadata(p.metadata(names, storage, long)), "", "Item 2,147,483,647 of a list."),
    )


def _find(item: bytes, signature: bytes, name: str, at: int) -> int:
    """Where the header (local or of the directory) of a record is."""
    found = item.find(signature)
    while found >= 0:
        if item[found + at : found + at + len(name)] == name.encode():
            return found
        found = item.find(signature, found + 1)
    raise ValueError(name)


def _patched(item: bytes, at: int, form: str, value: int) -> bytes:
    data = struct.pack(form, value)
    return item[:at] + data + item[at + len(data) :]


def _central(item: bytes, field: int, form: str, value: int, name: str = "archive/data/0") -> bytes:
    return _patched(item, _find(item, b"PK\1\2", name, 46) + field, form, value)


def _local(item: bytes, field: int, form: str, value: int) -> bytes:
    return _patched(item, _find(item, b"PK\3\4", "archive/data/0", 30) + field, form, value)


def _zips() -> _Attacks:
    good = p.container(p.tensor_pickle())
    end = good.rfind(b"PK\5\6")
    pickle_at = _find(good, b"PK\3\4", "archive/data.pkl", 30)
    twice = good.replace(b"archive/version", b"archive/dataXpkl").replace(b"dataXpkl", b"data.pkl")
    expanded = p.tensor_pickle((1 << 40,), (0,), count=6)
    wide = p.tensor(p.size(1 << 40), p.listing(p.chunk(p.size(0), p.size(1 << 40))))
    for name, item, error, what in (
        (
            "zip_size",
            _central(_central(good, 24, "<I", 1 << 30), 20, "<I", 1 << 30),
            "other sizes|beyond",
            "The directory says a gigabyte.",
        ),
        (
            "zip_small_size",
            _central(_central(good, 24, "<I", 4), 20, "<I", 4),
            "other sizes",
            "The directory says four bytes.",
        ),
        ("zip_offset", _central(good, 42, "<I", 1 << 31), "beyond", "A record beyond the item."),
        (
            "zip_count",
            _patched(_patched(good, end + 8, "<H", 60_000), end + 10, "<H", 60_000),
            "directory of",
            "60,000 records in 200 bytes.",
        ),
        (
            "zip_count64",
            _patched(good, end + 8, "<H", 0xFFFF),
            "zip64|missing|beyond",
            "More records than 16 bits hold.",
        ),
        ("zip_directory_offset", _patched(good, end + 16, "<I", 1 << 31), "beyond", "Elsewhere."),
        ("zip_directory_size", _patched(good, end + 12, "<I", 1 << 31), "directory", "Large."),
        (
            "zip_overlap",
            _central(good, 42, "<I", pickle_at, "archive/version"),
            "overlaps|another name",
            "Two records share their bytes.",
        ),
        ("zip_duplicate", twice, "two records|records data.pkl", "Two records of one name."),
        (
            "zip_local_name",
            good.replace(b"archive/data/0", b"archive/data/1", 1),
            "another name",
            "Local header and directory disagree.",
        ),
        ("zip_local_size", _local(good, 18, "<I", 5), "other sizes", "They disagree on the size."),
        ("zip_encrypted", _central(good, 8, "<H", 1), "encrypted", "A record is encrypted."),
        ("zip_compressed", p.container(p.tensor_pickle(), compress=True), "compressed", "One bit."),
        (
            "zip_bomb",
            p.container(p.tensor_pickle(), bytes(1 << 26), compress=True),
            "compressed",
            "64 MB in 64 KB.",
        ),
        ("zip_no_pickle", good.replace(b"data.pkl", b"data.pkX"), "0 records", "No data.pkl."),
        (
            "zip_legacy",
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(100),
            "before 1.6",
            "Not a zip, but an older format.",
        ),
        ("zip_garbage", bytes(200), "not a zip", "Zeros."),
        (
            "zip_big_endian",
            p.container(p.tensor_pickle(), more=(("archive/byteorder", b"big"),)),
            "big-endian",
            "Bytes in the other order.",
        ),
        (
            "storage_small",
            p.container(p.tensor_pickle(count=2)),
            "reaches beyond",
            "A storage of two elements for six.",
        ),
        (
            "storage_lies",
            p.container(p.tensor_pickle(), p.PAYLOAD[:8]),
            "holds 8 bytes",
            "A storage of six elements in eight bytes.",
        ),
        ("storage_missing", p.container(p.tensor_pickle(), None), "without a record", "None."),
        ("storage_offset", p.container(p.tensor_pickle(offset=1 << 40)), "reaches beyond", "Far."),
        (
            "stride_outside",
            p.container(p.tensor_pickle(strides=(1 << 40, 1))),
            "reaches beyond",
            "Row 1 is a terabyte away.",
        ),
        ("stride_negative", p.container(p.tensor_pickle(strides=(3, -1))), "strides", "Backwards."),
        (
            "storage_class",
            p.container(p.tensor_pickle(kind="load")),
            "unknown class",
            "A function is the storage's class.",
        ),
    ):
        yield name, Attack(_item(item), error, what)
    yield (
        "stride_bomb",
        Attack(
            lambda folder: _expanded(folder, p.container(expanded), wide),
            "come out",
            "A terabyte of one element.",
        ),
    )
    tensors = p.PROTOCOL + p.listing(*[p.tensor_pickle((1 << 20,), (0,))[2:-1]] * 100) + p.STOP
    yield (
        "object_stride_bomb",
        Attack(
            lambda folder: _with_storage(folder, tensors),
            "much more memory",
            "400 MB of tensors out of 24 bytes, inside an object.",
        ),
    )
    zeros = p.container(p.PROTOCOL + p.NONE + p.STOP, bytes(1 << 31 if False else 1 << 28))
    bomb = zstandard.ZstdCompressor().compress(zeros)
    transform = p.listing(p.text("stream.zstd/1"))
    yield (
        "zstd_bomb",
        Attack(
            _item(bomb, transform_descriptors=transform), "decompresses to more", "256 MB in 9 KB."
        ),
    )
    yield (
        "zstd_broken",
        Attack(
            _item(b"(\xb5/\xfd" + bytes(50), transform_descriptors=transform), "zstd|zip", "Noise."
        ),
    )
    yield (
        "transform_unknown",
        Attack(
            _item(good, transform_descriptors=p.listing(p.text("stream.exec/1"))),
            "unknown stream transform",
            "A transform that does not exist.",
        ),
    )


def _expanded(folder: Path, item: bytes, entry: bytes) -> None:
    storage = [p.key("w", p.size(0)), p.place("data", 0, len(item))]
    (folder / ".metadata").write_bytes(p.metadata({"w": entry}, storage))
    (folder / "data").write_bytes(item)


def _with_storage(folder: Path, pickle: bytes) -> None:
    item = p.container(pickle)
    storage = [p.key("o"), p.place("data", 0, len(item))]
    (folder / ".metadata").write_bytes(p.metadata({"o": p.entry_of_bytes()}, storage))
    (folder / "data").write_bytes(item)


def _sets() -> _Attacks:
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
    twice = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},' * 2
    for name, build, error, what in (
        ("set_header_length", file(p.safetensors({}, length=1 << 60)), "header of", "An exabyte."),
        ("set_header_truncated", file(b"\x10\0\0\0"), "too short", "Four bytes."),
        ("set_header_json", file(p.safetensors(b"{nothing")), "broken JSON", "Not JSON."),
        ("set_header_deep", file(p.safetensors(many)), "broken JSON", "200,000 levels of JSON."),
        (
            "set_header_digits",
            file(p.safetensors(b'{"a":' + b"9" * 200_000 + b"}")),
            "broken JSON|entry that is none",
            "A number of 200,000 digits.",
        ),
        ("set_name_twice", file(p.safetensors(twice[:-1] + b"}", b"1234")), "twice", "One hides."),
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


ATTACKS: Mapping[str, Attack] = dict(_attacks())


def main() -> None:
    root = Path(sys.argv[1])
    for name, attack in ATTACKS.items():
        folder = root / name
        folder.mkdir(parents=True)
        attack.build(folder)
        print(f"{name}: {attack.what}")


if __name__ == "__main__":
    main()
