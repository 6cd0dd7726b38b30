"""The workloads by name. Each yields one or several results, from processes of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import solo
from bench.measure import Result, Sample, Series, percentile
from bench.race import LONG, Act, Bench, Entry, Race, fresh
from bench.ranks import RankError, RankPool

__all__ = ["WORKLOADS"]

Variants = tuple[Mapping[str, Any], ...]

OURS = Entry("shardkeep", "Shardkeep", role="ours")
UNVERIFIED = Entry(
    "unverified",
    "Shardkeep, verify=False",
    who="shardkeep",
    role="ours",
    variants=({"verify": False},),
)
BACKGROUND = Entry("async", "Shardkeep, async_save", who="shardkeep", role="ours")
STOCK = Entry("stock", "stock DCP", role="stock")
TORCH = Entry("torch", "torch.save, one file a rank")
TENSORS = Entry("safetensors", "safetensors, one file a rank")
SNAPSHOT = Entry("torchsnapshot", "torchsnapshot")
META = Entry("torch_checkpointing", "torch_checkpointing")
RESHARDING = replace(META, variants=({"reshard": True},))

EVERYONE = (TORCH, TENSORS, SNAPSHOT, META)
FEW = (TORCH, TENSORS)

DCP = (OURS.contestant, STOCK.contestant)
"""The entry that writes the checkpoints that Shardkeep reads."""

STOCK_SAVES: Variants = (
    {"threads": 1},
    {"threads": 2},
    {"threads": 3},
    {"threads": 4},
    {"threads": 4, "caching": True},
)
STOCK_BEGINS: Variants = (
    {"threads": 4},
    {"threads": 4, "stager": "kept"},
    {"threads": 4, "stager": "kept", "process": True},
)


COPIES: Variants = ({"copying": 2}, {"copying": 1})
"""Numbers of threads with which torch copies in a load. With several ranks, each has one."""
COPIERS = (STOCK.key, TORCH.key, TENSORS.key)

STATES = {"adamw": "AdamW state", "bf16": "bf16 model"}


def left_out(entries: Sequence[Entry]) -> list[str]:
    """Return a note that names the contestants that did not take part."""
    there = {entry.contestant for entry in entries}
    out = [entry.label.partition(", ")[0] for entry in EVERYONE if entry.contestant not in there]
    return [f"Not among these: {', '.join(out)}."] if out else []


def writing(ranks: int) -> Entry:
    threads: Variants = ({"threads": 2}, {"threads": 3}) if ranks == 1 else ({"threads": 1},)
    return Entry("direct_write", "raw direct write", role="limit", variants=threads)


def reading(ranks: int, cold: bool) -> Entry:
    """Return the limit of reading a file of `direct_write`; direct reads end in buffers."""
    if cold:
        counts = (2, 4) if ranks == 1 else (1, 2, 4)
        threads: Variants = tuple({"threads": n, "mib": mib} for n in counts for mib in (2, 8))
        entry = Entry("direct_read", "raw direct read", variants=threads)
    else:
        threads = ({"threads": 2},) if ranks == 1 else ({"threads": 1},)
        entry = Entry("preadv", "raw preadv, touched memory", variants=threads)
    return replace(entry, role="limit", uses="direct_write", checked=not cold)


def saves(
    bench: Bench,
    name: str,
    kind: str = "adamw",
    many: bool = False,
    others: Sequence[Entry] = EVERYONE,
) -> Iterator[Result]:
    """Measure saves until everything is durable."""
    ranks = bench.ranks if many else 1
    title = f"Durable save, {STATES[kind]}, {_many(ranks)}"
    entries = (OURS, replace(STOCK, variants=STOCK_SAVES), *others, writing(ranks))
    with RankPool(ranks, bench.folder) as pool:
        result = started(bench, pool, name, title, "save", kind, bench.nbytes)
        result.limit = "direct_write"
        result.notes += left_out(entries)
        yield Race(bench, pool, result, entries).run(saving(bench, pool))


def loads(
    bench: Bench,
    name: str,
    kind: str = "adamw",
    many: bool = False,
    others: Sequence[Entry] = EVERYONE,
    cold: bool = False,
) -> Iterator[Result]:
    """Measure loads into existing tensors, from files in the page cache or on the disk."""
    ranks = bench.ranks if many else 1
    title = f"{'Cold' if cold else 'Cached'} load, {STATES[kind]}, {_many(ranks)}"
    entries = (OURS, UNVERIFIED, STOCK, *others)
    if ranks == 1:
        entries = tuple(
            replace(one, variants=COPIES) if one.key in COPIERS else one for one in entries
        )
    entries = (*entries, reading(ranks, cold))
    with RankPool(ranks, bench.folder) as pool:
        result = started(bench, pool, name, title, "load", kind, bench.nbytes)
        result.limit = entries[-1].key
        result.notes += left_out(entries)
        race = Race(bench, pool, result, entries)
        files = written(race, entries)
        yield race.run(loading(bench, pool, files, result, cold), trials=1)


def reshard(bench: Bench) -> Iterator[Result]:
    """Load rows as columns: every rank needs a part of what every other rank wrote."""
    straight = Entry(
        "straight",
        "load without resharding, verify=False",
        who="shardkeep",
        role="limit",
        state="rows",
        variants=UNVERIFIED.variants,
    )
    entries = (OURS, UNVERIFIED, STOCK, RESHARDING, straight)
    with RankPool(bench.ranks, bench.folder) as pool:
        title = f"Load rows as columns, {bench.ranks} ranks, cached"
        result = started(
            bench, pool, "reshard", title, "load", "adamw", bench.nbytes, split="columns"
        )
        pool.keep("build", "rows", "adamw", bench.nbytes)
        result.limit = "straight"
        result.notes += left_out(entries)
        race = Race(bench, pool, result, entries)
        files = written(race, entries, state="rows")
        yield race.run(loading(bench, pool, files, result), trials=1)


def other_ranks(bench: Bench, name: str, before: int, after: int) -> Iterator[Result]:
    """Load on another number of ranks than saved the checkpoint."""
    title = f"Load what {before} ranks saved on {after}, cached"
    limit = reading(after, cold=False)
    entries = (OURS, UNVERIFIED, STOCK, RESHARDING, limit)
    result = Result(name, title, name, "load", after, 0, limit=limit.key)
    result.notes += left_out(entries)
    with RankPool(before, bench.folder) as pool:
        pool.keep("build", "state", "adamw", bench.nbytes)
        race = Race(bench, pool, result, entries[:-1])
        files = written(race, entries[:-1])
    with RankPool(after, bench.folder) as pool:
        built = pool.keep("build", "state", "adamw", bench.nbytes)
        result.nbytes = sum(nbytes for nbytes, _ in built)
        race = Race(bench, pool, result, entries)
        files |= written(race, entries[-1:])
        yield race.run(loading(bench, pool, files, result), trials=1)


def column_slice(bench: Bench) -> Iterator[Result]:
    """Read a quarter of the columns of a tensor, as one of four tensor-parallel ranks does."""
    entries = (OURS, UNVERIFIED, STOCK, TORCH, TENSORS)
    with RankPool(1, bench.folder) as pool:
        title = "A quarter of one tensor's columns, 1 process, cached"
        amount = min(bench.nbytes // 4, 1 << 28)
        result = started(bench, pool, "slice", title, "load", "one", amount)
        result.nbytes //= 4
        result.notes.append(
            f"The tensor has {amount / 1e6:.0f} MB. Stock DCP has no call that reads a part of a "
            "tensor in one process, so it reads the whole tensor."
        )
        result.notes += left_out(entries)
        race = Race(bench, pool, result, entries)
        files = written(race, entries)

        def act(entry: Entry, trial: bool) -> list[Sample]:
            pool.all("warm", files[entry.source])
            work = ("do", solo.slice_of, entry.key, "state", files[entry.source])
            return pool.all(*work, check=trial)

        yield race.run(act, trials=1)


def small(bench: Bench, number: int) -> Iterator[Result]:
    """Save and load many tensors of 64 bytes, which shows the cost per tensor."""
    count = bench.counts[number]
    plans: Variants = ({"threads": 1}, {"threads": 1, "caching": True})
    long = count > 50_000  # a trial takes minutes: try no settings, leave out slow contestants
    stock = replace(STOCK, variants=plans[1:] if long else plans)
    others = FEW if long else EVERYONE
    seconds = 2.5 * LONG if long else LONG  # five rounds, nearly all of which is stock DCP
    with RankPool(1, bench.folder) as pool:
        pool.keep("build", "state", "small", count)
        for work in ("save", "load"):
            title = f"{count:,} tensors of 64 bytes: {work}, 1 process"
            result = Result(f"small-{count}-{work}", title, "small", work, 1, count * 64, count)
            result.notes += left_out((OURS, stock, *others))
            if work == "save":
                race = Race(bench, pool, result, (OURS, stock, *others), seconds)
                yield race.run(saving(bench, pool), trials=1 if long else 2)
            else:
                race = Race(bench, pool, result, (OURS, STOCK, *others), seconds)
                files = written(race, race.entries)
                yield race.run(loading(bench, pool, files, result), trials=1)


def asynchronous(bench: Bench, name: str, many: bool = False) -> Iterator[Result]:
    """Measure how long the caller waits, and how long until the checkpoint is durable."""
    ranks = bench.ranks if many else 1
    stock = replace(STOCK, variants=STOCK_BEGINS)
    limit = Entry("copy", "raw copy, warm to warm", role="limit")
    entries = (OURS, stock, SNAPSHOT, META, limit)
    with RankPool(ranks, bench.folder, group=True) as pool:
        title = f"Background save, {_many(ranks)}: until the caller goes on"
        result = started(bench, pool, name, title, "stall", "adamw", bench.nbytes)
        result.limit = "copy"

        def act(entry: Entry, trial: bool) -> list[Sample]:
            path = fresh(bench.folder, f"async-{entry.key}")
            pool.one("settle")
            try:
                return pool.all("begin", entry.key, "state", path)
            finally:
                shutil.rmtree(path, ignore_errors=True)

        yield Race(bench, pool, result, entries).run(act)


def checksums(bench: Bench) -> Iterator[Result]:
    """Measure the processor time of a save and of its checksums."""
    crc = Entry("crc", "CRC-32 of every block", role="other")
    with RankPool(1, bench.folder) as pool:
        title = "Checksums on saving, in processor time, 1 process"
        result = started(bench, pool, "checksums", title, "save", "adamw", bench.nbytes)
        result.notes.append(
            "The time of the checksums is derived: the checksum of each block of 256 KiB is timed "
            "on the bytes in place, as in a save, on one processor."
        )
        yield Race(bench, pool, result, (OURS, crc)).run(saving(bench, pool))


def memory(bench: Bench) -> Iterator[Result]:
    """Measure resident memory over many small saves."""
    result = Result(
        "memory", f"Memory over {bench.saves} small saves", "memory", "leak", 1, 0, limit=""
    )
    result.notes.append(
        "The slope is that of a line fitted to the resident memory after each save of the "
        "second half."
    )
    with RankPool(1, bench.folder) as pool:
        pool.keep("build", "state", "bf16", min(bench.nbytes, 4 << 20))
        for entry, verb in ((OURS, "save"), (BACKGROUND, "begin"), (STOCK, "save")):
            series = result.series[entry.key] = Series(entry.label, entry.role)
            path = fresh(bench.folder, f"memory-{entry.key}")
            try:
                pool.all("enter", entry.key, entry.contestant, {})
                found = pool.one(
                    "do", solo.memory_over, entry.key, "state", verb, path, bench.saves
                )
                series.add(found)
                bench.say(f"  {entry.label}: {found.figures['slope']:.0f} bytes a save")
            except RankError as error:
                series.error = str(error)
                bench.say(f"  {entry.label}: {error}")
    yield result


def interpreter(bench: Bench) -> Iterator[Result]:
    """Measure a training loop in Python beside a save in the background."""
    kept = {"threads": 4, "stager": "kept"}
    entries = (
        Entry("alone", "no save running", who="idle", role="limit"),
        Entry("raw_writer", "raw direct writes by another process", role="limit"),
        OURS,
        Entry(
            "low_priority",
            "Shardkeep, low_priority",
            who="shardkeep",
            role="ours",
            variants=({"low_priority": True},),
        ),
        replace(STOCK, key="stock", label="stock DCP, thread", variants=(kept,)),
        replace(
            STOCK,
            key="stock_process",
            who="stock",
            label="stock DCP, process",
            variants=(kept | {"process": True},),
        ),
    )
    steps: dict[str, list[float]] = {entry.key: [] for entry in entries}
    with RankPool(1, bench.folder, group=True) as pool:
        title = "A step of a training loop in Python while a save is running, 1 process"
        result = started(bench, pool, "interpreter", title, "step", "adamw", bench.nbytes // 2)
        result.limit = "alone"
        result.notes.append(
            "Saves follow each other without a pause. The steps do not include the stalls. Times "
            "are the 99th percentile of the steps of each round; p50 and p99 are those of all "
            "steps."
        )

        def act(entry: Entry, trial: bool) -> list[Sample]:
            path = fresh(bench.folder, f"loop-{entry.key}")
            count = bench.steps // 10 if trial else bench.steps
            try:
                sample, found = pool.one("do", solo.loop, entry.key, "state", path, count)
            finally:
                shutil.rmtree(path, ignore_errors=True)
            if not trial:
                steps[entry.key] += found
            return [sample]

        Race(bench, pool, result, entries).run(act, trials=1)
        for key, found in steps.items():
            if found:
                result.series[key].figures |= {
                    "p50": [percentile(found, 0.5)],
                    "p99": [percentile(found, 0.99)],
                    "steps": [len(found)],
                }
        yield result


def started(
    bench: Bench,
    pool: RankPool,
    name: str,
    title: str,
    work: str,
    kind: str,
    amount: int,
    split: str = "rows",
) -> Result:
    """Let the ranks build the state; return a result with its size."""
    built = pool.keep("build", "state", kind, amount, split)
    nbytes = sum(nbytes for nbytes, _ in built)
    return Result(name, title, name.partition("-")[0], work, pool.ranks, nbytes, built[0][1])


def saving(bench: Bench, pool: RankPool) -> Act:
    """Return an act that saves to a new path after everything written before is on the disk."""

    def act(entry: Entry, trial: bool) -> list[Sample]:
        path = fresh(bench.folder, f"save-{entry.key}")
        pool.one("settle")
        try:
            samples = pool.all("save", entry.key, entry.state, path)
            if trial and entry.contestant in DCP:
                pool.all("check_saved", entry.state, path)
            return samples
        finally:
            shutil.rmtree(path, ignore_errors=True)

    return act


def written(race: Race, entries: Sequence[Entry], state: str = "state") -> dict[str, Path]:
    """Save once with each source that entries load from; an entry whose source fails is out."""
    files: dict[str, Path] = {}
    failed: dict[str, str] = {}
    for source, entry in {entry.source: entry for entry in reversed(entries)}.items():
        path = fresh(race.bench.folder, f"files-{source}")
        key = f"writer-{source}"
        try:
            # Settings of a reader do not apply to the contestant that writes for it.
            how = entry.variants[0] if entry.contestant == source else {}
            race.pool.all("enter", key, source, how)
            race.pool.all("save", key, state, path)
            race.pool.all("leave", key)
            files[source] = path
        except RankError as error:
            failed[source] = str(error)
            race.bench.say(f"  {source} could not save: {error}")
            files[source] = path
    for entry in entries:
        if entry.source in failed:
            series = race.result.series.setdefault(entry.key, Series(entry.label, entry.role))
            series.error = failed[entry.source]
    return files


def loading(
    bench: Bench, pool: RankPool, files: Mapping[str, Path], result: Result, cold: bool = False
) -> Act:
    """Return an act that loads files from the page cache, or from the disk with `cold`."""

    def act(entry: Entry, trial: bool) -> list[Sample]:
        if cold:
            how = pool.one("cool", list(files.values()))
            note = f"The page cache is emptied by {how} before each load."
            if note not in result.notes:
                result.notes.append(note)
        else:
            pool.all("warm", files[entry.source])
        check = trial and entry.checked
        return pool.all("load", entry.key, entry.state, files[entry.source], check=check)

    return act


def _many(ranks: int) -> str:
    return "1 process" if ranks == 1 else f"{ranks} ranks"


@dataclass(frozen=True)
class Workload:
    """A workload that `python -m bench NAME` runs."""

    about: str
    run: Callable[[Bench], Iterator[Result]]


WORKLOADS = {
    "save-1": Workload("durable save, AdamW state, 1 process", partial(saves, name="save-1")),
    "save-4": Workload(
        "durable save, AdamW state, 4 ranks", partial(saves, name="save-4", many=True)
    ),
    "save-bf16": Workload(
        "durable save, bf16 model, 1 process",
        partial(saves, name="save-bf16", kind="bf16", others=FEW),
    ),
    "load-1": Workload("cached load, AdamW state, 1 process", partial(loads, name="load-1")),
    "load-4": Workload(
        "cached load, AdamW state, 4 ranks", partial(loads, name="load-4", many=True)
    ),
    "load-bf16": Workload(
        "cached load, bf16 model, 1 process",
        partial(loads, name="load-bf16", kind="bf16", others=FEW),
    ),
    "cold-1": Workload(
        "cold load, AdamW state, 1 process", partial(loads, name="cold-1", others=FEW, cold=True)
    ),
    "cold-4": Workload(
        "cold load, AdamW state, 4 ranks",
        partial(loads, name="cold-4", many=True, others=FEW, cold=True),
    ),
    "reshard": Workload("rows to columns on 4 ranks", reshard),
    "ranks-4-2": Workload(
        "saved by 4 ranks, loaded by 2", partial(other_ranks, name="ranks-4-2", before=4, after=2)
    ),
    "ranks-2-4": Workload(
        "saved by 2 ranks, loaded by 4", partial(other_ranks, name="ranks-2-4", before=2, after=4)
    ),
    "slice": Workload("a part of one tensor", column_slice),
    "small-20000": Workload("20,000 tensors of 64 bytes", partial(small, number=0)),
    "small-100000": Workload("100,000 tensors of 64 bytes", partial(small, number=1)),
    "async-1": Workload("background save, 1 process", partial(asynchronous, name="async-1")),
    "async-4": Workload(
        "background save, 4 ranks", partial(asynchronous, name="async-4", many=True)
    ),
    "checksums": Workload("processor time of the checksums", checksums),
    "memory": Workload("resident memory over 200 saves", memory),
    "interpreter": Workload("a training loop beside a save", interpreter),
}
