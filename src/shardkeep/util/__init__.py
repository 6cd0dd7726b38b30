"""Formatting, fork handling, garbage-collector pauses, retries. Imports nothing of Shardkeep."""
