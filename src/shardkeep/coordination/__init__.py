"""The ranks of a job, and how they coordinate. See `contract`. Nothing here imports torch."""

from shardkeep.coordination.detect import detect_ranks

__all__ = ["detect_ranks"]
