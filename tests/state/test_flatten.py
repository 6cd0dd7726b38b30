"""Flattening and merging of nested states, compared with torch's own flattening."""

from __future__ import annotations

from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkeep.errors import Conflict, FormatError, Mismatch
from shardkeep.plan.merging import merge
from shardkeep.state.flatten import MAX_DEPTH, Flat, flatten, get, put, unflatten
from shardkeep.types import Structure


class Tensor:
    """A stand-in for a tensor, equal only to itself."""

    def __repr__(self) -> str:
        return f"T{id(self) % 997}"


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def flat(state: Any) -> Flat:
    return flatten(state, is_tensor)


def values(flattened: Flat) -> dict[str, Any]:
    return {leaf.name: leaf.value for leaf in flattened.leaves}


def same(a: Any, b: Any) -> bool:
    """Return whether values are equal, including types of containers and keys, and the order."""
    if isinstance(a, Tensor):
        return a is b
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=False)
        return len(a) == len(b) and all(
            type(k) is type(m) and k == m and same(v, w) for (k, v), (m, w) in pairs
        )
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


PLAIN = st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=2)
LEAVES = st.builds(Tensor) | PLAIN | st.tuples(PLAIN, PLAIN) | st.just(())
KEYS = st.sampled_from(["a", "b", "c", 0, 1, -3, None, True, b"x", 1.5, (1, "y"), "é.f", ""])


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    mapping = st.dictionaries(KEYS, inner, max_size=4)
    return mapping | mapping.map(OrderedDict) | st.lists(inner, max_size=3)


NESTED = st.recursive(LEAVES, containers, max_leaves=12)
STATES = st.dictionaries(KEYS, NESTED, max_size=5)
STATES = STATES | STATES.map(OrderedDict)


def try_flat(state: Any) -> Flat | None:
    try:
        return flat(state)
    except Conflict as error:
        assert "under the name" in str(error)
        return None


@given(STATES)
def test_unflatten_gives_back_what_was_flattened(state: Any) -> None:
    flattened = try_flat(state)
    if flattened is not None:
        assert same(unflatten(flattened.structure, values(flattened)), state)


@given(STATES)
def test_every_leaf_is_at_its_path_and_can_be_set_there(state: Any) -> None:
    flattened = try_flat(state)
    for leaf in flattened.leaves if flattened else ():
        assert get(state, leaf.path) is leaf.value
        assert leaf.name == ".".join(map(str, leaf.path))
        new = Tensor()
        put(state, leaf.path, new)
        assert get(state, leaf.path) is new


@given(STATES)
def test_legacy_duplicates_are_the_outermost_containers_without_a_tensor(state: Any) -> None:
    flattened = try_flat(state)
    if flattened is None:
        return
    held = [leaf.path for leaf in flattened.leaves if is_tensor(leaf.value)]
    legacy_duplicates = {twin.path: twin for twin in flattened.legacy_duplicates}

    def bare(path: tuple[Any, ...]) -> bool:
        return path != () and not any(p[: len(path)] == path for p in held)

    names = [".".join(map(str, path)) for path in flattened.structure.containers if path]
    for path in flattened.structure.containers:
        name = ".".join(map(str, path))
        wanted = (
            bare(path)
            and not bare(path[:-1])
            and name not in flattened.structure.leaves
            and names.count(name) == 1
        )
        assert (path in legacy_duplicates) == wanted
        if wanted:
            assert legacy_duplicates[path].name == name
            assert same(legacy_duplicates[path].value, get(state, path))


@given(STATES)
def test_names_paths_and_leaves_are_those_of_torch(state: Any) -> None:
    torch = pytest.importorskip("torch")
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    marks: dict[int, Any] = {}

    def real(value: Any) -> Any:
        if isinstance(value, Tensor):
            return marks.setdefault(id(value), torch.zeros(()))
        if isinstance(value, dict):
            return type(value)((key, real(entry)) for key, entry in value.items())
        return [real(entry) for entry in value] if isinstance(value, list) else value

    made = real(state)
    try:
        theirs, paths = flatten_state_dict(made)
    except ValueError:
        with pytest.raises(Conflict):
            flatten(made, torch.is_tensor)
        return
    ours = flatten(made, torch.is_tensor)
    assert [leaf.name for leaf in ours.leaves] == list(theirs)
    for leaf in ours.leaves:
        assert leaf.value is theirs[leaf.name]
        typed = tuple(
            key if ours.structure.containers[leaf.path[:depth]] == "list" else str(key)
            for depth, key in enumerate(leaf.path)
        )
        assert typed == paths[leaf.name]


@pytest.mark.parametrize(
    ("state", "first", "second"),
    [
        ({0: 1, "0": 2}, "[0]", "['0']"),
        ({"a": {"b": 1}, "a.b": 2}, "['a']['b']", "['a.b']"),
        ({"a.b": 1, "a": {"b": 2}}, "['a.b']", "['a']['b']"),
        ({"a": [Tensor()], "a.0": 2}, "['a'][0]", "['a.0']"),
        ({None: 1, "x": 2, "None": 3}, "[None]", "['None']"),
    ],
)
def test_two_values_with_one_name_are_refused(state: Any, first: str, second: str) -> None:
    with pytest.raises(Conflict) as caught:
        flat(state)
    assert f"{first} and {second} would both be saved under the name" in str(caught.value)


def test_legacy_duplicates_are_what_old_readers_look_up() -> None:
    weight = Tensor()
    groups = [MappingProxyType({"lr": 0.1, "params": [0, 1]})]
    state = {
        "model": {"w": weight},
        "optim": {"state": {0: {"step": weight}}, "groups": groups, "hooks": {}},
        "rng": {"seed": 1, "cuda": OrderedDict(a=1)},
        "plain": [1, 2],
    }
    found = {twin.name: twin.value for twin in flat(state).legacy_duplicates}
    assert found == {
        "optim.groups": [{"lr": 0.1, "params": [0, 1]}],
        "optim.hooks": {},
        "rng": {"seed": 1, "cuda": OrderedDict(a=1)},
    }
    assert type(found["optim.groups"][0]) is dict
    assert type(found["rng"]["cuda"]) is OrderedDict


def test_a_name_in_use_gets_no_legacy_duplicate() -> None:
    weight = Tensor()
    state = {"a": {"b": {"c": 1}, "w": weight}, "a.b": weight, "d": {"e": {1: 1}, "w": weight}}
    assert [twin.name for twin in flat(state).legacy_duplicates] == ["d.e"]
    assert flat({"a": {"b": {"c": 1}, "w": weight}, "a.b": {"d": 1}}).legacy_duplicates == ()


def test_the_position_of_empty_containers_is_kept() -> None:
    state = OrderedDict(z={}, y=1, x={"u": {}, "v": OrderedDict()}, w=[{}, 2, {}], a={})
    flattened = flat(state)
    assert same(unflatten(flattened.structure, values(flattened)), state)
    assert list(values(flattened)) == ["y", "w.1"]


def test_an_empty_list_is_a_leaf() -> None:
    assert values(flat({"a": [], "b": [[], [[]]]})) == {"a": [], "b": [[], [[]]]}


@pytest.mark.parametrize("state", [[1], 1, None, "abc", {1}])
def test_a_state_is_a_mapping(state: Any) -> None:
    with pytest.raises(TypeError, match="a state is a mapping of names to values, not a"):
        flat(state)


@pytest.mark.parametrize("key", [object(), float("nan"), (1, object()), frozenset(), 1j])
def test_keys_of_other_types_are_refused(key: Any) -> None:
    with pytest.raises(Conflict, match=r"key .* of \['a'\] is a "):
        flat({"a": {key: 1}})


def test_cycles_are_refused() -> None:
    mapping: dict[str, Any] = {"x": 1}
    mapping["self"] = {"again": mapping}
    with pytest.raises(Conflict, match=r"\['m'\]\['self'\]\['again'\] holds itself"):
        flat({"m": mapping})
    plain: list[Any] = []
    plain.append([plain])
    with pytest.raises(Conflict, match=r"list inside \['l'\] holds itself"):
        flat({"l": plain})
    walked: list[Any] = [Tensor()]
    walked.append(walked)
    with pytest.raises(Conflict, match=r"\['l'\]\[1\] holds itself"):
        flat({"l": walked})


@pytest.mark.parametrize("wrap", [lambda x: {"a": x}, lambda x: [x], lambda x: [{"a": x}, [x]]])
def test_deep_nesting_is_refused(wrap: Any) -> None:
    state: Any = 1
    for _ in range(10_000):
        state = wrap(state)
    with pytest.raises(Conflict, match=f"more than {MAX_DEPTH} containers are nested"):
        flat({"s": state})


def test_shared_lists_are_searched_once() -> None:
    shared: list[Any] = [1]
    for _ in range(50):
        shared = [shared, shared]
    assert values(flat({"s": shared}))["s"] is shared


def test_errors_of_get_and_put_name_the_problem() -> None:
    state = {"a": [1], "t": (1, 2), "p": MappingProxyType({"k": 1})}
    put(state, ("a", 3), "x")
    assert state["a"] == [1, None, None, "x"]
    cases: list[tuple[Any, Any, str]] = [
        (get, ("b",), r"there is no \['b'\]"),
        (get, ("a", 9), r"there is no \['a'\]\[9\] in a list of 4"),
        (get, ("a", "0"), r"there is no \['a'\]\['0'\] in a list of 4"),
        (get, ("a", -1), r"there is no \['a'\]\[-1\]"),
        (get, ("t", 0), r"\['t'\] is a tuple, not a container"),
        (put, ("t", 0), r"\['t'\]\[0\] cannot be set: \['t'\] is a tuple"),
        (put, ("p", "k"), r"\['p'\]\['k'\] cannot be set: \['p'\] is a mappingproxy"),
        (put, ("b", "c"), r"there is no \['b'\]"),
        (put, ("a", 10**12), "is not a valid index of a list of 4"),
        (put, (), "the state itself"),
    ]
    for call, path, message in cases:
        with pytest.raises(Mismatch, match=message):
            call(state, path) if call is get else call(state, path, 0)


@pytest.mark.parametrize(
    ("leaves", "kinds", "message"),
    [
        ({"a": ("l", 10**12)}, {("l",): "list"}, "lack more than"),
        ({"a": ("l", "x")}, {("l",): "list"}, "not a valid index of a list"),
        ({"a": ("l", -1)}, {("l",): "list"}, "not a valid index of a list"),
        ({"a": ("l", 0), "b": ("l", 0)}, {("l",): "list"}, "two entries are at"),
        ({"a": ("x",), "b": ("x",)}, {}, "two entries are at"),
        ({"a": ("x",)}, {("x",): "dict"}, "two entries are at"),
        ({"a": ("x", "y")}, {}, "is not a container"),
        ({"a": ()}, {}, "which is that of the state itself"),
        ({}, {("x",): "set"}, "a container of unknown kind 'set'"),
        ({}, {("x",) * 5000: "dict"}, "is not a container|more than"),
        ({"a": ("x",) * 5000}, {("x",) * n: "dict" for n in range(1, 500)}, "more than 64"),
    ],
)
def test_a_hostile_structure_is_refused(leaves: Any, kinds: Any, message: str) -> None:
    structure = Structure(leaves, {(): "dict", **kinds})
    with pytest.raises(FormatError, match=message):
        unflatten(structure, lambda name: name)


def test_missing_entries_of_a_list_become_none() -> None:
    structure = Structure({"b": ("l", 3), "a": ("l", 1)}, {(): "dict", ("l",): "list"})
    assert unflatten(structure, str.upper) == {"l": [None, "A", None, "B"]}


def subset(state: Any, keep: Any) -> Any:
    """Return the state without some entries of its mappings, as on a rank of a pipeline."""
    if isinstance(state, dict):
        return type(state)((k, subset(v, keep)) for k, v in state.items() if keep())
    return [subset(entry, keep) for entry in state] if isinstance(state, list) else state


@given(STATES, st.data())
def test_merging_contains_the_leaves_of_all_ranks(state: Any, data: st.DataObject) -> None:
    if try_flat(state) is None:
        return

    def keep() -> bool:
        return data.draw(st.integers(0, 3)) > 0

    ranks = [flat(subset(state, keep)) for _ in range(3)]
    try:
        merged = merge([rank.structure for rank in ranks])
    except Conflict as error:
        # A list may lose the entries because of which it was flattened, and be a leaf on one rank.
        assert "but a" in str(error)
        return
    names = {name for rank in ranks for name in rank.structure.leaves}
    assert set(merged.leaves) == names
    assert set(merged.containers) == {p for rank in ranks for p in rank.structure.containers}
    together = flat(unflatten(merged, {name: Tensor() for name in names}))
    assert set(together.structure.containers) <= set(merged.containers) | {()}
    assert merge([merged, merged]) == merged
    assert merge([ranks[0].structure]) == ranks[0].structure


@given(STATES)
def test_merging_a_state_with_itself_changes_nothing(state: Any) -> None:
    flattened = try_flat(state)
    if flattened is not None:
        merged = merge([flattened.structure] * 3)
        assert merged == flattened.structure
        assert list(merged.leaves) == list(flattened.structure.leaves)
        assert same(unflatten(merged, values(flattened)), state)


def test_merge_keeps_the_order_of_first_appearance() -> None:
    first, second = (
        flat({"a": {"x": 1}, "e": {}, "b": 1}),
        flat({"b": 1, "a": {"y": 2}, "e": {"f": 1}}),
    )
    merged = merge([first.structure, second.structure])
    assert unflatten(merged, lambda name: name) == {
        "a": {"x": "a.x", "y": "a.y"},
        "e": {"f": "e.f"},
        "b": "b",
    }
    assert list(merged.leaves) == ["a.x", "a.y", "e.f", "b"]


@pytest.mark.parametrize(
    ("here", "there", "message"),
    [
        ({"a": 1}, {"a": {"b": 1}}, r"\['a'\] is a value on rank 0, but a dict on rank 1"),
        ({"a": {"b": 1}}, {"a": 1}, r"\['a'\] is a dict on rank 0, but a value on rank 1"),
        ({"a": {}}, {"a": 1}, r"\['a'\] is a dict on rank 0, but a value on rank 1"),
        ({"a": 1}, {"a": {}}, r"\['a'\] is a value on rank 0, but a dict on rank 1"),
        ({"a": {0: 1}}, {"a": [{}]}, r"\['a'\] is a dict on rank 0, but a list on rank 1"),
        ({0: 1}, {"0": 1}, r"\[0\] and \['0'\] \(rank 1\) would both be saved under the name '0'"),
        ({1: 1}, {True: 1}, r"'1' and 'True' \(rank 1\) have the same path"),
    ],
)
def test_contradictory_ranks_are_refused(here: Any, there: Any, message: str) -> None:
    with pytest.raises(Conflict, match=message):
        merge([flat(here).structure, flat(there).structure])


@given(STATES)
def test_a_structure_knows_the_containers_around_its_paths(state: Any) -> None:
    flattened = try_flat(state)
    if flattened is None:
        return
    structure = flattened.structure
    assert structure.parents is not None
    containers, leaves = list(structure.containers), list(structure.leaves.values())
    assert [containers[row] for row in structure.parents[0]] == [p[:-1] for p in containers[1:]]
    assert [containers[row] for row in structure.parents[1]] == [p[:-1] for p in leaves]


@given(STATES)
def test_ranks_with_the_same_state_share_its_structure(state: Any) -> None:
    one, other = try_flat(state), try_flat(state)
    if one is not None and other is not None:
        assert merge([one.structure, one.structure]) is one.structure
        merged = merge([one.structure, other.structure])
        assert merged == one.structure
        assert list(merged.leaves) == list(one.structure.leaves)
        assert list(merged.containers) == list(one.structure.containers)
