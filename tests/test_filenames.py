"""What the files of a checkpoint are called: one pattern for all that look for them."""

from __future__ import annotations

import pytest

from shardkeep.filenames import data_file, data_file_parts, metadata_rank, of_ranks

ID = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (data_file(3, 12, ID), (3, ID)),
        ("__3_0.distcp", (3, "")),
        (f"__0_0_{ID}_own.distcp", None),  # of a record that nobody but its writer finds
        ("__0_0_x.distcp", None),
        ("__0_0.distcp.tmp", None),
        ("a/__0_0.distcp", None),
        ("__٣_0.distcp", None),
        (f"__{'9' * 5000}_0.distcp", None),
        ("model.safetensors", None),
    ],
)
def test_data_files_say_who_wrote_them(name, parts):
    assert data_file_parts(name) == parts


def test_ranks_with_metadata_of_their_own_come_by_rank():
    names = ["__10.metadata", ".metadata", "__9.metadata", "__x.metadata", "__1.metadata.tmp"]
    assert of_ranks(names) == [(9, "__9.metadata"), (10, "__10.metadata")]
    assert [metadata_rank(name) for name in names] == [10, None, 9, None, None]
