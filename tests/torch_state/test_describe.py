"""Description of a state on one rank: its claim, and the paths of inner tensors of subclasses."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from shardkeep.state.flatten import unflatten
from shardkeep.torch_state.describe import describe_state


class Pair(torch.Tensor):
    """A tensor subclass of two inner tensors."""

    @staticmethod
    def __new__(cls, a, b):
        made = torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype)
        made.a, made.b = a, b
        return made

    def __tensor_flatten__(self):
        return ["a", "b"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def test_inner_tensors_are_below_the_path_of_their_subclass():
    pair = Pair(torch.zeros(2), torch.ones(2))
    nested = Pair(Pair(torch.zeros(3), torch.ones(3)), torch.ones(3))
    state = {"p": pair, "none": {}, "x": 1, "q": {"deep": nested, "end": {}}, "y": torch.ones(1)}
    local = describe_state(state)
    structure = local.claim.structure
    assert local.claim.tensors.names == (
        "p.a", "p.b", "q.deep.a.a", "q.deep.a.b", "q.deep.b", "y",
    )  # fmt: skip
    tree = unflatten(structure, {name: name for name in structure.leaves})
    assert tree == {
        "p": {"a": "p.a", "b": "p.b"},
        "none": {},
        "x": "x",
        "q": {
            "deep": {"a": {"a": "q.deep.a.a", "b": "q.deep.a.b"}, "b": "q.deep.b"},
            "end": {},
        },
        "y": "y",
    }
    assert list(tree) == list(state)


def test_the_claim_contains_small_values_but_not_large_ones():
    local = describe_state({"small": [1, 2], "large": list(range(10_000)), "odd": object()})
    assert local.claim.values == {"small": [1, 2]}
    assert local.claim.objects == ("small", "large", "odd")


def test_without_nesting_top_level_values_are_leaves():
    state = {"a": {"b": torch.ones(1)}, 1: torch.ones(2)}
    local = describe_state(state, nested=False)
    assert local.claim.tensors.names == ("1",)
    assert local.objects == {"a": state["a"]}
    assert local.claim.structure.leaves == {"a": ("a",), "1": (1,)}
