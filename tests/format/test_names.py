"""Names of data files are restricted to the checkpoint's folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.errors import FormatError
from shardkeep.format.names import safe_file_name


@pytest.mark.parametrize(
    "name", ["__0_0.distcp", "a/b.distcp", "..a", "a..", "...", "é ", ".metadata"]
)
def test_valid_names_are_unchanged(name):
    assert safe_file_name(name) == name


@pytest.mark.parametrize("name", ["./a/b", "a//b", "a/./b"])
def test_names_are_normalized(name):
    assert safe_file_name(name) in ("a/b",)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../x", "leaves the checkpoint's folder"),
        ("a/../../x", "leaves the checkpoint's folder"),
        ("a/..", "leaves the checkpoint's folder"),
        ("..", "leaves the checkpoint's folder"),
        ("/etc/passwd", "leaves the checkpoint's folder"),
        ("//host/share", "leaves the checkpoint's folder"),
        ("C:x", "leaves the checkpoint's folder"),
        ("./C:/x", "leaves the checkpoint's folder"),
        ("..\\x", "leaves the checkpoint's folder"),
        ("", "cannot name a file"),
        (".", "cannot name a file"),
        ("/", "cannot name a file"),
        ("a/", "cannot name a file"),
        ("a\0b", "cannot name a file"),
        ("x" * 5000, "cannot name a file"),
        ("\ud800", "is not valid Unicode"),
    ],
)
def test_invalid_names_are_refused(name, reason):
    with pytest.raises(FormatError, match=f"^m: file name .* {reason}$"):
        safe_file_name(name, file="m")


@given(st.text(st.sampled_from("./\\:Ca\0"), max_size=8))
def test_every_accepted_name_is_inside_the_checkpoint(name):
    try:
        safe = safe_file_name(name)
    except FormatError:
        return
    assert safe_file_name(safe) == safe
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(safe)
        assert not path.is_absolute() and not path.anchor and ".." not in path.parts
    assert (Path("/folder") / safe).resolve().is_relative_to("/folder")
