"""The package's face: every public name is there, and torch comes only with what needs it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import shardkeep as sk

WITH_TORCH = {
    "LoadReport",
    "SaveHandle",
    "SaveReport",
    "Shards",
    "async_save",
    "load",
    "release_memory",
    "save",
}


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.mark.parametrize("name", sorted(set(sk.__all__) - WITH_TORCH))
def test_names_that_need_no_torch(name):
    assert getattr(sk, name).__module__.startswith("shardkeep.")


@pytest.mark.torch
@pytest.mark.parametrize("name", sorted(WITH_TORCH))
def test_names_that_need_torch(name):
    pytest.importorskip("torch")
    assert callable(getattr(sk, name))


def test_all_is_what_dir_shows():
    assert set(sk.__all__) < set(dir(sk))
    with pytest.raises(AttributeError, match="module 'shardkeep' has no attribute 'no'"):
        _ = sk.no


def test_opening_imports_no_torch():
    code = "import sys, shardkeep as sk; sk.open; sk.Box; print('torch' in sys.modules)"
    assert run(code) == "False\n"


@pytest.mark.torch
def test_a_first_load_does_not_wait_for_a_part_of_numpy_that_nothing_here_needs(tmp_path):
    """`numpy.unique` imports `numpy.ma` when it is first called: 45 ms."""
    pytest.importorskip("torch")
    code = f"""
import sys, torch, shardkeep as sk
state = {{"w": torch.ones(3, 4), "b": torch.ones(5), "n": 3}}
sk.save(state, {str(tmp_path / "a")!r})
sk.async_save(state, {str(tmp_path / "b")!r}).result()
sk.load(state, {str(tmp_path / "a")!r})
print("numpy.ma" in sys.modules)
"""
    assert run(code) == "False\n"


@pytest.mark.torch
def test_save_stays_a_function_after_load_was_used():
    pytest.importorskip("torch")
    assert run("import shardkeep as sk; sk.load; print(callable(sk.save), callable(sk.load))") == (
        "True True\n"
    )


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")
@pytest.mark.parametrize("name", sorted(WITH_TORCH))
def test_without_torch_it_says_what_to_install(name):
    message = rf"shardkeep\.{name} needs torch: pip install 'shardkeep\[torch\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        getattr(sk, name)
