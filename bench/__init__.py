"""Benchmarks that compare Shardkeep with other tools and with the limits of the machine."""
