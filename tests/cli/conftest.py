"""Checkpoints made without torch, and the command run in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardkeep.checkpoint import commit
from shardkeep.cli import main
from shardkeep.format import values
from shardkeep.format.torch_zip.container_write import TensorFraming
from shardkeep.stores import LocalStore
from shardkeep.types import DTYPES, Box, Chunks, DType, Index, Objects, Structure, Tensors
from support.written_items import write_items


@dataclass(frozen=True)
class Ran:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command here; nothing it does may import torch."""

    def call(*argv: object) -> Ran:
        before = "torch" in sys.modules
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        printed = capsys.readouterr()
        assert ("torch" in sys.modules) == before
        assert "Traceback" not in printed.err
        return Ran(code, printed.out, printed.err)

    return call


def write(
    path: Path,
    tensors: Mapping[str, tuple[str, np.ndarray, Sequence[Box]]],
    objects: Mapping[str, Any],
    structure: Structure | None,
) -> Path:
    """A checkpoint of Shardkeep's: one data file for each place in a tensor's list of boxes."""
    store, save_id = LocalStore(path), commit.new_id()
    width = max((array.ndim for _, array, _ in tensors.values()), default=0)
    files: dict[str, list[tuple[TensorFraming | None, memoryview]]] = {}
    placed: list[tuple[str, int, Box]] = []
    for row, (dtype, array, boxes) in enumerate(tensors.values()):
        for rank, box in enumerate(boxes or [Box.whole(array.shape)]):
            part = np.ascontiguousarray(array[box.slices])
            raw = part.reshape(-1).view(np.uint8) if part.size else np.zeros(0, np.uint8)
            file = commit.data_file(rank, 0, save_id)
            item = (TensorFraming(DType.named(dtype), box.sizes), raw.data)
            files.setdefault(file, []).append(item)
            placed.append((file, row, box))
    first = commit.data_file(0, 0, save_id)
    for value in objects.values():
        files.setdefault(first, []).append((None, memoryview(repr(value).encode())))
        placed.append((first, -1, Box((), ())))
    written = write_items(store, files)
    store.sync()
    names = list(files)
    order = sorted(range(len(placed)), key=lambda i: names.index(placed[i][0]))
    where = {given: place for place, given in enumerate(order)}  # files are written one by one
    rows = np.array([where[i] for i in range(len(placed))], dtype=np.int64)
    chunks, others = rows[: len(rows) - len(objects)], rows[len(rows) - len(objects) :]
    counts = np.diff(written.block)
    checksums = [written.checksums[written.block[r] : written.block[r + 1]] for r in chunks]

    def padded(parts: list[tuple[int, ...]], fill: int) -> np.ndarray:
        table = np.full((len(parts), width), fill, dtype=np.int64)
        for row, part in enumerate(parts):
            table[row, : len(part)] = part
        return table

    boxes = [box for _, row, box in placed if row >= 0]
    arrays = [array for _, array, _ in tensors.values()]
    index = Index(
        files=written.files,
        tensors=Tensors(
            names=tuple(tensors),
            dtype=np.array([DType.named(d).code for d, _, _ in tensors.values()], np.uint8),
            ndim=np.array([array.ndim for array in arrays], np.uint8),
            shape=padded([array.shape for array in arrays], 1),
        ),
        chunks=Chunks(
            tensor=np.array([row for _, row, _ in placed if row >= 0], np.int64),
            offsets=padded([box.offsets for box in boxes], 0),
            sizes=padded([box.sizes for box in boxes], 1),
            file=written.file[chunks],
            item=written.item[chunks],
            length=written.length[chunks],
            payload=written.payload[chunks],
            transform=np.zeros(len(chunks), np.int16),
            block=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[chunks])]),
            checksums=np.concatenate([np.zeros(0, np.uint32), *checksums]),
        ),
        objects=Objects(
            names=tuple(objects),
            file=written.file[others],
            item=written.item[others],
            length=written.length[others],
            transform=np.zeros(len(others), np.int16),
            crc=written.crc[others].astype(np.int64),
            values={name: values.encode(value) for name, value in objects.items()},
        ),
        structure=structure,
    )
    header = {"save_id": save_id, "shardkeep": "0.1.0", "torch": "2.13.0"}
    commit.publish(store, save_id, index, header)
    return path


Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(state)`: a checkpoint of nested arrays, `(dtype, array, boxes)`, and values."""

    def call(state: Mapping[Any, Any], name: str = "ckpt") -> Path:
        tensors: dict[str, Any] = {}
        objects: dict[str, Any] = {}
        leaves: dict[str, tuple[Any, ...]] = {}
        containers: dict[tuple[Any, ...], str] = {}
        empties: dict[tuple[Any, ...], int] = {}

        def walk(path: tuple[Any, ...], value: Any) -> None:
            flat = ".".join(map(str, path))
            if isinstance(value, (dict, list)):
                containers[path] = "dict" if isinstance(value, dict) else "list"
                if path and not value:
                    empties[path] = len(leaves)
                for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                    walk((*path, key), inner)
                return
            leaves[flat] = path
            if isinstance(value, np.ndarray):
                tensors[flat] = (_torch_name(value), value, [])
            elif isinstance(value, tuple) and isinstance(value[1:2] and value[1], np.ndarray):
                tensors[flat] = value
            else:
                objects[flat] = value

        walk((), dict(state))
        return write(tmp_path / name, tensors, objects, Structure(leaves, containers, empties))

    return call


def _torch_name(array: np.ndarray) -> str:
    plain = [d.name for d in DTYPES if d.numpy == array.dtype and not d.note]
    return plain[0]
