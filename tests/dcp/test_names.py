"""Every public name of torch's package in the recorded releases exists in the drop-in."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fsspec")
pytest.importorskip("safetensors")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

from compat import differences, names, names_page

from shardkeep.dcp.bridge.torch_modules import torch_module

RECORDS = names.recorded()
INSTALLED = ".".join(torch.__version__.split(".")[:2])
MADE_WITH = re.search(
    r"torch==(\d+\.\d+)", (Path(__file__).parents[2] / "constraints.txt").read_text()
)[1]  # type: ignore[index]

if INSTALLED not in map(names_page.minor, RECORDS):
    pytest.skip("not a release whose names are recorded", allow_module_level=True)

MODULES = [
    pytest.param(record, module, id=f"{names_page.minor(record)} {module or 'the package'}")
    for record in RECORDS
    for module in record.modules
]


def test_two_releases_are_recorded():
    assert [names_page.minor(record) for record in RECORDS] == ["2.13", "2.15"]
    assert all(len(record.modules) > 20 for record in RECORDS)
    assert "async_save" in RECORDS[0].modules[""]
    assert "CheckpointableTensor" in RECORDS[1].modules["protocol"]


@pytest.mark.parametrize(("record", "module"), MODULES)
def test_every_name_can_be_imported(record, module):
    place = f"shardkeep.dcp.{module}" if module else "shardkeep.dcp"
    ours = importlib.import_module(place)
    assert sys.modules[place] is ours
    for name, how in record.modules[module].items():
        value = getattr(ours, name)
        assert names.describe(value).kind == how.kind, name
        assert not [member for member in how.members if not hasattr(value, member)], name
    if module:
        assert getattr(importlib.import_module("shardkeep.dcp"), module) is ours


@pytest.mark.parametrize("record", RECORDS, ids=names_page.minor)
def test_private_modules_can_be_imported(record):
    for name in record.private:
        assert importlib.import_module(f"shardkeep.dcp.{name}")
        if name == "_nested_dict":
            assert sys.modules[f"shardkeep.dcp.{name}"] is torch_module(name)


def test_signatures_agree_and_nothing_is_unexplained():
    assert names_page.compare().problems == ()


def test_the_record_equals_the_names_of_the_release():
    (record,) = [record for record in RECORDS if names_page.minor(record) == INSTALLED]
    if record.python != f"{sys.version_info.major}.{sys.version_info.minor}":
        pytest.skip("signatures of enums and protocols differ between releases of Python")
    found = names.record()
    for module, public in record.modules.items():
        assert found.modules[module] == public, module
    assert found.private == record.private


@pytest.mark.skipif(INSTALLED != MADE_WITH, reason="the page is made with another release")
def test_the_page_equals_the_output_of_the_command():
    assert names_page.PAGE.read_text(encoding="utf-8") == names_page.text(names_page.compare())


def test_an_unused_entry_of_a_table_is_an_error(monkeypatch):
    monkeypatch.setitem(differences.BETTER, "filesystem.NoWriter", "it is not there")
    monkeypatch.setitem(differences.BETTER, "planner.LoadPlan", "torch's own can't be better")
    monkeypatch.setitem(differences.MISSING, "planner.LoadPlan", "it is there")
    told = "the tables in compat/differences.py name {}: there is no such name"
    assert names_page.compare().problems == (
        told.format("filesystem.NoWriter"),
        told.format("planner.LoadPlan"),
        told.format("planner.LoadPlan"),
    )


def test_another_signature_is_an_error_until_it_is_explained(monkeypatch):
    from shardkeep.dcp import filesystem, state_dict_loader

    def load(state_dict, *, checkpoint_id=None, storage_reader=None, planner=None):
        pass

    def reset(self):
        pass

    load.__module__, reset.__module__ = state_dict_loader.__name__, filesystem.__name__
    load.__qualname__, reset.__qualname__ = "load", "FileSystemReader.reset"
    monkeypatch.setattr(state_dict_loader, "load", load)
    monkeypatch.setattr(filesystem.FileSystemReader, "reset", reset)
    found = set(names_page.compare().problems)
    ours = "(state_dict, *, checkpoint_id=None, storage_reader=None, planner=None"
    assert (
        f"state_dict_loader.load{ours}) in Shardkeep, "
        f"state_dict_loader.load{ours}, process_group=None, no_dist=False) in torch 2.13"
    ) in found
    told = (
        "filesystem.FileSystemReader.reset(self) in Shardkeep, (self, checkpoint_id=None) in torch"
    )
    assert {f"{told} 2.13", f"{told} 2.15"} <= found
    monkeypatch.setitem(differences.EXPLAINED, "state_dict_loader.load", "for a test")
    monkeypatch.setitem(differences.EXPLAINED, "filesystem.FileSystemReader.reset", "for a test")
    left = names_page.compare().problems
    assert not [line for line in left if "_loader.load(" in line or "FileSystemReader" in line]


def test_a_missing_name_is_an_error_until_a_reason_is_given(monkeypatch):
    from shardkeep.dcp import state_dict_loader

    monkeypatch.delattr(state_dict_loader, "load")
    monkeypatch.setattr(state_dict_loader, "__getattr__", lambda name: getattr(None, name))
    wrong = "state_dict_loader.load is missing, and compat/differences.py does not say why"
    assert wrong in names_page.compare().problems
    monkeypatch.setitem(differences.MISSING, "state_dict_loader.load", "for a test")
    found = names_page.compare()
    assert wrong not in found.problems
    assert "| `load` | **missing**: for a test |" in names_page.text(found)
