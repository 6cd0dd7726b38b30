"""The tensors of a state as columns, compared with `describe_tensor` of each tensor."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.state.flatten import flatten
from shardkeep.torch_state.describe import LocalState, describe_state, describe_tensors
from shardkeep.torch_state.pieces import describe_tensor, is_any_tensor, is_tensor
from shardkeep.torch_state.shards import Shards
from shardkeep.types import DTYPES, Box


class Tagged(torch.Tensor):
    """A subclass whose values are those of its own memory."""


def leaf(kind: str, shape: tuple[int, ...]) -> Any:
    if kind == "shards":
        whole = torch.rand(4, 3)
        return Shards((9, 3), [((1, 0), whole[:2]), ((7, 0), whole[2:])])
    if kind == "global":
        value = torch.rand(2, 5)
        value.global_shape, value.global_offsets = (4, 5), ((2, 0),)
        value.local_offsets, value.local_sizes = ((0, 0),), ((2, 5),)
        return value
    if kind == "quantized":
        return torch.quantize_per_tensor(torch.ones(3), 0.5, 1, torch.quint8)
    plain = torch.ones(shape)
    made = {
        "plain": plain,
        "parameter": torch.nn.Parameter(plain),
        "half": plain.to(torch.bfloat16),
        "transposed": plain.permute(tuple(reversed(range(plain.ndim)))),
        "complex": torch.complex(plain, plain).conj(),
        "tagged": plain.as_subclass(Tagged),
        "sparse": plain.to_sparse(),
        "number": 7,
    }
    return made[kind]


KINDS = (
    "plain parameter half transposed complex tagged sparse number shards global quantized"
).split()
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
STATES = st.dictionaries(
    st.text("abc", min_size=1, max_size=2),
    st.builds(leaf, st.sampled_from(KINDS), SHAPES),
    max_size=8,
)


def boxes(local: LocalState) -> list[tuple[str, str, tuple[int, ...], Box]]:
    """Return name, dtype, global shape and box of each piece of a claim."""
    claim = local.claim
    found = []
    for tensor, offsets, sizes in zip(claim.piece, claim.offsets, claim.sizes, strict=True):
        ndim = claim.tensors.ndim[tensor]
        found.append(
            (
                claim.tensors.names[tensor],
                DTYPES[claim.tensors.dtype[tensor]].name,
                tuple(claim.tensors.shape[tensor, :ndim].tolist()),
                Box(tuple(offsets[:ndim].tolist()), tuple(sizes[:ndim].tolist())),
            )
        )
        assert (claim.tensors.shape[tensor, ndim:] == 1).all()
        assert not offsets[ndim:].any() and (sizes[ndim:] == 1).all()
    return found


def same_memory(one: Any, other: Any) -> bool:
    return (one.shape, one.stride(), one.dtype, one.data_ptr(), one.is_conj()) == (
        other.shape, other.stride(), other.dtype, other.data_ptr(), other.is_conj(),
    )  # fmt: skip


@given(STATES)
def test_a_claim_describes_each_tensor_as_describe_tensor_does(state: dict[str, Any]) -> None:
    local = describe_state(state)
    leaves = dict(flatten(state, is_any_tensor).items())
    tensors = [
        one
        for name, leaf in leaves.items()
        if is_tensor(leaf)
        for one in describe_tensor(name, leaf)
    ]
    assert local.claim.tensors.names == tuple(tensor.name for tensor in tensors)
    objects = tuple(name for name, leaf in leaves.items() if not is_tensor(leaf))
    assert local.claim.objects == objects == tuple(local.objects)
    pieces = [(tensor, piece) for tensor in tensors for piece in tensor.pieces]
    assert boxes(local) == [(t.name, t.dtype.name, t.shape, piece.box) for t, piece in pieces]
    assert all(map(same_memory, local.memory, (piece.local for _, piece in pieces)))


@given(STATES)
def test_the_pieces_of_one_tensor_are_those_of_describe_tensor(state: dict[str, Any]) -> None:
    flat = flatten(state, is_any_tensor)
    rows, _, _ = describe_tensors(flat)
    pieces = rows.pieces(rows.tensors())
    leaves = flat.items()
    tensors = [
        one for name, leaf in leaves if is_tensor(leaf) for one in describe_tensor(name, leaf)
    ]
    for row, tensor in enumerate(tensors):
        found = pieces.of(row, len(tensor.shape))
        assert [piece.box for piece in found] == [piece.box for piece in tensor.pieces]
        assert all(same_memory(a.local, b.local) for a, b in zip(found, tensor.pieces, strict=True))


# --- large pieces --------------------------------------------------------------------------------


@given(STATES, st.integers(1, 40))
def test_large_pieces_are_cut_into_views_that_tile_them(state: dict[str, Any], limit: int) -> None:
    whole = describe_state(state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDKEEP_MAX_CHUNK_BYTES", str(limit))
        cut = describe_state(state)
    assert cut.claim.tensors.names == whole.claim.tensors.names
    assert cut.claim.structure == whole.claim.structure
    parts = list(zip(boxes(cut), cut.memory, strict=True))
    for described, memory in zip(boxes(whole), whole.memory, strict=True):
        outer = described[-1]
        seen = np.zeros(outer.sizes, dtype=int)
        while not seen.all() or not parts or not seen.size:
            (*what, box), view = parts.pop(0)
            assert tuple(what) == described[:-1]
            inside = box.relative_to(outer).slices
            assert same_memory(view, memory.detach()[inside])
            assert view.nbytes <= max(limit, view.element_size())
            seen[inside] += 1
            if not seen.size or seen.all():
                break
        assert (seen == 1).all()
    assert not parts


def test_cut_pieces_keep_their_aliases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDKEEP_MAX_CHUNK_BYTES", "8")
    tied = torch.rand(4, 2)
    claim = describe_state({"a": tied, "b": torch.rand(3), "c": torch.nn.Parameter(tied)}).claim
    assert claim.piece.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert claim.alias.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]


# --- tied weights --------------------------------------------------------------------------------


def positions(*values: Any) -> tuple[int, ...]:
    return tuple(describe_state({str(i): v for i, v in enumerate(values)}).claim.alias.tolist())


def test_aliases_are_the_same_elements_of_the_same_memory() -> None:
    a, b = torch.rand(4, 6), torch.rand(4, 6)
    tied = torch.nn.Parameter(a)
    assert positions(a, b, tied, a.view(4, 6), a.detach(), b) == (0, 1, 0, 0, 0, 1)
    others = [a.t(), a[:2], a[:, :3], a.view(24), a.view(torch.int32), a.view(2, 2, 6), a[1:]]
    assert positions(a, *others) == tuple(range(8))
    assert positions(a[:1], a[:1].expand(1, 6), a[0:1, :]) == (0, 0, 0)
    assert positions(torch.empty(0), torch.empty(0)) == (0, 1)
    halves = a[:2], a[2:]
    assert positions(
        Shards((4, 6), [((0, 0), halves[0])]), Shards((4, 6), [((2, 0), halves[0])]), halves[0]
    ) == (0, 1, 2)
    c = torch.rand(3, dtype=torch.complex64)
    assert positions(c, c.conj(), c.conj().conj(), c.conj()) == (0, 1, 0, 1)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3)), max_size=8))
def test_an_alias_is_the_first_of_its_kind(picks: list[tuple[int, int, int]]) -> None:
    bases = [torch.zeros(6) for _ in range(3)]
    found = positions(*(bases[base][start : start + size] for base, start, size in picks))
    expected = [picks.index(pick) if pick[2] else i for i, pick in enumerate(picks)]
    assert list(found) == expected
