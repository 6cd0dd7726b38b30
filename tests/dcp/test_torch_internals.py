"""The page of torch's private names lists exactly those that the source uses."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("fsspec")
pytest.importorskip("safetensors")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

import torch.distributed.checkpoint as stock
from compat import torch_internals
from compat.torch_internals_table import OTHER_RELEASES, TABLE

import shardkeep.dcp  # noqa: F401 - the scan looks into the modules of torch that it imports
from shardkeep.dcp.bridge import torch_messages

MADE_WITH = re.search(r"torch==(\d+\.\d+)", (torch_internals.ROOT / "constraints.txt").read_text())[
    1
]  # type: ignore[index]

if not torch.__version__.startswith(f"{MADE_WITH}."):
    pytest.skip("another release has other private names", allow_module_level=True)


@pytest.fixture(scope="module")
def found():
    return torch_internals.uses()


def test_every_use_is_listed_and_every_listed_name_is_used(found):
    assert torch_internals.problems(found) == []
    assert len(TABLE) > 40


def test_the_page_equals_the_output_of_the_command(found):
    assert torch_internals.PAGE.read_text(encoding="utf-8") == torch_internals.text(found)


def resolved(name):
    """Return whether the installed torch has an object under this name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return True
    return False


INSTANCE_ATTRIBUTES = ("_cached_plans_key", "_tensor_full_shapes", "_weight_map",
                       "_weight_scale_mapping")  # fmt: skip


@pytest.mark.parametrize("name", sorted(TABLE))
def test_the_installed_torch_has_every_name(name):
    if name.endswith(INSTANCE_ATTRIBUTES):
        name = name.rpartition(".")[0]
    assert resolved(name)


@pytest.mark.parametrize("name", sorted(OTHER_RELEASES))
def test_names_of_other_releases_are_still_looked_up(name):
    last = name.rpartition(".")[2]
    sources = [file.read_text() for file in torch_internals.SOURCE.rglob("*.py")]
    assert any(f'"{last}"' in source for source in sources)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from torch._utils import _f as f\nf()", {"torch._utils._f"}),
        ("import torch._x", {"torch._x"}),
        ("import torch\ntorch._a._b(1)", {"torch._a._b"}),
        ("import torch.nn as t\nt.modules._b", {"torch.nn.modules._b"}),
        ("import torch as t\nt.nn.Module", set()),
        ("f('torch._x.y')", {"torch._x.y"}),
        ("def f(dist): dist.distributed_c10d._s()", {"torch.distributed.distributed_c10d._s"}),
        ("from shardkeep._x import _y", set()),
        ("import torch\ntorch.__version__", set()),
        (
            "import torch.distributed.checkpoint as stock\nclass W:\n def _write_data(self): 1",
            {"torch.distributed.checkpoint.filesystem._FileSystemWriter._write_data"},
        ),
        (
            "import torch.distributed.checkpoint.filesystem as stock\n"
            "getattr(stock, '_StorageInfo', 0)",
            {"torch.distributed.checkpoint.filesystem._StorageInfo"},
        ),
    ],
)
def test_uses_are_detected(source, names):
    assert torch_internals.names_in(source) == names


def test_strings_of_the_format_do_not_count_as_uses():
    assert torch_internals.names_in("f('torch._x.y')", strings=False) == set()
    assert torch_internals.is_format("format/pickle/reader.py")
    assert not torch_internals.is_format("dcp/filesystem.py")


def test_a_use_that_is_not_listed_is_named(found):
    extra = torch_internals.Use("torch._new", "dcp/filesystem.py")
    gone = {use for use in found if use.name != "torch._neg_view"}
    assert torch_internals.problems({*gone, extra}) == [
        "dcp/filesystem.py uses torch._new: add it to TABLE",
        "nothing uses torch._neg_view: remove it from TABLE",
    ]


@pytest.mark.parametrize(
    "start",
    [
        torch_messages.missing_key("NAME").partition("NAME")[0],
        torch_messages.not_a_tensor("NAME").partition("NAME")[0],
        torch_messages.size_mismatch("NAME", "A", "B").partition("A")[0],
        torch_messages.CHECKPOINT_EXISTS.partition("self")[0],
        torch_messages.CANNOT_DETECT,
    ],
)
def test_kept_messages_are_those_of_the_installed_torch(start):
    folder = Path(stock.__file__).parent
    assert any(start in file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
