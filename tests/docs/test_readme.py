"""The README's tour runs, and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from shardkeep.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = re.search(r"\$ shardkeep ls run/step_100 --depth 2\n(.*?)```", README, re.DOTALL)


def test_the_tour(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    shown = {}
    for line in "".join(SNIPPETS).splitlines():
        code, _, comment = line.partition("  #")
        if "=" in code.split("(")[0] or code.startswith(("import", "sk.", "model(", "optim.")):
            exec(code, names)
        elif code.strip():
            shown[comment.strip()] = eval(code, names)
    assert shown.pop("(256, 64)") == (256, 64)
    assert shown.pop("3") == 3
    assert shown.pop("0.001") == 0.001
    (rows,) = shown.values()
    assert rows.shape == (2, 64)

    assert SHELL is not None
    listing, _, checked = SHELL[1].partition("$ shardkeep verify run/step_100\n")
    assert main(["ls", "run/step_100", "--depth", "2"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1:] == listing.splitlines()[1:]
    assert told[0].split("torch")[0] == listing.split("torch")[0]
    assert main(["verify", "run/step_100"]) == 0
    # The trailing figure depends on how many digits the date of the save has in the manifest.
    assert capsys.readouterr().out.split(";")[0] == checked.split(";")[0] == "run/step_100: whole"
