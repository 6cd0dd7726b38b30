"""Coordination of ranks through the job's key-value store."""
