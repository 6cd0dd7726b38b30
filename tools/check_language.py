"""Check prose for constructions that readers had to decode.

Run `python tools/check_language.py` from the root of the repository, with files or folders as
arguments to check only those. It reads comments and string literals of Python files, and Markdown
files without their code blocks. It prints each match with its file, its line and advice, and exits
with 1 if there is a match.

The list is short on purpose: each entry is a construction that used to be everywhere in the
project. Add constructions that return, not ones that could be wrong.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

TREES = ("src", "tests", "bench", "compat", "crash", "demo", "fuzz", "attacks", "tools", "docs")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")

RULES = (
    (
        r"(?<!here )\b(is|are|be|was) (none|no)\b(?! (longer|more|matter|different|worse|better))",
        "say what was found and what was expected",
    ),
    (r"\bcan't be[:;,.)]|\bcan't be$", "say what is allowed: 'must be at least 1, not 0'"),
    (r"\bas of `", "describe it here, or write 'see save()'"),
    (
        r"\b[Ww]ho(ever)? (asks|reads|loads|saves|looks|collects|waits|wants|calls|takes part|"
        r"makes|commits|has|is told)\b",
        "name the subject: the caller, the reader, a rank",
    ),
    (r"\b(is|are|was|were|be) told\b", "report to, notify, pass"),
    (r"\bhears? of\b", "learns of, is notified of"),
    (
        r"\b(bytes|payloads?|tensors?|elements|files?|items?|chunks?|pieces?) (that )?lies?\b",
        "are stored at, are located in",
    ),
    (r"\b(stands?|stood) (in|beside|below|behind|there|right)\b", "are listed in, are next to"),
    (r"\bbehind (its|the|their) caller", "in the background"),
    (
        r"\b(life of a (save|load)|the two lives|rooms? of the house|torch rooms?)\b",
        "settings, stages, packages",
    ),
    (r"\bcame about\b|\bcomes about\b", "happened"),
    (r"\bin peace\b", "normally, without an error"),
    (r"\bplayed (device|rank|store)", "mock, simulated"),
    (r"\bis for (who|whoever)\b", "the caller must"),
    (
        r"\bnobody (has )?(asked|asks|needs to be|knows|hears)\b",
        "name what did not happen: 'its result was never retrieved'",
    ),
    (r"\bwhat (comes|came|goes|went|there is)\b", "name the thing"),
    (r"\bfound out\b", "detected, determined"),
)


@dataclass(frozen=True)
class Match:
    """A construction that was found."""

    file: Path
    line: int
    text: str
    advice: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text!r}: {self.advice}"


def main(paths: list[str]) -> int:
    """Check the given files and folders, by default all of the project; return the exit code."""
    found = [match for file in _files(paths) for match in check(file)]
    for match in found:
        print(match)
    print(f"{len(found)} constructions to rewrite" if found else "language: nothing found")
    return 1 if found else 0


def check(file: Path) -> Iterator[Match]:
    """Yield what the rules find in one file."""
    for start, text in _prose(file):
        prose = re.sub(r"\n[ \t]+", "\n", text)  # A construction may continue on the next line.
        for pattern, advice in RULES:
            for match in re.finditer(pattern.replace(" ", r"\s"), prose):
                line = start + prose.count("\n", 0, match.start())
                yield Match(file.relative_to(ROOT), line, " ".join(match[0].split()), advice)


def _prose(file: Path) -> Iterator[tuple[int, str]]:
    """Yield pieces of prose with the line that each starts at."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        # Code blocks are checked where they come from.
        yield 1, re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), text, flags=re.S)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING):
            yield token.start[0], token.string


def _files(paths: list[str]) -> Iterator[Path]:
    roots = [Path(path).resolve() for path in paths] or [ROOT / name for name in (*TREES, *PAGES)]
    for root in roots:
        if root.is_file():
            yield root
        for file in sorted(root.rglob("*")):
            if (
                file.suffix in (".py", ".md")
                and "golden" not in file.parts
                and file != Path(__file__)
            ):
                yield file


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
