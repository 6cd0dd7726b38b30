"""Safetensors files, and the index of a set of them."""
