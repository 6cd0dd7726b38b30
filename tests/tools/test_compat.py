"""The compatibility checks find what is planted, and this torch reads what Shardkeep writes."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path

import pytest
from compat import comparison

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from compat import __main__ as command
from compat import page
from compat.directions import NOT_THERE, judge, judge_case, not_written
from compat.read_golden import without
from compat.results import Direction, Outcome, Result, store, stored

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scripts(monkeypatch):
    """The scripts that run inside other releases, as modules: (states, read_with_torch)."""
    monkeypatch.syspath_prepend(str(ROOT / "compat"))
    states = importlib.import_module("states")
    reading = importlib.import_module("read_with_torch")
    monkeypatch.setattr(reading.golden, "save", states.save)
    return states, reading


@pytest.fixture
def templates(scripts):
    return importlib.import_module("templates")


@pytest.fixture
def written(scripts, tmp_path, monkeypatch):
    """A handful of states that Shardkeep saved, as folders of cases."""
    states, reading = scripts
    monkeypatch.chdir(tmp_path)
    names = ("nested", "dtype.bfloat16", "int_keys", "containers", "simulated_ranks", "tied")
    for name in names:
        outcome = reading.golden.attempt(states.CASES[name], tmp_path, 3, 0)
        assert outcome["ok"], outcome
    return {name: tmp_path / name for name in names}


def node(reading, state):
    return json.loads(json.dumps(reading.describe(state)))


STATE = {
    "w": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "values": {"i": 1, "nan": float("nan"), "zero": 0.0, "t": (1, None), "s": "x"},
    "keys": {0: "zero", "1": "one"},
    "list": [torch.ones(2), {"x": True}, []],
    "nothing": {},
}


def changed(path, value):
    state = copy.deepcopy(STATE)
    *outer, last = path
    inner = state
    for key in outer:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return state


def one_byte(tensor):
    bits = tensor.clone().view(torch.uint8)
    bits[0, 0] ^= 1
    return bits.view(torch.float32)


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("w",), one_byte(STATE["w"]), "['w']"),
        (("w",), STATE["w"].double(), "['w']"),
        (("w",), STATE["w"].reshape(3, 2), "['w']"),
        (("w",), None, "['w']"),
        (("values", "i"), True, "['values']['i']"),
        (("values", "i"), 1.0, "['values']['i']"),
        (("values", "zero"), -0.0, "['values']['zero']"),
        (("values", "nan"), 0.0, "['values']['nan']"),
        (("values", "t"), [1, None], "['values']['t']"),
        (("values", "t"), (1, 0), "['values']['t']"),
        (("values", "s"), None, "['values']['s']"),
        (("list", 1, "x"), False, "['list'][1]['x']"),
        (("list",), [torch.ones(2), {"x": True}], "['list']"),
        (("list", 2), (), "['list'][2]"),
        (("nothing",), None, "['nothing']"),
        (("more",), 1, 'value": "more"'),
    ],
)
def test_a_planted_difference_is_found(scripts, path, value, where):
    _, reading = scripts
    expected = node(reading, STATE)
    assert comparison.compare(expected, node(reading, STATE)) == comparison.Comparison(11, ())
    (found,) = comparison.compare(expected, node(reading, changed(path, value))).differences
    assert where in found.path


def test_the_type_of_a_key_counts_unless_names_are_all_there_is(scripts):
    _, reading = scripts
    text = changed(("keys",), {"0": "zero", "1": "one"})
    expected, actual = node(reading, STATE), node(reading, text)
    assert len(comparison.compare(expected, actual).differences) == 2
    assert not comparison.compare(expected, actual, text_keys=True).differences
    other = node(reading, changed(("keys", 0), "none"))
    assert len(comparison.compare(expected, other, text_keys=True).differences) == 1


@pytest.mark.smoke
def test_this_torch_reads_what_shardkeep_writes(scripts, tmp_path, monkeypatch):
    """All states of one process; `make compat` has other releases read them, and those of more."""
    states, reading = scripts
    monkeypatch.chdir(tmp_path)
    names = []
    for name in [name for name, case in states.CASES.items() if case.ranks == 1]:
        outcome = reading.golden.attempt(states.CASES[name], tmp_path, 3, 0)
        if outcome.get("why", "").startswith(NOT_THERE):
            continue
        assert outcome["ok"], (name, outcome)
        names.append(name)
        folder = tmp_path / name
        reading.answer(tmp_path / "load", name, reading.read_case(folder))
        reading.answer(tmp_path / "torch_save", name, reading.read_through_torch_save(folder))
    plain = judge("load", tmp_path / "load", tmp_path)
    assert plain.differences == ()
    absent = [one for one in plain.outcomes if one.absent]
    assert plain.cases == len(names) - len(absent) and plain.equal == plain.leaves > 700, absent
    assert judge("torch_save", tmp_path / "torch_save", tmp_path, text_keys=True).differences == ()


def test_a_flipped_byte_of_the_file_is_found(scripts, written, tmp_path):
    _, reading = scripts
    folder = written["dtype.bfloat16"]
    expected = json.loads((folder / "expected.json").read_text())
    ((_, matrix),) = [item for item in expected["items"] if item[0]["value"] == "matrix"]
    payload = comparison.base64.b64decode(matrix["data"])
    (file,) = (folder / "ckpt").glob("*.distcp")
    data = bytearray(file.read_bytes())
    at = data.index(payload)
    data[at + 3] ^= 0x10
    file.write_bytes(data)
    reading.answer(tmp_path, "answer", reading.read_case(folder))
    outcome = judge_case("dtype.bfloat16", tmp_path / "answer.json")
    assert [line.split(":")[0] for line in outcome.differences] == ["['matrix']"]


def test_a_load_that_forgets_leaves_is_found(scripts, written, tmp_path):
    _, reading = scripts
    answer = reading.read_case(written["nested"], None, lambda state, path, flatten: state)
    reading.answer(tmp_path, "answer", answer)
    outcome = judge_case("nested", tmp_path / "answer.json")
    templates_own = 4  # empty containers, which are in the template already, and no tensor
    assert outcome.leaves - templates_own <= len(outcome.differences) <= outcome.leaves


def test_objects_beside_their_integer_keys_are_put_there(templates):
    sentinel = templates.SENTINEL
    blank = {"d": {0: {"x": sentinel, "t": "tensor"}, "a": sentinel}, "l": [{1: sentinel}]}
    loaded = copy.deepcopy(blank)
    loaded["d"]["a"] = "A"
    loaded["d"]["0"] = {"x": 5}
    loaded["l"][0]["1"] = None
    settled, moved = templates.settle(blank, loaded)
    assert settled == {"d": {0: {"x": 5, "t": "tensor"}, "a": "A"}, "l": [{1: None}]}
    assert moved == 2
    # What did not come stays what it was, and a stray key stays where it is.
    assert templates.settle(blank, blank) == (blank, 0)
    assert templates.settle({"a": 1}, {"a": 1, "0": 2}) == ({"a": 1, "0": 2}, 0)


def test_a_reader_that_ends_or_fails_is_a_difference(tmp_path):
    assert judge_case("gone", tmp_path / "gone.json").differences == (": no answer",)
    leaf = {"kind": "value", "type": "int", "value": 1}
    failed = {"why": "KeyError: 'x'", "expected": {"kind": "list", "items": [leaf, leaf]}}
    (tmp_path / "failed.json").write_text(json.dumps(failed))
    assert judge_case("failed", tmp_path / "failed.json") == Outcome(
        "failed", 2, (": KeyError: 'x'",)
    )


def test_a_state_that_could_not_be_saved_is_a_difference_unless_by_nature():
    reasons = {"a": "TypeError: broken", "b": "NotInThisReleaseError: no torch.int1"}
    broken, absent = not_written(reasons)
    assert broken.differences == (": not saved: TypeError: broken",)
    assert (absent.differences, absent.absent) == ((), "no torch.int1")


def test_a_name_is_taken_out_of_an_expectation(scripts):
    _, reading = scripts
    pruned, removed = without(node(reading, STATE), "values.i")
    assert removed == 1
    assert (
        comparison.compare(node(reading, changed(("values", "i"), None)), pruned).differences == ()
    )
    assert without(node(reading, STATE), "values.none")[1] == 0


def result(release, *outcomes):
    directions = (Direction("load", outcomes), Direction("open", outcomes))
    return Result(release, "3.11.1", "2.0.0", "2.13.0", "2026-01-02", 7, 1.0, directions)


def test_the_page_shows_counts_differences_and_reasons(tmp_path):
    fine = Outcome("nested", 1200)
    absent = Outcome("dtype.uint16", absent="no torch.uint16")
    wrong = Outcome("shapes", 9, ("['a']: missing",))
    for one in (result("2.10.0", fine), result("2.2.2", fine, absent), result("2.3.1", wrong)):
        store(one, tmp_path)
    shown = page.text(stored(tmp_path))
    rows = [line.split(" | ")[:2] for line in shown.splitlines() if line.startswith("| 2.")]
    assert rows[:3] == [
        ["| 2.2.2", "1,200 / 1,200 (1)"],
        ["| 2.3.1", "**8 / 9 (1)**"],
        ["| 2.10.0", "1,200 / 1,200 (1)"],
    ]
    assert "| it loads | no such dtype | `uint16` | 2.2 |" in shown
    assert "- 2.3.1, 1 process: `shapes['a']: missing`" in shown
    assert "**2 different**" in shown


@pytest.mark.parametrize(("outcome", "code"), [(Outcome("a", 1), 0), (Outcome("a", 1, ("x",)), 1)])
def test_the_exit_code_tells_whether_anything_differs(monkeypatch, tmp_path, outcome, code):
    monkeypatch.setattr(command, "write_states", lambda *_: {})
    monkeypatch.setattr(command, "environment", lambda *_, **__: _Nothing())
    monkeypatch.setattr(command, "check", lambda *_: result("2.3.1", outcome))
    monkeypatch.setattr(command, "store", lambda _: None)
    monkeypatch.setattr("sys.argv", ["compat", "2.3.1"])
    assert command.main() == code


class _Nothing:
    def __enter__(self):
        return None

    def __exit__(self, *_):
        return None
