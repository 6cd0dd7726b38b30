"""Bytes and types: pickles, metadata, containers, manifest. Pure: what is read comes as bytes."""
