"""The life of a load, from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from os import PathLike
from typing import Any

import torch

from shardkeep import settings
from shardkeep.checkpoint import reader
from shardkeep.checkpoint.read_plan import ReadPlan
from shardkeep.checkpoint.reader import CheckpointReader
from shardkeep.coordination import detect_ranks
from shardkeep.coordination.contract import Ranks, Session
from shardkeep.coordination.progress import shown
from shardkeep.coordination.timing import Clock, slowest
from shardkeep.engine.match import Contents, Found, Match, match
from shardkeep.errors import Mismatch
from shardkeep.state.flatten import Leaf, put
from shardkeep.state.markers import Unwrapped, unmarked
from shardkeep.state.per_rank import Chooser, OwnValues
from shardkeep.stores import open_store
from shardkeep.stores.contract import Store
from shardkeep.torch_state.memory import Destinations
from shardkeep.torch_state.pieces import TensorDescription, is_any_tensor
from shardkeep.torch_state.stateful import (
    StatefulObjects,
    StoredLeaf,
    call_state_dicts,
    load_state_dicts,
    materialize_optimizer_state,
)
from shardkeep.types import ITEMSIZES, Progress
from shardkeep.util import gc_pause
from shardkeep.util.formatting import count, human_bytes

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
        unchecked: tensors of which this rank read something that no checksum covers: all of it, or
            a part of a payload whose only checksum is one of the whole. It may be damaged or not.
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
            f"loaded {human_bytes(self.nbytes)} in {total:.2f} s ({self.rate:.1f} GB/s): {phases}; "
            f"slowest rank {rank}, {longest:.2f} s" + self._doubt()
        )

    def _doubt(self) -> str:
        if not self.unchecked:
            return ""
        of = count(len(self.unchecked), "tensor")
        return f"; unchecked: {human_bytes(self.bytes_unchecked)} of {of}"


def load(
    state: MutableMapping[Any, Any],
    path: str | PathLike[str] | Store,
    *,
    strict: Strict = True,
    dtype: DtypePolicy = "error",
    trust: Sequence[str] = (),
    per_rank: PerRankPolicy = "error",
    verify: bool = True,
    max_host_memory: int | None = None,
    ranks: Sequence[int] | Ranks | None = None,
    progress: Progress | bool | None = None,
) -> LoadReport:
    """Fill `state` in place from a checkpoint; every rank that takes part calls this.

    The number of ranks and the placements may differ from those that saved. Each rank reads only
    the byte ranges that its own boxes need.

    After a `Mismatch` of this rank the template is as it was. Any later error (`Damaged`,
    `RankFailed`, `OSError`) may leave it filled in part, and wholly on a rank where another one
    failed: load into it again, or make it anew.

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
        verify: check the checksums of everything that is read.
        max_host_memory: bytes of memory that the reading may take, besides what objects take; by
            default `SHARDKEEP_MAX_HOST_MEMORY_BYTES`.
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
    _check_policies(strict, dtype)
    job = detect_ranks(ranks)
    store = open_store(path, budget=max_host_memory)
    with job.session("load", store.url) as session:
        clock = Clock(session, _PARTS)
        with gc_pause.paused():  # what is made for each tensor is gone again when this ends
            planned = _planned(
                state, store, session, clock, strict, dtype, trust, per_rank, max_host_memory
            )

        clock.part("read")
        with shown(progress, session) as tell:
            stats = planned.filling.run(
                store,
                verify=verify,
                threads=settings.read_threads(settings.ranks_here(session.size)),
                budget=max_host_memory,
                progress=tell,
            )

        clock.part("restore")
        for tensor, value in planned.inside:
            _copy(tensor, value)
        for leaf, value in planned.values:
            put(planned.marked.state, leaf.path, value)
        planned.marked.put_back()
        load_state_dicts(state, planned.template, planned.statefuls)

        seconds = clock.seconds()
        slowest_rank = slowest(session, sum(seconds.values()))
        session.conclude()
        return replace(
            planned.report,
            nbytes=stats.bytes_needed,
            read=stats.bytes_read,
            unchecked=stats.unchecked,
            bytes_unchecked=stats.bytes_unchecked,
            seconds=seconds,
            slowest=slowest_rank,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Planned:
    """What there is to do: nothing can be refused any more.

    Attributes:
        template, statefuls: as from `call_state_dicts`; `marked`: the template without its marks.
        filling: the tensors that are read, and how.
        inside: tensors that the checkpoint has inside an object, and their values.
        values: the other leaves, and their values.
        report: what is known of the load before it is done.
    """

    template: Mapping[Any, Any]
    statefuls: StatefulObjects
    marked: Unwrapped
    filling: ReadPlan
    inside: list[tuple[TensorDescription, torch.Tensor]]
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
    budget: int | None,
) -> _Planned:
    clock.phase("open")
    source = reader.open_reader(store, rank=(session.rank, session.size))

    clock.phase("describe")
    template, statefuls = call_state_dicts(state)
    materialize_optimizer_state(template, statefuls, _stored(source))
    policy = partial(_policy, per_rank, default="error")
    negotiate_writers = OwnValues(source, session.rank, session.size, policy)
    flat, marked = unmarked(template, is_any_tensor, negotiate_writers.key)

    clock.phase("match")
    matched = match(flat, Contents(source, tuple(trust)), negotiate_writers)
    _refuse(matched, strict, dtype)

    clock.phase("read")
    clock.part("plan")
    filling = _plan(matched.found, source, settings.ranks_here(session.size), budget)
    report = _report(matched, matched.found.names_of(filling.resharded))
    report = replace(report, skipped=tuple(negotiate_writers.skipped))
    return _Planned(template, statefuls, marked, filling, matched.inside, matched.values, report)


def _plan(found: Found, source: CheckpointReader, ranks_here: int, budget: int | None) -> ReadPlan:
    """Where the pieces of these tensors go, and how to read them; their rows are in order."""
    codes = source.index.tensors.dtype[found.wanted.tensor]
    nbytes = found.wanted.sizes.prod(axis=1) * ITEMSIZES[codes]
    destinations = Destinations(found.memory, found.addresses, codes, nbytes)
    threads, together = settings.read_threads(ranks_here), ranks_here > 1
    return source.plan(
        found.wanted, destinations, threads=threads, together=together, budget=budget
    )


def _stored(source: CheckpointReader) -> Iterator[StoredLeaf]:
    """The leaves of a checkpoint, by their paths."""
    kinds = source.dtypes_and_shapes
    for name, path in source.structure.leaves.items():
        if name in kinds:
            yield path, *kinds[name]
        elif name in source:
            yield path, None, ()


def _refuse(matched: Match, strict: Strict, dtype: DtypePolicy) -> None:
    """Raise Mismatch, listing all that the caller does not allow."""
    refused = {
        name: "missing: not in the checkpoint"
        for name in matched.missing
        if _policy(strict, name, True)
    }
    refused |= matched.refused
    for name, (stored, wanted) in matched.dtypes.items():
        policy = _policy(dtype, name, "error")
        if policy == "error" or (policy == "upcast" and not _widens(stored, wanted)):
            refused[name] = f"dtype: {stored} in the checkpoint, {wanted} in the template"
    if not refused:
        return
    lines = [f"  {name}: {why}" for name, why in list(refused.items())[:_SHOWN]]
    if len(refused) > len(lines):
        lines.append(f"  and {len(refused) - len(lines)} more")
    many = f"{count(len(refused), 'name')} {'does' if len(refused) == 1 else 'do'} not match"
    few = f"{matched.path}: {many}; nothing was read"
    message = "\n".join([few, *lines])
    raise Mismatch(message, LoadReport(matched.path, **_lists(matched), refused=refused))


def _report(matched: Match, resharded: tuple[str, ...]) -> LoadReport:
    loaded = matched.found.names + [tensor.name for tensor, _ in matched.inside]
    loaded += [leaf.name for leaf, _ in matched.values]
    return LoadReport(
        matched.path,
        loaded=tuple(loaded),
        resharded=resharded,
        cast=dict(matched.dtypes),
        **_lists(matched),
    )


def _lists(matched: Match) -> dict[str, Any]:
    return {"missing": tuple(matched.missing), "unexpected": tuple(matched.unexpected)}


_POLICIES = ("error", "cast", "upcast")


def _policy(policy: Any, name: str, default: Any) -> Any:
    if not isinstance(policy, Mapping):
        return policy
    fitting = (value for pattern, value in policy.items() if fnmatchcase(name, pattern))
    return next(fitting, default)


def _check_policies(strict: Strict, dtype: DtypePolicy) -> None:
    """Refuse what is none, also where it would not be asked: the next load may ask."""
    for policy in _each(dtype):
        if policy not in _POLICIES:
            raise ValueError(f"dtype policy must be one of {_POLICIES}, not {policy!r}")
    for policy in _each(strict):
        if not isinstance(policy, bool):
            raise ValueError(f"strict must be True or False, not {policy!r}")


def _each(policy: Any) -> list[Any]:
    return list(policy.values()) if isinstance(policy, Mapping) else [policy]


def _widens(stored: str, wanted: str) -> bool:
    target: torch.dtype = getattr(torch, wanted)
    return bool(torch.promote_types(getattr(torch, stored), target) == target)


def _copy(tensor: TensorDescription, value: torch.Tensor) -> None:
    with torch.no_grad():
        for piece in tensor.pieces:
            piece.local.copy_(value[piece.box.slices])
