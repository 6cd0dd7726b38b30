"""Commits: a checkpoint is complete or absent, and changed bytes are detected."""

from __future__ import annotations

import errno
import random
import threading
import warnings

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import torch.distributed.checkpoint as stock

import shardkeep as sk
from shardkeep.checkpoint import commit
from shardkeep.checkpoint.reader import open_reader
from shardkeep.engine import save
from shardkeep.stores import LocalStore, MemoryStore
from shardkeep.testing.simulated_ranks import run
from support.faults import WAYS, Crashed, FaultyStore
from support.scenarios import bits, values
from support.store_files import names_in


def state(seed: str) -> dict:
    tied = values(seed + "tied", (6, 2), torch.float32)
    return {
        "model": {
            "a": values(seed + "a", (5, 3), torch.float32),
            "b": values(seed + "b", (7,), torch.bfloat16),
            "embed": tied,
            "head": tied,
            "scalar": values(seed + "s", (), torch.float64),
            "none": torch.zeros(0, 4),
        },
        "groups": [{"lr": len(seed) / 10, "params": [0, 1]}],
        "note": f"{seed} state",
        "set": {1, 2, len(seed)},
        7: {"seven": (seed,)},
    }


OLD, NEW = state("old"), state("newer")


def contents(checkpoint) -> dict:
    """Return the bytes or the value of every leaf, by name."""
    found = {}
    for name in checkpoint:
        value = checkpoint.read(name)
        if checkpoint.is_tensor(name):
            info = checkpoint.tensor(name)
            value = (info.dtype, info.shape, value.shape, value.tobytes())
        found[name] = value
    return found


def saved(what: dict) -> MemoryStore:
    store = MemoryStore()
    sk.save(what, store)
    return store


def files(store: MemoryStore) -> dict[str, bytes]:
    return {name: store.get_range(name, 0, store.head(name).size) for name in names_in(store)}


def store_of(content: dict[str, bytes]) -> MemoryStore:
    store = MemoryStore()
    for name, data in content.items():
        store.put(name, data, mode="replace")
    return store


@pytest.fixture(scope="module")
def whole() -> dict[str, dict]:
    return {"old": contents(sk.open(saved(OLD))), "new": contents(sk.open(saved(NEW)))}


def committed_state(store: MemoryStore, whole: dict[str, dict]) -> str:
    """Return which state is committed, after checking that it can be read in every way."""
    try:
        checkpoint = sk.open(store)
    except sk.NotACheckpoint:
        return "none"
    report = checkpoint.verify()
    assert report.ok, report.damaged
    assert not report.unchecked
    found = contents(checkpoint)
    (which,) = [name for name, expected in whole.items() if found == expected]
    plain = sk.open(store, manifest=False)
    assert plain.verify().ok
    for name in checkpoint:
        if checkpoint.is_tensor(name):
            assert plain.read(name).tobytes() == checkpoint.read(name).tobytes()
    return which


@pytest.mark.parametrize(("kind", "when"), WAYS)
@pytest.mark.parametrize("before", ["none", "old"])
def test_a_save_that_fails_anywhere_leaves_the_old_or_the_new(whole, before, kind, when):
    start = {} if before == "none" else files(saved(OLD))
    ends = []
    for at in range(1000):
        inner = store_of(start)
        store = FaultyStore(inner, at, kind, when)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "files of the overwritten")
                sk.save(NEW, store, overwrite=before == "old")
            failed = False
        except (OSError, Crashed):
            failed = True
        there = committed_state(inner, whole)
        assert there in (before, "new")
        committed = ("put", ".metadata") in store.log[: at + (when == "after")]
        assert there == ("new" if committed else before), store.log[at]
        if not failed:
            assert there == "new"
        elif kind == "error" and not committed:
            assert files(inner) == start  # all new files are removed
        ends.append(there)
        if len(store.log) <= at:
            break
        sk.save(NEW, inner, overwrite=True)
        assert committed_state(inner, whole) == "new"
    assert ends == sorted(ends, key=[before, "new"].index)  # one switch, in one direction
    assert len(ends) > 10


def test_an_error_before_the_commit_leaves_no_new_files(whole):
    for at in range(1000):
        inner = store_of(files(saved(OLD)))
        before = set(names_in(inner))
        store = FaultyStore(inner, at)
        try:
            sk.save(NEW, store, overwrite=True)
        except OSError:
            if ("open_writer", ".manifest") in [(what, name[:9]) for what, name in store.log]:
                break  # from here on an error may follow a commit
            assert set(names_in(inner)) == before
    else:
        pytest.fail("the save never came as far as its manifest")
    assert at > 5


def test_old_files_are_removed_only_after_the_commit(tmp_path, whole):
    stock.save(dict(OLD["model"]), checkpoint_id=tmp_path, no_dist=True)
    local = LocalStore(tmp_path)
    content = {name: local.get_range(name, 0, local.head(name).size) for name in names_in(local)}
    theirs = set(content) - {".metadata"}
    assert theirs
    store = FaultyStore(store_of(content))
    sk.save(NEW, store, overwrite=True)
    removed = {name for what, name in store.log if what == "delete"}
    removed -= {f".lease_{open_reader(store.inner).found.trailer.save_id}.json"}
    assert removed == theirs
    order = [what for what, _ in store.log]
    assert order.index("put") < order.index("delete")
    assert not theirs & set(names_in(store.inner))
    assert committed_state(store.inner, whole) == "new"


def linked_backup(path):
    """Make a backup by hard links, as `cp -al` does, which keep the files that are replaced."""
    backup = path.with_name("backup")
    backup.mkdir()
    for file in path.iterdir():
        (backup / file.name).hardlink_to(file)


def test_old_files_are_removed_despite_a_backup_of_hard_links(tmp_path, whole):
    path = tmp_path / "ckpt"
    sk.save(OLD, path)
    linked_backup(path)
    old = {file.name for file in path.iterdir()}
    sk.save(NEW, path, overwrite=True)
    assert {file.name for file in path.iterdir()} & old == {commit.METADATA}
    assert committed_state(LocalStore(path), whole) == "new"
    assert committed_state(LocalStore(tmp_path / "backup"), whole) == "old"


class Late(LocalStore):
    """A store that commits and then raises, as if the folder's sync failed after the rename."""

    def put(self, name, data, *, mode):
        super().put(name, data, mode=mode)
        if name == commit.METADATA:  # and not for the lease, which is written first
            raise OSError(errno.EIO, "Input/output error", name)


@pytest.mark.parametrize("backup", [False, True])
def test_an_error_after_the_commit_keeps_the_new_checkpoint(tmp_path, whole, backup):
    path = tmp_path / "ckpt"
    sk.save(OLD, path)
    if backup:
        linked_backup(path)
    with pytest.raises(OSError, match="Input/output error"):
        sk.save(NEW, Late(path), overwrite=True)
    assert committed_state(LocalStore(path), whole) == "new"


@pytest.mark.parametrize("part", ["put", "open_writer"])
def test_a_full_disk_leaves_no_new_files_beside_a_broken_record(whole, part):
    content = files(saved(OLD))
    record = bytearray(content[commit.METADATA])
    record[-10] ^= 1
    content[commit.METADATA] = bytes(record)
    log = FaultyStore(store_of(content))
    sk.save(NEW, log, overwrite=True)
    wanted = commit.METADATA if part == "put" else ".manifest"
    at = [(what, name[: len(wanted)]) for what, name in log.log].index((part, wanted))
    inner = store_of(content)
    with pytest.raises(OSError, match="No space left"):
        sk.save(NEW, FaultyStore(inner, at), overwrite=True)
    assert files(inner) == content


def test_a_rank_that_fails_after_its_report_keeps_its_files(whole, monkeypatch):
    """The report arrives and only the reply is lost, so the other rank commits the files."""
    store, committed = MemoryStore(), threading.Event()
    report, publish = save.report, commit.publish

    def lost(session, *args):
        found = report(session, *args)
        if session.rank == 1:
            assert committed.wait(30)
            raise ConnectionError("no answer")
        return found

    def published(*args, **options):
        publish(*args, **options)
        committed.set()

    monkeypatch.setattr(save, "report", lost)
    monkeypatch.setattr(commit, "publish", published)

    def one(ranks):
        sk.save({f"w{ranks.rank}": torch.ones(4)}, store, ranks=ranks)

    with pytest.raises(ConnectionError, match="no answer"):
        run(2, one)
    checkpoint = sk.open(store)
    assert sorted(checkpoint) == ["w0", "w1"]
    assert checkpoint.verify().ok


class Kept(MemoryStore):
    """A store that refuses to delete data files."""

    def delete(self, name):
        if name.endswith(".distcp"):
            raise PermissionError(errno.EACCES, "Permission denied", name)
        super().delete(name)


def test_the_warning_about_old_files_names_the_calling_line():
    store = Kept()
    sk.save(OLD, store)
    with pytest.warns(UserWarning, match="files of the overwritten checkpoint") as caught:
        sk.save(NEW, store, overwrite=True)
    assert [one.filename for one in caught] == [__file__]


def test_a_stock_checkpoint_that_replaced_one_of_shardkeep_is_opened(tmp_path, whole):
    sk.save(OLD, tmp_path)
    newer = {"model": NEW["model"], "note": "from torch"}
    stock.save(newer, checkpoint_id=tmp_path, no_dist=True)
    checkpoint = sk.open(tmp_path)
    assert checkpoint.kind == "dcp"
    assert checkpoint.verify().ok
    assert checkpoint.read("note") == "from torch"
    assert set(checkpoint) == {"note", *(f"model.{name}" for name in NEW["model"])}
    for name, tensor in NEW["model"].items():
        assert checkpoint.read(f"model.{name}").tobytes() == bits(tensor)
    sk.save(OLD, tmp_path, overwrite=True)
    assert contents(sk.open(tmp_path)) == whole["old"]
    assert "__0_0.distcp" not in {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("late", [1, 2, 3])
def test_a_commit_during_find_is_not_taken_for_one_of_stock_torch(late):
    """Otherwise the checkpoint would be read without its checksums."""

    class Late(MemoryStore):
        looks = 0

        def head(self, name):
            if name == commit.METADATA:
                self.looks += 1
                if self.looks <= late:
                    raise FileNotFoundError(name)
            return super().head(name)

    store = Late()
    sk.save(OLD, store, overwrite=True)
    store.looks = 0
    try:
        kind = commit.find(store).kind
    except sk.NotACheckpoint:
        kind = None
    assert kind in ("shardkeep", None)


def test_a_replacement_during_find_is_not_taken_for_one_of_stock_torch():
    class Replaced(MemoryStore):
        other = b""

        def get_range(self, name, offset, length):
            if name == commit.METADATA and self.other:
                self.put(name, self.other, mode="replace")
                self.other = b""
            return super().get_range(name, offset, length)

    more = NEW | {"more": values("more", (3, 3), torch.float32)}
    for first, last in ((OLD, more), (more, OLD)):
        store, new = Replaced(), saved(last)
        sk.save(first, store)
        for name, data in files(new).items():
            if name == commit.METADATA:
                store.other = data
            else:
                store.put(name, data, mode="replace")
        assert store.head(commit.METADATA).size != len(store.other)
        found = commit.find(store)
        assert (found.kind, store.other) == ("shardkeep", b"")
        assert contents(sk.open(store)) == contents(sk.open(new))


def test_an_unreadable_checkpoint_is_overwritten_only_on_request():
    content = files(saved(OLD))
    content[".metadata"] = content[".metadata"][:-1]
    with pytest.raises(sk.AlreadyExists, match="holds a checkpoint that can't be read"):
        sk.save(NEW, store_of(content))
    store = store_of({**content, "__0_0.distcp": b"of another tool"})
    sk.save(NEW, store, overwrite=True)
    assert sk.open(store).read("note") == "newer state"
    # No record names the old files of Shardkeep's, so they are garbage. Those of others stay.
    assert set(content) & set(names_in(store)) == {".metadata"}
    assert "__0_0.distcp" in set(names_in(store))


@pytest.fixture
def quick(monkeypatch):
    """Read on one thread: the files are so small that threads would only cost time."""
    monkeypatch.setenv("SHARDKEEP_READ_THREADS", "1")


def assert_detected(content: dict[str, bytes], original: dict, what: str, names: list[str]) -> None:
    """Assert that opening or verifying detects the change, and that reads return no wrong data."""
    try:
        checkpoint = sk.open(store_of(content))
        report = checkpoint.verify()
    except sk.ShardkeepError as error:
        assert str(error)
        return
    assert not report.ok, f"{what}: not detected by verify"
    assert set(checkpoint) <= set(original), f"{what}: unknown names appeared"
    for name in names:
        try:
            value = checkpoint.read(name)
            if checkpoint.is_tensor(name):
                info = checkpoint.tensor(name)
                value = (info.dtype, info.shape, value.shape, value.tobytes())
        except sk.ShardkeepError:
            continue
        assert value == original[name], f"{what}: {name!r} has a wrong value"


@pytest.mark.parametrize("kind", [".metadata", ".manifest", "__0_"])
def test_every_flipped_byte_is_found(quick, kind):
    content = files(saved(OLD))
    original = contents(sk.open(store_of(content)))
    assert sk.open(store_of(content)).verify().ok, "otherwise any flipped bit would be detected"
    chance = random.Random(kind)
    (name,) = [name for name in content if name.startswith(kind)]
    data = content[name]
    # Damage there does not depend on the name that is read, so a few names are sufficient.
    names = 12 if kind == "__0_" else 2
    for place in sorted(chance.sample(range(len(data)), 1200)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << chance.randrange(8)
        some = chance.sample(sorted(original), min(names, len(original)))
        assert_detected({**content, name: bytes(flipped)}, original, f"{name} byte {place}", some)


@pytest.mark.parametrize("kind", [".metadata", ".manifest", "__0_"])
def test_every_cut_is_found(quick, kind):
    content = files(saved(OLD))
    original = contents(sk.open(store_of(content)))
    (name,) = [name for name in content if name.startswith(kind)]
    data = content[name]
    pickle = open_reader(store_of(content)).found.trailer.pickle_length
    lengths = set(random.Random(kind).sample(range(len(data)), 200)) | {0, 1, len(data) - 1, pickle}
    for length in sorted(lengths):
        if length >= len(data):
            continue
        cut = {**content, name: data[:length]}
        if name == ".metadata" and length == pickle:
            # What is left is exactly a checkpoint of stock torch.
            assert sk.open(store_of(cut)).kind == "dcp"
            assert sk.open(store_of(cut)).verify().ok
        else:
            assert_detected(cut, original, f"{name} cut to {length}", list(original))
    others = {n: d for n, d in content.items() if n != name}
    assert_detected(others, original, f"{name} removed", list(original))
