"""Options of a save are validated before any file is created or any other rank is contacted."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.engine.options import AsyncSaveOptions, SaveConfig, SaveOptions

REFUSED = [
    (
        {"filez": 2},
        TypeError,
        r"got an unexpected keyword argument 'filez'; did you mean 'files'\?",
    ),
    ({"zzz": 2}, TypeError, r"got an unexpected keyword argument 'zzz'$"),
    ({"overwrite": 1}, TypeError, "overwrite must be True or False, not 1"),
    ({"flatten": None}, TypeError, "flatten must be True or False, not None"),
    ({"balance_replicas": "no"}, TypeError, "balance_replicas must be True or False, not 'no'"),
    (
        {"require_identical_objects": 0},
        TypeError,
        "require_identical_objects must be True or False, not 0",
    ),
    ({"files": 2.5}, TypeError, r"files must be a whole number of at least 1, not 2\.5"),
    ({"files": True}, TypeError, "files must be a whole number of at least 1, not True"),
    ({"files": 0}, ValueError, "files must be at least 1, not 0"),
    ({"retries": -1}, ValueError, "retries must be at least 0, not -1"),
    ({"retries": "3"}, TypeError, "retries must be a whole number of at least 0, not '3'"),
    ({"save_id": "xyz"}, ValueError, "save_id must be 32 lowercase hexadecimal digits, not 'xyz'"),
    ({"save_id": "a/b"}, ValueError, "save_id must be 32 lowercase hexadecimal digits, not 'a/b'"),
    ({"save_id": "A" * 32}, ValueError, "save_id must be 32 lowercase hexadecimal digits"),
    ({"save_id": 7}, TypeError, "save_id must be a string of 32 hexadecimal digits, not 7"),
    ({"max_host_memory": 0}, ValueError, "max_host_memory must be a number of bytes"),
    ({"progress": "yes"}, TypeError, "progress must be True, False, None or a callable, not 'yes'"),
    ({"on_event": 3}, TypeError, "on_event must be None or a callable, not 3"),
]


@pytest.mark.parametrize("call", [sk.save, sk.async_save])
@pytest.mark.parametrize(("options", "kind", "message"), REFUSED)
def test_a_bad_option_is_refused_before_any_file_is_created(tmp_path, call, options, kind, message):
    with pytest.raises(kind, match=message):
        call({"w": torch.ones(3)}, tmp_path / "ckpt", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_keyword_names_the_function(tmp_path):
    with pytest.raises(TypeError, match=r"^async_save\(\) got an unexpected keyword argument"):
        sk.async_save({}, tmp_path / "ckpt", nonsense=1)
    with pytest.raises(TypeError, match=r"^save\(\) got .* 'low_priority'"):
        sk.save({}, tmp_path / "ckpt", low_priority=True)


def test_every_keyword_is_an_option_of_the_engine_with_a_default():
    """The typed dictionaries and the validated class have the same fields."""
    known = set(SaveConfig.__dataclass_fields__)
    assert (
        set(AsyncSaveOptions.__annotations__) | {"overwrite", "save_id", "metrics", "step"} == known
    )
    assert set(SaveOptions.__annotations__) < set(AsyncSaveOptions.__annotations__)


@pytest.mark.parametrize("call", [sk.save, sk.async_save])
def test_a_save_id_of_the_caller_is_the_id_of_the_save(tmp_path, call):
    done = call({"w": torch.ones(3)}, tmp_path / "ckpt", save_id="5a" * 16)
    report = done if call is sk.save else done.result(60)
    assert report.save_id == "5a" * 16
    assert (tmp_path / "ckpt" / f"__0_0_{'5a' * 16}.distcp").exists()
