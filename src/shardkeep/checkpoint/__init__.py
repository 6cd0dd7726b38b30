"""A checkpoint in a store: commit, leases, garbage collection, reading and verification."""
