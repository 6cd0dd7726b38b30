"""The page on changing over: every snippet runs, and says what the page shows."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fsspec")
pytest.importorskip("safetensors")
pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore"),  # What the page says of warnings, it tests itself.
]

import shardkeep.dcp as dcp
from support.migrating import said_by, script

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "migrating.md").read_text(encoding="utf-8")
SAVE_ID = "5ave1d" + 26 * "0"

BLOCKS = [*re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE), ("", "")]
SNIPPETS = [
    (code, shown if other == "" else "")
    for (kind, code), (other, shown) in pairwise(BLOCKS)
    if kind == "python"
]
ON_RANKS = re.compile(r"# on (\d) ranks\n")


def plain(text: str) -> str:
    return re.sub(r"\b[0-9a-f]{32}\b|(?<=_)[0-9a-f]{32}", SAVE_ID, text).strip()


@pytest.fixture
def trusted_before():
    """The page trusts a class for good."""
    before = torch.serialization.get_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="torch 2.5 has it")
def test_what_one_process_runs(tmp_path, monkeypatch, trusted_before):
    monkeypatch.chdir(tmp_path)
    module = script()
    ran = 0
    for code, shown in SNIPPETS:
        if not ON_RANKS.match(code):
            assert plain(said_by(code, module)) == plain(shown), code
            ran += 1
    assert ran >= 12


def in_jobs() -> list[tuple[int, str, str]]:
    found = [(ON_RANKS.match(code), code, shown) for code, shown in SNIPPETS]
    return [(int(match[1]), code, shown) for match, code, shown in found if match]


def test_what_jobs_run(gloo, tmp_path):
    assert {size for size, _, _ in in_jobs()} == {2, 4}
    for size, code, shown in in_jobs():
        said = gloo.run("support.migrating:on_rank", code, str(tmp_path), size=size)
        assert [plain(one) for one in said] == [plain(shown)] * size, code


def test_the_command_changes_all_imports(tmp_path):
    (old, new) = re.search(r"sed -i 's/(.*)/(.*)/g'", PAGE).groups()  # type: ignore[union-attr]
    code = "import {0} as dcp\nimport {0}\nfrom {0}.filesystem import FileSystemReader\n"
    code += "from {0} import save\nloaded = {0}.state_dict_loader.load\n"
    assert re.sub(old, new, code.format("torch.distributed.checkpoint")) == code.format(
        "shardkeep.dcp"
    )
    names: dict[str, object] = {}
    exec(code.format("shardkeep.dcp"), names)
    assert names["dcp"] is dcp
    assert names["loaded"] is dcp.load


@pytest.mark.parametrize("page", ["migrating.md", "drop-in.md"])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", (DOCS / page).read_text(encoding="utf-8")):
        assert (DOCS / link).exists(), link
