"""All ranks soon name a rank that failed, and the previous checkpoint still loads."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.gloo]

import shardkeep as sk
from support import jobs
from support.gloo import Failed
from support.waiting import PROMPT_SECONDS

SOON = {"SHARDKEEP_HEARTBEAT_SECONDS": "0.3", "SHARDKEEP_MAX_MISSED_HEARTBEATS": "6"}
FAILURES = {
    "partial": ("describe", "Conflict", "tensor 'p' is Partial(sum)"),
    "full": ("write", "OSError", "No space left on device"),
    "killed": ("write", None, "rank 2 on"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("how", list(FAILURES))
def test_all_ranks_name_the_one_that_failed(gloo, tmp_path, how, overwrite):
    phase, kind, text = FAILURES[how]
    path = tmp_path / "ckpt"
    before: set[str] = set()
    if overwrite:
        gloo.run(jobs.failing_save, str(path), "fine", False)
        before = jobs.folder(path)
        old = gloo.run(jobs.read_back, str(path), size=1)[0]
    if how == "killed":
        with pytest.raises(Failed) as caught:
            gloo.run(jobs.failing_save, str(path), how, overwrite, env=SOON)
        assert list(caught.value.errors) == [2]
        ends = caught.value.results
    else:
        ends = dict(enumerate(gloo.run(jobs.failing_save, str(path), how, overwrite, env=SOON)))
        assert ends[2]["kind"] == kind
        assert text in ends.pop(2)["text"]
    for rank in (0, 1, 3):
        told = ends[rank]
        assert told["kind"] == "RankFailed"
        assert (told["rank"], told["phase"], told["path"]) == (2, phase, str(path))
        assert text in told["text"]
        assert told["took"] < PROMPT_SECONDS
    if overwrite:
        left = jobs.folder(path) - before
        assert before <= jobs.folder(path)
        assert sk.open(path).verify().ok
        assert gloo.run(jobs.read_back, str(path), size=1)[0] == old
    else:
        left = jobs.folder(path) if path.exists() else set()
        with pytest.raises(sk.NotACheckpoint):
            sk.open(path)
    assert left == set()  # the file of the dead rank is removed, too
    ends = gloo.run(jobs.failing_save, str(path), "fine", True)
    assert [end["kind"] for end in ends] == ["saved"] * 4
    assert sk.open(path).verify().ok
    assert not before - {".metadata"} & jobs.folder(path)
    for leaves in gloo.run(jobs.read_back, str(path), size=2):
        assert leaves["mine.3"][2] == torch.full((4,), 3.0).numpy().tobytes()
