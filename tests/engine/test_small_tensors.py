"""Small tensors are loaded in columns, with the results of the general way and far less work."""

from __future__ import annotations

import io
import sys
from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import torch.distributed.checkpoint as stock
from hypothesis import given, settings
from hypothesis import strategies as st

import shardkeep as sk
from shardkeep.checkpoint import reader
from shardkeep.checkpoint.chunk_locations import inside
from shardkeep.engine import load, match
from shardkeep.format.torch_zip import container
from shardkeep.state.flatten import flatten
from shardkeep.state.per_rank import PerRankValues
from shardkeep.stores import MemoryStore
from support.scenarios import bits, values
from support.store_files import names_in

DTYPES = "float32 bfloat16 int8 bool complex64 float8_e4m3fn uint16 complex128 float64".split()


@contextmanager
def columns(bytes_at_most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDKEEP_SMALL_TENSOR_BYTES", str(bytes_at_most))
        yield


class Counting(MemoryStore):
    """A store that counts the reads of data files."""

    reads = 0

    def get_range(self, name, offset, length):
        self.reads += name.endswith(".distcp")
        return super().get_range(name, offset, length)


@st.composite
def tensors(draw):
    """Return name, shape, dtype, the template's dtype, and the part that the template holds."""
    found = []
    for i in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        dtype = draw(st.sampled_from(DTYPES))
        cast = draw(st.sampled_from([dtype, dtype, dtype, "float64"]))
        how = draw(st.sampled_from(["whole", "whole", "part", "transposed", "grad", "neg"]))
        cuts = draw(st.sampled_from([None, *range(len(shape))]))
        found.append((f"t{i}", shape, dtype, cast, how, cuts))
    return found


def state_of(made):
    """Return the state to save, with each tensor whole or cut in two along one dimension."""
    state = {}
    for name, shape, dtype, _, _, cuts in made:
        whole = values(name, shape, getattr(torch, dtype))
        state[name] = whole
        if cuts is not None and shape[cuts] > 1:
            offsets = [0] * len(shape)
            offsets[cuts] = shape[cuts] // 2
            first = [slice(None)] * len(shape)
            first[cuts] = slice(0, offsets[cuts])
            second = list(first)
            second[cuts] = slice(offsets[cuts], None)
            state[name] = sk.Shards(
                shape, [((0,) * len(shape), whole[tuple(first)]), (offsets, whole[tuple(second)])]
            )
    return state


def template_of(made):
    state = {}
    for name, shape, _, cast, how, _ in made:
        kind = getattr(torch, cast)
        tensor = torch.zeros(shape, dtype=kind)
        if how == "part" and shape and shape[0] > 1:
            rest = torch.zeros((shape[0] - 1, *shape[1:]), dtype=kind)
            tensor = sk.Shards(shape, [((1,) + (0,) * (len(shape) - 1), rest)])
        elif how == "transposed":
            tensor = torch.zeros(shape[::-1], dtype=kind).permute(tuple(range(len(shape)))[::-1])
        elif how == "grad" and kind.is_floating_point and kind.itemsize > 1:
            tensor.requires_grad_()
        elif how == "neg" and kind == torch.complex64:
            tensor = tensor.conj()
        state[name] = tensor
    return state


def held(state):
    """Return the bits of everything in a state."""
    return {
        name: [bits(part.resolve_conj()) for _, part in value.parts]
        if isinstance(value, sk.Shards)
        else bits(value.resolve_conj())
        for name, value in state.items()
    }


def both_ways(store, made):
    """Return the bits and the report, or the error, of a load with and without columns."""
    outcomes = []
    for limit in (0, 1 << 18):
        template = template_of(made)
        with columns(limit), pytest.MonkeyPatch.context() as patch:
            patch.setenv("SHARDKEEP_READ_THREADS", "1")
            try:
                report = sk.load(template, store, dtype="cast")
            except sk.errors.ShardkeepError as error:
                outcomes.append((type(error), str(error), getattr(error, "block", None)))
                continue
        facts = (report.loaded, report.resharded, report.cast, report.nbytes)
        outcomes.append((held(template), facts))
    return outcomes


@settings(max_examples=60)
@given(tensors())
def test_both_ways_give_the_same_bits_and_reports(made):
    store = MemoryStore()
    sk.save(state_of(made), store)
    general, fast = both_ways(store, made)
    assert general == fast
    assert len(fast) == 2, fast


@settings(max_examples=60)
@given(tensors(), st.data())
def test_both_ways_report_damage_equally(made, data):
    store = MemoryStore()
    sk.save(state_of(made), store)
    files = [name for name in names_in(store) if name.endswith(".distcp")]
    if not files:
        return
    file = data.draw(st.sampled_from(files))
    content = bytearray(store.get_range(file, 0, store.head(file).size))
    how = data.draw(st.sampled_from(["flip", "cut", "gone"]))
    if how == "gone":
        store.delete(file)
    else:
        at = data.draw(st.integers(0, len(content) - 1))
        store.put(file, content[:at] if how == "cut" else _flipped(content, at), mode="replace")
    general, fast = both_ways(store, made)
    assert general == fast


def _flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def many(count, fill=1.0):
    return {"layers": {str(i): {"weight": torch.full((16,), fill * i)} for i in range(count)}}


def test_a_thousand_tensors_take_few_reads_and_no_copies(monkeypatch):
    store = Counting()
    sk.save(many(1000), store)
    copies = []
    plan = load._plan

    def planned(*args, **more):
        copies.append(plan(*args, **more))
        return copies[-1]

    monkeypatch.setattr(load, "_plan", planned)
    template = many(1000, 0.0)
    store.reads = 0
    told = []
    report = sk.load(template, store, progress=lambda *what: told.append(what))
    assert copies[0].copies == []
    assert store.reads == 1
    assert told == [("read", report.read, report.read)]
    assert all(held["weight"].eq(int(i)).all() for i, held in template["layers"].items())
    assert report.nbytes == 64_000
    assert len(report.loaded) == 1000


def calls_of(function):
    """Count the calls of Python functions that a function makes."""
    count = 0

    def saw(frame, event, arg):
        nonlocal count
        count += event == "call"

    sys.setprofile(saw)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_another_small_tensor_costs_almost_no_calls():
    stores = {count: MemoryStore() for count in (500, 1500)}
    calls = {}
    for count, store in stores.items():
        sk.save(many(count), store)
        flat = flatten(many(count, 0.0), load.is_any_tensor)
        described = match.describe_tensors(flat)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(match, "describe_tensors", lambda _, known=described: known)

            def load_once(store=store, flat=flat):
                source = reader.open_reader(store)
                own = PerRankValues(source, 0, 1, str)
                matched = match.match(flat, match.Contents(source, ()), own)
                filling = load._plan(matched.pieces, source, 1, None)
                filling.run(store, verify=True, threads=1, progress=None)
                load._report(matched, ())

            load_once()
            calls[count] = calls_of(load_once)
    # Each tensor costs a look at its memory and torch's calls for its storage. All else is columns.
    assert (calls[1500] - calls[500]) / 1000 <= 7.1, calls


def test_memory_that_is_not_plain_is_filled_in_the_general_way():
    store = MemoryStore()
    state = {f"t{i}": torch.arange(4.0) + i for i in range(4)}
    sk.save(state, store)
    expanded = torch.zeros(1).expand(4)
    backing = torch.zeros(8)
    template = {"t0": backing[::2], "t1": backing[1::2], "t2": torch.zeros(4), "t3": expanded}
    sk.load(template, store)
    assert backing.tolist() == [0, 1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("saved", "part", "wanted", "resharded"),
    [
        ([(0, 2), (2, 4)], 24, None, False),  # rows in order: one box, cut on saving
        ([(0, 2), (2, 4)], 48, None, True),  # not cut: the parts of two ranks
        ([(0, 2), (2, 4)], 24, (1, 4), True),
        (None, 48, (1, 4), True),
        (None, 48, None, False),
    ],
)
def test_tensors_that_were_cut_on_saving_are_not_resharded(
    monkeypatch, saved, part, wanted, resharded
):
    monkeypatch.setenv("SHARDKEEP_MAX_CHUNK_BYTES", str(part))
    whole, store = torch.arange(12.0).reshape(4, 3), MemoryStore()
    cut = [((low, 0), whole[low:high]) for low, high in saved or [(0, 4)]]
    sk.save({"w": sk.Shards((4, 3), cut)}, store)
    low, high = wanted or (0, 4)
    into = torch.zeros(high - low, 3)
    for limit in (0, 1 << 16):
        with columns(limit):
            report = sk.load({"w": sk.Shards((4, 3), [((low, 0), into)])}, store)
        assert report.resharded == (("w",) if resharded else ())
        assert torch.equal(into, whole[low:high])


def test_columns_side_by_side_are_resharded():
    whole, store = torch.arange(12.0).reshape(4, 3), MemoryStore()
    sk.save({"w": sk.Shards((4, 3), [((0, 0), whole[:, :1]), ((0, 1), whole[:, 1:])])}, store)
    into = torch.zeros(4, 3)
    assert sk.load({"w": into}, store).resharded == ("w",)
    assert torch.equal(into, whole)


def test_small_items_of_stock_torch_are_read_together(tmp_path, monkeypatch):
    state = many(300)
    stock.save(state, storage_writer=stock.FileSystemWriter(tmp_path), no_dist=True)
    store = Counting()
    for path in tmp_path.iterdir():
        store.put(path.name, path.read_bytes(), mode="replace")
    template = many(300, 0.0)
    sk.load(template, store)
    assert store.reads == 2  # one read for all headers, one for all payloads
    assert all(held["weight"].eq(int(i)).all() for i, held in template["layers"].items())


def test_the_manifest_is_read_once():
    store = MemoryStore()
    sk.save(many(100), store)
    seen = []
    read = store.get_range
    store.get_range = lambda name, offset, length: seen.append(name) or read(name, offset, length)
    sk.load(many(100, 0.0), store)
    assert sum(name.startswith(".manifest") for name in seen) == 1


def items():
    """Return tensors as torch.save writes them, of two shapes, with views among them."""
    made = []
    for i in range(6):
        base = values(f"t{i}", (4, 3 + i % 2), torch.float32)
        for tensor in (base, base.T, base[1:], torch.nn.Parameter(base)):
            file = io.BytesIO()
            torch.save(tensor, file)
            made.append(file.getvalue())
    return made


ITEMS = items()


def parsed(data, known=None):
    """Return the content of an item, or its error."""
    try:
        return container.tensor(inside(data), len(data), file="f", place="t", known=known)
    except (sk.errors.FormatError, sk.errors.Damaged) as error:
        return str(error)


def test_similar_items_are_parsed_together_as_alone():
    known = {}
    assert [parsed(item, known) for item in ITEMS] == [parsed(item) for item in ITEMS]
    assert len(known) == 8


@settings(max_examples=300)
@given(st.sampled_from(ITEMS), st.data())
def test_a_changed_item_is_checked_as_it_would_be_alone(item, data):
    known = {}
    for one in ITEMS:
        parsed(one, known)
    at = data.draw(st.integers(0, len(item) - 1))
    changed = item[:at] + bytes([data.draw(st.integers(0, 255))]) + item[at + 1 :]
    assert parsed(changed, known) == parsed(changed)


def test_a_broken_header_among_many_is_named(tmp_path):
    stock.save(many(50), storage_writer=stock.FileSystemWriter(tmp_path), no_dist=True)
    source = sk.open(tmp_path)
    (chunk,) = source["layers.7.weight"].chunks
    path = tmp_path / chunk.item.file
    content = bytearray(path.read_bytes())
    content[chunk.item.offset : chunk.item.offset + 4] = b"none"
    path.write_bytes(content)
    with pytest.raises(sk.errors.FormatError) as alone:
        sk.open(tmp_path).read("layers.7.weight")
    with pytest.raises(sk.errors.FormatError) as together:
        sk.load(many(50, 0.0), tmp_path)
    assert str(together.value) == str(alone.value)
    assert "layers.7.weight" in str(alone.value)
