"""Creates the corpus: `python -m fuzz.seeds`. Needs torch.

The corpus holds small files of stock releases, from tests/golden, and files written by Shardkeep.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import tempfile
from pathlib import Path

import torch

import shardkeep as sk
from fuzz.mutators import pack_files
from fuzz.worker import CORPUS
from shardkeep.checkpoint.reader import open_reader

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
RELEASES = ("2.0.1", "2.3.1", "2.4.1", "2.15.0", "python313")
_FEW = 3
"""The number of cases taken from a release: the smallest, which run fastest."""


def keep(target: str, name: str, data: bytes) -> None:
    folder = CORPUS / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def golden(release: str) -> None:
    """Keep metadata, items and whole checkpoints of one release."""
    with tarfile.open(GOLDEN / f"{release}.tar.xz") as archive, tempfile.TemporaryDirectory() as to:
        archive.extractall(to, filter="data")
        found = [
            (
                path.parent.name,
                {f.name: f.read_bytes() for f in sorted(path.iterdir()) if f.is_file()},
            )
            for path in sorted(Path(to).glob("*/ckpt"))
        ]
    found.sort(key=lambda one: sum(map(len, one[1].values())))
    for name, files in found[:1]:
        keep("checkpoint", f"{release}-{name}", pack_files(files))
    for name, files in [one for one in found if ".metadata" in one[1]][:_FEW]:
        keep("metadata", f"{release}-{name}", files[".metadata"])
    for name, files in [one for one in found if "__0.metadata" in one[1]][:1]:
        keep("per-rank-metadata", f"{release}-{name}", files["__0.metadata"])
        keep("checkpoint", f"{release}-{name}", pack_files(files))


def ours() -> None:
    """Keep the files that Shardkeep writes for a state with values of all kinds."""
    weight = torch.arange(12.0).reshape(3, 4)
    state = {
        "model": {"w": weight, "tied": weight, "b": torch.ones(2, dtype=torch.bfloat16)},
        "groups": [{"lr": 0.1, "params": [0, 1], "betas": (0.9, 0.99)}],
        "big": {1: 2**70, "nan": float("nan"), "set": {1}, "bytes": b"ab"},
        "odd": (torch.ones(2), torch.float16, torch.Size([1])),
        "rng": sk.PerRank({"x": 1}),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ckpt"
        sk.save(state, path)
        files = {file.name: file.read_bytes() for file in sorted(path.iterdir())}
        opened = open_reader(path)
        (file,) = (name for name in files if name.endswith(".distcp"))
        for name in ("model.w", "odd"):
            row = (
                opened.locations.item(opened.chunk_rows(name)[0])
                if name in opened.tensor_rows
                else None
            )
            where = row or opened.locations.object(opened.object_rows[name])
            item = files[file][where.offset : where.offset + where.length]
            for target in ("tensor-item",) if row else ("object-item", "torch-object"):
                keep(target, "ours", item)
    metadata = files[".metadata"]
    keep("metadata", "ours", metadata)
    keep("trailer", "ours", metadata)
    keep("trailer", "without", metadata[:300])
    (manifest,) = (data for name, data in files.items() if name.startswith(".manifest"))
    keep("manifest", "ours", manifest)
    keep("checkpoint", "ours", pack_files(files))


def items() -> None:
    """Keep items written by torch.save."""
    values = {
        "tensor": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.ones(4, dtype=torch.float8_e4m3fn),
        "conj": torch.ones(2, dtype=torch.complex64).conj(),
    }
    for name, value in values.items():
        out = io.BytesIO()
        torch.save(value, out)
        keep("tensor-item", name, out.getvalue())
    objects = {
        "plain": {"a": [1, (2.5, None)], "b": {"c": b"x", "s": {1}}, "d": torch.float32},
        "tensors": [torch.ones(2, 2), torch.ones(3)[1:], torch.nn.Parameter(torch.zeros(1))],
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 2, torch.qint8),
        "channels": torch.quantize_per_channel(
            torch.ones(2, 2), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8
        ),
        "generator": torch.Generator().get_state(),
    }
    for name, value in objects.items():
        out = io.BytesIO()
        torch.save(value, out)
        for target in ("object-item", "torch-object"):
            keep(target, name, out.getvalue())


def others() -> None:
    """Keep safetensors files, their index, and leases."""
    entries = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    sharding = json.dumps({"a": {"saved_offsets": [0, 3]}})
    plain = {"__metadata__": {"format": "pt"}, **entries}
    sharded = {"__metadata__": {"DCP_SHARDING_INFO": sharding}, "a": entries["a"]}
    for name, header, size in (("plain", plain, 32), ("sharded", sharded, 24)):
        data = json.dumps(header).encode()
        keep("safetensors", name, struct.pack("<Q", len(data)) + data + bytes(range(size)))
    index = {"metadata": {"total_size": 32}, "weight_map": {"a": "x.safetensors", "b": "y"}}
    keep("safetensors-index", "plain", json.dumps(index).encode())
    holder = {"save_id": "0" * 32, "host": "h", "machine": "m", "pid": 7, "started": 3}
    keep("lease", "other", json.dumps(holder).encode())


def main() -> None:
    shutil.rmtree(CORPUS, ignore_errors=True)
    for release in RELEASES:
        golden(release)
    ours()
    items()
    others()


if __name__ == "__main__":
    main()
