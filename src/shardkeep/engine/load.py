"""Loading a checkpoint into a template, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
from typing_extensions import Unpack

from shardkeep import settings
from shardkeep.checkpoint import reader
from shardkeep.checkpoint.read_plan import ReadPlan
from shardkeep.checkpoint.reader import CheckpointReader
from shardkeep.coordination import detect_ranks
from shardkeep.coordination.contract import Ranks, Session
from shardkeep.coordination.events import CheckpointLoaded, EventSender, WorkFailed
from shardkeep.coordination.progress import shown
from shardkeep.coordination.timing import Clock, slowest
from shardkeep.engine.load_options import LoadConfig, LoadOptions
from shardkeep.engine.load_report import LoadReport
from shardkeep.engine.match import Contents, Match, MatchedPieces, match
from shardkeep.errors import Mismatch
from shardkeep.io.read.copies import ReadStats
from shardkeep.state.flatten import Flat, put
from shardkeep.state.markers import Unwrapped, unmarked
from shardkeep.state.per_rank import PerRankValues
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
from shardkeep.types import ITEMSIZES
from shardkeep.util import gc_pause
from shardkeep.util.formatting import count

__all__ = ["load", "run_load"]

_MAX_LINES_SHOWN = 40
"""Lines of an error about names that do not match; the report has all of them."""

_REPORTED_PHASES = {"open": "plan", "describe": "plan", "match": "plan"}
"""Phase that errors name -> phase of the report."""


def load(
    state: MutableMapping[Any, Any],
    path: str | PathLike[str] | Store,
    *,
    ranks: Sequence[int] | Ranks | None = None,
    **options: Unpack[LoadOptions],
) -> LoadReport:
    """Fill a state in place from a checkpoint. Every rank that takes part calls this.

    The number of ranks and the placements may differ from those that saved. Each rank reads only
    the byte ranges that its own boxes need.

    If this rank raises `Mismatch`, its template is unchanged. A later error (`Damaged`,
    `RankFailed`, `OSError`) may leave the template partly filled, or completely filled on a rank
    where another rank failed: load into it again, or create a new one.

    Args:
        state: the template. Tensors are filled, and other values are replaced, under the keys that
            they have. An optimizer that has not made a step yet gets the state that the checkpoint
            has for it.
        path: a folder, or a store.
        ranks: the global ranks that take part. The default is all ranks of the default process
            group, or this process alone if there is none.
        options: how to load:

            - `strict`: whether a name that the checkpoint lacks is an error. Also per name pattern,
              as `{"optim.*": False}`: the first pattern that matches decides, and names without a
              match are strict. Default True.
            - `dtype`: what to do with a tensor whose stored dtype differs: "error", "cast", or
              "upcast" (cast only if no value can change). Also per name pattern. Default "error".
            - `trust`: classes, as "module.Class", that objects may contain besides plain values.
            - `per_rank`: what to do with a `PerRank` value that another number of ranks saved:
              "error", "skip" (leave it as it is), "modulo" (take the value of this rank's number
              modulo theirs), or a function (name, rank, number of ranks that load, number of ranks
              that saved) -> rank or None. Also per name pattern. Default "error".
            - `verify`: check the checksums of everything that is read. Default True.
            - `max_host_memory`: bytes of host memory that the reading may use, not counting
              objects. The default is `SHARDKEEP_MAX_HOST_MEMORY_BYTES`.
            - `progress`: a callback for progress, or True for a bar on standard error, if that is a
              terminal.
            - `on_event`: a hook that receives the events of the load.

    Returns:
        What was loaded, and how long it took.

    Raises:
        NotACheckpoint: the path contains no committed checkpoint.
        FormatError: a file of the checkpoint is malformed.
        Damaged: a file does not match its checksums, or is missing.
        Mismatch: names are missing, or shapes or dtypes differ. The error lists all of them and
            carries the report; nothing was read.
        Untrusted: an object contains a class that is not trusted.
        RankFailed: another rank failed.
        TypeError, ValueError: an option is unknown or has a value that is not allowed.

    Example:
        >>> state = {"model": model, "optim": optimizer, "step": 0}
        >>> report = shardkeep.load(state, "run/step_100", dtype={"model.*": "upcast"})
        >>> state["step"]
        100
    """
    config = LoadConfig.of("load", options)
    store = open_store(path, budget=config.max_host_memory)
    return run_load(state, store, detect_ranks(ranks), config)


def run_load(
    state: MutableMapping[Any, Any],
    store: Store,
    ranks: Ranks,
    config: LoadConfig,
    step: int | None = None,
) -> LoadReport:
    """Fill a state from a store: the stages of `load`, in order.

    Args:
        state: the template.
        store: the checkpoint.
        ranks: the ranks that take part.
        config: how to load.
        step: the training step that events name.

    Raises: what `load` raises.
    """
    send = EventSender(config.on_event, path=store.url, rank=ranks.rank, step=step)
    try:
        with ranks.session("load", store.url, events=send) as session:
            work = _Load(store, session, config, Clock(session, _REPORTED_PHASES), send)
            source = _open(work)
            plain, stateful_objects = _call_state_dicts(work, state)
            with gc_pause.paused():  # not above: state_dict() may wait for other ranks
                template = _describe(work, source, plain, stateful_objects)
                matched = _match(work, source, template)
                plan = _plan_reads(work, source, matched)
            stats = _read(work, plan)
            _restore(work, state, template, matched)
            report = _report(matched, matched.pieces.names_of(plan.resharded))
            report = _finished(work, report, template, stats)
    except Exception as error:
        send(WorkFailed(work="load", error=error))
        raise
    seconds = sum(report.seconds.values())
    send(CheckpointLoaded(names=len(report.loaded), nbytes=report.nbytes, seconds=seconds))
    return report


@dataclass(frozen=True, slots=True, eq=False)
class _Load:
    """One load on one rank: what all of its stages need."""

    store: Store
    session: Session
    config: LoadConfig
    clock: Clock
    send: EventSender

    @property
    def ranks_here(self) -> int:
        """How many ranks of this load share the host."""
        return self.session.ranks_on_this_host()


@dataclass(frozen=True, slots=True, eq=False)
class _Template:
    """The state that is filled, as names.

    Attributes:
        plain: the state with the state dictionaries of its stateful objects in their places.
        stateful_objects: these objects.
        unmarked: `plain` without its `PerRank` and `Replicated` markers.
        flat: the flat names of `unmarked`.
        per_rank: the keys of this rank's `PerRank` values in the checkpoint.
    """

    plain: Mapping[Any, Any]
    stateful_objects: StatefulObjects
    unmarked: Unwrapped
    flat: Flat
    per_rank: PerRankValues


def _open(work: _Load) -> CheckpointReader:
    work.clock.phase("open")
    with gc_pause.paused():
        return reader.open_reader(work.store, rank=(work.session.rank, work.session.size))


def _call_state_dicts(
    work: _Load, state: Mapping[Any, Any]
) -> tuple[Mapping[Any, Any], StatefulObjects]:
    """Replace the stateful objects of the template by their state dictionaries."""
    work.clock.phase("describe")
    return call_state_dicts(state)


def _describe(
    work: _Load,
    source: CheckpointReader,
    plain: Mapping[Any, Any],
    stateful_objects: StatefulObjects,
) -> _Template:
    """Name the leaves of the template, and create the optimizer state that it lacks."""
    materialize_optimizer_state(plain, stateful_objects, _stored_leaves(source))
    session = work.session
    per_rank = PerRankValues(source, session.rank, session.size, work.config.per_rank_mode)
    flat, without_markers = unmarked(plain, is_any_tensor, per_rank.key)
    return _Template(plain, stateful_objects, without_markers, flat, per_rank)


def _match(work: _Load, source: CheckpointReader, template: _Template) -> Match:
    """Compare the template and the checkpoint, and refuse what the caller does not allow."""
    work.clock.phase("match")
    matched = match(template.flat, Contents(source, tuple(work.config.trust)), template.per_rank)
    _refuse(matched, work.config)
    return matched


def _plan_reads(work: _Load, source: CheckpointReader, matched: Match) -> ReadPlan:
    work.clock.phase("read")
    work.clock.part("plan")
    return _plan(matched.pieces, source, work.ranks_here, work.config.max_host_memory)


def _read(work: _Load, plan: ReadPlan) -> ReadStats:
    """Read, check, and put the tensors in place."""
    work.clock.part("read")
    with shown(work.config.progress, work.session, work.send) as progress:
        return plan.run(
            work.store,
            verify=work.config.verify,
            threads=settings.read_threads(work.ranks_here),
            budget=work.config.max_host_memory,
            progress=progress,
        )


def _restore(work: _Load, state: Any, template: _Template, matched: Match) -> None:
    """Put all other values in place, and call `load_state_dict` of stateful objects."""
    work.clock.part("restore")
    for tensor, value in matched.inside_objects:
        _copy(tensor, value)
    for leaf, value in matched.values:
        put(template.unmarked.state, leaf.path, value)
    template.unmarked.put_back()
    load_state_dicts(state, template.plain, template.stateful_objects)


def _finished(work: _Load, report: LoadReport, template: _Template, stats: ReadStats) -> LoadReport:
    """Complete the report, with the slowest of all ranks: the last messages of the load."""
    seconds = work.clock.seconds()
    slowest_rank = slowest(work.session, sum(seconds.values()))
    work.session.conclude()
    return replace(
        report,
        skipped=tuple(template.per_rank.skipped),
        nbytes=stats.bytes_needed,
        read=stats.bytes_read,
        unchecked=stats.unchecked,
        bytes_unchecked=stats.bytes_unchecked,
        seconds=seconds,
        slowest=slowest_rank,
    )


def _plan(
    pieces: MatchedPieces, source: CheckpointReader, ranks_here: int, budget: int | None
) -> ReadPlan:
    """Plan how the pieces are read into their memory. Their rows are in order."""
    codes = source.index.tensors.dtype[pieces.wanted.tensor]
    nbytes = pieces.wanted.sizes.prod(axis=1) * ITEMSIZES[codes]
    destinations = Destinations(pieces.memory, pieces.addresses, codes, nbytes)
    threads, together = settings.read_threads(ranks_here), ranks_here > 1
    return source.plan(
        pieces.wanted, destinations, threads=threads, together=together, budget=budget
    )


def _stored_leaves(source: CheckpointReader) -> Iterator[StoredLeaf]:
    """Yield path, dtype and shape of the leaves of a checkpoint; objects have no dtype."""
    kinds = source.dtypes_and_shapes
    for name, path in source.structure.leaves.items():
        if name in kinds:
            yield path, *kinds[name]
        elif name in source:
            yield path, None, ()


def _refuse(matched: Match, config: LoadConfig) -> None:
    """Raise Mismatch with everything that the caller does not allow, if there is anything."""
    refused = {
        name: "missing: not in the checkpoint" for name in matched.missing if config.is_strict(name)
    }
    refused |= matched.refused
    for name, (stored, wanted) in matched.dtypes.items():
        mode = config.dtype_mode(name)
        if mode == "error" or (mode == "upcast" and not _widens(stored, wanted)):
            refused[name] = f"dtype: {stored} in the checkpoint, {wanted} in the template"
    if not refused:
        return
    lines = [f"  {name}: {why}" for name, why in list(refused.items())[:_MAX_LINES_SHOWN]]
    if len(refused) > len(lines):
        lines.append(f"  and {len(refused) - len(lines)} more")
    names = f"{count(len(refused), 'name')} {'does' if len(refused) == 1 else 'do'} not match"
    message = "\n".join([f"{matched.path}: {names}; nothing was read", *lines])
    raise Mismatch(message, replace(_report(matched, ()), loaded=(), cast={}, refused=refused))


def _report(matched: Match, resharded: tuple[str, ...]) -> LoadReport:
    """Return the report of a load that has not been made yet."""
    loaded = matched.pieces.names + [tensor.name for tensor, _ in matched.inside_objects]
    loaded += [leaf.name for leaf, _ in matched.values]
    return LoadReport(
        matched.path,
        loaded=tuple(loaded),
        resharded=resharded,
        missing=tuple(matched.missing),
        unexpected=tuple(matched.unexpected),
        cast=dict(matched.dtypes),
    )


def _widens(stored: str, wanted: str) -> bool:
    """Whether every value of the stored dtype is one of the wanted dtype, too."""
    target: torch.dtype = getattr(torch, wanted)
    return bool(torch.promote_types(getattr(torch, stored), target) == target)


def _copy(tensor: TensorDescription, value: torch.Tensor) -> None:
    with torch.no_grad():
        for piece in tensor.pieces:
            piece.local.copy_(value[piece.box.slices])
