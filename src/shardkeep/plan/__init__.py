"""Pure functions over numpy columns: what meets what, who writes what, what to read."""
