"""A short description of the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

__all__ = ["file_system", "machine", "versions"]

LIBRARIES = (
    "shardkeep",
    "torch",
    "numpy",
    "isal",
    "deflate",
    "safetensors",
    "torchsnapshot",
    "torch_checkpointing",
)


def machine(folder: Path) -> Mapping[str, str]:
    """Return the facts needed to judge the figures; checkpoints are written to `folder`."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{memory / 2**30:.0f} GiB",
        "file system": file_system(folder),
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        "Python": platform.python_version(),
        "settings": _settings(),
        "load before the run": f"{os.getloadavg()[0]:.1f}",
    }


def versions() -> Mapping[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def file_system(folder: Path) -> str:
    """Return the type of the file system that a folder is on, as the kernel names it."""
    best, kind = "", "unknown"
    resolved = f"{folder.resolve()}/"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, name, *_ = line.split()
        if resolved.startswith(mount.rstrip("/") + "/") and len(mount) >= len(best):
            best, kind = mount, name
    return kind


def _settings() -> str:
    """Return the settings of Shardkeep that the environment changes."""
    turned = sorted(name for name in os.environ if name.startswith("SHARDKEEP_"))
    return ", ".join(f"{name}={os.environ[name]}" for name in turned) or "defaults"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return platform.machine()
