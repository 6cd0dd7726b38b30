"""Store in a folder of the local file system or of a mounted one (NFS, Lustre)."""
