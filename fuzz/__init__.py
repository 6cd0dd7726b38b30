"""Broken and hostile bytes for everything that reads a checkpoint. See `fuzz/README.md`."""
