"""The manifest: everything that an index holds, as columns that can be read by range."""
