"""The memory of tensors of every dtype: reading and filling it."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from shardkeep.errors import Mismatch
from shardkeep.state.flatten import flatten
from shardkeep.torch_state.describe import describe_tensors
from shardkeep.torch_state.memory import (
    Destinations,
    destination,
    is_contiguous_on_cpu,
    memory_array,
    payload_bytes,
)
from shardkeep.torch_state.pieces import is_any_tensor
from shardkeep.types import DTYPES, DType

PLAIN = [d for d in DTYPES if hasattr(torch, d.name) and not d.name.startswith(("qint", "quint"))]


def empty(dtype: DType, *shape: int) -> Any:
    return torch.empty(shape, dtype=getattr(torch, dtype.name))


def noise(nbytes: int) -> Any:
    return np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)


@st.composite
def views(draw: st.DrawFn) -> Any:
    """Return a function that makes a view of a tensor of shape (4, 6, 5), and its name."""
    slices = tuple(
        slice(draw(st.integers(0, n)), draw(st.integers(0, n)), draw(st.integers(1, 3)))
        for n in (4, 6, 5)
    )
    order = draw(st.permutations(range(3)))
    return lambda array: (
        array[slices].transpose(order)
        if isinstance(array, np.ndarray)
        else array[slices].permute(order)
    )


@given(st.sampled_from(PLAIN), views())
@settings(max_examples=150)
def test_memory_array_has_the_bytes_in_memory_for_any_dtype_and_strides(
    dtype: DType, view: Any
) -> None:
    size = dtype.itemsize
    word = np.dtype("c16") if size == 16 else np.dtype(f"u{size}")
    expected = noise(120 * size).view(word).reshape(4, 6, 5)
    tensor = empty(dtype, 4, 6, 5)
    memory_array(tensor)[...] = expected
    words = memory_array(view(tensor))
    assert words.dtype == word
    assert words.tobytes() == view(expected).tobytes()
    assert bytes(payload_bytes(view(tensor))) == view(expected).tobytes()
    target = empty(dtype, 4, 6, 5)
    memory_array(target)[...] = 0
    array, finish = destination(view(target), dtype)
    array[...] = view(expected)
    finish()
    untouched = np.zeros_like(expected)
    view(untouched)[...] = view(expected)
    assert memory_array(target).tobytes() == untouched.tobytes()


def test_a_view_is_no_copy_and_outlives_the_tensor() -> None:
    tensor = torch.arange(6.0)
    words, data = memory_array(tensor), payload_bytes(tensor)
    words[0] = 0x40E00000
    assert tensor[0] == 7
    assert data[:4] == bytes.fromhex("0000e040")
    assert len(data) == 24
    pointer = tensor.data_ptr()
    del tensor
    gc.collect()
    assert words.__array_interface__["data"][0] == pointer
    assert words[0] == 0x40E00000


@pytest.mark.parametrize("dtype", PLAIN, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,)])
def test_scalars_and_empties(dtype: DType, shape: tuple[int, ...]) -> None:
    tensor = empty(dtype, *shape)
    assert memory_array(tensor).shape == shape
    assert len(payload_bytes(tensor)) == tensor.numel() * dtype.itemsize
    array, finish = destination(tensor, dtype)
    assert array.shape == shape
    finish()


def test_lazily_conjugated_and_negated_tensors() -> None:
    value = torch.tensor([1 + 2j, 3 - 4j])
    for lazy in (value.conj(), torch._neg_view(value), value.conj().imag):
        assert lazy.is_conj() or lazy.is_neg()
        with pytest.raises(ValueError, match="neither conjugated nor negated"):
            memory_array(lazy)
        expected = lazy.resolve_conj().resolve_neg()
        assert bytes(payload_bytes(lazy)) == expected.contiguous().numpy().tobytes()
        array, finish = destination(lazy, DType.named(str(lazy.dtype)))
        array[...] = memory_array(expected * 3)
        finish()
        assert torch.equal(lazy.resolve_conj().resolve_neg(), expected * 3)


def test_quantized_tensors_cannot_be_viewed() -> None:
    with pytest.raises(ValueError, match="quantized"):
        memory_array(torch.quantize_per_tensor(torch.ones(3), 0.5, 1, torch.quint8))


def test_parameters_and_inference_tensors_can_be_filled() -> None:
    with torch.inference_mode():
        inference = torch.zeros(3)
    parameter = torch.nn.Parameter(torch.zeros(3))
    for tensor in (parameter, inference, torch.zeros(6)[::2]):
        for stored in (torch.float32, torch.bfloat16, torch.float64, torch.int32):
            source = torch.tensor([1, 2, 3], dtype=stored)
            array, finish = destination(tensor, DType.named(str(stored)))
            array[...] = memory_array(source)
            finish()
            assert tensor.tolist() == [1, 2, 3]
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.zero_()
    assert parameter.requires_grad
    assert parameter.is_leaf


def test_a_dtype_that_this_torch_lacks_or_cannot_cast_is_refused() -> None:
    with pytest.raises(Mismatch, match=r"torch .* has no dtype strange"):
        destination(torch.zeros(1), DType("strange", np.dtype("u1")))
    if hasattr(torch, "bits8"):
        array, finish = destination(torch.zeros(1), DType.named("bits8"))
        array[...] = 1
        with pytest.raises(Mismatch, match=r"torch cannot cast bits8 to torch\.float32"):
            finish()


def addresses(*tensors: torch.Tensor) -> list[int]:
    """Return the destinations of tensors that are filled with elements of their own dtype."""
    rows, _, _ = describe_tensors(flatten(dict(enumerate(tensors)), is_any_tensor))
    pieces = rows.pieces(rows.tensors())
    nbytes = np.array([tensor.nbytes for tensor in tensors])
    codes = np.array(rows.codes, dtype=np.uint8)
    every = np.arange(len(tensors))
    return Destinations(pieces.memory, pieces.addresses, codes, nbytes).addresses(every).tolist()


@given(st.sampled_from(PLAIN), views())
@settings(max_examples=150)
def test_only_plain_memory_has_an_address(dtype: DType, view: Any) -> None:
    tensor = view(empty(dtype, 4, 6, 5))
    wanted = tensor.data_ptr() if tensor.is_contiguous() and tensor.numel() else 0
    assert is_contiguous_on_cpu(tensor) == tensor.is_contiguous()
    assert addresses(tensor, torch.nn.Parameter(tensor, requires_grad=False)) == [wanted] * 2


def test_memory_that_differs_from_the_values_has_no_address() -> None:
    z = torch.zeros(4, dtype=torch.complex64)
    negated = torch.zeros(4, dtype=torch.complex64).conj().imag
    given_back = torch.zeros(4)
    given_back.untyped_storage().resize_(12)
    scalar = torch.zeros(1).expand(4)
    last = torch.zeros(6)[2:]
    shown = addresses(z, z.conj(), negated, scalar, given_back, last)
    assert shown == [z.data_ptr(), 0, 0, 0, 0, last.data_ptr()]
    given_back.untyped_storage().resize_(16)
    assert addresses(given_back) == [given_back.data_ptr()]
    last.untyped_storage().resize_(23)
    assert addresses(last) == [0]
    assert not is_contiguous_on_cpu(torch.zeros(4, device="meta"))
