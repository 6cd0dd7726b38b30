"""Readers and writers of whatever fsspec reaches."""

from __future__ import annotations

from shardkeep.dcp.handed import rest_of, theirs

__getattr__ = rest_of("fsspec_filesystem", "_fsspec_filesystem")
_stock = theirs("fsspec_filesystem", "_fsspec_filesystem")
FsspecReader, FsspecWriter = _stock.FsspecReader, _stock.FsspecWriter
