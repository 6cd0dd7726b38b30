"""The life of a load, from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardkeep import checkpoint, collector, knobs
from shardkeep.checkpoint import Checkpoint
from shardkeep.clock import Clock, slowest
from shardkeep.contracts import Progress, Ranks, Session, Store
from shardkeep.errors import Mismatch
from shardkeep.filling import Filling
from shardkeep.marks import Unwrapped, unmarked
from shardkeep.plan.overlap import Boxes
from shardkeep.progress import shown
from shardkeep.ranks import take_part
from shardkeep.resizing import Chooser, OwnValues
from shardkeep.stores import store_at
from shardkeep.tensors.memory import Landings
from shardkeep.tensors.objects import MAKERS, from_bytes
from shardkeep.tensors.pieces import Described, is_any_tensor
from shardkeep.tensors.rows import Pieces
from shardkeep.tensors.state import describe_tensors
from shardkeep.tensors.stateful import Statefuls, Stored, expand, make_room, restore
from shardkeep.tree import Flat, Leaf, put
from shardkeep.types import DTYPES, I64, Path, Tensors

__all__ = ["LoadReport", "load"]

_SHOWN = 40
"""Lines of a message about what does not match; the report has them all."""

_PARTS = {"open": "plan", "describe": "plan", "match": "plan"}
"""Phase of an error -> phase of the report."""

Strict = bool | Mapping[str, bool]
DtypePolicy = str | Mapping[str, str]
PerRankPolicy = str | Chooser | Mapping[str, str | Chooser]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did, or why it refused to. Names are flat names of the checkpoint.

    Attributes:
        path: where the checkpoint is.
        loaded: tensors and objects that now hold what was saved.
        resharded: those of them that this rank put together from other boxes than its own. Chunks
            that tile one of its boxes exactly, run after run, are that box: saves cut large ones.
        missing: wanted by the template, not in the checkpoint (left untouched).
        unexpected: in the checkpoint, not wanted by the template.
        cast: loaded tensors whose dtype differs: name -> (stored, wanted).
        skipped: values of single ranks (`PerRank`) that another number of ranks saved, left as they
            are, as the caller wanted.
        refused: name -> why it can't be loaded; empty unless carried by a `Mismatch`.
        unchecked: tensors of which this rank read something that no digest covers: all of it, or a
            part of a payload whose only digest is one of the whole. It may be damaged or not.
        nbytes: bytes of tensor data that this rank needed; `read`: bytes that it read for them;
            `bytes_unchecked`: how many of those that it needed are unchecked.
        seconds: phase -> seconds that this rank spent in it: "plan" (open the checkpoint, describe
            the template, match them, decide what to read), "read" (read, check, put in place), and
            "restore" (cast, replace values, `load_state_dict`).
        slowest: the rank that took the longest, and its seconds in all.
    """

    path: str
    loaded: tuple[str, ...] = ()
    resharded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    cast: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    unchecked: tuple[str, ...] = ()
    nbytes: int = 0
    read: int = 0
    bytes_unchecked: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    slowest: tuple[int, float] = (0, 0.0)

    @property
    def rate(self) -> float:
        """GB (10^9 bytes) of needed data for each second of the phase "read"; 0.0 without any."""
        seconds = self.seconds.get("read", 0.0)
        return self.nbytes / seconds / 1e9 if seconds else 0.0

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in self.seconds.items())
        rank, longest = self.slowest
        return (
            f"loaded {_size(self.nbytes)} in {total:.2f} s ({self.rate:.1f} GB/s): {phases}; "
            f"slowest rank {rank}, {longest:.2f} s" + self._doubt()
        )

    def _doubt(self) -> str:
        count = len(self.unchecked)
        of = f"{_size(self.bytes_unchecked)} of {count} tensor{'' if count == 1 else 's'}"
        return f"; unchecked: {of}" if count else ""


def _size(nbytes: int) -> str:
    """Bytes as people read them: "1.9 GiB"."""
    if nbytes < 1 << 10:
        return f"{nbytes} B"
    power = min(5, (nbytes.bit_length() - 1) // 10)
    return f"{nbytes / (1 << 10 * power):.1f} {' KMGTP'[power]}iB"


def load(
    state: MutableMapping[Any, Any],
    path: str | PathLike[str] | Store,
    *,
    strict: Strict = True,
    dtype: DtypePolicy = "error",
    trust: Sequence[str] = (),
    per_rank: PerRankPolicy = "error",
    verify: bool = True,
    host_budget: int | None = None,
    ranks: Sequence[int] | Ranks | None = None,
    progress: Progress | bool | None = None,
) -> LoadReport:
    """Fill `state` in place from a checkpoint; every rank that takes part calls this.

    The number of ranks and the placements may differ from those that saved. Each rank reads only
    the byte ranges that its own boxes need.

    Args:
        state: the template: tensors are filled, values replaced, under the keys that they have. An
            optimizer that never made a step gets the state that the checkpoint has for it.
        path: a folder, or a store.
        strict: whether a name that the checkpoint lacks is an error; also per name pattern, as
            `{"optim.*": False}`: the first pattern that fits decides, without any it is.
        dtype: what to do where the stored dtype differs: "error", "cast", or "upcast" (only where
            no value can change); also per name pattern.
        trust: classes, as "module.Class", that objects may be built of; otherwise only plain ones.
        per_rank: what to do with a `PerRank` value that another number of ranks saved: "error",
            "skip" (leave it as it is), "modulo" (take that of this rank's number modulo theirs), or
            a function (name, rank, ranks that load, ranks that saved) -> rank or None; also per
            name pattern.
        verify: check the digests of everything that is read.
        host_budget: bytes of memory that the reading may take, besides what objects take; by
            default `SHARDKEEP_HOST_BUDGET`.
        ranks: global ranks that take part (default: all of the default group, or this process).
        progress: told how far the reading has come; True shows a bar on standard error, if that is
            a terminal.

    Raises:
        NotACheckpoint, FormatError, Damaged: there is nothing whole to load.
        Mismatch: names are missing, shapes or dtypes differ: all of them are listed, and nothing
            was read. It carries the report.
        Untrusted: an object holds a class that was not trusted.
        RankFailed: another rank failed.
    """
    job = take_part(ranks)
    store = store_at(path, budget=host_budget)
    with job.session("load", store.url) as session:
        clock = Clock(session, _PARTS)
        with collector.paused():  # what is made for each tensor is gone again when this ends
            planned = _planned(state, store, session, clock, strict, dtype, trust, per_rank)

        clock.part("read")
        with shown(progress, session) as tell:
            stats = planned.filling.run(
                store,
                verify=verify,
                threads=knobs.threads(knobs.ranks_here(session.size)),
                budget=host_budget,
                progress=tell,
            )

        clock.part("restore")
        planned.landings.finish()
        for tensor, value in planned.inside:
            _copy(tensor, value)
        for leaf, value in planned.values:
            put(planned.marked.state, leaf.path, value)
        planned.marked.put_back()
        restore(state, planned.template, planned.statefuls)

        seconds = clock.seconds()
        return replace(
            planned.report,
            nbytes=stats.bytes_needed,
            read=stats.bytes_read,
            unchecked=stats.unchecked,
            bytes_unchecked=stats.bytes_unchecked,
            seconds=seconds,
            slowest=slowest(session, sum(seconds.values())),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Planned:
    """What there is to do: nothing can be refused any more.

    Attributes:
        template, statefuls: as from `expand`; `marked`: the template without its marks.
        landings, filling: the tensors that are read, and how.
        inside: tensors that the checkpoint has inside an object, and their values.
        values: the other leaves, and their values.
        report: what is known of the load before it is done.
    """

    template: Mapping[Any, Any]
    statefuls: Statefuls
    marked: Unwrapped
    landings: Landings
    filling: Filling
    inside: list[tuple[Described, torch.Tensor]]
    values: list[tuple[Leaf, Any]]
    report: LoadReport


def _planned(
    state: Mapping[Any, Any],
    store: Store,
    session: Session,
    clock: Clock,
    strict: Strict,
    dtype: DtypePolicy,
    trust: Sequence[str],
    per_rank: PerRankPolicy,
) -> _Planned:
    clock.phase("open")
    source = checkpoint.open(store, rank=(session.rank, session.size))

    clock.phase("describe")
    template, statefuls = expand(state)
    make_room(template, statefuls, _stored(source))
    policy = partial(_policy, per_rank, default="error")
    own = OwnValues(source, session.rank, session.size, policy)
    flat, marked = unmarked(template, is_any_tensor, own.key)

    clock.phase("match")
    contents = _Contents(source, tuple(trust))
    match = _match(flat, contents, own)
    match.refuse(strict, dtype)

    clock.phase("read")
    clock.part("plan")
    landings, filling = _plan(match.found, source, knobs.ranks_here(session.size))
    report = match.report(match.found.names_of(filling.resharded))
    report = replace(report, skipped=tuple(own.skipped))
    return _Planned(
        template, statefuls, marked, landings, filling, match.inside, match.values, report
    )


def _plan(found: _Found, source: Checkpoint, ranks_here: int) -> tuple[Landings, Filling]:
    """Where the pieces of these tensors go, and how to read them; their rows are in order."""
    codes = source.index.tensors.dtype[found.wanted.tensor]
    landings = Landings(found.memory, codes, found.wanted.sizes.prod(axis=1))
    threads, together = knobs.threads(ranks_here), ranks_here > 1
    return landings, source.plan(found.wanted, landings, threads=threads, together=together)


def _stored(source: Checkpoint) -> Iterator[Stored]:
    """The leaves of a checkpoint, by their paths."""
    kinds = source.kinds
    for name, path in source.structure.leaves.items():
        if name in kinds:
            yield path, *kinds[name]
        elif name in source:
            yield path, None, ()


class _Contents:
    """A checkpoint's contents as a template sees them: tensors, and values made for torch."""

    def __init__(self, source: Checkpoint, trust: tuple[str, ...]) -> None:
        self.source = source
        self._trust = trust
        self._values: dict[str, Any] = {}

    def is_tensor(self, name: str) -> bool:
        return name in self.source.kinds

    def value(self, name: str) -> Any:
        """An object, with torch's own types."""
        if name not in self._values:
            decode = partial(from_bytes, name=name, trust=self._trust)
            self._values[name] = self.source.value(name, makers=MAKERS, decode=decode)
        return self._values[name]

    def whole(self, name: str) -> Any:
        """A tensor that is one chunk, as its item describes it."""
        item = self.source.item(name)
        with self.source.naming(name):
            return from_bytes(item, name=name, trust=self._trust)

    def find(self, name: str, path: Path) -> tuple[str, Any] | None:
        """The object that holds what a template has at `path`, and the value there.

        It is either an object of that very name or, as torch 2.3 and unflattened states have it,
        part of an object that is one of the containers around it.
        """
        if name in self.source and not self.source.is_tensor(name):
            return name, self.value(name)
        for depth in range(len(path) - 1, 0, -1):
            outer = ".".join(map(str, path[:depth]))
            if outer in self.source and not self.source.is_tensor(outer):
                found = _descend(self.value(outer), path[depth:])
                return None if found is None else (outer, found[0])
        return None


def _descend(value: Any, path: Path) -> tuple[Any] | None:
    """The value at a path inside a value, in a 1-tuple (as it may be None), or None."""
    for key in path:
        if isinstance(value, Mapping):
            # torch 2.4 and later turn all keys into strings on saving.
            same = [k for k in (key, str(key)) if k in value]
            same = same or [k for k in value if str(k) == str(key)]
            if not same:
                return None
            value = value[same[0]]
        elif isinstance(value, list | tuple) and isinstance(key, int) and 0 <= key < len(value):
            value = value[key]
        else:
            return None
    return (value,)


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """Pieces of tensors that the checkpoint has as such, under the same names and shapes.

    Attributes:
        names: of the tensors, in the order of the template.
        wanted: [P] the pieces; tensors count as in the checkpoint.
        of: [P] which of `names` a piece belongs to.
        memory: [P] where it goes.
    """

    names: list[str]
    wanted: Boxes
    of: I64
    memory: Sequence[torch.Tensor]

    def names_of(self, pieces: NDArray[np.bool_]) -> tuple[str, ...]:
        """The names of these pieces' tensors, each once."""
        return tuple(self.names[row] for row in dict.fromkeys(self.of[pieces].tolist()))


@dataclass(frozen=True, slots=True)
class _Match:
    """How a template and a checkpoint go together."""

    path: str
    found: _Found
    inside: list[tuple[Described, torch.Tensor]]
    values: list[tuple[Leaf, Any]]
    missing: list[str]
    unexpected: list[str]
    dtypes: dict[str, tuple[str, str]]
    refused: dict[str, str]

    def refuse(self, strict: Strict, dtype: DtypePolicy) -> None:
        """Raise Mismatch, listing all that the caller does not allow."""
        refused = {
            name: "missing: not in the checkpoint"
            for name in self.missing
            if _policy(strict, name, True)
        }
        refused |= self.refused
        for name, (stored, wanted) in self.dtypes.items():
            policy = _policy(dtype, name, "error")
            if policy not in _POLICIES:
                raise ValueError(f"dtype policy must be one of {_POLICIES}, not {policy!r}")
            if policy == "error" or (policy == "upcast" and not _widens(stored, wanted)):
                refused[name] = f"dtype: {stored} in the checkpoint, {wanted} in the template"
        if not refused:
            return
        lines = [f"  {name}: {why}" for name, why in list(refused.items())[:_SHOWN]]
        if len(refused) > len(lines):
            lines.append(f"  and {len(refused) - len(lines)} more")
        few = f"{self.path}: {len(refused)} names do not match; nothing was read"
        message = "\n".join([few, *lines])
        raise Mismatch(message, LoadReport(self.path, **self._lists(), refused=refused))

    def report(self, resharded: tuple[str, ...]) -> LoadReport:
        loaded = self.found.names + [tensor.name for tensor, _ in self.inside]
        loaded += [leaf.name for leaf, _ in self.values]
        return LoadReport(
            self.path,
            loaded=tuple(loaded),
            resharded=resharded,
            cast=dict(self.dtypes),
            **self._lists(),
        )

    def _lists(self) -> dict[str, Any]:
        return {"missing": tuple(self.missing), "unexpected": tuple(self.unexpected)}


_POLICIES = ("error", "cast", "upcast")


def _policy(policy: Any, name: str, default: Any) -> Any:
    if not isinstance(policy, Mapping):
        return policy
    fitting = (value for pattern, value in policy.items() if fnmatchcase(name, pattern))
    return next(fitting, default)


def _widens(stored: str, wanted: str) -> bool:
    target: torch.dtype = getattr(torch, wanted)
    return bool(torch.promote_types(getattr(torch, stored), target) == target)


def _match(flat: Flat, contents: _Contents, own: OwnValues) -> _Match:
    """Compare names, shapes and dtypes; nothing is read but objects."""
    source, known = contents.source, contents.source.index
    rows, objects, _ = describe_tensors(flat)
    names, tensors = rows.names, rows.tensors()
    pieces, place = rows.pieces(tensors), source.rows(names)
    there = np.flatnonzero(place >= 0)
    same = _same_shape(tensors, there, known.tensors, place[there])
    found = _found_pieces(names, pieces, there[same], place, known.chunks.offsets.shape[1])
    match = _Match(source.url, found, [], [], [], [], {}, dict(own.refused))
    used = {names[row] for row in there.tolist()}
    for row in there[~same].tolist():
        shape = source.kinds[names[row]][1]
        match.refused[names[row]] = (
            f"shape: {list(shape)} in the checkpoint, {list(rows.shapes[row])} in the template"
        )
    for row in there[same & (tensors.dtype[there] != known.tensors.dtype[place[there]])].tolist():
        dtypes = known.tensors.dtype[place[row]], tensors.dtype[row]
        match.dtypes[names[row]] = (DTYPES[dtypes[0]].name, DTYPES[dtypes[1]].name)
    for row in np.flatnonzero(place < 0).tolist():
        dtype, shape = DTYPES[tensors.dtype[row]], tuple(rows.shapes[row])
        tensor = Described(names[row], dtype, shape, pieces.of(row, len(shape)))
        path = flat.structure.leaves.get(tensor.name, ())
        used |= _match_inside(match, tensor, path, contents)
    for leaf in (leaf for leaf in flat.leaves if leaf.name in objects) if objects else ():
        if contents.is_tensor(leaf.name):
            used.add(leaf.name)
            _match_quantized(match, leaf, contents)
            continue
        held = contents.find(leaf.name, leaf.path)
        if held is None:
            match.missing.append(leaf.name)
        else:
            used.add(held[0])
            match.values.append((leaf, held[1]))
    left = (name for name in source if name not in used)
    match.unexpected.extend(name for name in left if not own.others(name))
    return match


def _match_quantized(match: _Match, leaf: Leaf, contents: _Contents) -> None:
    """A tensor that is an object here: only its own item knows the scale of a quantized one."""
    wanted = leaf.value
    if isinstance(wanted, torch.Tensor) and wanted.is_quantized:
        dtype, shape = contents.source.shape_of(leaf.name)
        if (f"torch.{dtype}", shape) == (str(wanted.dtype), tuple(wanted.shape)):
            match.values.append((leaf, contents.whole(leaf.name)))
            return
        stored, kind = f"{dtype}{list(shape)}", f"{wanted.dtype}{list(wanted.shape)}"
    else:
        stored, kind = "a tensor", type(wanted).__name__
    match.refused[leaf.name] = f"kind: {stored} in the checkpoint, {kind} in the template"


def _same_shape(ours: Tensors, mine: I64, theirs: Tensors, place: I64) -> NDArray[np.bool_]:
    """Whether these rows of two tables of tensors have the same shape, pair by pair."""
    dims = max(ours.shape.shape[1], theirs.shape.shape[1])
    shapes = _widened(ours.shape[mine], dims, 1) == _widened(theirs.shape[place], dims, 1)
    same: NDArray[np.bool_] = shapes.all(axis=1) & (ours.ndim[mine] == theirs.ndim[place])
    return same


def _found_pieces(
    names: Sequence[str], pieces: Pieces, tensors: I64, place: I64, dims: int
) -> _Found:
    """The pieces of these tensors, whose places in the checkpoint are `place`."""
    chosen = np.flatnonzero(np.bincount(tensors, minlength=len(names))[pieces.piece])
    of = pieces.piece[chosen]
    wanted = Boxes(
        place[of],
        _widened(pieces.offsets[chosen], dims, 0),
        _widened(pieces.sizes[chosen], dims, 1),
    )
    memory = [pieces.memory[row] for row in chosen.tolist()]
    mine = [names[row] for row in tensors.tolist()]
    return _Found(mine, wanted, np.searchsorted(tensors, of), memory)


def _widened(table: I64, dims: int, fill: int) -> I64:
    """A table of coordinates with so many columns; what is cut off holds nothing but `fill`."""
    more = dims - table.shape[1]
    return np.pad(table, ((0, 0), (0, more)), constant_values=fill) if more > 0 else table[:, :dims]


def _match_inside(match: _Match, tensor: Described, path: Path, contents: _Contents) -> set[str]:
    """A tensor that the checkpoint has inside an object; the object's name."""
    found = contents.find(tensor.name, path)
    if found is None:
        match.missing.append(tensor.name)
        return set()
    name, value = found
    if not isinstance(value, torch.Tensor):
        kind = type(value).__name__
        match.refused[tensor.name] = f"kind: {kind} in the checkpoint, a tensor in the template"
    elif tuple(value.shape) != tensor.shape:
        match.refused[tensor.name] = (
            f"shape: {list(value.shape)} in the checkpoint, {list(tensor.shape)} in the template"
        )
    else:
        stored = str(value.dtype).removeprefix("torch.")
        if stored != tensor.dtype.name:
            match.dtypes[tensor.name] = (stored, tensor.dtype.name)
        match.inside.append((tensor, value))
    return {name}


def _copy(tensor: Described, value: torch.Tensor) -> None:
    with torch.no_grad():
        for piece in tensor.pieces:
            piece.local.copy_(value[piece.box.slices])
