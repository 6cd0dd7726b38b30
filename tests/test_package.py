"""The public names: all are there, and torch is imported only by those that need it."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys

import pytest

import shardkeep as sk
from shardkeep.util.without_torch import stand_in

NEED_TORCH = {
    "Restored",
    "Shards",
    "async_save",
    "load",
    "release_memory",
    "save",
}
ALIASES = {"EventHook"}  # names of types, not classes
WITHOUT_TORCH = importlib.util.find_spec("torch") is None
only_without_torch = pytest.mark.skipif(not WITHOUT_TORCH, reason="torch is installed")


def call(function):
    """Call it with as many arguments as it must have."""
    if not inspect.isfunction(function):
        return function()
    parameters = inspect.signature(function).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return function(*[None for _ in required])


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True
    )
    return done.stdout


@pytest.mark.parametrize("name", sorted(set(sk.__all__) - NEED_TORCH - ALIASES))
def test_names_that_need_no_torch(name):
    assert getattr(sk, name).__module__.startswith("shardkeep.")


@pytest.mark.torch
@pytest.mark.parametrize("name", sorted(NEED_TORCH))
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


@pytest.mark.parametrize("name", sorted(set(sk.__all__) - ALIASES))
def test_every_public_name_has_a_docstring_and_its_own_name(name):
    value = getattr(sk, name)
    assert value.__doc__
    assert value.__name__ == name


def test_a_star_import_gives_every_public_name():
    names: dict[str, object] = {}
    exec("from shardkeep import *", names)
    assert set(sk.__all__) <= set(names)
    assert not set(names) - set(sk.__all__) - {"__builtins__"}


def test_help_and_inspect_see_every_public_name():
    """In a process of its own: neither needs torch, and neither imports it where it is missing."""
    code = """
import inspect, pydoc, shardkeep as sk
members = dict(inspect.getmembers(sk))
page = pydoc.render_doc(sk, renderer=pydoc.plaintext)
print(sorted(name for name in sk.__all__ if name not in members or name not in page))
print("dcp" in members, inspect.ismodule(members["dcp"]), "state: 'Mapping" in page)
"""
    assert run(code) == "[]\nTrue True True\n"


def test_errors_protocols_and_types_that_a_caller_can_meet_are_public():
    from shardkeep import errors

    assert set(errors.__all__) <= set(sk.__all__)
    named = "Store Ranks KeepPolicy Progress StepHandle Restored Chunk ByteRange Step"
    assert set(named.split()) <= set(sk.__all__)


@only_without_torch
@pytest.mark.parametrize("name", sorted(NEED_TORCH))
def test_calling_what_needs_torch_says_what_to_install(name):
    message = rf"shardkeep\.{name} needs torch, .*: pip install 'shardkeep\[torch\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        call(getattr(sk, name))


@only_without_torch
def test_the_drop_in_says_what_to_install():
    message = r"shardkeep\.dcp\.save needs torch, .*: pip install 'shardkeep\[torch\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        sk.dcp.save({}, checkpoint_id="run")


@only_without_torch
@pytest.mark.parametrize("method", ["save", "restore"])
def test_a_manager_says_what_to_install(method, tmp_path):
    arguments = {"save": (1, {}), "restore": ({},)}[method]
    message = rf"shardkeep\.Manager\.{method} needs torch, .*: pip install"
    with sk.Manager(tmp_path / "run") as manager, pytest.raises(ModuleNotFoundError, match=message):
        getattr(manager, method)(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(NEED_TORCH))
def test_a_stand_in_has_the_docstring_and_signature_of_what_it_stands_for(name):
    made = stand_in(sk._MODULES[name], name)
    assert made.__doc__
    if inspect.isfunction(made):
        assert str(inspect.signature(made)).startswith("(")
    if not WITHOUT_TORCH:
        real = getattr(sk, name)
        assert inspect.getdoc(made) == inspect.getdoc(real)
        if inspect.isfunction(made):
            assert inspect.signature(made) == inspect.signature(real)
    with pytest.raises(ModuleNotFoundError, match="needs torch"):
        call(made)


def test_without_posix_locks_it_says_which_platforms_are_supported():
    """As on Windows, which has no `fcntl`."""
    code = """
import sys
sys.modules["fcntl"] = None  # importing it fails
try:
    import shardkeep
except ImportError as error:
    print(type(error).__name__, error)
"""
    said = run(code)
    assert said.startswith(
        "ImportError Shardkeep runs on Linux and, as best effort, on macOS, but not on Windows"
    )
    assert "use it inside WSL" in said
    assert "fcntl" not in said
