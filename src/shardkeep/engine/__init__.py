"""Saving and loading: the stages of a save, its queue, the stages of a load."""
