"""Shares of a memory budget: they fit into it, down to the smallest amount that the work needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.plan.file_layout import MIN_WINDOW_BYTES
from shardkeep.plan.memory_budget import MemoryBudget
from shardkeep.settings import BLOCK, PAGE

MIB = 1 << 20
budgets = st.integers(0, 1 << 36).map(MemoryBudget)


@given(budgets, st.integers(1, 64))
def test_windows_fit_into_the_budget(budget, wanted):
    threads = budget.write_threads(wanted)
    window = budget.window_bytes(threads)
    assert 1 <= threads <= wanted
    assert window % PAGE == 0 and MIN_WINDOW_BYTES <= window <= 16 * MIB
    assert threads * window <= max(budget.nbytes, MIN_WINDOW_BYTES)


@given(budgets, st.integers(1, 64))
def test_reads_leave_half_of_the_budget_to_the_store(budget, threads):
    buffer = budget.read_buffer_bytes(threads)
    assert buffer % BLOCK == 0 and MIB <= buffer <= 4 * MIB
    assert threads * buffer <= max(budget.nbytes - budget.direct_read_bytes(), threads * MIB)
    direct = budget.direct_buffer_bytes(threads, 4 * MIB)
    assert direct % PAGE == 0 and direct <= 4 * MIB
    assert threads * direct <= budget.direct_read_bytes()


@given(budgets)
def test_memory_for_rounds_is_taken_from_both_halves(budget):
    rounds = budget.round_bytes()
    left = budget.after_rounds(rounds)
    assert rounds % BLOCK == 0 and BLOCK <= rounds <= max(BLOCK, budget.nbytes // 4)
    assert left.nbytes == max(0, budget.nbytes - 2 * rounds)
    assert left.nbytes // 2 + rounds <= max(rounds, budget.nbytes // 2)


@given(st.integers(16 * MIB, 1 << 36), st.integers(1, 4))
def test_conversions_hold_a_slab_its_reads_and_a_window(nbytes, files):
    each = MemoryBudget(nbytes).shared_by(files)
    assert each.nbytes * files <= nbytes
    held = each.slab_bytes() + each.slab_read_bytes() + each.slab_window_bytes()
    assert held <= each.nbytes


def test_staging_counts_only_if_a_limit_is_given(monkeypatch):
    given_budget = MemoryBudget.of(8 * MIB)
    assert given_budget.can_stage(7 * MIB) and not given_budget.can_stage(7 * MIB + 1)
    assert given_budget.after_staging(5 * MIB).nbytes == 3 * MIB
    monkeypatch.setenv("SHARDKEEP_MAX_HOST_MEMORY_BYTES", "2MiB")
    default = MemoryBudget.of(None)
    assert default.nbytes == 2 * MIB
    assert default.can_stage(1 << 40) and default.after_staging(1 << 40) == default


@pytest.mark.parametrize("nbytes", [0, 1, 1000])
def test_a_budget_of_zero_still_allows_one_thread(nbytes):
    budget = MemoryBudget.of(nbytes)
    assert budget.write_threads(8) == 1 and budget.window_bytes(1) == MIN_WINDOW_BYTES
    assert budget.direct_buffer_bytes(4, MIB) == 0
    assert budget.slab_bytes() >= 1
