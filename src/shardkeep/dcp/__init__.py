"""The drop-in: `import shardkeep.dcp as dcp` where `torch.distributed.checkpoint` was imported.

Names and signatures are torch's (2.13); the engine is Shardkeep's. So far: `save`, `load`, the file
system's reader and writer, and the default planners with their options. A planner, reader or writer
that overrides something is refused, not half obeyed.
"""

from __future__ import annotations

from shardkeep.dcp.api import load, save
from shardkeep.dcp.filesystem import FileSystemReader, FileSystemWriter
from shardkeep.dcp.planners import DefaultLoadPlanner, DefaultSavePlanner

__all__ = [
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "FileSystemReader",
    "FileSystemWriter",
    "load",
    "save",
]
