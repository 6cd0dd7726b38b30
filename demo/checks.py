"""Two other readers of the checkpoint, each in a separate process: `python -m demo.checks KIND`.

`stock` is `torch.distributed.checkpoint` without Shardkeep; `bare` is Shardkeep without torch.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from demo.recorder import Holdings

__all__ = ["bare", "stock"]


def stock(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all tensors and values that torch's own loader reads."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    inner = {
        name.rsplit(".", depth)[0] for name in found for depth in range(1, name.count(".") + 1)
    }
    found = {name: entry for name, entry in found.items() if name not in inner}  # whole containers
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in found.items()
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    tensors = {name: leaf.numpy() for name, leaf in state.items() if torch.is_tensor(leaf)}
    return tensors, {name: leaf for name, leaf in state.items() if name not in tensors}


def bare(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all tensors and values that Shardkeep reads."""
    import shardkeep as sk

    checkpoint = sk.open(path)
    contents = {name: checkpoint.read(name) for name in checkpoint}
    tensors = {name: contents[name] for name in checkpoint if checkpoint.is_tensor(name)}
    return tensors, {name: leaf for name, leaf in contents.items() if name not in tensors}


def main() -> None:
    kind, path, recorded = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    begun = time.perf_counter()
    tensors, values = {"stock": stock, "bare": bare}[kind](path)
    seconds = time.perf_counter() - begun
    found = Holdings.read(recorded).compare(tensors, values)
    imported = [name for name in ("torch", "shardkeep") if name in sys.modules]
    version = str(sys.modules[imported[0]].__version__)
    print(
        json.dumps(asdict(found) | {"seconds": seconds, "imported": imported, "version": version})
    )


if __name__ == "__main__":
    main()
