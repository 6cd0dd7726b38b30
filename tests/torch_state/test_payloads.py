"""Payloads: any bytes of a tensor in C order, whatever its strides, without moving the rest."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep.torch_state.payloads as module
from shardkeep.torch_state.memory import is_contiguous_on_cpu
from shardkeep.torch_state.payloads import StatePayloads, slabs

DTYPES = (
    "uint8 bool int16 uint16 bfloat16 float16 float32 int32 float64 int64 complex64 complex128 "
    "float8_e4m3fn"
).split()


def payloads_of(tensor: torch.Tensor, objects=()) -> StatePayloads:
    address = tensor.data_ptr() if is_contiguous_on_cpu(tensor) else 0
    return StatePayloads([tensor], np.array([address]), objects)


def taken(payloads: StatePayloads, row: int, start: int, nbytes: int) -> bytes:
    into = np.full(nbytes + 64, 0xA5, dtype=np.uint8)
    address = into.ctypes.data
    shift = -address % 64
    payloads.copy(row, start, nbytes, address + shift)
    assert (into[:shift] == 0xA5).all() and (into[shift + nbytes :] == 0xA5).all()
    return into[shift : shift + nbytes].tobytes()


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().flatten()
    whole = torch.empty(plain.shape, dtype=plain.dtype).copy_(plain)
    return whole.view(torch.uint8).numpy().tobytes()


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(1, 6), max_size=4))
    dtype = getattr(torch, draw(st.sampled_from(DTYPES)))
    raw = torch.from_numpy(
        np.random.default_rng(draw(st.integers(0, 9))).integers(
            0, 2 if dtype == torch.bool else 256, 2 * prod(shape) * dtype.itemsize, dtype=np.uint8
        )
    )
    tensor = raw.view(dtype)
    tensor = tensor[: prod(shape)] if draw(st.booleans()) else tensor[::2]
    tensor = tensor.reshape(shape) if tensor.is_contiguous() else tensor.clone().reshape(shape)
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    if shape and draw(st.booleans()):
        tensor = tensor[draw(st.integers(0, tensor.shape[0] - 1)) :]
    if shape and draw(st.booleans()):
        tensor = tensor[:1].expand(3, *tensor.shape[1:])
    if dtype.is_complex and draw(st.booleans()):
        tensor = tensor.conj()
    return tensor


@settings(max_examples=300)
@given(tensors(), st.data())
def test_any_range_of_elements_equals_that_of_a_contiguous_copy(tensor, data):
    payloads, whole = payloads_of(tensor, [b"object"]), bits(tensor)
    size = tensor.element_size()
    first = data.draw(st.integers(0, tensor.numel() - 1))
    last = data.draw(st.integers(first + 1, tensor.numel()))
    start, stop = first * size, last * size
    assert taken(payloads, 0, start, stop - start) == whole[start:stop]
    assert taken(payloads, 0, 0, len(whole)) == whole
    assert taken(payloads, 1, 1, 4) == b"bjec"


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_slabs_contain_the_elements_in_order(shape, data):
    whole = np.arange(prod(shape)).reshape(shape)
    first = data.draw(st.integers(0, whole.size - 1))
    count = data.draw(st.integers(0, whole.size - first))
    found = list(slabs(tuple(shape), first, count))
    assert len(found) <= 2 * len(shape) + 1
    parts = [whole[place].reshape(-1) for place in found]
    assert np.concatenate([np.empty(0, int), *parts]).tolist() == list(range(first, first + count))


def test_copying_a_part_of_a_large_view_moves_only_that_part(monkeypatch):
    tensor = torch.arange(1 << 22, dtype=torch.float32).reshape(2048, 2048).t()
    payloads, copied, real = payloads_of(tensor), [], module.copy_out

    def counted(into, part):
        copied.append(into.numel() * 4)
        real(into, part)

    monkeypatch.setattr(module, "copy_out", counted)
    start = 2048 * 4 * 10 + 8
    assert taken(payloads, 0, start, 1 << 16) == bits(tensor)[start : start + (1 << 16)]
    assert sum(copied) == 1 << 16
