"""Writing of data files from payloads in memory, with checksums on the way."""
