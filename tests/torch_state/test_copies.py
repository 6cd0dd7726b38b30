"""A copy of a state shares nothing with it; otherwise copying fails."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from torch._subclasses.fake_tensor import FakeTensorMode

from shardkeep.torch_state.copies import copy_state

NO_MEMORY = [
    MemoryError(),
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
]
no_memory = pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)


class Object:
    """An object with a tensor in it."""

    def __init__(self):
        self.tensor = torch.ones(3)


def refusing(error):
    def allocate(nbytes):
        raise error

    return allocate


@no_memory
def test_a_copy_without_memory_fails_instead_of_sharing_the_tensor(monkeypatch, error):
    """Otherwise, the tensor would be saved with the values that it has later."""
    for state in (torch.ones(3), {"o": Object()}, [(torch.ones(3),)]):
        with pytest.raises(type(error)) as caught:
            copy_state(state, allocate=refusing(error))
        assert caught.value is error


@no_memory
@pytest.mark.parametrize("pickles", [False, True])
def test_an_object_without_memory_for_its_copy_is_not_shared(error, pickles):
    class Large:
        def __reduce_ex__(self, protocol):
            raise error if pickles else TypeError("can't be pickled")

        def __deepcopy__(self, memo):
            raise error

    with pytest.raises(type(error)) as caught:
        copy_state({"large": Large()})
    assert caught.value is error


@no_memory
def test_a_sparse_tensor_without_memory_for_its_copy_is_not_shared(monkeypatch, error):
    def to(*_, **__):
        raise error

    sparse = torch.eye(3).to_sparse()
    monkeypatch.setattr(torch.Tensor, "to", to)
    with pytest.raises(type(error)) as caught:
        copy_state({"sparse": sparse})
    assert caught.value is error


def test_values_without_data_or_copies_stay_as_they_are():
    class Odd(torch.Tensor):
        """A kind of tensor that can't do anything."""

        @staticmethod
        def __new__(cls):
            return torch.Tensor._make_wrapper_subclass(cls, (3,))

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError(str(function))

    class Alone:
        def __reduce_ex__(self, protocol):
            raise TypeError("can't be pickled")

    with FakeTensorMode():
        fake = torch.ones(3)
    state = {
        "meta": torch.ones(3, device="meta"),
        "fake": fake,
        "lazy": torch.nn.UninitializedParameter(),
        "odd": Odd(),
        "alone": Alone(),
    }
    made = copy_state(state)
    assert all(made[name] is value for name, value in state.items())


def test_sparse_quantized_and_nested_tensors_are_copied():
    whole = torch.arange(4.0)
    state = {
        "sparse": torch.diag(whole).to_sparse(),
        "quantized": torch.quantize_per_tensor(whole, 0.5, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([whole, whole[:2]]),
    }
    made = copy_state(state)
    assert torch.equal(made["sparse"].to_dense(), torch.diag(whole))
    assert torch.equal(made["quantized"].dequantize(), whole)
    assert all(map(torch.equal, made["nested"].unbind(), [whole, whole[:2]]))
    assert all(made[name] is not value for name, value in state.items())
