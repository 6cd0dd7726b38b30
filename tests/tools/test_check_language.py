"""The check of the project's language finds what it names, where it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("check_language", ROOT / "tools/check_language.py")
assert _spec is not None and _spec.loader is not None
check_language = importlib.util.module_from_spec(_spec)
__import__("sys").modules["check_language"] = check_language
_spec.loader.exec_module(check_language)

SAMPLES = (
    "byte 0xd8 is n" + "o opcode",
    "files=0 can" + "'t be: 1 or more",
    "as of " + "`save`",
    "which is for wh" + "o pinned it",
    "the tensor " + "lies in its file",
    "it is " + "told of progress",
    "nobody " + "asked for its result",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(check_language, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("sample", SAMPLES)
def test_constructions_are_found_in_docstrings_comments_messages_and_pages(sample, folder):
    texts = {
        "docstring.py": f'def f():\n    """First line.\n\n    Then {sample}.\n    """\n',
        "comment.py": f"value = 1\n\n\n# Here {sample}.\n",
        "message.py": f'value = 1\n\n\nerror = "{sample}"\n',
        "page.md": f"# Page\n\n\nHere {sample}.\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        assert [match.line for match in check_language.check(folder / name)] == [4], name


def test_a_construction_that_is_broken_over_two_lines_is_found(folder):
    (folder / "page.md").write_text("Here it is\nn" + "o opcode.\n")
    assert len(list(check_language.check(folder / "page.md"))) == 1


def test_plain_language_and_code_pass(folder):
    (folder / "page.md").write_text("There is no clock. It is no longer used.\n```\nis none\n```\n")
    (folder / "code.py").write_text("value_is_none = lies = told = 1\n")
    for name in ("page.md", "code.py"):
        assert list(check_language.check(folder / name)) == []


def test_the_exit_code_says_whether_anything_was_found(folder, capsys):
    (folder / "good.md").write_text("Fine.\n")
    (folder / "bad.md").write_text("This is" + " none.\n")
    assert check_language.main([str(folder / "good.md")]) == 0
    assert check_language.main([str(folder / "bad.md")]) == 1
    assert "bad.md:1: 'is" + " none'" in capsys.readouterr().out
