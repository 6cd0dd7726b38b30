"""Settings: one table, which the guide repeats; values with units; errors and warnings by name."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from shardkeep import settings
from shardkeep.settings import SETTINGS
from shardkeep.util.formatting import human_bytes, parse_bytes

GUIDE = Path(__file__).parents[1] / "docs" / "guide.md"


def default(setting) -> str:
    if setting.unit == "bytes":
        number, unit = human_bytes(int(setting.default)).split()
        return f"{float(number):g} {unit}"
    return f"{setting.default:,g} s" if setting.unit == "seconds" else f"{setting.default:g}"


def test_the_guide_lists_every_setting():
    rows = "".join(f"| `{s.variable}` | {default(s)} | {s.meaning} |\n" for s in SETTINGS)
    table = "| Variable | Default | Meaning |\n|---|---|---|\n" + rows
    assert table in GUIDE.read_text(encoding="utf-8"), f"docs/guide.md should hold:\n{table}"


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("65536", 65536),
        ("64KiB", 65536),
        ("64kib", 65536),
        ("64K", 65536),
        (" 64 MiB ", 64 << 20),
        ("1 GB", 10**9),
        ("1.5 GB", 1_500_000_000),
        ("1.5KiB", 1536),
        ("100B", 100),
        ("2TiB", 2 << 40),
    ],
)
def test_sizes_have_units(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "lots", "-1", "1iB", "64 MiBs", "1.5", "0.3KiB", "1 2"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(ValueError, match="number of bytes"):
        parse_bytes(text)


def test_values_are_read_at_the_time_of_use(monkeypatch):
    assert settings.read_gap_bytes() == 64 << 10
    for text, nbytes in (("1MiB", 1 << 20), ("1e6", 10**6), ("7", 7), ("2 GB", 2 * 10**9)):
        monkeypatch.setenv("SHARDKEEP_READ_GAP_BYTES", text)
        assert settings.read_gap_bytes() == nbytes
    monkeypatch.setenv("SHARDKEEP_DEADLINE_SECONDS", "2.5")
    assert settings.deadline_seconds() == 2.5
    monkeypatch.setenv("SHARDKEEP_READ_THREADS", "3")
    assert settings.read_threads() == 3


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.variable)
@pytest.mark.parametrize("text", ["", "many", "-1", "nan", "inf", "5 parsecs"])
def test_a_bad_value_is_refused_with_name_value_and_expectation(setting, text):
    with pytest.raises(ValueError) as caught:
        setting.parse(text)
    message = str(caught.value)
    assert message.startswith(f"{setting.variable} must be a ")
    assert f"number of {setting.unit}, {setting.least:g} or more (such as " in message
    assert message.endswith(f", not {text!r}")


def test_a_bad_value_is_refused_where_it_is_used(monkeypatch):
    monkeypatch.setenv("SHARDKEEP_WRITE_THREADS", "2.5")
    expected = r"SHARDKEEP_WRITE_THREADS must be a whole number of threads, 0 or more .*, not '2.5'"
    with pytest.raises(ValueError, match=expected):
        settings.write_threads()


def test_an_unknown_variable_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(settings, "_warned_of", set())
    monkeypatch.setenv("SHARDKEEP_READ_TREADS", "3")
    monkeypatch.setenv("SHARDKEEP_COLOUR", "red")
    with pytest.warns(UserWarning) as caught:
        settings.read_threads()
    messages = sorted(str(warning.message) for warning in caught)
    assert len(messages) == 2
    assert "SHARDKEEP_COLOUR is ignored" in messages[0] and "see Settings" in messages[0]
    assert "did you mean SHARDKEEP_READ_THREADS?" in messages[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings.read_threads()
