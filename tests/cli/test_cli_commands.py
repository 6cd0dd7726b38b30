"""The commands, run in this process on checkpoints that no torch wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardkeep.checkpoint import commit
from shardkeep.stores import LocalStore
from shardkeep.types import Box, Chunks, Index, Objects, Tensors

Make = Callable[..., Path]
Run = Callable[..., Any]

WEIGHT = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.fixture
def ckpt(make: Make) -> Path:
    halves = [Box((0, 0), (2, 6)), Box((2, 0), (2, 6))]
    return make(
        {
            "model": {
                "layers": [
                    {"weight": ("float32", WEIGHT, halves), "bias": np.ones(4, np.int64)},
                    {"weight": np.zeros((0, 3), np.float16), "scale": np.array(2.5)},
                ],
                "unused": {},
            },
            "optim": {0: {"lr": 0.001, "betas": (0.9, 0.999)}, "note": "hi"},
            "epoch": 3,
        }
    )


def test_ls_shows_a_tree(ckpt: Path, run: Run) -> None:
    ran = run("ls", ckpt)
    assert ran.code == 0
    assert ran.err == ""
    assert ran.lines == [
        f"{ckpt}: Shardkeep checkpoint (by shardkeep 0.1.0, torch 2.13.0), "
        "4 tensors, 4 objects, 136 bytes, 2 files",
        "├─ model            4 tensors       136 B",
        "│  ├─ layers        4 tensors       136 B",
        "│  │  ├─ 0          2 tensors       128 B",
        "│  │  │  ├─ weight  float32 [4, 6]   96 B",
        "│  │  │  └─ bias    int64 [4]        32 B",
        "│  │  └─ 1          2 tensors         8 B",
        "│  │     ├─ weight  float16 [0, 3]    0 B",
        "│  │     └─ scale   float64 []        8 B",
        "│  └─ unused        empty dict",
        "├─ optim            3 objects",
        "│  ├─ 0             2 objects",
        "│  │  ├─ lr         0.001",
        "│  │  └─ betas      (0.9, 0.999)",
        "│  └─ note          'hi'",
        "└─ epoch            3",
    ]


def test_ls_folds_below_a_depth(ckpt: Path, run: Run) -> None:
    assert run("ls", ckpt, "--depth", 1).lines[1:] == [
        "├─ model  4 tensors  136 B",
        "├─ optim  3 objects",
        "└─ epoch  3",
    ]
    assert len(run("ls", ckpt, "--depth", 0).lines) == 1


def test_ls_flat_prints_names_that_show_takes(ckpt: Path, run: Run) -> None:
    lines = run("ls", ckpt, "--flat").lines[1:]
    assert lines[0] == "model.layers.0.weight  float32 [4, 6]  96 B"
    names = [line.split("  ")[0] for line in lines]
    assert len(names) == 9
    for name in names:
        assert run("show", ckpt, name).code == 0


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.weight", ["model.layers.0.weight", "model.layers.1.weight"]),
        ("model.layers.1", ["model.layers.1.weight", "model.layers.1.scale"]),
        ("epoch", ["epoch"]),
        ("optim.0.[lb]?", ["optim.0.lr"]),
    ],
)
def test_ls_takes_names_and_patterns(ckpt: Path, run: Run, pattern: str, names: list[str]) -> None:
    ran = run("ls", ckpt, pattern, "--flat")
    assert ran.lines[1] in (f"{len(names)} names of 9 match", "1 name of 9 match")
    assert [line.split()[0] for line in ran.lines[2:]] == names


def test_ls_says_that_nothing_matches(ckpt: Path, run: Run) -> None:
    ran = run("ls", ckpt, "weight")
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err == (
        f"shardkeep: nothing in {ckpt} matches 'weight': a pattern fits whole names "
        "(try '*part*'), a name lists what is below it\n"
    )


def test_ls_json_is_exact(ckpt: Path, run: Run) -> None:
    ran = run("ls", ckpt, "--json")
    assert ran.code == 0
    head = ran.json
    entries = {entry["name"]: entry for entry in head.pop("entries")}
    assert head["path"] == str(ckpt)
    assert head["kind"] == "shardkeep"
    assert head["says"]["torch"] == "2.13.0"
    assert sorted(head["files"]) == sorted(p.name for p in ckpt.glob("*.distcp"))
    assert (head["tensors"], head["objects"], head["nbytes"]) == (4, 4, 136)
    assert entries["model.layers.0.weight"] == {
        "name": "model.layers.0.weight",
        "path": ["model", "layers", 0, "weight"],
        "kind": "tensor",
        "dtype": "float32",
        "shape": [4, 6],
        "nbytes": 96,
        "chunks": 2,
    }
    assert entries["optim.0.lr"]["value"] == 0.001
    assert entries["optim.0.lr"]["path"] == ["optim", 0, "lr"]
    assert entries["optim.0.betas"]["repr"] == "(0.9, 0.999)"
    assert entries["model.unused"]["kind"] == "empty dict"
    assert len(ran.lines) == 1 + 9 + 1  # an entry a line


def test_ls_json_of_a_pattern(ckpt: Path, run: Run) -> None:
    assert [e["name"] for e in run("ls", ckpt, "epoch", "--json").json["entries"]] == ["epoch"]


@pytest.mark.parametrize("other", ["--flat", "--json"])
def test_depth_is_for_trees(ckpt: Path, run: Run, other: str) -> None:
    ran = run("ls", ckpt, other, "--depth", 1)
    assert ran.code == 2
    assert (
        ran.err == "shardkeep: --depth folds a tree and can't be combined with --flat or --json\n"
    )


def test_ls_of_an_empty_state(make: Make, run: Run) -> None:
    path = make({})
    assert run("ls", path).out.endswith("0 tensors, 0 objects, 0 bytes, 0 files\n")
    assert run("ls", path, "--json").json["entries"] == []


def test_large_and_unreadable_objects_do_not_stop_a_listing(
    ckpt: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardkeep.checkpoint.reader import CheckpointReader
    from shardkeep.errors import Damaged

    def broken(self: CheckpointReader, name: str, **_: Any) -> Any:
        raise Damaged("the bytes\x1b[2J are gone", file="__0_0.distcp", name=name)

    monkeypatch.setattr(CheckpointReader, "value", broken)
    ran = run("ls", ckpt, "epoch")
    assert ran.code == 0
    assert ran.lines[2].endswith(
        r"object that can't be read: __0_0.distcp, 'epoch': the bytes\x1b[2J are gone"
    )
    entry = run("ls", ckpt, "epoch", "--json").json["entries"][0]
    assert entry["error"] == r"__0_0.distcp, 'epoch': the bytes\x1b[2J are gone"


def test_show_a_tensor(ckpt: Path, run: Run) -> None:
    ran = run("show", ckpt, "model.layers.0.weight", "--stats")
    assert ran.code == 0
    lines = ran.lines
    assert lines[:6] == [
        "model.layers.0.weight",
        "  dtype   float32",
        "  shape   [4, 6]",
        "  size    96 B",
        "  chunks  2 in 2 files",
        "",
    ]
    assert lines[6].split() == ["box", "file", "offset", "length"]
    assert lines[7].startswith("  [0:2, 0:6]  __0_0_")
    assert lines[8].startswith("  [2:4, 0:6]  __1_0_")
    assert lines[10:15] == [
        "  values:",
        "  [[ 0.,  1.,  2.,  3.,  4.,  5.],",
        "   [ 6.,  7.,  8.,  9., 10., 11.],",
        "   [12., 13., 14., 15., 16., 17.],",
        "   [18., 19., 20., 21., 22., 23.]]",
    ]
    assert lines[16:] == ["  min  0", "  max  23", "  mean 11.5", "  nan  0", "  inf  0"]


def test_show_a_box(ckpt: Path, run: Run) -> None:
    ran = run("show", ckpt, "model.layers.0.weight", "--box", "1:3,-2:", "--stats")
    assert ran.lines[10:13] == [
        "  values of [1:3, 4:6]:",
        "  [[10., 11.],",
        "   [16., 17.]]",
    ]
    assert ran.lines[14:17] == ["  min  10", "  max  17", "  mean 13.5"]


def test_show_what_has_no_elements_or_no_dimensions(ckpt: Path, run: Run) -> None:
    empty = run("show", ckpt, "model.layers.1.weight", "--stats").lines
    assert "  no elements in [0:0, 0:3]" in empty
    assert empty[-2:] == ["  nan  0", "  inf  0"]
    assert "  2.5" in run("show", ckpt, "model.layers.1.scale").lines


def test_show_reads_only_what_it_shows(
    make: Make, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardkeep.checkpoint.reader import CheckpointReader

    path = make({"w": np.arange(1_000_000, dtype=np.int32).reshape(1000, 10, 100)})
    asked: list[int] = []
    read = CheckpointReader.read

    def counted(self: CheckpointReader, name: str, box: Box | None = None, **rest: Any) -> Any:
        assert box is not None
        asked.append(box.numel)
        return read(self, name, box, **rest)

    monkeypatch.setattr(CheckpointReader, "read", counted)
    ran = run("show", path, "w")
    assert asked == [64]
    assert "  size    3.8 MiB (4,000,000 bytes)" in ran.lines
    title = "  values of [0:1, 0:8, 0:8] (the first of 1,000,000; --box shows others):"
    assert title in ran.lines
    assert ran.lines[-1] == "    [700, 701, 702, 703, 704, 705, 706, 707]]]"
    asked.clear()
    assert run("show", path, "w", "--box", "7,:2").lines[-1].endswith("7198, 7199]]]")
    assert asked == [200]


@pytest.mark.parametrize("part", [7, 100, 10**6])
def test_statistics_do_not_depend_on_the_parts(
    make: Make, run: Run, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    from shardkeep.cli import stats

    values = np.linspace(-1, 2, 120, dtype=np.float64).reshape(5, 8, 3)
    values[1, 2, 0], values[4, 7, 2], values[0, 0, 0] = np.nan, np.inf, -np.inf
    path = make({"w": ("float64", values, [Box((0, 0, 0), (5, 3, 3)), Box((0, 3, 0), (5, 5, 3))])})
    monkeypatch.setattr(stats, "_PART", part)
    finite = values[np.isfinite(values)]
    assert run("show", path, "w", "--stats").lines[-6:] == [
        f"  min  {finite.min():.9g}",
        f"  max  {finite.max():.9g}",
        f"  mean {finite.mean():.9g}",
        "  nan  1",
        "  inf  2",
        "  (117 finite elements: min, max and mean are of these)",
    ]


def test_dtypes_that_numpy_lacks_are_shown(make: Make, run: Run) -> None:
    import ml_dtypes

    path = make(
        {
            "bf": np.array([1.5, -2.0], ml_dtypes.bfloat16),
            "f8": np.array([0.5, 448], ml_dtypes.float8_e4m3fn),
            "c32": ("complex32", np.array([(1, 2)], [("real", "<f2"), ("imag", "<f2")]), []),
            "f4": ("float4_e2m1fn_x2", np.array([18], np.uint8), []),
            "yes": np.array([True, False]),
            "i": np.array([-(2**63), 2**63 - 1]),
            "c": np.array([1 + 2j, complex(np.nan, 0)]),
        }
    )
    assert "  [ 1.5, -2. ]" in run("show", path, "bf", "--stats").lines
    assert "  max  448" in run("show", path, "f8", "--stats").lines
    c32 = run("show", path, "c32", "--stats").lines
    assert c32[1] == "  dtype   complex32 (pairs of float16, as fields 'real' and 'imag')"
    assert "  [1.+2.j]" in c32
    assert "  mean 1+2j" in c32
    assert "  mean 0.5" in run("show", path, "yes", "--stats").lines
    i = run("show", path, "i", "--stats").lines
    assert "  min  -9,223,372,036,854,775,808" in i
    assert "  max  9,223,372,036,854,775,807" in i
    assert run("show", path, "c", "--stats").lines[-4:-1] == ["  mean 1+2j", "  nan  1", "  inf  0"]
    f4 = run("show", path, "f4", "--stats")
    assert "  [18]" in f4.lines
    assert f4.code == 2
    assert f4.err == (
        "shardkeep: float4_e2m1fn_x2 has no statistics: what is read is two 4-bit floats (e2m1) "
        "a byte, packed as they are stored\n"
    )


def test_long_lists_of_chunks_are_cut_unless_asked_for(make: Make, run: Run) -> None:
    boxes = [Box((row,), (1,)) for row in range(40)]
    path = make({"w": ("float32", np.zeros(40, np.float32), boxes)})
    assert "  ... and 8 more (--chunks lists all)" in run("show", path, "w").lines
    lines = run("show", path, "w", "--chunks").lines
    assert sum("distcp" in line for line in lines) == 40


def test_show_an_object_and_a_container(ckpt: Path, run: Run) -> None:
    assert run("show", ckpt, "optim.0.betas").lines == [
        "optim.0.betas: object, tuple",
        "  (0.9, 0.999)",
    ]
    assert (
        run("show", ckpt, "optim.0").lines
        == [
            "optim.0: 2 inside",
            "└─ optim     2 objects",
            "   └─ 0      2 objects",
            "      ├─ lr     0.001",
            "      └─ betas  (0.9, 0.999)",
        ]
        or run("show", ckpt, "optim.0").lines[0] == "optim.0: 2 inside"
    )
    assert run("show", ckpt, "model.unused").lines == ["model.unused: empty dict"]


def test_show_suggests_close_names(ckpt: Path, run: Run) -> None:
    ran = run("show", ckpt, "model.layer.0.weight")
    assert ran.code == 1
    assert ran.err == (
        f"shardkeep: {ckpt} has no tensor, object or container named 'model.layer.0.weight'; "
        "did you mean 'model.layers.0.weight' or 'model.layers.1.weight' or "
        "'model.layers.0.bias'?\n"
    )
    assert run("show", ckpt, "betas").err.endswith("did you mean 'optim.0.betas'?\n")
    assert (
        run("show", ckpt, "zzzz").err
        == f"shardkeep: {ckpt} has no tensor, object or container named 'zzzz'\n"
    )


def test_only_tensors_have_boxes(ckpt: Path, run: Run) -> None:
    ran = run("show", ckpt, "epoch", "--box", "0")
    assert ran.code == 2
    assert ran.err == "shardkeep: 'epoch' is not a tensor: --box and --stats are for tensors only\n"
    ran = run("show", ckpt, "model.layers.0.bias", "--box", "5")
    assert ran.code == 2
    assert ran.err == "shardkeep: box '5': '5' reaches out of a dimension of size 4\n"


HOSTILE = "a\x1b[2J\x1b]0;owned\x07\nfake\u202eline"


def test_hostile_names_never_reach_the_terminal_raw(make: Make, run: Run) -> None:
    path = make({HOSTILE: np.ones(2, np.float32), "t": {"b\r\x9b": "text\x1b[31m\n", "\x00": {}}})
    for argv in (
        ["ls", path],
        ["ls", path, "--flat"],
        ["ls", path, "--json"],
        ["show", path, HOSTILE],
        ["show", path, "t"],
        ["show", path, "a\x1b"],
        ["verify", path],
    ):
        ran = run(*argv)
        for line in (ran.out + ran.err).split("\n"):
            assert line.isprintable(), (argv, line)
    shown = r"a\x1b[2J\x1b]0;owned\x07\nfake\u202eline"
    assert shown in run("ls", path).out
    assert r"'text\x1b[31m\n'" in run("ls", path).out
    # A name can be given as it was printed.
    assert run("show", path, shown).lines[0] == shown
    assert run("ls", path, "--json").json["entries"][0]["name"] == HOSTILE


def test_verify_a_whole_checkpoint(ckpt: Path, run: Run) -> None:
    ran = run("verify", ckpt)
    assert ran.code == 0
    assert ran.err == ""
    assert ran.out.startswith(f"{ckpt}: whole; ")
    assert ran.out.endswith(" of 2 files checked\n")
    report = run("verify", ckpt, "--json").json
    assert report["ok"] is True
    assert report["kind"] == "shardkeep"
    assert report["damaged"] == []
    assert report["unchecked"] == []
    # Every byte: data files and .metadata; the manifest's own trailer is what it was opened by.
    data = sum(p.stat().st_size for p in ckpt.glob("*.distcp"))
    assert report["checked_bytes"] >= data
    quiet = run("verify", ckpt, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_verify_names_what_is_damaged(ckpt: Path, run: Run) -> None:
    file = next(ckpt.glob("__1_0_*.distcp"))
    at = file.read_bytes().index(WEIGHT[2:].tobytes())
    flip(file, at + 5)
    ran = run("verify", ckpt)
    assert ran.code == 1
    assert "damaged in 1 place; " in ran.lines[0]
    assert ran.lines[1].startswith(
        f"  {file.name}, model.layers.0.weight, block 0 (written by rank 1): "
    )
    report = run("verify", ckpt, "--json")
    assert report.code == 1
    assert report.json["ok"] is False
    (damage,) = report.json["damaged"]
    assert damage["file"] == file.name
    assert damage["name"] == "model.layers.0.weight"
    assert (damage["block"], damage["rank"]) == (0, 1)
    quiet = run("verify", ckpt, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (1, "", "")


def test_damage_is_an_error_for_show_too(ckpt: Path, run: Run) -> None:
    file = next(ckpt.glob("__1_0_*.distcp"))
    flip(file, file.read_bytes().index(WEIGHT[2:].tobytes()))
    ran = run("show", ckpt, "model.layers.0.weight")
    assert ran.code == 1
    assert ran.err.startswith(f"shardkeep: {file.name}, 'model.layers.0.weight'")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("command", [["ls"], ["show", "x"], ["verify"], ["verify", "--json"]])
def test_broken_metadata_is_damage(tmp_path: Path, run: Run, command: list[str]) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80\x02]q\x00.")
    ran = run(command[0], tmp_path, *command[1:])
    assert ran.code == 1
    if command[0] == "verify":
        assert ".metadata" in ran.out
        assert ran.err == ""
    else:
        assert ran.out == ""
        assert ran.err.startswith("shardkeep: .metadata: ")
        assert ran.err.count("\n") == 1


def test_a_missing_manifest_is_damage(ckpt: Path, run: Run) -> None:
    for path in ckpt.iterdir():
        if path.name != ".metadata" and path.suffix != ".distcp":
            path.unlink()
    ran = run("verify", ckpt, "--json")
    assert ran.code == 1
    assert "missing" in ran.json["damaged"][0]["what"]


@pytest.mark.parametrize("command", [["ls"], ["show", "x"], ["verify"]])
def test_a_folder_of_checkpoints_names_them(
    tmp_path: Path, ckpt: Path, run: Run, command: list[str]
) -> None:
    run_folder = tmp_path / "run"
    for step in range(10):
        (run_folder / f"step_{step}").mkdir(parents=True)
        shutil.copy(ckpt / ".metadata", run_folder / f"step_{step}" / ".metadata")
    ran = run(command[0], run_folder, *command[1:])
    names = ", ".join(f"step_{step}" for step in range(8))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        f"shardkeep: {run_folder} has no .metadata and no .safetensors file: no checkpoint is "
        f"committed there; it contains checkpoints: {names} and 2 more; name one of them\n"
    )


@pytest.mark.parametrize("command", [["ls"], ["show", "x"], ["verify"], ["verify", "--quiet"]])
def test_no_checkpoint_there(tmp_path: Path, run: Run, command: list[str]) -> None:
    nowhere = tmp_path / "nowhere"
    ran = run(command[0], nowhere, *command[1:])
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        f"shardkeep: {nowhere} is empty or does not exist: no checkpoint is committed there\n"
    )
    file = tmp_path / "file"
    file.write_bytes(b"")
    ran = run(command[0], file, *command[1:])
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"shardkeep: {file}/.metadata: Not a directory\n"
    ran = run(command[0], "s3://bucket/x", *command[1:])
    assert ran.code == 2
    assert ran.err == "shardkeep: 's3://bucket/x' is a URL; the command opens only local folders\n"


def test_safetensors_are_listed_but_can_not_be_checked(tmp_path: Path, run: Run) -> None:
    header = json.dumps({"a.b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    data = np.array([1, 2], "<f4").tobytes()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    listed = run("ls", tmp_path).lines
    assert listed[0] == f"{tmp_path}: safetensors, 1 tensor, 0 objects, 8 bytes, 1 file"
    assert listed[1:] == ["└─ a     1 tensor     8 B", "   └─ b  float32 [2]  8 B"]
    assert "  [1., 2.]" in run("show", tmp_path, "a.b").lines
    ran = run("verify", tmp_path)
    assert ran.code == 0
    assert "nothing could be checked" in ran.lines[0]
    assert ran.lines[1:] == ["1 name has no checksum, so damage there is not detected:", "  a.b"]


def test_arguments(run: Run) -> None:
    assert run("--version").out == "shardkeep 0.1.0\n"
    nothing = run()
    assert nothing.code == 2
    assert "verify" in nothing.out
    for command in ("ls", "show", "verify"):
        helped = run(command, "--help")
        assert helped.code == 0
        assert "Exit code" in helped.out
    ran = run("export")
    assert ran.code == 2
    assert ran.err == "shardkeep: No such command 'export' (see shardkeep --help)\n"
    ran = run("ls")
    assert ran.code == 2
    assert ran.err == "shardkeep: Missing argument 'PATH' (see shardkeep ls --help)\n"
    ran = run("ls", ".", "--nope")
    assert ran.code == 2
    assert "--nope" in ran.err
    assert ran.err.count("\n") == 1


def test_an_object_that_decompresses_to_gigabytes_is_not_read(tmp_path: Path, run: Run) -> None:
    zstandard = pytest.importorskip("zstandard")
    stream = zstandard.ZstdCompressor().compressobj()
    data = b"".join(stream.compress(bytes(1 << 20)) for _ in range(64)) + stream.flush()
    assert len(data) < 64 * 1024
    (tmp_path / "data").write_bytes(data)
    none, table = np.zeros(0, np.int64), np.zeros((0, 0), np.int64)
    few, small = np.zeros(0, np.uint8), np.zeros(0, np.int16)
    index = Index(
        files=("data",),
        transforms=((), ("stream.zstd/1",)),
        tensors=Tensors((), few, few, table),
        chunks=Chunks(
            none, table, table, none.astype(np.int32), none, none, none, small,
            np.zeros(1, np.int64), np.zeros(0, np.uint32),
        ),
        objects=Objects(
            ("bomb",), np.zeros(1, np.int32), np.zeros(1, np.int64), np.array([len(data)]),
            np.ones(1, np.int16), np.full(1, -1), {},
        ),
    )  # fmt: skip
    save_id = commit.new_id()
    commit.publish(LocalStore(tmp_path), save_id, index, {"save_id": save_id})
    (line,) = run("ls", tmp_path).lines[1:]
    assert line.startswith("└─ bomb  object that can't be read: data, bomb: it decompresses to ")
