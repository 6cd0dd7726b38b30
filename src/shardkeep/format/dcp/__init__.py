"""The `.metadata` file of `torch.distributed.checkpoint`, and what Shardkeep appends to it."""
