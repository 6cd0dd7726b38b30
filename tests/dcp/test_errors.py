"""Failures are caught as torch's exception, as the class of the cause, and as an `Exception`."""

from __future__ import annotations

import pickle
import traceback

import pytest

torch = pytest.importorskip("torch")

import shardkeep as sk
import shardkeep.dcp as dcp
from shardkeep import errors
from shardkeep.dcp.bridge import trust
from shardkeep.dcp.bridge.errors import as_torch, failed, portable, together, wrapped
from support import dcp_planners
from support.dcp_planners import LoadPlanner, SavePlanner

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:.*torch.distributed is"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]
CheckpointException = dcp.CheckpointException


class Odd(Exception):
    """An exception whose arguments differ from its attributes."""

    def __init__(self, code: int, *, where: str) -> None:
        super().__init__(f"{where}: {code}")
        self.code, self.where = code, where


class Disk(sk.ShardkeepError, OSError):
    """An exception of two hierarchies."""


class Final(Exception):
    """An exception that does not allow subclasses."""

    def __init_subclass__(cls) -> None:
        raise RuntimeError("no")


class Slots(ValueError):
    """An exception without a `__dict__`."""

    __slots__ = ("place",)


def unicode_error() -> UnicodeDecodeError:
    try:
        b"\xff".decode()
    except UnicodeDecodeError as error:
        return error
    raise AssertionError


CAUSES = [
    sk.Mismatch("m", sk.LoadReport("p")),
    sk.Conflict("twice"),
    sk.Damaged("cut", file="f", name="w", block=3),
    sk.FormatError("bad", file="f", place="p"),
    sk.Untrusted("o", ("m.C",)),
    sk.RankFailed(2, "host", "write", "p", "Traceback\nKeyError: 'x'"),
    sk.AlreadyExists("there"),
    sk.NotACheckpoint("empty"),
    KeyError("w"),
    ValueError("v"),
    RuntimeError(),
    FileNotFoundError(2, "No such file", "some/file"),
    OSError(28, "No space left on device"),
    OSError("only text"),
    Disk(5, "I/O", "disk"),
    unicode_error(),
    ImportError("i", name="mod", path="pa"),
    StopIteration(4),
    Odd(3, where="here"),
    Slots("s"),
]
ATTRIBUTES = """
    report what file name block place classes rank host phase path cause errno filename strerror
    encoding object start end reason value code where
""".split()


def attributes(error: BaseException) -> dict:
    return {name: getattr(error, name) for name in ATTRIBUTES if hasattr(error, name)}


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize("again", [False, True], ids=["raised", "pickled"])
@pytest.mark.parametrize("cause", CAUSES, ids=lambda error: f"{type(error).__name__}")
def test_an_error_is_of_torchs_class_and_of_its_own(cause, again):
    before = (type(cause), cause.args, attributes(cause))
    with pytest.raises(type(cause)) as caught, as_torch(3):
        raise cause
    error = caught.value
    if again and type(cause) is not Odd:  # The exception itself can't be pickled.
        error = pickle.loads(pickle.dumps(error))
    assert isinstance(error, CheckpointException)
    assert isinstance(error, Exception)
    assert (type(error).__name__, type(error).__module__) == (
        type(cause).__name__,
        type(cause).__module__,
    )
    if type(cause) is not sk.Untrusted:
        assert error.args == before[1]
    assert attributes(error) == {**attributes(cause), **before[2]} == before[2]
    where = 2 if isinstance(cause, sk.RankFailed) else 3
    ((rank, (inner, trace)),) = error.failures.items()
    assert (rank, type(inner)) == (where, before[0])
    assert "test_an_error_is_of_torchs_class_and_of_its_own" in [frame.name for frame in trace]
    last = traceback.format_exception_only(type(cause), cause)[-1].strip()
    assert last in str(error)
    assert "test_errors.py" in str(error)


@pytest.mark.parametrize("again", [False, True], ids=["raised", "pickled"])
def test_an_error_whose_class_allows_no_subclass_is_an_exception(again):
    with pytest.raises(CheckpointException) as caught, as_torch(0):
        raise Final("why")
    error = caught.value
    if again:
        error = pickle.loads(pickle.dumps(error))
    assert isinstance(error, Exception)
    assert type(error).__name__ == "CheckpointException"
    assert "Final: why" in str(error)


def test_an_error_that_cannot_be_pickled_is_sent_as_text():
    for cause in (Odd(3, where="here"), KeyError(lambda: 0)):
        error = pickle.loads(pickle.dumps(failed(cause, {1: wrapped(raised(cause))})))
        assert isinstance(error, CheckpointException)
        assert isinstance(error, RuntimeError)
        assert f"{type(cause).__name__}: " in str(error)
    told = portable({1: wrapped(raised(Odd(3, where="here")))})
    assert repr(told[1][0]) == "RuntimeError('Odd: here: 3')"


def test_exits_and_torchs_own_exceptions_are_not_wrapped(tmp_path):
    with pytest.raises(KeyboardInterrupt) as stopped, as_torch(0):
        raise KeyboardInterrupt
    assert type(stopped.value) is KeyboardInterrupt
    plain = CheckpointException("m", {1: (KeyError("x"), traceback.StackSummary())})
    with pytest.raises(CheckpointException) as caught, as_torch(0):
        raise plain
    assert caught.value is plain


def test_an_exception_of_a_load_inside_is_not_wrapped_twice():
    inner = failed(sk.Conflict("c"), {0: wrapped(raised(sk.Conflict("c")))})
    outer = failed(inner, {4: wrapped(inner)})
    assert isinstance(outer, sk.Conflict)
    assert list(outer.failures) == [4]
    assert isinstance(pickle.loads(pickle.dumps(outer)), sk.Conflict)


def test_ranks_together():
    same = {rank: wrapped(raised(KeyError(rank))) for rank in (1, 2)}
    assert isinstance(together("plan", same), KeyError)
    assert together("plan", same).args == (1,)
    mixed = {**same, 3: wrapped(raised(sk.Conflict("c")))}
    error = together("plan", mixed)
    assert isinstance(error, Exception)
    assert not isinstance(error, KeyError | sk.Conflict)
    assert list(error.failures) == [1, 2, 3]
    assert error.args == ("3 ranks failed in phase 'plan'",)
    assert "KeyError: 2" in str(error)
    assert "Conflict: c" in str(error)


@pytest.mark.gloo
def test_on_real_ranks(gloo, tmp_path):
    alike = ([True, True], {0: "KeyError('w')", 1: "KeyError('w')"})
    mixed = ([True, False], {0: "OSError(28, 'full')", 1: "KeyError('w')"})
    assert gloo.run(dcp_planners.unlike, str(tmp_path), size=2) == [[alike, mixed]] * 2


@pytest.mark.parametrize("kind", errors.__all__)
def test_all_errors_can_be_pickled(kind):
    examples = {type(cause).__name__: cause for cause in CAUSES}
    cause = examples.get(kind, sk.ShardkeepError("text"))
    back = pickle.loads(pickle.dumps(cause))
    assert (type(back), back.args, str(back)) == (type(cause), cause.args, str(cause))
    assert vars(back) == vars(cause)


# --- Torch's words --------------------------------------------------------------------------------


@pytest.mark.parametrize("planner", [dcp.DefaultLoadPlanner, LoadPlanner], ids=["engine", "steps"])
def test_a_missing_name_has_torchs_message(tmp_path, planner):
    dcp.save({"a": {"w": torch.ones(2)}}, checkpoint_id=tmp_path)
    template = {"a": {"w": torch.zeros(2), "more": torch.zeros(1)}}
    with pytest.raises(
        Exception, match=r"Missing key in checkpoint state_dict: a\.more\."
    ) as caught:
        dcp.load(template, checkpoint_id=tmp_path, planner=planner())
    assert isinstance(caught.value, CheckpointException)


@pytest.mark.parametrize("planner", [dcp.DefaultLoadPlanner, LoadPlanner], ids=["engine", "steps"])
def test_another_size_has_torchs_message(tmp_path, planner):
    dcp.save({"w": torch.ones(2, 3), "n": torch.tensor(1)}, checkpoint_id=tmp_path)
    said = (
        r"Size mismatch between saved torch.Size\(\[2, 3\]\) and current: "
        r"torch.Size\(\[3\]\) for w"
    )
    template = {"w": torch.zeros(3), "n": torch.tensor(0)}
    with pytest.raises(Exception, match=said) as caught:
        dcp.load(template, checkpoint_id=tmp_path, planner=planner())
    assert isinstance(caught.value, CheckpointException)


def test_a_message_lists_a_limited_number_of_names(tmp_path):
    dcp.save({"w": 1}, checkpoint_id=tmp_path)
    with pytest.raises(sk.Mismatch) as caught:
        dcp.load({f"n{n}": 1 for n in range(500)}, checkpoint_id=tmp_path)
    assert str(caught.value).count("Missing key in checkpoint state_dict") == 40
    assert len(caught.value.report.missing) == 500


# --- Trust ----------------------------------------------------------------------------------------


class Own:
    """A class of the user."""

    def __init__(self, n: int) -> None:
        self.n = n

    class Inner:
        """A class inside the class of the user."""

        n = 2


def function(n: int) -> Own:
    """Return an object, as a function that a pickle may call."""
    return Own(n)


NAME = f"{__name__}.Own"


@pytest.fixture
def safe_globals():
    """Restore torch's list of safe globals after a test."""
    before = torch.serialization.get_safe_globals()
    yield torch.serialization
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.mark.parametrize("planner", [dcp.DefaultLoadPlanner, LoadPlanner], ids=["engine", "steps"])
def test_the_line_that_trusts_a_class(tmp_path, planner, safe_globals):
    dcp.save({"own": Own(3), "n": 1}, checkpoint_id=tmp_path, planner=SavePlanner())
    loaded = {"own": None, "n": 0}
    with pytest.raises(sk.Untrusted) as caught:
        dcp.load(loaded, checkpoint_id=tmp_path, planner=planner())
    assert isinstance(caught.value, CheckpointException)
    line = f"torch.serialization.add_safe_globals([{NAME}])"
    said = f"holds classes that are not trusted: {NAME}; if you trust this checkpoint's author"
    assert str(caught.value).endswith(f"object 'own' {said} with them, call {line}\n")
    assert caught.value.classes == (NAME,)
    assert loaded == {"own": None, "n": 0}
    exec(line.replace(NAME, "Own"), {"torch": torch, "Own": Own})
    dcp.load(loaded, checkpoint_id=tmp_path, planner=planner())
    assert (type(loaded["own"]), loaded["own"].n, loaded["n"]) == (Own, 3, 1)


def test_the_engines_own_message_is_kept(tmp_path):
    sk.save({"own": Own(3)}, tmp_path)
    with pytest.raises(sk.Untrusted, match=rf'pass trust=\["{NAME}"\]$'):
        sk.load({"own": None}, tmp_path)


def test_trust_can_be_limited_to_a_block(tmp_path):
    if not hasattr(torch.serialization, "safe_globals"):
        pytest.skip("this torch has no such context")
    dcp.save({"own": Own(3)}, checkpoint_id=tmp_path)
    loaded = {"own": None}
    with torch.serialization.safe_globals([Own]):
        dcp.load(loaded, checkpoint_id=tmp_path)
    assert loaded["own"].n == 3
    with pytest.raises(sk.Untrusted):
        dcp.load(loaded, checkpoint_id=tmp_path)


def test_what_may_be_trusted(safe_globals):
    safe_globals.clear_safe_globals()
    assert trust.trusted() == ()
    safe_globals.add_safe_globals([Own, Own.Inner, function, complex, torch.Size])
    wanted = {NAME, f"{NAME}.Inner", f"{__name__}.function", "builtins.complex", "torch.Size"}
    assert set(trust.trusted()) == wanted


def test_a_class_under_the_name_in_the_file(monkeypatch):
    entries = [(Own, "elsewhere.Own"), Own]
    monkeypatch.setattr(torch.serialization, "get_safe_globals", lambda: entries)
    assert trust.trusted() == ("elsewhere.Own", NAME)


def test_releases_without_safe_globals_trust_nothing(monkeypatch, tmp_path):
    monkeypatch.delattr(torch.serialization, "get_safe_globals")
    assert trust.trusted() == ()
    dcp.save({"own": Own(3)}, checkpoint_id=tmp_path)
    with pytest.raises(sk.Untrusted):
        dcp.load({"own": None}, checkpoint_id=tmp_path)
