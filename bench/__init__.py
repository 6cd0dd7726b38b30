"""Shardkeep beside others and beside the machine's limits, in one run: `python -m bench`."""
