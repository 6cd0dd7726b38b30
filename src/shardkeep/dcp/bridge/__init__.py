"""Conversion between torch's planners, storage and metadata and those of the engine."""
