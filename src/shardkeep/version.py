"""The version of Shardkeep, for packaging and for the headers of checkpoints."""

__version__ = "0.1.0"
