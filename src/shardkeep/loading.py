"""The life of a load, from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from os import PathLike
from typing import Any

import torch

from shardkeep import checkpoint
from shardkeep.checkpoint import Checkpoint, Request
from shardkeep.clock import Clock
from shardkeep.contracts import Progress, Ranks, Store
from shardkeep.errors import Mismatch
from shardkeep.ranks import take_part
from shardkeep.stores import store_at
from shardkeep.tensors.memory import landing
from shardkeep.tensors.objects import MAKERS, from_bytes
from shardkeep.tensors.pieces import Described, is_any_tensor
from shardkeep.tensors.state import describe_tensors
from shardkeep.tensors.stateful import Stored, expand, make_room, restore
from shardkeep.tree import Flat, Leaf, flatten, put
from shardkeep.types import Path

__all__ = ["LoadReport", "load"]

_SHOWN = 40
"""Lines of a message about what does not match; the report has them all."""

Strict = bool | Mapping[str, bool]
DtypePolicy = str | Mapping[str, str]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did, or why it refused to. Names are flat names of the checkpoint.

    Attributes:
        path: where the checkpoint is.
        loaded: tensors and objects that now hold what was saved.
        resharded: those of them that this rank put together from other boxes than its own.
        missing: wanted by the template, not in the checkpoint (left untouched).
        unexpected: in the checkpoint, not wanted by the template.
        cast: loaded tensors whose dtype differs: name -> (stored, wanted).
        refused: name -> why it can't be loaded; empty unless carried by a `Mismatch`.
        nbytes: bytes of tensor data that this rank needed; `read`: bytes that it read for them.
        seconds: phase -> seconds that this rank spent in it.
    """

    path: str
    loaded: tuple[str, ...] = ()
    resharded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    cast: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    nbytes: int = 0
    read: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


def load(
    state: MutableMapping[Any, Any],
    path: str | PathLike[str] | Store,
    *,
    strict: Strict = True,
    dtype: DtypePolicy = "error",
    trust: Sequence[str] = (),
    verify: bool = True,
    ranks: Sequence[int] | Ranks | None = None,
    progress: Progress | None = None,
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
        verify: check the digests of everything that is read.
        ranks: global ranks that take part (default: all of the default group, or this process).
        progress: told how far the reading has come.

    Raises:
        NotACheckpoint, FormatError, Damaged: there is nothing whole to load.
        Mismatch: names are missing, shapes or dtypes differ: all of them are listed, and nothing
            was read. It carries the report.
        Untrusted: an object holds a class that was not trusted.
        RankFailed: another rank failed.
    """
    job = take_part(ranks)
    store = store_at(path)
    with job.session("load", store.url) as session:
        clock = Clock(session)
        clock.phase("open")
        source = checkpoint.open(store, rank=(session.rank, session.size))

        clock.phase("describe")
        template, statefuls = expand(state)
        make_room(template, statefuls, _stored(source))
        flat = flatten(template, is_any_tensor)

        clock.phase("match")
        contents = _Contents(source, tuple(trust))
        match = _match(flat, contents)
        match.refuse(strict, dtype)

        clock.phase("read")
        requests, finish = _requests(match.stored, source)
        stats = source.fill(requests, verify=verify, progress=progress)
        for done in finish:
            done()
        for tensor, value in match.inside:
            _copy(tensor, value)
        for leaf, value in match.values:
            put(template, leaf.path, value)
        restore(state, template, statefuls)
        return match.report(stats.bytes_needed, stats.bytes_read, clock.seconds())


def _stored(source: Checkpoint) -> Iterator[Stored]:
    """The leaves of a checkpoint, by their paths."""
    for name, path in source.structure.leaves.items():
        if source.is_tensor(name):
            yield path, *source.shape_of(name)
        elif name in source:
            yield path, None, ()


class _Contents:
    """A checkpoint's contents as a template sees them: tensors, and values made for torch."""

    def __init__(self, source: Checkpoint, trust: tuple[str, ...]) -> None:
        self.source = source
        self._trust = trust
        self._values: dict[str, Any] = {}

    def is_tensor(self, name: str) -> bool:
        return name in self.source and self.source.is_tensor(name)

    def value(self, name: str) -> Any:
        """An object, with torch's own types."""
        if name not in self._values:
            decode = partial(from_bytes, name=name, trust=self._trust)
            self._values[name] = self.source.value(name, makers=MAKERS, decode=decode)
        return self._values[name]

    def whole(self, name: str) -> Any:
        """A tensor that is one chunk, as its item describes it."""
        return from_bytes(self.source.item(name), name=name, trust=self._trust)

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


@dataclass(frozen=True, slots=True)
class _Match:
    """How a template and a checkpoint go together."""

    path: str
    stored: list[Described]
    inside: list[tuple[Described, torch.Tensor]]
    values: list[tuple[Leaf, Any]]
    missing: list[str]
    unexpected: list[str]
    resharded: list[str]
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

    def report(self, nbytes: int, read: int, seconds: Mapping[str, float]) -> LoadReport:
        loaded = [t.name for t in self.stored] + [t.name for t, _ in self.inside]
        loaded += [leaf.name for leaf, _ in self.values]
        return LoadReport(
            self.path,
            loaded=tuple(loaded),
            resharded=tuple(self.resharded),
            cast=dict(self.dtypes),
            nbytes=nbytes,
            read=read,
            seconds=dict(seconds),
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


def _match(flat: Flat, contents: _Contents) -> _Match:
    """Compare names, shapes and dtypes; nothing is read but objects."""
    source = contents.source
    tensors, objects = describe_tensors(flat)
    paths = flat.structure.leaves
    match = _Match(source.url, [], [], [], [], [], [], {}, {})
    used: set[str] = set()
    for tensor in tensors:
        if contents.is_tensor(tensor.name):
            used.add(tensor.name)
            _match_tensor(match, tensor, source)
        else:
            used.update(_match_inside(match, tensor, paths.get(tensor.name, ()), contents))
    for leaf in (leaf for leaf in flat.leaves if leaf.name in objects):
        if contents.is_tensor(leaf.name):
            used.add(leaf.name)
            _match_quantized(match, leaf, contents)
            continue
        found = contents.find(leaf.name, leaf.path)
        if found is None:
            match.missing.append(leaf.name)
        else:
            used.add(found[0])
            match.values.append((leaf, found[1]))
    match.unexpected.extend(name for name in source if name not in used)
    return match


def _match_tensor(match: _Match, tensor: Described, source: Checkpoint) -> None:
    dtype, shape = source.shape_of(tensor.name)
    if shape != tuple(tensor.shape):
        match.refused[tensor.name] = (
            f"shape: {list(shape)} in the checkpoint, {list(tensor.shape)} in the template"
        )
        return
    if dtype != tensor.dtype:
        match.dtypes[tensor.name] = (dtype.name, tensor.dtype.name)
    match.stored.append(tensor)
    chunks = {chunk.box for chunk in source.tensor(tensor.name).chunks}
    if not all(piece.box in chunks for piece in tensor.pieces):
        match.resharded.append(tensor.name)


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
    elif tuple(value.shape) != tuple(tensor.shape):
        match.refused[tensor.name] = (
            f"shape: {list(value.shape)} in the checkpoint, {list(tensor.shape)} in the template"
        )
    else:
        stored = str(value.dtype).removeprefix("torch.")
        if stored != tensor.dtype.name:
            match.dtypes[tensor.name] = (stored, tensor.dtype.name)
        match.inside.append((tensor, value))
    return {name}


def _requests(
    tensors: Sequence[Described], source: Checkpoint
) -> tuple[list[Request], list[Callable[[], None]]]:
    """What to read into which memory, and what to do when it is there."""
    requests: list[Request] = []
    finish: list[Callable[[], None]] = []
    for tensor in tensors:
        stored, _ = source.shape_of(tensor.name)
        for piece in tensor.pieces:
            array, done = landing(piece.local, stored)
            requests.append(Request(tensor.name, piece.box, array))
            finish.append(done)
    return requests, finish


def _copy(tensor: Described, value: torch.Tensor) -> None:
    with torch.no_grad():
        for piece in tensor.pieces:
            piece.local.copy_(value[piece.box.slices])
