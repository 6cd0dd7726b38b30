"""Reading stored chunks into memory, with few reads and checksums on the way."""
