"""Detection of any changed bit: it is refused with its place, or it changes no value."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import shardkeep as sk
from shardkeep.checkpoint.reader import open_reader
from support import damage

ALL = bool(os.environ.get("TEST_EVERY_BYTE"))
"""Whether to test every byte outside large payloads, which takes half an hour."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("damage")
    sk.save(damage.state(), root / "ours")
    damage.save_stock(root / "stock", single_file_per_rank=False)
    return root


def places(path: Path, count: int) -> list[tuple[str, int, int]]:
    """Return (file, byte, bit) of places in every file, most of them in its structures."""
    dice, found = random.Random(1), []
    for file in sorted(path.iterdir()):
        size = file.stat().st_size
        ends = [*range(min(600, size)), *range(max(0, size - 1500), size)]
        some = ends if ALL else dice.sample(ends, min(len(ends), count))
        some += [dice.randrange(size) for _ in range(count)]
        found += [(file.name, at, dice.randrange(8)) for at in some]
    return found


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_a_flipped_bit_is_detected_or_changes_nothing(made, kind):
    path, refused = made / kind, 0
    ways = {
        "load": lambda: damage.by_load(path),
        "read": lambda: damage.by_read(path),
        "as stock reads": lambda: damage.by_read(path, manifest=False),
    }
    for file, at, bit in places(path, 6 if kind == "ours" else 2):
        with damage.changed(path / file, at, bit):
            ends = {way: damage.outcome(work, file) for way, work in ways.items()}
            found = damage.outcome(lambda: sk.open(path).verify().ok, file)
        place = f"bit {bit} of byte {at} of {file}"
        allowed = {"same", "refused"}
        if kind == "stock" and file == ".metadata":
            allowed.add("other values came back")  # it has no checksum, and defines the values
        assert set(ends.values()) <= allowed, f"{place}: {ends}"
        if kind == "ours":
            assert found != "same", f"{place}: verify did not detect it"
        elif file != ".metadata" and "refused" in ends.values():
            assert found != "same", f"{place}: {ends}, but verify did not detect it"
        refused += "refused" in ends.values()
    assert refused > 20
    assert damage.by_load(path)


def payload(path: Path, name: str) -> tuple[Path, int, int]:
    """Return file, offset and length of the payload of a tensor that is one chunk."""
    checkpoint = open_reader(path)
    (row,) = checkpoint.chunk_rows(name)
    first, nbytes = checkpoint.locations.locate([row])[row].payload
    return path / checkpoint.locations.item(row).file, first, nbytes


TENSORS = [name for name, value in damage.state().items() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("kind", ["ours", "stock"])
@pytest.mark.parametrize("name", [name for name in TENSORS if name != "conj"])
@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_damage_names_the_tensor_and_the_block(made, kind, name, place):
    path = made / kind
    file, first, nbytes = payload(path, name)
    at = int(nbytes * place)
    known = kind == "ours" or nbytes <= 256 * 1024
    where = f"block {at // (256 * 1024)}" if known else f"its {nbytes} bytes at {first}"
    names = {"tied", "again"} if name in ("tied", "again") else {name}
    with damage.changed(file, first + at, 3):
        for work in (damage.by_load, damage.by_read):
            with pytest.raises(sk.Damaged) as caught:
                work(path)
            assert caught.value.file == file.name
            assert caught.value.name in names
            assert where in str(caught.value)
            assert "CRC-32" in str(caught.value)
        (found,) = {str(one): one for one in sk.open(path).verify().damaged}.values()
        assert (found.file, found.name in names) == (file.name, True)


@pytest.mark.parametrize("name", ["long", "odd"])
def test_damage_names_an_object_of_a_stock_checkpoint(made, name):
    path = made / "stock"
    checkpoint = open_reader(path)
    item = checkpoint.locations.object(checkpoint.object_rows[name])
    data = (path / item.file).read_bytes()[item.offset : item.offset + item.length]
    at = item.offset + data.index(b"data.pkl") + 64
    with damage.changed(path / item.file, at, 0):
        for work in (damage.by_load, damage.by_read):
            with pytest.raises(sk.Damaged, match=r"data\.pkl. does not match its CRC-32") as caught:
                work(path)
            assert (caught.value.file, caught.value.name) == (item.file, name)


def test_an_object_is_one_block_whatever_its_size(tmp_path):
    sk.save({"w": torch.ones(3), "large": list(range(300_000))}, tmp_path)
    checkpoint = open_reader(tmp_path)
    item = checkpoint.locations.object(checkpoint.object_rows["large"])
    assert item.length > 4 * 256 * 1024
    with damage.changed(tmp_path / item.file, item.offset + item.length // 2, 0):
        (found,) = sk.open(tmp_path).verify().damaged
        assert (found.file, found.name, found.rank, found.block) == (item.file, "large", 0, None)
        with pytest.raises(sk.Damaged, match="'large'"):
            sk.open(tmp_path).read("large")


@pytest.mark.parametrize("codec", [False, True])
def test_the_report_names_what_a_load_could_not_check(made, tmp_path, codec):
    path = made / "stock"
    if codec:
        from torch.distributed.checkpoint._extension import ZStandard

        path = tmp_path / "packed"
        damage.save_stock(path, _extensions=[ZStandard()])
    wanted = damage.state()
    report = sk.load(damage.blank(wanted), path)
    assert (report.unchecked, report.bytes_unchecked) == ((), 0)
    assert "unchecked" not in str(report)

    rows = {"large": sk.Shards((300, 500), [((100, 0), torch.zeros(50, 500))])}
    rows["small"] = sk.Shards((20, 3), [((5, 0), torch.zeros(3, 3))])
    part = sk.load(rows, path)
    expected = () if codec else ("large",)  # a decompressed item is checked as a whole
    assert part.unchecked == expected
    assert part.bytes_unchecked == (0 if codec else 100_000)
    assert codec or str(part).endswith("; unchecked: 97.7 KiB of 1 tensor")
    assert torch.equal(rows["large"].parts[0][1], wanted["large"][100:150])

    nothing = sk.load(damage.blank(wanted), path, verify=False)
    assert set(nothing.unchecked) == set(TENSORS)


def test_two_parts_that_cover_a_tensor_are_checked_together(made):
    path = made / "stock"
    halves = [((at, 0), torch.zeros(150, 500)) for at in (0, 150)]
    template = {"large": sk.Shards((300, 500), halves)}
    assert sk.load(template, path).unchecked == ()
    file, first, _ = payload(path, "large")
    with damage.changed(file, first + 100, 0), pytest.raises(sk.Damaged, match="'large'"):
        sk.load(template, path)


def test_safetensors_without_checksums_are_unchecked(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"w": torch.ones(100)}, tmp_path / "model.safetensors")
    report = sk.load({"w": torch.zeros(100)}, tmp_path)
    assert (report.unchecked, report.bytes_unchecked) == (("w",), 400)
    assert sk.open(tmp_path).verify().unchecked == ("w",)


def test_tensors_of_another_memory_layout_are_checked(made):
    path = made / "stock"
    template = {"large": torch.zeros(500, 300).T, "across": torch.zeros(400, 260)}
    assert sk.load(template, path).unchecked == ()
    for name in template:
        file, first, nbytes = payload(path, name)
        with damage.changed(file, first + nbytes // 3, 0), pytest.raises(sk.Damaged, match=name):
            sk.load(template, path)
