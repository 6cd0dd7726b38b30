"""Ranks that coordinate through the job's key-value store."""
