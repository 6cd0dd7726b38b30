"""The vocabulary: frozen values that every room shares.

A *tensor* is known by its name, dtype and global shape. It is stored as one or more *chunks*, each
a *box* of it. The bytes of a chunk are its *payload*; an *item* is the container around a payload.
An *object* is any value that is not a tensor.

Two views of one thing live here: single values (`TensorInfo`, `Chunk`, ...) for people, and
columns (`Index` and its tables) for arithmetic over many of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from shardkeep.errors import FormatError

__all__ = [
    "DTYPES",
    "ITEMSIZES",
    "MAX_DIMS",
    "Box",
    "ByteRange",
    "Chunk",
    "Chunks",
    "Claim",
    "DType",
    "Frame",
    "Framing",
    "Index",
    "ObjectInfo",
    "Objects",
    "Opaque",
    "Progress",
    "Step",
    "Structure",
    "TensorInfo",
    "Tensors",
    "YieldGil",
    "never_yield",
]

I64 = NDArray[np.int64]

MAX_DIMS = 64
"""Dimensions of a tensor at most: the limit of torch's own iterators, and of numpy 2."""


@dataclass(frozen=True, slots=True)
class DType:
    """A tensor element type, by torch's name.

    Attributes:
        name: torch's name without the module, such as "bfloat16".
        numpy: what `read` returns, little-endian; its item size is the stored one.
        note: set where numpy only carries the bits: what comes out, in words.
    """

    name: str
    numpy: np.dtype[Any]
    note: str = ""

    @property
    def itemsize(self) -> int:
        """Bytes of one element, as stored."""
        return self.numpy.itemsize

    @staticmethod
    def named(name: str) -> DType:
        """The dtype of that name (with or without "torch."); FormatError if there is none."""
        dtype = _BY_NAME.get(name.removeprefix("torch."))
        if dtype is None:
            raise FormatError(f"unknown dtype {name!r}")
        return dtype

    @property
    def code(self) -> int:
        """Position in `DTYPES`: how columns hold a dtype in memory (files hold its name)."""
        return _CODES[self.name]

    def __str__(self) -> str:
        return self.name


def _dtypes() -> Iterator[DType]:
    for name in (
        "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
        "float16 float32 float64 complex64 complex128"
    ).split():
        yield DType(name, np.dtype(name).newbyteorder("<"))
    for name in (
        "bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"
    ).split():
        yield DType(name, np.dtype(getattr(ml_dtypes, name)))
    half = np.dtype([("real", "<f2"), ("imag", "<f2")])
    yield DType("complex32", half, "pairs of float16, as fields 'real' and 'imag'")
    brain = np.dtype([("real", ml_dtypes.bfloat16), ("imag", ml_dtypes.bfloat16)])
    yield DType("bcomplex32", brain, "pairs of bfloat16, as fields 'real' and 'imag'")
    packed = "two 4-bit floats (e2m1) a byte, packed as they are stored"
    yield DType("float4_e2m1fn_x2", np.dtype(np.uint8), packed)
    for name, carrier in (("qint8", "i1"), ("quint8", "u1"), ("qint32", "<i4")):
        note = "the quantized integers, without scale and zero point"
        yield DType(name, np.dtype(carrier), note)
    for name in ("quint4x2", "quint2x4"):
        yield DType(name, np.dtype(np.uint8), "packed quantized integers, as they are stored")
    for bits in range(1, 8):
        yield DType(f"uint{bits}", np.dtype(np.uint8), f"a byte that holds {bits} bits")
        yield DType(f"int{bits}", np.dtype(np.uint8), f"a byte that holds {bits} bits")
    for name in ("bits8", "bits1x8", "bits2x4", "bits4x2"):
        yield DType(name, np.dtype(np.uint8), "raw bits")
    yield DType("bits16", np.dtype("<u2"), "raw bits")


DTYPES: tuple[DType, ...] = tuple(_dtypes())
ITEMSIZES: NDArray[np.int64] = np.array([dtype.itemsize for dtype in DTYPES], dtype=np.int64)
"""Bytes of an element, by the code of its dtype."""
_BY_NAME = {dtype.name: dtype for dtype in DTYPES}
_CODES = {dtype.name: code for code, dtype in enumerate(DTYPES)}


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor: `sizes[d]` elements from `offsets[d]` on, in every dimension d."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Box:
        return Box((0,) * len(shape), tuple(shape))

    @property
    def ndim(self) -> int:
        return len(self.sizes)

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar, 0 if any size is 0."""
        return prod(self.sizes)

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(o + s for o, s in zip(self.offsets, self.sizes, strict=True))

    def within(self, shape: tuple[int, ...]) -> bool:
        """Whether the box lies inside a tensor of that shape."""
        return len(shape) == self.ndim and all(
            o >= 0 and s >= 0 and o + s <= n
            for o, s, n in zip(self.offsets, self.sizes, shape, strict=True)
        )

    def intersect(self, other: Box) -> Box | None:
        """What both boxes hold, or None if that is empty. Both must have the same ndim."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = tuple(map(min, self.ends, other.ends))
        sizes = tuple(e - s for s, e in zip(starts, ends, strict=True))
        return None if any(s <= 0 for s in sizes) else Box(starts, sizes)

    def relative_to(self, outer: Box) -> Box:
        """The same box, with offsets counted from the start of `outer`."""
        moved = tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True))
        return Box(moved, self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """For indexing an array of the global shape."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    def __str__(self) -> str:
        return f"[{', '.join(f'{o}:{e}' for o, e in zip(self.offsets, self.ends, strict=True))}]"


@dataclass(frozen=True, slots=True)
class ByteRange:
    """`length` bytes of a file (named relative to the checkpoint), from `offset` on."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Frame:
    """What lies around one payload, so that all of it together is an item.

    Attributes:
        head: what goes before the payload.
        before, between, after: the tail, but for the two places of the payload's CRC-32.
        tail_length: bytes of the tail.
    """

    head: bytes
    before: bytes
    between: bytes
    after: bytes
    tail_length: int = field(init=False)

    def __post_init__(self) -> None:
        length = len(self.before) + len(self.between) + len(self.after) + 8
        object.__setattr__(self, "tail_length", length)

    def tail(self, crc: int) -> bytes:
        """What goes after the payload, given its CRC-32."""
        packed = crc.to_bytes(4, "little")
        return b"%b%b%b%b%b" % (self.before, packed, self.between, packed, self.after)


Framing = Callable[[int, bool], Frame]
"""Makes frames of one kind: of an item that starts at that position of its file.

The payload starts at a multiple of `ALIGNMENT`; of `PAGE` where the second argument is true. Frames
for positions that are such a multiple apart are the same.
"""


YieldGil = Callable[[], None]
"""Called between pieces of work that keep the interpreter for more than a moment."""


def never_yield() -> None:
    """Work on."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One stored box of a tensor, and the item that holds it."""

    box: Box
    item: ByteRange


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a checkpoint.

    Attributes:
        name: its flat name.
        dtype: element type.
        shape: global shape, in elements.
        chunks: the boxes that it is stored as; together they cover it.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object in a checkpoint: its name, the item that holds it, and its value.

    Parts of unknown classes are `Opaque` stand-ins inside `value`.
    """

    name: str
    item: ByteRange | None
    value: Any

    @property
    def nbytes(self) -> int:
        """Bytes of the item that holds the object."""
        return self.item.length if self.item else 0


@dataclass(frozen=True, slots=True)
class Opaque:
    """Stands for a value of a class that is not known to be safe. It was never imported.

    Attributes:
        module, qualname: where the class says it lives.
        args: what it was to be called with; state: what it was to be filled with, if anything.
    """

    module: str
    qualname: str
    args: tuple[Any, ...] = field(default=(), repr=False)
    state: Any = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return f"{self.module}.{self.qualname}"

    def __repr__(self) -> str:
        return f"<Opaque {self.name}>"


Path = tuple[Any, ...]
"""Keys from the root of a state to a leaf, typed: a list's index and a mapping's 0 are ints."""


@dataclass(frozen=True, slots=True)
class Structure:
    """The shape of a nested state, flat: where each leaf is, and what each container is.

    Attributes:
        leaves: flat name -> path. Several names may share a payload, but not a path.
        containers: path -> "dict", "list" or "OrderedDict", outer before inner; the root is ().
            Tuples are leaves, as in DCP. Containers that hold nothing are here, too.
        empties: path of each container that holds nothing -> how many leaves come before it (a
            stand-in for its place among them; without it, order would be lost).
        parents: for each container but the root, and for each leaf, the row in `containers` of the
            one around it. Only where whoever made the structure knows them anyway: looking them up
            by path takes long.
    """

    leaves: Mapping[str, Path]
    containers: Mapping[Path, str]
    empties: Mapping[Path, int] = field(default_factory=dict)
    parents: tuple[Sequence[int], Sequence[int]] | None = field(
        default=None, compare=False, repr=False
    )


@dataclass(frozen=True, slots=True, eq=False)
class Tensors:
    """N tensors as columns. D is the largest ndim of them (0 without any)."""

    names: tuple[str, ...]
    dtype: NDArray[np.uint8]
    """[N] codes: positions in `DTYPES`."""
    ndim: NDArray[np.uint8]
    """[N] dimensions."""
    shape: I64
    """[N, D] global shapes, filled up with 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """M chunks as columns; the rows of a tensor are adjacent, in the order of the tensors.

    A payload is the chunk's elements in C order, without gaps, unless `payload` is negative: then
    only the item's own header says where and how they lie.
    """

    tensor: I64
    """[M] row in `Tensors`."""
    offsets: I64
    """[M, D] filled up with 0."""
    sizes: I64
    """[M, D] filled up with 1."""
    file: NDArray[np.int32]
    """[M] position in `Index.files`."""
    item: I64
    """[M] where the item starts in its file, in bytes."""
    length: I64
    """[M] bytes of the item."""
    payload: I64
    """[M] where the payload starts in its file, in bytes; negative: ask the item's header."""
    transform: NDArray[np.int16]
    """[M] position in `Index.transforms`; 0 is none."""
    block: I64
    """[M + 1] rows block[i]:block[i + 1] of `checksums` belong to chunk i (none: not digested)."""
    checksums: NDArray[np.uint32]
    """CRC-32 of each block of `BLOCK` bytes of a payload, counted from the payload's start."""


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """K objects as columns."""

    names: tuple[str, ...]
    file: NDArray[np.int32]
    """[K] position in `Index.files`."""
    item: I64
    """[K] where the item starts, in bytes."""
    length: I64
    """[K] bytes of the item."""
    transform: NDArray[np.int16]
    """[K] position in `Index.transforms`; 0 is none."""
    crc: I64
    """[K] CRC-32 of the item's bytes, or -1 where it is not known."""
    values: Mapping[str, Any]
    """Name -> value, as typed JSON (`format.values`), where it is known without the item."""


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """What a checkpoint holds and where, whatever kind of checkpoint it is.

    Attributes:
        files: data files, relative to the checkpoint; none of them leaves it.
        transforms: stream transforms of items, as DCP names them (`("stream.zstd/1",)`), outermost
            last; the first one is always `()`.
        structure: how the names nest; None if the checkpoint does not say (flat names then).
        legacy_duplicates: objects that only repeat a container whose leaves are there as well, and
            the container's path; torch 2.3 and older look them up, nobody else needs them.
        extra: what else is known, for people: "format", "torch", "created", ...
    """

    files: tuple[str, ...]
    tensors: Tensors
    chunks: Chunks
    objects: Objects
    transforms: tuple[tuple[str, ...], ...] = ((),)
    structure: Structure | None = None
    legacy_duplicates: Mapping[str, Path] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """What one rank has to save: names and boxes, no data.

    P pieces as columns: a piece is a box of a tensor that this rank holds in memory.
    """

    tensors: Tensors
    piece: I64
    """[P] row in `tensors`."""
    offsets: I64
    """[P, D] filled up with 0."""
    sizes: I64
    """[P, D] filled up with 1."""
    alias: I64
    """[P] the first piece of this rank that lies in the same memory: itself, if there is none."""
    objects: tuple[str, ...]
    values: Mapping[str, Any]
    """Object's name -> its value as typed JSON, of those that are small and have one."""
    structure: Structure
    legacy_duplicates: Mapping[str, Path]
    marks: Mapping[Path, str] = field(default_factory=dict)
    """Where a value is marked (`marks`) -> "PerRank" or "Replicated"."""
    content: Mapping[str, bytes] = field(default_factory=dict)
    """What is marked "Replicated", in words -> a checksum of what this rank has."""


@dataclass(frozen=True, slots=True)
class Step:
    """A committed checkpoint of a run.

    Attributes:
        number: the training step, 0 or more.
        metrics: what was measured there, as saved with it: finite numbers by name.
    """

    number: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Progress(Protocol):
    """Told how far long work has come."""

    def __call__(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` bytes of this phase; may be called from several threads."""
        ...
