"""The trailer of `.metadata` detects each changed byte, and pickle ignores it."""

from __future__ import annotations

import io
import pickle

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shardkeep.errors import Damaged, FormatError
from shardkeep.format.dcp.trailer import (
    TRAILER_SIZE,
    Trailer,
    digest,
    manifest_name,
    manifest_save_id,
)

SAVE = "00112233445566778899aabbccddeeff"
PICKLE = pickle.dumps({"a": 1})
TRAILER = Trailer.of(SAVE, PICKLE, b"manifest")
FILE = PICKLE + TRAILER.to_bytes()
MARKS = (FILE[len(PICKLE) :][:8], FILE[-8:])

sizes = st.integers(0, 2**64 - 1)
digests = st.binary(min_size=16, max_size=16)
ids = digests.map(bytes.hex)


@given(ids, st.integers(0, 2**60), digests, sizes, digests)
def test_a_trailer_is_read_as_it_was_written(save_id, length, one, manifest_length, other):
    trailer = Trailer(save_id, length, one, manifest_length, other)
    data = trailer.to_bytes()
    assert len(data) == TRAILER_SIZE
    assert Trailer.parse(data, length + TRAILER_SIZE) == trailer
    before = b"x" * min(5, length)
    assert Trailer.parse(before + data, length + TRAILER_SIZE) == trailer


def test_a_trailer_describes_its_pickle_and_manifest():
    assert Trailer.parse(FILE, len(FILE)) == TRAILER
    assert TRAILER.manifest == ".manifest-00112233445566778899aabbccddeeff.npz"
    TRAILER.check_pickle(PICKLE)
    TRAILER.check_manifest(b"manifest")
    assert pickle.load(io.BytesIO(FILE)) == {"a": 1}


@given(st.binary(max_size=200))
def test_other_files_have_no_trailer(data):
    assume(MARKS[0] not in data and not data.endswith(MARKS[1]))  # either one announces a trailer
    assume(not any(data.endswith(b"." + MARKS[0][:length]) for length in range(1, 8)))
    assert Trailer.parse(data[-TRAILER_SIZE:], len(data)) is None


@pytest.mark.parametrize("bit", [0x01, 0x80])
@pytest.mark.parametrize("place", range(TRAILER_SIZE))
def test_a_flipped_byte_is_detected(place, bit):
    bad = bytearray(FILE)
    bad[len(PICKLE) + place] ^= bit
    with pytest.raises(FormatError, match=r"^\.metadata: the trailer "):
        Trailer.parse(bytes(bad[-TRAILER_SIZE:]), len(bad))


@pytest.mark.parametrize("cut", range(1, TRAILER_SIZE))
def test_a_truncated_trailer_is_detected(cut):
    bad = FILE[:-cut]
    with pytest.raises(FormatError, match=r"^m: the trailer is cut or damaged$"):
        Trailer.parse(bad[-TRAILER_SIZE:], len(bad), file="m")


def test_a_trailer_of_another_pickle_is_detected():
    longer = b"x" + FILE
    with pytest.raises(
        FormatError, match=f"for {len(PICKLE)} bytes of pickle, not {len(PICKLE) + 1}"
    ):
        Trailer.parse(longer, len(longer))


def test_bytes_after_the_trailer_are_detected():
    longer = FILE + b"x"
    with pytest.raises(FormatError, match="the trailer is cut or damaged"):
        Trailer.parse(longer, len(longer))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (PICKLE[:-1], f"has {len(PICKLE) - 1} bytes, not {len(PICKLE)}"),
        (bytes(len(PICKLE)), "digest"),
    ],
)
def test_an_error_names_the_damaged_pickle(data, what):
    with pytest.raises(Damaged, match=rf"^\.metadata: the pickle .*{what}"):
        TRAILER.check_pickle(data)


def test_an_error_names_the_damaged_manifest():
    with pytest.raises(Damaged, match=r"^\.manifest-0011.*npz: the manifest does not match its"):
        TRAILER.check_manifest(b"Manifest")


def test_names_of_manifests_contain_the_id_of_the_save():
    assert manifest_save_id(manifest_name(SAVE)) == SAVE
    for name in (
        ".manifest-.npz",
        f"x{manifest_name(SAVE)}",
        f"{manifest_name(SAVE)}\n",
        ".metadata",
    ):
        assert manifest_save_id(name) is None


@pytest.mark.parametrize(
    "save_id", ["", "0" * 31, "0" * 31 + "G", "A" * 32, " " * 32, "../" + "0" * 29]
)
def test_invalid_ids_are_refused(save_id):
    with pytest.raises(ValueError, match="a save id has 32 hex digits"):
        Trailer(save_id, 0, digest(b""), 0, digest(b"")).to_bytes()
