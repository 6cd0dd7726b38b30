"""Planning as pure functions over numpy columns: overlaps, writers, file layouts and reads."""
