"""Payloads in memory into data files: laid out ahead, checksummed on the way."""
