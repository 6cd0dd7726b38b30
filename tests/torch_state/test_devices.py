"""Copies from CUDA devices, with a mock of torch.cuda: no test runs on a real device."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from shardkeep.settings import PAGE
from shardkeep.torch_state import devices

CUDA = torch.device("cuda", 0)


@pytest.fixture
def done(monkeypatch):
    """The calls of the mock device, in order."""
    told = []

    class Stream:
        def __init__(self, device):
            self.name = "side" if device is not None else "current"

        def synchronize(self):
            told.append(f"wait for the {self.name} stream")

    @contextmanager
    def stream(given):
        told.append(f"on the {given.name} stream")
        yield
        told.append("off it")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream(None))
    devices._side_stream.cache_clear()
    yield told
    devices._side_stream.cache_clear()


def test_a_copy_from_a_device_uses_a_side_stream_and_is_complete_on_return(done, monkeypatch):
    class Into:
        def copy_(self, tensor, non_blocking=False):
            done.append(f"copy {tensor.name}" + non_blocking * ", not waiting")

    class Tensor(SimpleNamespace):
        device = CUDA

        def resolve_conj(self):
            done.append(f"conjugate {self.name}")
            return self

        def resolve_neg(self):
            return self

    monkeypatch.setattr(devices, "integer_view", lambda tensor: tensor)
    for name in ("a", "b"):
        devices.copy_out(Into(), Tensor(name=name))
    steps = (
        "on the side stream; conjugate {}; copy {}, not waiting; off it; wait for the side stream"
    )
    assert done == [step for name in "ab" for step in steps.format(name, name).split("; ")]


def test_copies_within_the_cpu_need_no_stream(done):
    into = torch.zeros(3)
    devices.copy_out(into.view(torch.int32), torch.arange(3.0))
    assert into.tolist() == [0, 1, 2]
    devices.finish_work([torch.device("cpu"), torch.device("meta")])
    assert not done


def test_queued_work_of_the_caller_is_waited_for(done):
    devices.finish_work([CUDA, torch.device("cpu")])
    assert done == ["wait for the current stream"]


@pytest.mark.parametrize("nbytes", [1, 5000, 1 << 20])
def test_pinned_memory_begins_at_a_page(monkeypatch, nbytes):
    asked, empty = [], torch.empty

    def played(*sizes, pin_memory=False, **kwargs):
        asked.append(pin_memory)
        return empty(*sizes, **kwargs)

    monkeypatch.setattr(torch, "empty", played)
    block = devices.pinned(nbytes)
    assert asked == [True]
    assert (block.nbytes, block.ctypes.data % PAGE) == (nbytes, 0)
    block[:] = 1


@pytest.mark.parametrize("nbytes", [1, 5000])
def test_memory_that_cannot_be_pinned_is_ordinary_with_a_warning(monkeypatch, nbytes):
    empty = torch.empty

    def limited(*sizes, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nand how to debug it")
        return empty(*sizes, **kwargs)

    monkeypatch.setattr(torch, "empty", limited)
    with pytest.warns(UserWarning, match=f"^{nbytes} bytes to stage a save in could not be pinned"):
        block = devices.pinned(nbytes)
    assert (block.nbytes, block.ctypes.data % PAGE) == (nbytes, 0)
    block[:] = 1
