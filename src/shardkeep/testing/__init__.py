"""Tools for tests of code that uses Shardkeep: simulated ranks."""
