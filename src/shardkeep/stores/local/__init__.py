"""A store in a folder of the local file system, or of one that is mounted (NFS, Lustre)."""
