"""The workloads, by name: each makes one result or several, in processes of its own."""

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
from bench.ranks import Crew, RankError

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
MAPPED = Entry(
    "mapped",
    "Shardkeep, SHARDKEEP_MMAP=1",
    who="shardkeep",
    role="ours",
    variants=({"mapped": True},),
)
MAPPED_UNVERIFIED = Entry(
    "mapped_unverified",
    "Shardkeep, SHARDKEEP_MMAP=1, verify=False",
    who="shardkeep",
    role="ours",
    variants=({"mapped": True, "verify": False},),
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
"""Who writes what Shardkeep reads."""

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
"""Threads of torch's own copies in a load. Ranks have one each."""
COPIERS = (STOCK.key, TORCH.key, TENSORS.key)

STATES = {"adamw": "AdamW state", "bf16": "bf16 model"}


def left_out(entries: Sequence[Entry]) -> list[str]:
    """A note of who could have taken part, but did not."""
    there = {entry.contestant for entry in entries}
    out = [entry.label.partition(", ")[0] for entry in EVERYONE if entry.contestant not in there]
    return [f"Not among these: {', '.join(out)}."] if out else []


def writing(ranks: int) -> Entry:
    threads: Variants = ({"threads": 2}, {"threads": 3}) if ranks == 1 else ({"threads": 1},)
    return Entry("direct_write", "raw direct write", role="limit", variants=threads)


def reading(ranks: int, cold: bool) -> Entry:
    """The limit of reading what `direct_write` wrote; a direct read leaves it in its buffers."""
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
    """Until everything is durable."""
    ranks = bench.ranks if many else 1
    title = f"Durable save, {STATES[kind]}, {_many(ranks)}"
    entries = (OURS, replace(STOCK, variants=STOCK_SAVES), *others, writing(ranks))
    with Crew(ranks, bench.folder) as crew:
        result = started(bench, crew, name, title, "save", kind, bench.nbytes)
        result.limit = "direct_write"
        result.notes += left_out(entries)
        yield Race(bench, crew, result, entries).run(saving(bench, crew))


def loads(
    bench: Bench,
    name: str,
    kind: str = "adamw",
    many: bool = False,
    others: Sequence[Entry] = EVERYONE,
    cold: bool = False,
) -> Iterator[Result]:
    """Into tensors that are there, from files that are in the page cache or are not."""
    ranks = bench.ranks if many else 1
    title = f"{'Cold' if cold else 'Cached'} load, {STATES[kind]}, {_many(ranks)}"
    entries = (OURS, UNVERIFIED, STOCK, *others)
    if ranks == 1:
        entries = tuple(
            replace(one, variants=COPIES) if one.key in COPIERS else one for one in entries
        )
    entries = (*entries, reading(ranks, cold))
    with Crew(ranks, bench.folder) as crew:
        result = started(bench, crew, name, title, "load", kind, bench.nbytes)
        result.limit = entries[-1].key
        result.notes += left_out(entries)
        race = Race(bench, crew, result, entries)
        files = written(race, entries)
        yield race.run(loading(bench, crew, files, result, cold), trials=1)


def reshard(bench: Bench) -> Iterator[Result]:
    """Rows into columns: every rank needs a part of what every other one wrote."""
    straight = Entry(
        "straight",
        "straight load, rows as rows, verify=False",
        who="shardkeep",
        role="limit",
        state="rows",
        variants=UNVERIFIED.variants,
    )
    entries = (OURS, UNVERIFIED, MAPPED, MAPPED_UNVERIFIED, STOCK, RESHARDING, straight)
    with Crew(bench.ranks, bench.folder) as crew:
        title = f"Load rows as columns, {bench.ranks} ranks, cached"
        result = started(
            bench, crew, "reshard", title, "load", "adamw", bench.nbytes, split="columns"
        )
        crew.keep("build", "rows", "adamw", bench.nbytes)
        result.limit = "straight"
        result.notes += left_out(entries)
        race = Race(bench, crew, result, entries)
        files = written(race, entries, state="rows")
        yield race.run(loading(bench, crew, files, result), trials=1)


def other_ranks(bench: Bench, name: str, before: int, after: int) -> Iterator[Result]:
    """Saved by so many ranks, loaded by another number."""
    title = f"Load what {before} ranks saved on {after}, cached"
    limit = reading(after, cold=False)
    entries = (OURS, UNVERIFIED, STOCK, RESHARDING, limit)
    result = Result(name, title, name, "load", after, 0, limit=limit.key)
    result.notes += left_out(entries)
    with Crew(before, bench.folder) as crew:
        crew.keep("build", "state", "adamw", bench.nbytes)
        race = Race(bench, crew, result, entries[:-1])
        files = written(race, entries[:-1])
    with Crew(after, bench.folder) as crew:
        built = crew.keep("build", "state", "adamw", bench.nbytes)
        result.nbytes = sum(nbytes for nbytes, _ in built)
        race = Race(bench, crew, result, entries)
        files |= written(race, entries[-1:])
        yield race.run(loading(bench, crew, files, result), trials=1)


def column_slice(bench: Bench) -> Iterator[Result]:
    """A quarter of one tensor's columns, as the second of four tensor-parallel ranks wants it."""
    entries = (OURS, UNVERIFIED, STOCK, TORCH, TENSORS)
    with Crew(1, bench.folder) as crew:
        title = "A quarter of one tensor's columns, 1 process, cached"
        amount = min(bench.nbytes // 4, 1 << 28)
        result = started(bench, crew, "slice", title, "load", "one", amount)
        result.nbytes //= 4
        result.notes.append(
            f"The tensor has {amount / 1e6:.0f} MB; stock DCP has no call that reads a part of a "
            "tensor in one process, so it reads all of it."
        )
        result.notes += left_out(entries)
        race = Race(bench, crew, result, entries)
        files = written(race, entries)

        def act(entry: Entry, trial: bool) -> list[Sample]:
            crew.all("warm", files[entry.source])
            work = ("do", solo.slice_of, entry.key, "state", files[entry.source])
            return crew.all(*work, check=trial)

        yield race.run(act, trials=1)


def small(bench: Bench, number: int) -> Iterator[Result]:
    """Many tensors of 64 bytes: nothing but the cost of each."""
    count = bench.counts[number]
    plans: Variants = ({"threads": 1}, {"threads": 1, "caching": True})
    long = count > 50_000  # minutes for a trial: settings are not tried, slow ones left out
    stock = replace(STOCK, variants=plans[1:] if long else plans)
    others = FEW if long else EVERYONE
    seconds = 2.5 * LONG if long else LONG  # five rounds, of which stock takes nearly all
    with Crew(1, bench.folder) as crew:
        crew.keep("build", "state", "small", count)
        for work in ("save", "load"):
            title = f"{count:,} tensors of 64 bytes: {work}, 1 process"
            result = Result(f"small-{count}-{work}", title, "small", work, 1, count * 64, count)
            result.notes += left_out((OURS, stock, *others))
            if work == "save":
                race = Race(bench, crew, result, (OURS, stock, *others), seconds)
                yield race.run(saving(bench, crew), trials=1 if long else 2)
            else:
                race = Race(bench, crew, result, (OURS, STOCK, *others), seconds)
                files = written(race, race.entries)
                yield race.run(loading(bench, crew, files, result), trials=1)


def asynchronous(bench: Bench, name: str, many: bool = False) -> Iterator[Result]:
    """How long the caller waits, and how long until the checkpoint is durable."""
    ranks = bench.ranks if many else 1
    stock = replace(STOCK, variants=STOCK_BEGINS)
    limit = Entry("copy", "raw copy, warm to warm", role="limit")
    entries = (OURS, stock, SNAPSHOT, META, limit)
    with Crew(ranks, bench.folder, group=True) as crew:
        title = f"Background save, {_many(ranks)}: until the caller goes on"
        result = started(bench, crew, name, title, "stall", "adamw", bench.nbytes)
        result.limit = "copy"

        def act(entry: Entry, trial: bool) -> list[Sample]:
            path = fresh(bench.folder, f"async-{entry.key}")
            crew.one("settle")
            try:
                return crew.all("begin", entry.key, "state", path)
            finally:
                shutil.rmtree(path, ignore_errors=True)

        yield Race(bench, crew, result, entries).run(act)


def checksums(bench: Bench) -> Iterator[Result]:
    """Processor time of a save, and of the checksums in it."""
    crc = Entry("crc", "CRC-32 of every block", role="other")
    with Crew(1, bench.folder) as crew:
        title = "Digests on saving, in processor time, 1 process"
        result = started(bench, crew, "checksums", title, "save", "adamw", bench.nbytes)
        result.notes.append(
            "The digests' time is derived: the check of each block of 256 KiB is timed where it "
            "lies, as a save does it; it runs on one processor."
        )
        yield Race(bench, crew, result, (OURS, crc)).run(saving(bench, crew))


def memory(bench: Bench) -> Iterator[Result]:
    """Resident memory over many small saves."""
    result = Result(
        "memory", f"Memory over {bench.saves} small saves", "memory", "leak", 1, 0, limit=""
    )
    result.notes.append(
        "The slope is that of a straight line through the resident memory after each save of the "
        "second half."
    )
    with Crew(1, bench.folder) as crew:
        crew.keep("build", "state", "bf16", min(bench.nbytes, 4 << 20))
        for entry, verb in ((OURS, "save"), (BACKGROUND, "begin"), (STOCK, "save")):
            series = result.series[entry.key] = Series(entry.label, entry.role)
            path = fresh(bench.folder, f"memory-{entry.key}")
            try:
                crew.all("enter", entry.key, entry.contestant, {})
                found = crew.one(
                    "do", solo.memory_over, entry.key, "state", verb, path, bench.saves
                )
                series.add(found)
                bench.say(f"  {entry.label}: {found.figures['slope']:.0f} bytes a save")
            except RankError as error:
                series.error = str(error)
                bench.say(f"  {entry.label}: {error}")
    yield result


def interpreter(bench: Bench) -> Iterator[Result]:
    """A training loop in Python beside a save in the background."""
    kept = {"threads": 4, "stager": "kept"}
    entries = (
        Entry("alone", "no save running", who="nobody", role="limit"),
        Entry("aside", "raw direct writes by another process", role="limit"),
        OURS,
        Entry(
            "low_priority",
            "Shardkeep, gentle",
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
    with Crew(1, bench.folder, group=True) as crew:
        title = "A step of a training loop in Python while a save is running, 1 process"
        result = started(bench, crew, "interpreter", title, "step", "adamw", bench.nbytes // 2)
        result.limit = "alone"
        result.notes.append(
            "Saves follow each other without a pause; the stalls themselves are not in the steps. "
            "Times are the 99th percentile of each round's steps; p50 and p99 those of all steps."
        )

        def act(entry: Entry, trial: bool) -> list[Sample]:
            path = fresh(bench.folder, f"loop-{entry.key}")
            count = bench.steps // 10 if trial else bench.steps
            try:
                sample, found = crew.one("do", solo.loop, entry.key, "state", path, count)
            finally:
                shutil.rmtree(path, ignore_errors=True)
            if not trial:
                steps[entry.key] += found
            return [sample]

        Race(bench, crew, result, entries).run(act, trials=1)
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
    crew: Crew,
    name: str,
    title: str,
    work: str,
    kind: str,
    amount: int,
    split: str = "rows",
) -> Result:
    """Have the ranks make the state; a result that knows its size."""
    built = crew.keep("build", "state", kind, amount, split)
    nbytes = sum(nbytes for nbytes, _ in built)
    return Result(name, title, name.partition("-")[0], work, crew.ranks, nbytes, built[0][1])


def saving(bench: Bench, crew: Crew) -> Act:
    """A save to where nothing is, with nothing else on its way to the disk."""

    def act(entry: Entry, trial: bool) -> list[Sample]:
        path = fresh(bench.folder, f"save-{entry.key}")
        crew.one("settle")
        try:
            samples = crew.all("save", entry.key, entry.state, path)
            if trial and entry.contestant in DCP:
                crew.all("check_saved", entry.state, path)
            return samples
        finally:
            shutil.rmtree(path, ignore_errors=True)

    return act


def written(race: Race, entries: Sequence[Entry], state: str = "state") -> dict[str, Path]:
    """Have each source that entries load from saved once; who can't be is out with its error."""
    files: dict[str, Path] = {}
    failed: dict[str, str] = {}
    for source, entry in {entry.source: entry for entry in reversed(entries)}.items():
        path = fresh(race.bench.folder, f"files-{source}")
        key = f"writer-{source}"
        try:
            # How to read is not how to write, where somebody reads what another wrote.
            how = entry.variants[0] if entry.contestant == source else {}
            race.crew.all("enter", key, source, how)
            race.crew.all("save", key, state, path)
            race.crew.all("leave", key)
            files[source] = path
        except RankError as error:
            failed[source] = str(error)
            race.bench.say(f"  {source} can't save: {error}")
            files[source] = path
    for entry in entries:
        if entry.source in failed:
            series = race.result.series.setdefault(entry.key, Series(entry.label, entry.role))
            series.error = failed[entry.source]
    return files


def loading(
    bench: Bench, crew: Crew, files: Mapping[str, Path], result: Result, cold: bool = False
) -> Act:
    """A load of files that are in the page cache, or that are not."""

    def act(entry: Entry, trial: bool) -> list[Sample]:
        if cold:
            how = crew.one("cool", list(files.values()))
            note = f"Before each load the page cache is emptied by {how}."
            if note not in result.notes:
                result.notes.append(note)
        else:
            crew.all("warm", files[entry.source])
        check = trial and entry.checked
        return crew.all("load", entry.key, entry.state, files[entry.source], check=check)

    return act


def _many(ranks: int) -> str:
    return "1 process" if ranks == 1 else f"{ranks} ranks"


@dataclass(frozen=True)
class Workload:
    """What `python -m bench NAME` runs."""

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
    "checksums": Workload("processor time of the digests", checksums),
    "memory": Workload("resident memory over 200 saves", memory),
    "interpreter": Workload("a training loop beside a save", interpreter),
}
