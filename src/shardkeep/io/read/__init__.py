"""Stored chunks into memory: few reads, checked on the way."""
