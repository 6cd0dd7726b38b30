"""The call patterns of training frameworks work with one import changed."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@pytest.mark.parametrize("name", ["titan", "lightning", "accelerate"])
def test_a_framework_saves_and_resumes(gloo, tmp_path, name):
    assert gloo.run(f"support.dcp_frameworks:{name}", str(tmp_path), size=4) == ["done"] * 4
