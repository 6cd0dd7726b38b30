"""The zip files that `torch.save` writes, one for each item of a checkpoint."""
