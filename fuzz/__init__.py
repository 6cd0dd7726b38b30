"""Fuzzing of everything that reads a checkpoint. See `fuzz/README.md`."""
