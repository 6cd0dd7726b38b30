"""The commands on what stock torch wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
dcp = pytest.importorskip("torch.distributed.checkpoint")

Run = Callable[..., Any]


class Config:
    """A class that no reader knows."""

    def __init__(self) -> None:
        self.width = 64


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stock") / "ckpt"
    state = {
        "model": {"w": torch.arange(100_000, dtype=torch.bfloat16), "t": torch.ones(3, 2).T},
        "epoch": 3,
        "config": Config(),
        "long": list(range(100)),
    }
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


def test_ls(stock: Path, run: Run) -> None:
    lines = run("ls", stock).lines
    assert lines[0] == (
        f"{stock}: torch.distributed checkpoint, 2 tensors, 3 objects, "
        "195.3 KiB (200,024 bytes), 1 file"
    )
    assert lines[1:6] == [
        "├─ model   2 tensors          195.3 KiB",
        "│  ├─ w    bfloat16 [100000]  195.3 KiB",
        "│  └─ t    float32 [2, 3]          24 B",
        "├─ epoch   3",
        f"├─ config  <Opaque {__name__}.Config>",
    ]
    assert lines[6].startswith("└─ long    [0, 1, 2, ")
    assert lines[6].endswith("...")
    entries = {entry["name"]: entry for entry in run("ls", stock, "--json").json["entries"]}
    assert entries["long"]["value"] == list(range(100))
    assert entries["config"]["repr"] == f"<Opaque {__name__}.Config>"


def test_show(stock: Path, run: Run) -> None:
    lines = run("show", stock, "model.t", "--stats").lines
    assert "  [[1., 1., 1.]," in lines
    assert "  mean 1" in lines
    lines = run("show", stock, "model.w", "--box", "-3:").lines
    assert "  [99840., 99840., 99840.]" in lines
    assert run("show", stock, "config").lines == [
        "config: object, Opaque",
        f"  <Opaque {__name__}.Config>",
        "    filled with {'width': 64}",
        "",
        "Classes that Shardkeep does not know; they were not imported, nothing was run:",
        f"  {__name__}.Config",
    ]
    assert len(run("show", stock, "long").lines) == 1 + 102


def test_verify(stock: Path, run: Run, tmp_path: Path) -> None:
    ran = run("verify", stock)
    assert ran.code == 0
    assert ran.lines[0].startswith(f"{stock}: whole; ")
    assert ran.lines[1:] == [
        "1 name has no checksum, so damage there is not detected:",
        "  .metadata",
    ]
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / ".metadata").write_bytes((stock / ".metadata").read_bytes())
    data = bytearray((stock / "__0_0.distcp").read_bytes())
    payload = bytes(torch.arange(100_000, dtype=torch.bfloat16).view(torch.uint8).numpy())
    data[data.index(payload) + 1000] ^= 4
    (copy / "__0_0.distcp").write_bytes(data)
    ran = run("verify", copy, "--json")
    assert ran.code == 1
    (damage,) = ran.json["damaged"]
    assert (damage["file"], damage["name"]) == ("__0_0.distcp", "model.w")


def test_a_missing_file_is_damage_but_no_obstacle(stock: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes((stock / ".metadata").read_bytes())
    ran = run("ls", tmp_path)
    assert ran.code == 0
    assert "│  ├─ w    bfloat16 [100000]  195.3 KiB" in ran.lines
    (epoch,) = [line for line in ran.lines if "epoch" in line]
    assert "object that can't be read: __0_0.distcp, 'epoch': the file is missing" in epoch
    ran = run("verify", tmp_path)
    assert ran.code == 1
    assert "damaged in 5 places" in ran.lines[0]
    ran = run("show", tmp_path, "model.w")
    assert ran.code == 1
    assert ran.err == "shardkeep: __0_0.distcp, 'model.w': the file is missing\n"
