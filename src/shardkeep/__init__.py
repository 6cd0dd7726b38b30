"""Shardkeep keeps the shards: a checkpoint engine for PyTorch's distributed format."""
