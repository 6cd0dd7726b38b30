"""Messages arrive as they were sent, or raise an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.coordination.keyvalue.framing import (
    PIECE_BYTES,
    join_pieces,
    piece_count,
    split_into_pieces,
)
from shardkeep.errors import FormatError
from support.sessions import payload

edges = st.sampled_from(
    [
        0,
        1,
        PIECE_BYTES - 26,
        PIECE_BYTES - 25,
        PIECE_BYTES - 24,
        PIECE_BYTES,
        2 * PIECE_BYTES - 25,
        3 * PIECE_BYTES,
    ]
)


@given(st.binary(max_size=3000))
def test_round_trip(message: bytes) -> None:
    pieces = split_into_pieces(message)
    assert join_pieces(pieces) == message
    assert len(pieces) == piece_count(pieces[0]) == 1


@given(edges, st.integers(0, 3))
def test_round_trip_of_pieces(size: int, seed: int) -> None:
    message = payload(seed, 2 * size)[:size]  # all of it random
    pieces = split_into_pieces(message)
    assert join_pieces(pieces) == message
    assert len(pieces) == piece_count(pieces[0])
    assert all(len(piece) <= PIECE_BYTES for piece in pieces)


def test_compressed_when_it_pays() -> None:
    (piece,) = split_into_pieces(bytes(10 * PIECE_BYTES))
    assert len(piece) < PIECE_BYTES // 100
    assert join_pieces([piece]) == bytes(10 * PIECE_BYTES)


@given(st.sampled_from([5, 600, PIECE_BYTES + 9]), st.booleans(), st.data())
def test_every_flipped_bit_is_noticed(size: int, zeros: bool, data: st.DataObject) -> None:
    pieces = split_into_pieces(bytes(size) if zeros else payload(1, 2 * size)[:size])
    which = data.draw(st.integers(0, len(pieces) - 1))
    at = data.draw(st.integers(0, min(40, len(pieces[which]) - 1)))
    changed = bytearray(pieces[which])
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    pieces[which] = bytes(changed)
    with pytest.raises(FormatError, match="message"):
        join_pieces(pieces)


def test_missing_or_foreign_pieces_are_noticed() -> None:
    pieces = split_into_pieces(payload(1, 4 * PIECE_BYTES))
    with pytest.raises(FormatError, match="arrived damaged"):
        join_pieces(pieces[:-1])
    for start in (b"", b"SKm1", b"x" * 100):
        with pytest.raises(FormatError, match="does not start with"):
            piece_count(start)
