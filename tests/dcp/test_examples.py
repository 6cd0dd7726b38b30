"""Examples of user code work with one import changed."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("ddp", ()),
        ("fsdp1", ()),
        ("fsdp2", ()),
        ("fsdp2", ((2, 2),)),  # HSDP
        ("tensor_parallel", ()),
        ("two_dimensions", ()),
        ("another_layout", ()),
    ],
    ids=["DDP", "FSDP1", "FSDP2", "HSDP", "TP", "FSDP2 and TP", "from FSDP2 to TP"],
)
def test_training_resumes_to_the_bit(gloo, tmp_path, name, args):
    done = gloo.run(f"support.dcp_examples:{name}", str(tmp_path), *args, size=4)
    assert done == ["done"] * 4
