"""Many small items at once are, byte for byte, what one makes of each alone."""

from __future__ import annotations

import zlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkeep.io.items import put_items
from shardkeep.types import Frame

FRAMES = [
    Frame(b"head", b"be", b"tween", b"after"),
    Frame(b"", b"", b"", b""),
    Frame(b"a longer head", b"before", b"", b"x"),
]
RUNS = st.lists(
    st.tuples(st.sampled_from(range(3)), st.sampled_from([0, 1, 5, 64]), st.integers(1, 40)),
    max_size=6,
)


@given(RUNS, st.integers(0, 9))
@settings(max_examples=200)
def test_items_alike_and_mixed_lie_one_after_the_other(runs, seed):
    rng = np.random.default_rng(seed)
    kinds = [(frame, size) for frame, size, count in runs for _ in range(count)]
    data = [rng.bytes(size) for _, size in kinds]
    crcs = [zlib.crc32(one) for one in data]
    frames = [FRAMES[frame] for frame, _ in kinds]
    wanted = b"".join(
        frame.head + one + frame.tail(crc)
        for frame, one, crc in zip(frames, data, crcs, strict=True)
    )
    into = np.full(len(wanted) + 2, 7, dtype=np.uint8)
    payloads = np.frombuffer(b"".join(data), dtype=np.uint8)
    put_items(frames, [size for _, size in kinds], crcs, payloads, into[1:-1])
    assert into.tobytes() == b"\7" + wanted + b"\7"
