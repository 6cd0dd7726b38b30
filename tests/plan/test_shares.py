"""Distribution of pieces over ranks, and of items over files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.plan.ownership import owners
from shardkeep.plan.packing import pack

sizes = st.one_of(st.just(0), st.integers(0, 40), st.integers(0, 2**40))


@st.composite
def holdings(draw):
    keys = draw(
        st.dictionaries(
            st.integers(-5, 2**60), st.tuples(sizes, st.sets(st.integers(0, 9), min_size=1))
        )
    )
    rows = [(k, r, n) for k, (n, ranks) in keys.items() for r in ranks]
    return draw(st.permutations(rows))


def columns(rows):
    return tuple(np.array(rows, dtype=np.int64).reshape(-1, 3).T)


@settings(max_examples=150)
@given(holdings(), st.randoms(use_true_random=False), st.sampled_from([0, 2, 1000]))
def test_each_key_has_one_owner_that_holds_it_in_any_order(rows, random, greedy):
    key, rank, nbytes = columns(rows)
    chosen = owners(key, rank, nbytes, greedy=greedy)
    assert chosen.dtype == bool and chosen.shape == key.shape
    assert sorted(key[chosen]) == sorted(set(key))
    shuffled = list(range(len(rows)))
    random.shuffle(shuffled)
    again = owners(key[shuffled], rank[shuffled], nbytes[shuffled], greedy=greedy)
    assert (again == chosen[shuffled]).all()


@settings(max_examples=100)
@given(st.lists(sizes, min_size=1, max_size=60), st.integers(1, 8))
def test_with_full_replicas_the_largest_key_bounds_the_imbalance(weights, ranks):
    key = np.tile(np.arange(len(weights)), ranks)
    rank = np.repeat(np.arange(ranks), len(weights))
    nbytes = np.tile(np.array(weights, dtype=np.int64), ranks)
    chosen = owners(key, rank, nbytes)
    load = np.bincount(rank[chosen], np.maximum(nbytes[chosen], 1), minlength=ranks)
    assert load.max() - load.min() <= max(*weights, 1)


def test_small_keys_are_spread_by_hash_and_large_ones_balance_the_load():
    rng = np.random.default_rng(0)
    keys, ranks = 50_000, 16
    weights = rng.integers(1, 1000, keys)
    weights[:200] *= 1000
    key, rank = (
        np.repeat(np.arange(keys), 4),
        (np.arange(4 * keys) // 4 % 4 * 4 + np.arange(4 * keys) % 4),
    )
    chosen = owners(key, rank, weights[key], greedy=200)
    load = np.bincount(rank[chosen], weights[key[chosen]], minlength=ranks)
    among_replicas = load.reshape(4, 4)
    assert (np.ptp(among_replicas, axis=1) < 0.005 * load.mean()).all()
    by_hash = owners(key, rank, weights[key], greedy=0)
    counts = np.bincount(rank[by_hash], minlength=ranks)
    assert counts.max() < 1.06 * counts.mean()


def test_pieces_with_one_holder_count_in_the_load():
    key = np.array([0, 1, 1, 2, 2], dtype=np.int64)
    rank = np.array([0, 0, 1, 0, 1], dtype=np.int64)
    nbytes = np.array([100, 30, 30, 20, 20], dtype=np.int64)
    assert owners(key, rank, nbytes).tolist() == [True, False, True, False, True]


def test_the_same_piece_twice_on_one_rank_is_written_once():
    one = np.zeros(3, dtype=np.int64)
    assert owners(one, one, one).sum() == 1


@settings(max_examples=200)
@given(st.lists(sizes, max_size=60), st.integers(1, 8))
def test_files_have_about_equal_sizes(weights, files):
    nbytes = np.array(weights, dtype=np.int64)
    file = pack(nbytes, files)
    assert file.dtype == np.int64 and file.shape == nbytes.shape
    assert ((file >= 0) & (file < files)).all()
    load = np.bincount(file, np.maximum(nbytes, 1), minlength=files)
    assert load.max() - load.min() <= max([*weights, 1])
    assert (pack(nbytes, files) == file).all()
    if len(weights) >= files:
        assert set(file) == set(range(files))


def test_packing_into_no_files_is_refused():
    with pytest.raises(ValueError, match="files must be at least 1, not 0"):
        pack(np.zeros(1, dtype=np.int64), 0)
