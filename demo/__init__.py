"""The demo: train on real text, kill all ranks, resume on another number of ranks, compare."""
