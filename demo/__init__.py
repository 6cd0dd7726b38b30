"""The main job on real input: train, get killed, resume on another number of ranks, compare."""
