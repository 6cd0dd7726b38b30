"""Tools for tests of code that uses Shardkeep.

`StoreTests` proves that a store of one's own keeps the contract. `FaultyStore` fails and waits on
purpose. `simulated_ranks` runs ranks as threads of one process.

Only `StoreTests` needs pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardkeep.testing.faulty_store import (
    Crashed,
    Fault,
    FaultPlan,
    FaultyStore,
    Operation,
    fail_at,
    fail_randomly,
)

if TYPE_CHECKING:
    from shardkeep.testing.store_tests import StoreTests

__all__ = [
    "Crashed",
    "Fault",
    "FaultPlan",
    "FaultyStore",
    "Operation",
    "StoreTests",
    "fail_at",
    "fail_randomly",
]


def __getattr__(name: str) -> Any:
    if name == "StoreTests":
        import pytest

        pytest.register_assert_rewrite("shardkeep.testing.store_tests")  # so that failures say why
        from shardkeep.testing.store_tests import StoreTests

        return StoreTests
    raise AttributeError(f"module 'shardkeep.testing' has no attribute {name!r}")
