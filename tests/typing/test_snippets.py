"""Type checkers accept the snippets of the README and the guide: a program as users write it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]  # they read torch's sources, too

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/guide.md")

PREAMBLE = """\
import random
from typing import Any

import torch
import shardkeep as sk

model: torch.nn.Module
loader: Any
config: dict[str, int]
path: str
state: dict[str, Any]


def train(state: dict[str, Any]) -> float:
    return 0.0


def accessors(ckpt: sk.Checkpoint) -> None:
    info: sk.TensorInfo = ckpt.tensor("w")
    chunk: sk.Chunk = info.chunks[0]
    where: sk.ByteRange = chunk.item
    entry: sk.TensorInfo | sk.ObjectInfo = ckpt["w"]
    with ckpt as same:
        checked: sk.VerifyReport = same.verify()
        text: str = str(checked)
    print(where, entry, text)


def errors() -> None:
    try:
        sk.load(state, path)
    except sk.Mismatch as error:
        if error.report is not None:
            missing: tuple[str, ...] = error.report.missing
            print(missing)
    except sk.Damaged as error:
        block: int | None = error.block
        print(error.file, error.name, block)


class KeepEven:
    def keep(self, steps: "Sequence[sk.Step]") -> "list[int]":
        return [step.number for step in steps if step.number % 2 == 0]


def policies() -> None:
    policy: sk.KeepPolicy = KeepEven()
    run = sk.Manager("run", keep=sk.KeepLast(3) | policy)
    handle: sk.StepHandle = run.save(1, state)
    print(handle.result())
"""


def program() -> str:
    """Each snippet as a function, below what the pages take for granted."""
    parts = ["from collections.abc import Sequence\n", PREAMBLE]
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL), 1):
            name = f"{Path(page).stem.lower()}_{number}"
            parts.append(f"def {name}() -> None:\n{textwrap.indent(code, '    ')}")
    return "\n\n".join(parts)


def check(command: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "MYPYPATH": str(ROOT / "src")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def written(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(program(), encoding="utf-8")
    return file


def test_the_program_has_the_snippets_of_both_pages():
    text = program()
    assert text.count("def readme_") >= 3
    assert text.count("def guide_") >= 6
    compile(text, "program.py", "exec")


def test_mypy_strict(written, tmp_path):
    pytest.importorskip("mypy")
    cache = f"--cache-dir={ROOT / '.mypy_cache' / 'snippets'}"
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", cache]
    check([*command, str(written)], tmp_path)


def test_pyright(written, tmp_path):
    pyright = shutil.which("pyright") or shutil.which("pyright", path=Path(sys.executable).parent)
    if pyright is None:
        pytest.skip("pyright is not installed")
    config = tmp_path / "pyrightconfig.json"
    config.write_text(f'{{"extraPaths": ["{ROOT / "src"}"], "include": ["program.py"]}}')
    check([pyright, "--pythonpath", sys.executable, "--project", str(config)], tmp_path)


def test_the_marker_of_a_typed_package_is_shipped():
    assert (ROOT / "src" / "shardkeep" / "py.typed").exists()
    assert 'shardkeep = ["py.typed"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
