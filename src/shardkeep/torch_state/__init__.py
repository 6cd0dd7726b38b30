"""Torch-facing: what a rank holds of a state, as pieces of memory and as objects."""
