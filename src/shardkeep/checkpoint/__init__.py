"""A checkpoint on a store: commit, leases, garbage, reader, read plan, verification."""
