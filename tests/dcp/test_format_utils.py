"""Checkpoints are converted to files of `torch.save` and back, without a template."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections import OrderedDict
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch.distributed.checkpoint as stock
import torch.distributed.checkpoint.format_utils as stock_utils

import shardkeep as sk
import shardkeep.dcp as dcp
from shardkeep.checkpoint.reader import open_reader
from shardkeep.dcp import format_utils
from shardkeep.dcp.format_utils import (
    BroadcastingTorchSaveReader,
    DynamicMetaLoadPlanner,
    FormatMode,
    dcp_to_torch_save,
    torch_save_to_dcp,
)
from shardkeep.types import Opaque, TensorInfo
from support import dcp_planners
from support.scenarios import bits, equal, values

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:.*torch.distributed is"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]
GOLDEN = Path(__file__).parents[1] / "golden"
RELEASES = sorted(path.name.removesuffix(".tar.xz") for path in GOLDEN.glob("*.tar.xz"))


def state() -> dict:
    weight = values("w", (3, 4), torch.float32)
    return {
        "model": OrderedDict(w=weight, b=values("b", (2,), torch.bfloat16)),
        "tied": weight,
        "optim": {
            "state": {0: {"step": torch.tensor(2.0)}, 10: {"step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.5, "betas": (0.9, 0.99), "params": [0, 10]}],
        },
        "list": [values("l", (2,), torch.int16), {"x": 1}, [torch.ones(1)]],
        "tuple": (1, torch.ones(2)),
        "empty": {},
        "none": torch.zeros(0, 2),
        "step": 3,
    }


def test_our_checkpoints_are_converted_and_back(tmp_path):
    saved = state()
    dcp.save(saved, checkpoint_id=tmp_path / "first")
    dcp_to_torch_save(tmp_path / "first", tmp_path / "file.pt")
    loaded = torch.load(tmp_path / "file.pt")
    assert equal(loaded, saved)
    assert type(loaded["model"]) is OrderedDict
    assert loaded["tied"].data_ptr() == loaded["model"]["w"].data_ptr()
    torch_save_to_dcp(tmp_path / "file.pt", tmp_path / "second")
    first, second = (open_reader(tmp_path / name) for name in ("first", "second"))
    assert second.structure == first.structure
    assert second.tensor("tied").chunks == second.tensor("model.w").chunks
    assert second.verify().ok
    dcp_to_torch_save(str(tmp_path / "second"), str(tmp_path / "again.pt"))
    assert equal(torch.load(tmp_path / "again.pt"), saved)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.pt", "file.pt", "first", "second",
    ]  # fmt: skip


def test_checkpoints_and_files_of_stock_torch_are_converted(tmp_path):
    saved = {"model": {"w": torch.ones(2, 3)}, "list": [torch.ones(1), 2], "n": 1}
    stock.save(saved, checkpoint_id=tmp_path / "theirs")
    dcp_to_torch_save(tmp_path / "theirs", tmp_path / "ours.pt")
    stock_utils.dcp_to_torch_save(tmp_path / "theirs", tmp_path / "theirs.pt")
    assert equal(torch.load(tmp_path / "ours.pt"), torch.load(tmp_path / "theirs.pt"))
    torch_save_to_dcp(tmp_path / "theirs.pt", tmp_path / "ours")
    stock_utils.dcp_to_torch_save(tmp_path / "ours", tmp_path / "back.pt")
    assert equal(torch.load(tmp_path / "back.pt"), saved)
    loaded = {"model": {"w": torch.zeros(2, 3)}, "list": [torch.zeros(1), 0], "n": 0}
    stock.load(loaded, checkpoint_id=tmp_path / "ours")
    assert equal(loaded, saved)


def test_state_dicts_of_models_are_converted(tmp_path):
    """State dicts have an attribute, parameters, and tensors that share a storage."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    base = torch.arange(6.0)
    saved = {
        "model": model.state_dict(),
        "parameters": dict(model.named_parameters()),
        "view": base[2:4],
        "base": base,
    }
    assert hasattr(saved["model"], "_metadata")
    torch.save(saved, tmp_path / "file.pt")
    torch_save_to_dcp(tmp_path / "file.pt", tmp_path / "ckpt")
    dcp_to_torch_save(tmp_path / "ckpt", tmp_path / "again.pt")
    loaded = torch.load(tmp_path / "again.pt")
    for name in ("model", "parameters"):
        assert equal(dict(loaded[name]), {k: v.detach() for k, v in saved[name].items()})
    assert equal((loaded["view"], loaded["base"]), (saved["view"], saved["base"]))


def same(made, told, source) -> str:
    """Return where a state differs from the `tree()` of the checkpoint; empty if nowhere."""
    if isinstance(told, TensorInfo):
        if not isinstance(made, torch.Tensor) or str(made.dtype) != f"torch.{told.dtype}":
            return f"{told.name}: {made!r:.80}"
        raw = made.int_repr() if made.is_quantized else made
        fits = tuple(made.shape) == told.shape and bits(raw) == source.read(told.name).tobytes()
        return "" if fits else f"{told.name}: other bytes or shape"
    if type(told) in (dict, OrderedDict):
        if type(made) is not type(told) or list(made) != list(told):
            return f"{made!r:.80} is not {told!r:.80}"
        return "".join(same(made[key], told[key], source) for key in told)
    if type(told) in (list, tuple):
        if type(made) is not type(told) or len(made) != len(told):
            return f"{made!r:.80} is not {told!r:.80}"
        return "".join(same(m, t, source) for m, t in zip(made, told, strict=True))
    if isinstance(told, Opaque) or hasattr(told, "__array__") or isinstance(made, torch.Tensor):
        return ""  # Types of torch, which are read as other types without torch.
    fits = made == told or (made != made and told != told)
    fits = fits or type(made).__module__ == "torch"
    return "" if fits else f"{made!r:.80} is not {told!r:.80}"


@pytest.mark.parametrize("release", RELEASES)
def test_checkpoints_of_all_releases_are_converted(tmp_path, release):
    with tarfile.open(GOLDEN / f"{release}.tar.xz") as archive:
        archive.extractall(tmp_path)
    wrong, refused, right = [], [], 0
    for folder in sorted(tmp_path.glob("**/ckpt")):
        name = folder.parent.name
        try:
            dcp_to_torch_save(folder, tmp_path / "file.pt")
        except (sk.Untrusted, sk.Mismatch) as error:
            refused.append(name)
            assert isinstance(error, dcp.CheckpointException)
            continue
        made = torch.load(tmp_path / "file.pt", weights_only=False)
        source = sk.open(folder)
        wrong += [f"{name}: {line}" for line in [same(made, source.tree(), source)] if line]
        right += 1
    assert wrong == []
    # Classes of the script that made them, and dtypes that this torch lacks.
    assert {name.split(".")[0] for name in refused} <= {
        "objects",
        "dtypes_in_objects",
        "more_dtypes",
    }
    assert right >= 5


class Own:
    """A class of the user."""

    def __init__(self, n: int) -> None:
        self.n = n


class Evil:
    """A class that runs code when it is unpickled without restriction."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


NAME = f"{__name__}.Own"


def test_a_file_is_read_safely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"own": Own(3), "w": torch.ones(1)}, "own.pt")
    line = rf"object 'own.pt' .*call torch\.serialization\.add_safe_globals\(\[{NAME}\]\)"
    with pytest.raises(sk.Untrusted, match=line) as caught:
        torch_save_to_dcp("own.pt", "ckpt")
    assert isinstance(caught.value, dcp.CheckpointException)
    assert not Path("ckpt").exists()
    with torch.serialization.safe_globals([Own]):
        torch_save_to_dcp("own.pt", "ckpt")
        dcp_to_torch_save("ckpt", "again.pt")
    assert torch.load("again.pt", weights_only=False)["own"].n == 3
    before = Path("again.pt").read_bytes()
    with pytest.raises(sk.Untrusted, match=r"object 'own' holds"):
        dcp_to_torch_save("ckpt", "again.pt")
    assert Path("again.pt").read_bytes() == before
    torch.save({"evil": Evil()}, "evil.pt")
    with pytest.raises(sk.Untrusted, match="mkdir"):
        torch_save_to_dcp("evil.pt", "ckpt2")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.pt", "ckpt", "evil.pt", "own.pt",
    ]  # fmt: skip


def test_files_that_cannot_be_converted_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        torch_save_to_dcp(tmp_path / "nothing.pt", tmp_path / "ckpt")
    with pytest.raises(sk.NotACheckpoint, match="no checkpoint is committed there"):
        dcp_to_torch_save(tmp_path / "nothing", tmp_path / "file.pt")
    (tmp_path / "nothing.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_bytes(b"text")
    for name in ("nothing.pt", "text.pt"):
        with pytest.raises(sk.FormatError, match=name):
            torch_save_to_dcp(tmp_path / name, tmp_path / "ckpt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(sk.Mismatch, match=r"list.pt holds a list, not a mapping"):
        torch_save_to_dcp(tmp_path / "list.pt", tmp_path / "ckpt")
    torch.save({"a": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(sk.FormatError, match="old"):
        torch_save_to_dcp(tmp_path / "old.pt", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_a_file_appears_when_it_is_complete(tmp_path, monkeypatch):
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "ckpt")
    (tmp_path / "file.pt").write_text("before")

    def full(value, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        dcp_to_torch_save(tmp_path / "ckpt", tmp_path / "file.pt")
    assert (tmp_path / "file.pt").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "file.pt"]


def test_damage_is_named_and_not_converted(tmp_path):
    dcp.save({"w": torch.ones(5000)}, checkpoint_id=tmp_path / "ckpt")
    (data,) = (tmp_path / "ckpt").glob("*.distcp")
    flipped = bytearray(data.read_bytes())
    flipped[9000] ^= 1
    data.write_bytes(flipped)
    with pytest.raises(sk.Damaged, match="'w'"):
        dcp_to_torch_save(tmp_path / "ckpt", tmp_path / "file.pt")
    assert not (tmp_path / "file.pt").exists()


# --- The command ----------------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "shardkeep.dcp.format_utils", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command(tmp_path):
    saved = state()
    torch.save(saved, tmp_path / "file.pt")
    done = command("torch_to_dcp", tmp_path / "file.pt", tmp_path / "ckpt")
    assert (done.returncode, done.stderr) == (0, "")
    assert equal(sk.open(tmp_path / "ckpt").read("step"), 3)
    assert format_utils._main(
        ["dcp_to_torch", str(tmp_path / "ckpt"), str(tmp_path / "again.pt")]
    ) == 0  # fmt: skip
    assert equal(torch.load(tmp_path / "again.pt"), saved)


def test_the_command_reports_a_missing_checkpoint(tmp_path, capsys):
    for mode in FormatMode:
        source = str(tmp_path / "nothing")
        assert format_utils._main([mode.value, source, str(tmp_path / "x")]) == 1
        assert capsys.readouterr().err == (
            f"No checkpoint found at {source}: nothing was converted\n"
        )
    with pytest.raises(SystemExit) as ended:
        format_utils._main(["other", "a", "b"])
    assert ended.value.code == 2
    assert list(tmp_path.iterdir()) == []


# --- Files of torch.save into a template ----------------------------------------------------------


def test_a_file_into_a_template_without_a_job(tmp_path):
    saved = {"model": {"w": values("w", (3, 2), torch.float32), "n": torch.tensor(3)}, "more": 1}
    torch.save(saved, tmp_path / "file.pt")
    loaded = {"model": {"w": torch.zeros(3, 2), "n": torch.tensor(0)}}
    weight = loaded["model"]["w"]
    options = {"storage_reader": BroadcastingTorchSaveReader(), "planner": DynamicMetaLoadPlanner()}
    dcp.load(loaded, checkpoint_id=tmp_path / "file.pt", **options)
    assert equal(loaded["model"], saved["model"])
    assert loaded["model"]["w"] is weight
    with pytest.raises(RuntimeError, match="Non-tensor value identified at more"):
        dcp.load({"more": 0}, checkpoint_id=tmp_path / "file.pt", **options)
    for wrong in ({"w": torch.zeros(2, 2)}, {"w": torch.zeros(4, 2)}):
        with pytest.raises(ValueError, match=r"Size mismatch between saved torch.Size\(\[3, 2\]\)"):
            dcp.load({"model": wrong}, checkpoint_id=tmp_path / "file.pt", **options)
    with pytest.raises(RuntimeError, match=r"Missing key in checkpoint state_dict: model\.x"):
        dcp.load({"model": {"x": torch.zeros(1)}}, checkpoint_id=tmp_path / "file.pt", **options)
    with pytest.raises(ValueError, match="checkpoint_id must be the path of the file"):
        dcp.load(
            {"w": torch.zeros(1)}, **options | {"storage_reader": BroadcastingTorchSaveReader()}
        )
    assert issubclass(BroadcastingTorchSaveReader, stock_utils.BroadcastingTorchSaveReader)


@pytest.mark.gloo
def test_a_file_that_one_rank_sees_into_tensors_of_all(gloo, tmp_path):
    told = gloo.run(dcp_planners.broadcast, str(tmp_path), size=2)
    assert told == [
        "0: Size mismatch between saved torch.Size([5, 3]) and current: torch.Size([6, 3]) "
        "for model.rows\n0: Missing key in checkpoint state_dict: model.new."
    ] * 2  # fmt: skip


def test_names_that_other_programs_import_exist():
    assert format_utils._EmptyStateDictLoadPlanner is (
        dcp.default_planner._EmptyStateDictLoadPlanner
    )
    for name in ("_load_state_dict", "_save_state_dict", "FileSystemReader", "FileSystemWriter"):
        assert getattr(format_utils, name).__module__.startswith("shardkeep.dcp")
