"""Write `docs/drop-in.md`: every public name of torch's package, and Shardkeep's counterpart.

    python -m compat.names_page     # writes the page, or lists unexplained differences

Whether a name is "the same" is computed, never written by hand: either the object is torch's own,
or the signatures are equal.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compat.differences import BETTER, EXPLAINED, MISSING
from compat.names import OURS, STOCK, Name, Record, describe, describe_member, module, recorded

PAGE = Path(__file__).resolve().parents[1] / "docs" / "drop-in.md"

OWN, SAME, IMPROVED, ABSENT = "torch's own", "same", "better", "missing"

EARLY = "also where torch is older and has none"


@dataclass(frozen=True)
class Row:
    """A name or a member of a class (`Class.member`), and its verdict.

    Attributes:
        module: the module in torch's package; "" is the package itself.
        name: the name in the module.
        releases: the releases of torch that have it.
        verdict: one of OWN, SAME, IMPROVED, ABSENT.
        how: what is better, or why it is missing.
        key: the place in `shardkeep.dcp` where the object is defined, as in the tables.
    """

    module: str
    name: str
    releases: tuple[str, ...]
    verdict: str
    how: str = ""
    key: str = ""

    @property
    def place(self) -> str:
        return f"{self.module}.{self.name}" if self.module else self.name


@dataclass(frozen=True)
class Comparison:
    """All rows, and the unexplained differences."""

    records: tuple[Record, ...]
    rows: tuple[Row, ...]
    problems: tuple[str, ...]


def compare(records: tuple[Record, ...] | None = None) -> Comparison:
    """Compare the installed names with the recorded names of the releases."""
    records = recorded() if records is None else records
    rows: list[Row] = []
    problems: list[str] = []
    for name in sorted({name for record in records for name in record.modules}):
        offers: dict[str, dict[str, Name]] = {}
        for record in records:
            for public, how in record.modules.get(name, {}).items():
                offers.setdefault(public, {})[minor(record)] = how
        for public in sorted(offers):
            found, wrong = _judge(name, public, offers[public])
            rows += found
            problems += wrong
    problems += _unused(rows)
    return Comparison(records, tuple(rows), tuple(problems))


def minor(record: Record) -> str:
    return record.torch.rpartition(".")[0]


def _judge(where: str, name: str, offers: dict[str, Name]) -> tuple[list[Row], list[str]]:
    """Return the rows of a name and its members, and the unexplained differences."""
    place = f"{where}.{name}" if where else name
    row = functools.partial(Row, where, name, tuple(offers))
    try:
        ours = getattr(module(OURS, where), name)
    except (ImportError, AttributeError):
        why = MISSING.get(place, "")
        return [row(ABSENT, why, place)], [] if why else [
            f"{place} is missing, and compat/differences.py does not say why"
        ]
    theirs = _attribute(where, name)
    if ours is theirs:
        members = _members(where, name, offers, lambda _: (OWN, "", ""))
        return [row(OWN), *members], []
    key, found = _key(ours), describe(ours)
    wrong = [
        f"{place}{found.signature} in Shardkeep, {place}{how.signature} in torch {release}"
        for release, how in offers.items()
        if found.signature != how.signature and key not in EXPLAINED
    ]
    wrong += [f"{place} is a {found.kind}, not a {how.kind}"
              for how in offers.values() if found.kind != how.kind]  # fmt: skip
    members = _members(where, name, offers, functools.partial(_judge_member, ours, theirs))
    wrong += _wrong_members(place, ours, offers)
    how = BETTER.get(key, "" if theirs else EARLY)
    return [row(IMPROVED if how else SAME, how, key), *members], wrong


def _attribute(where: str, name: str) -> Any:
    """Return torch's object in the installed release, or None."""
    try:
        return getattr(module(STOCK, where), name, None)
    except ImportError:
        return None


def _members(where: str, name: str, offers: dict[str, Name], judge: Any) -> list[Row]:
    every = sorted({member for how in offers.values() for member in how.members})
    return [
        Row(
            where,
            f"{name}.{member}",
            tuple(release for release, how in offers.items() if member in how.members),
            *judge(member),
        )
        for member in every
    ]


def _judge_member(ours: Any, theirs: Any, member: str) -> tuple[str, str, str]:
    found = inspect.getattr_static(ours, member, None)
    if found is None:
        return ABSENT, "", ""
    if found is inspect.getattr_static(theirs, member, None) or _of_torch(found):
        return OWN, "", ""
    key = _key(found)
    return (IMPROVED, BETTER[key], key) if key in BETTER else (SAME, "", key)


def _wrong_members(place: str, ours: Any, offers: dict[str, Name]) -> Iterator[str]:
    for release, how in offers.items():
        for member, signature in how.members.items():
            found = inspect.getattr_static(ours, member, None)
            if found is None:
                yield f"{place}.{member} is missing"
            elif how.kind == "class" and _key(found) not in EXPLAINED:
                given = describe_member(ours, member)
                if given != signature:
                    yield f"{place}.{member}{given} in Shardkeep, {signature} in torch {release}"


def _of_torch(member: Any) -> bool:
    """Return whether a method is inherited from a class of torch's."""
    return _home(member)[0].startswith("torch.")


def _key(value: Any) -> str:
    """Return where an object is defined below `shardkeep.dcp`, or "" for other objects."""
    home, name = _home(value)
    inner = home.removeprefix(f"{OURS}.")
    return "" if inner == home else f"{inner}.{name}"


def _home(value: Any) -> tuple[str, str]:
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)
    return getattr(value, "__module__", None) or "", getattr(value, "__qualname__", "")


def _unused(rows: Iterable[Row]) -> list[str]:
    """Return the errors for entries of the tables that no name needs."""
    keys = {row.key for row in rows}
    absent = {row.place for row in rows if row.verdict == ABSENT}
    wrong = [key for table in (BETTER, EXPLAINED) for key in table if key not in keys]
    wrong += [key for key in MISSING if key not in absent]
    return [
        f"the tables in compat/differences.py name {key}: there is no such name" for key in wrong
    ]


def text(found: Comparison) -> str:
    """Return the page."""
    releases = [minor(record) for record in found.records]
    # Each name of the package is a name of a module as well, and counted there.
    counted = [row for row in found.rows if row.module]
    count = {what: sum(row.verdict == what for row in counted)
             for what in (OWN, SAME, IMPROVED, ABSENT)}  # fmt: skip
    modules = sorted({name for record in found.records for name in record.modules} - {""})
    parts = [
        "# The drop-in, name by name",
        f"Made by `make drop-in` from what torch {' and '.join(releases)} offer: "
        f"{len(counted):,} public names in {len(modules)} modules, methods included. "
        f"{count[OWN]:,} are torch's own, {count[SAME]:,} the same, {count[IMPROVED]:,} better, "
        f"**{count[ABSENT]:,} missing**.",
        INTRODUCTION,
        "## `shardkeep.dcp`",
        _package(found.rows, releases),
    ]
    for name in modules:
        rows = [row for row in found.rows if row.module == name]
        since = [minor(record) for record in found.records if name in record.modules]
        only = "" if len(since) == len(releases) else f" ({', '.join(since)})"
        parts += [f"## `{name}`{only}", _table(rows, since) if rows else NOTHING]
    parts += ["## Private modules", _private(found.records)]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """\
Each name is in the module of the same name: `shardkeep.dcp.filesystem.FileSystemReader` for
`torch.distributed.checkpoint.filesystem.FileSystemReader`, whatever release is installed.

- **torch's own**: the object of the installed release itself. The classes that planners, storage
  and metadata consist of have to be torch's own.
- **same**: an object of Shardkeep's with the same names, kinds and defaults of parameters.
- **better**: the same, with an improvement that is described.

Numbers in brackets are the releases of torch that have the name, if not all of them do. Private
names are available as well. How to change over: [migrating.md](migrating.md)."""

NOTHING = "No public names."


def _package(rows: Sequence[Row], releases: Sequence[str]) -> str:
    """Return the table of the names in the package, which are described in their modules."""
    names = {row.name for row in rows if not row.module}
    homes: dict[str, str] = {}
    for row in rows:
        if row.module and not row.module.startswith("_") and row.name in names:
            homes.setdefault(row.name, row.module)
    lines = ["| Name | From | |", "|---|---|---|"]
    for row in rows:
        if not row.module and "." not in row.name:
            home = f"`{homes[row.name]}`" if row.name in homes else ""
            lines.append(f"| {_code(row, releases)} | {home} | {_said(row)} |")
    return "\n".join(lines)


def _table(rows: Sequence[Row], releases: Sequence[str]) -> str:
    lines = ["| Name | |", "|---|---|"]
    for row in rows:
        if "." in row.name:
            continue
        members = [one for one in rows if one.name.startswith(f"{row.name}.")]
        inherit = [one for one in members if one.verdict == row.verdict == OWN]
        names = [_code(row, releases), *(_member(one, releases) for one in inherit)]
        lines.append(
            f"| {names[0]}{': ' if inherit else ''}{', '.join(names[1:])} | {_said(row)} |"
        )
        left = [one for one in members if one not in inherit]
        told = [one for one in left if one.verdict in (IMPROVED, ABSENT)]
        lines += [f"| {_code(one, releases)} | {_said(one)} |" for one in told]
        for verdict in (SAME, OWN):
            plain = [_member(one, releases) for one in left if one.verdict == verdict]
            if plain:
                lines.append(f"| of `{row.name}`: {', '.join(plain)} | {verdict} |")
    return "\n".join(lines)


def _code(row: Row, releases: Sequence[str]) -> str:
    return f"`{row.name}`{_only(row, releases)}"


def _member(row: Row, releases: Sequence[str]) -> str:
    return f"`{row.name.partition('.')[2]}`{_only(row, releases)}"


def _only(row: Row, releases: Sequence[str]) -> str:
    return "" if len(row.releases) == len(releases) else f" ({', '.join(row.releases)})"


def _said(row: Row) -> str:
    explained = EXPLAINED.get(row.key, "")
    said = f"**{row.verdict}**: {row.how}" if row.how else row.verdict
    return f"{said}; {explained}" if explained else said


def _private(records: Sequence[Record]) -> str:
    names = sorted({name for record in records for name in record.private})
    return f"Private modules, re-exported as well: {', '.join(f'`{name}`' for name in names)}."


def main() -> int:
    """Write the page; if a difference is unexplained, print it and return 1."""
    found = compare()
    for problem in found.problems:
        print(problem, file=sys.stderr)
    if not found.problems:
        PAGE.write_text(text(found), encoding="utf-8")
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
