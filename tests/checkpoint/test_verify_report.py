"""Text of a verify report, in one line and in full."""

from __future__ import annotations

import numpy as np
import pytest

import shardkeep as sk


def report(*damaged: sk.Damaged, unchecked: tuple[str, ...] = (), checked: int = 2048):
    return sk.VerifyReport("run/step_1", "shardkeep", 2, checked, damaged, unchecked, 10)


def test_a_whole_checkpoint():
    assert str(report()) == "run/step_1: whole; 2.0 KiB of 2 files checked"
    assert repr(report()) == "<VerifyReport run/step_1: whole; 2.0 KiB of 2 files checked>"
    assert report().ok


def test_damage_is_listed_with_its_place_and_writer():
    damage = sk.Damaged("too short", file="__3_0_ab.distcp", name="w\x1b", block=2)
    made = report(damage, unchecked=("n",))
    assert not made.ok
    assert str(made).splitlines() == [
        "run/step_1: damaged in 1 place; 2.0 KiB of 2 files checked",
        r"  __3_0_ab.distcp, w\x1b, block 2 (written by rank 3): too short",
        "1 name has no checksum, so damage there is not detected:",
        "  n",
    ]
    assert repr(made) == (
        "<VerifyReport run/step_1: damaged in 1 place; 2.0 KiB of 2 files checked>"
    )


def test_a_checkpoint_without_checksums_is_not_called_whole():
    made = report(unchecked=("a", "b"), checked=0)
    assert str(made).splitlines()[0] == (
        "run/step_1: no damage found, but nothing could be checked; 0 B of 2 files checked"
    )
    assert "2 names have no checksum" in str(made)


def test_a_checkpoint_on_disk(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file({"w": np.zeros(4)}, tmp_path / "model.safetensors")
    made = sk.open(tmp_path).verify()
    assert made.unchecked == ("w",)
    assert str(made).endswith("  w")
