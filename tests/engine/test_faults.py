"""If storage fails, nothing is committed or left behind, and the old checkpoint still loads."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux"),
]

import shardkeep as sk
from support import injected, injected_store
from support.injected import CALLS, Saver, outcome
from support.phases import PHASES, happening


def state(seed: float) -> dict:
    return {"w": torch.arange(200_000.0) + seed, "n": seed}


def save(work: str, path, seed: float):
    if work == "save":
        return sk.save(state(seed), path, overwrite=True)
    return sk.async_save(state(seed), path, overwrite=True).result(60)


def there(path) -> tuple[float, set[str]]:
    ckpt = sk.open(path)
    assert ckpt.verify().ok
    assert (ckpt.read("w") == state(ckpt["n"].value)["w"].numpy()).all()
    return ckpt["n"].value, {file.name for file in Path(path).iterdir()}


def open_files() -> int:
    gc.collect()  # files opened by earlier looks at a checkpoint
    return len(list(Path("/proc/self/fd").iterdir()))


# --- single system calls --------------------------------------------------------------------------

SOME = [
    ("over", "write", "openat", "data", "EACCES", "refused"),
    ("over", "sync", "ftruncate", "data", "EIO", "refused"),
    ("over", "assign", "fsync", "folder above", "EIO", "refused"),
    ("over", "assign", "rename", "new lease", "EACCES", "refused"),
    ("over", "commit", "rename", "new .metadata", "EROFS", "refused"),
    ("new", "commit", "renameat2", "new .metadata", "EIO", "refused"),
    ("over", "after", "unlink", "lease", "EIO", "kept"),
    ("new", "assign", "mkdir", "folder", "ENOSPC", "refused"),
    ("async", "write", "pwritev2", "data", "ENOSPC", "refused"),
    ("manager", "commit", "fsync", "folder", "EIO", "new"),
    ("manager", "after", "unlink", "old data", "EIO", "kept"),
]


def test_errors_of_system_calls_leave_the_old_checkpoint(tmp_path):
    """This tries a selection of the calls; `make faults` tries all of them."""
    if not injected.works(tmp_path):
        pytest.skip("needs strace, and the right to trace")
    calls = {(one.kind, one.phase, one.name, one.of): one for one in CALLS}
    with Saver() as saver:
        for number, (*where, error, expected) in enumerate(SOME, 1):
            found = outcome(saver, tmp_path, calls[tuple(where)], error, number)
            assert found == expected, where


# --- single operations of a store ----------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def on_page(kind: str, error: str) -> set[tuple[str, ...]]:
    """Return the rows of the page about this kind of save and this error."""
    at = 5 + injected_store.ERRORS.index(error)
    table = PAGE.read_text().partition("| Error comes |")[2].partition("\n\n")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {
        (*line[:4], when, line[at])
        for line in lines
        if line[0] == kind
        for when in line[4].split(", ")
    }


@pytest.mark.parametrize("kind", injected_store.KINDS)
def test_errors_of_a_store_have_the_documented_effect(kind):
    """This tries one of the errors; `make faults` tries all of them and writes the page."""
    found = {
        (*row[:4], when, row[5])
        for row in injected_store.rows(kind, ["EIO"])
        for when in row[4].split(", ")
    }
    assert len(found) >= 25
    assert found == on_page(kind, "EIO")


# --- a full, a read-only, a vanished folder -------------------------------------------------------

FULL = """
import os, sys
import torch, shardkeep as sk
import gc; gc.disable()
folder, size = sys.argv[1], int(sys.argv[2])
open_files = lambda: len(os.listdir("/proc/self/fd"))
sk.save({"n": 1, "w": torch.ones(1000)}, f"{folder}/ckpt")
before, files = sorted(os.listdir(f"{folder}/ckpt")), open_files()
for work in ("save", "async"):
    big = {"n": 2, "w": torch.ones(size)}
    try:
        if work == "save":
            sk.save(big, f"{folder}/ckpt", overwrite=True)
        else:
            sk.async_save(big, f"{folder}/ckpt", overwrite=True).result(60)
    except OSError as error:
        print(error.errno, "distcp" in str(error.filename))
    assert sk.open(f"{folder}/ckpt").verify().ok and sk.open(f"{folder}/ckpt")["n"].value == 1
    assert sorted(os.listdir(f"{folder}/ckpt")) == before
    assert open_files() == files
    sk.save({"n": 1, "w": torch.ones(1000)}, f"{folder}/ckpt", overwrite=True)
    before = sorted(os.listdir(f"{folder}/ckpt"))
"""


def run(command: list[str]) -> str:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_file_system(tmp_path):
    mount = f"mount -t tmpfs -o size=4m none {tmp_path}"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*unshare, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount in a namespace of its own")
    program = f"{mount} && exec {sys.executable} -c '{FULL}' {tmp_path} {2 << 20}"
    assert run([*unshare, program]) == f"{errno.ENOSPC} True\n" * 2


def test_a_limit_on_the_size_of_files(tmp_path):
    """RLIMIT_FSIZE makes writes fail with EFBIG, as quotas of some systems do."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    command = [sys.executable, "-c", limited + FULL, str(tmp_path), str(2 << 20)]
    assert run(command) == f"{errno.EFBIG} True\n" * 2


def test_a_folder_without_permission_to_write(tmp_path):
    folder = tmp_path / "run"
    sk.save(state(1), folder / "ckpt")
    before = there(folder / "ckpt")
    program = (
        "import os, sys, torch, shardkeep as sk\n"
        "sk.save({'n': 2}, sys.argv[1] + '.other')\n"
        "os.getuid() or os.seteuid(65534)\n"
        "try:\n"
        "    sk.save({'n': 2}, sys.argv[1], overwrite=True)\n"
        "except PermissionError as error:\n"
        "    print(error.filename.startswith(sys.argv[1]))\n"
    )
    for path in (folder, *list(tmp_path.parents)[:2], tmp_path):
        path.chmod(0o755)
    (folder / "ckpt").chmod(0o555)
    try:
        if not _others_can_enter(folder):
            pytest.skip("another user can't reach the temporary folder")
        assert run([sys.executable, "-c", program, str(folder / "ckpt")]) == "True\n"
    finally:
        (folder / "ckpt").chmod(0o755)
    assert there(folder / "ckpt") == before


def _others_can_enter(folder: Path) -> bool:
    return bool(os.getuid()) or all(one.stat().st_mode & 0o001 for one in folder.parents)


@pytest.mark.parametrize("work", ["save", "async_save"])
@pytest.mark.parametrize("phase", ["write", "sync", "report"])
def test_a_folder_that_was_removed_is_not_created_again_without_its_data(tmp_path, work, phase):
    path, away = tmp_path / "ckpt", tmp_path / "away"
    sk.save(state(1), path)
    files = open_files()
    with happening(phase, 0, lambda: path.exists() and path.rename(away)):
        # Before the first file is written, the folder is created again. But the checkpoint that was
        # to be replaced is gone, so the save must not commit.
        refusals = sk.Replaced if phase == "write" else (sk.NotACheckpoint, FileNotFoundError)
        with pytest.raises(refusals):
            save(work, path, 2.0)
        assert not (path / ".metadata").exists()
    assert open_files() == files
    save(work, path, 3.0)
    assert there(path)[0] == 3.0


# --- Ctrl-C ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES["save"])
def test_an_interrupted_save_leaves_nothing(tmp_path, phase):
    path = tmp_path / "ckpt"
    sk.save(state(1), path)
    before, files, threads = there(path), open_files(), threading.active_count()
    interrupt = happening(phase, 0, lambda: os.kill(os.getpid(), signal.SIGINT))
    with interrupt, pytest.raises(KeyboardInterrupt):
        sk.save(state(2), path, overwrite=True)
    assert there(path) == before
    assert (open_files(), threading.active_count()) == (files, threads)
    sk.save(state(3), path, overwrite=True)
    assert there(path)[0] == 3


def test_a_save_interrupted_while_it_writes_leaves_nothing(tmp_path):
    path = tmp_path / "ckpt"
    sk.save(state(1), path)
    before, files, threads = there(path), open_files(), threading.active_count()

    def progress(phase: str, done: int, total: int) -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        big = {"w": torch.ones(8 << 20), "n": 2}
        sk.save(big, path, overwrite=True, max_host_memory=4 << 20, progress=progress)
    assert there(path) == before
    assert (open_files(), threading.active_count()) == (files, threads)
    sk.save(state(3), path, overwrite=True)
    assert there(path)[0] == 3


INTERRUPTED = """
import gc, os, random, signal, sys, threading, time
import torch, shardkeep as sk

path, rounds = sys.argv[1], int(sys.argv[2])
state = lambda n: {"w": torch.full((100_000,), float(n)), "set": {1, n}, "n": n}
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
lost = []
sys.unraisablehook = lambda one: lost.append(f"{one.object!r}: {one.exc_value!r}")
begin = time.monotonic()
for n in range(6):
    sk.save(state(n), path, overwrite=True)
    begin = time.monotonic() if n == 0 else begin
usual, pick = (time.monotonic() - begin) / 5, random.Random(7)
gc.collect()
whole, files = len(os.listdir(path)), len(os.listdir("/proc/self/fd"))
raised = 0

def interrupt(moment, over):
    time.sleep(moment)
    if not over.is_set():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

for n in range(10, 10 + rounds):
    over = threading.Event()
    other = threading.Thread(target=interrupt, args=(pick.uniform(0, usual), over))
    finished = False
    try:
        other.start()
        sk.save(state(n), path, overwrite=True)
        finished = True
        over.set()
        other.join()
        time.sleep(0)
    except KeyboardInterrupt:
        raised += 1
        over.set()
        other.join()
    found = sk.open(path)
    assert found.verify().ok
    assert (found.read("w") == float(found["n"].value)).all()
    assert found["n"].value == n or not finished
    del found
    sk.save(state(n), path, overwrite=True)
    left = [name for name in os.listdir(path) if not name.startswith(".lease_")]
    assert len(left) == whole, sorted(left)  # this process lives: so may a save of its
gc.collect()
lost = [one for one in lost if "shardkeep" in one]
print(raised > rounds // 4, len(os.listdir("/proc/self/fd")) - files, lost)
"""


def test_an_interrupt_at_any_moment_leaks_no_descriptor_and_no_file(tmp_path):
    program = [sys.executable, "-c", INTERRUPTED, str(tmp_path / "ckpt"), "40"]
    assert run(program) == "True 0 []\n"
