"""Typed reading of fields: each wrong value is one line that names file, field, value and what is allowed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleb.errors import ConfigError, LayerMapError, ModelError
from sleb.fields import Fields, read_json, shown

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(3, 3), (3.0, 3), (0, None), (9, None), (True, None), ("3", None), (3.5, None), ([], None)],
)
def test_an_integer_in_its_range(value: Any, wanted: int | None) -> None:
    fields = Fields({"heads": value}, "config.json")
    if wanted is not None:
        assert fields.integer("heads", 1, 8) == wanted
    else:
        message = f"config.json: heads is {json.dumps(value)}; it must be an integer from 1 to 8"
        with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
            fields.integer("heads", 1, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, "4.0", True, -1, 0, {}])
def test_a_number_is_finite_and_in_its_range(value: Any) -> None:
    with pytest.raises(ModelError, match=r"^c: factor is .*; it must be a number above 0 up to 100$"):
        Fields({"factor": value}, "c").number("factor", 0, 100, above=True)
    assert Fields({"factor": 4}, "c").number("factor", 0, 100, above=True) == 4.0


def test_absent_and_null_fields_have_the_default_or_are_missing() -> None:
    fields = Fields({"a": None}, "map.json", LayerMapError)
    for name, found in (("a", "null"), ("b", "missing")):
        assert fields.boolean(name, default=None) is None
        assert name not in fields
        with pytest.raises(LayerMapError, match=rf"^map.json: {name} is {found}; it must be a string$"):
            fields.string(name)


def test_a_field_of_an_inner_object_is_named_with_both() -> None:
    inner = Fields({"rope": {"type": "x"}}, "config.json").object("rope")
    with pytest.raises(ModelError, match=r'^config.json: rope: type is "x"; it must be one of linear, yarn$'):
        inner.string("type", ("linear", "yarn"))


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_any_value_is_read_or_refused_in_one_printable_line(value: Any) -> None:
    fields = Fields({"x": value}, "f")
    readers = [
        lambda: fields.integer("x", -5, 5),
        lambda: fields.number("x", -5, 5),
        lambda: fields.boolean("x"),
        lambda: fields.string("x", ("a",)),
        lambda: fields.items("x", 2),
        lambda: fields.object("x"),
    ]
    messages = []
    for read in readers:
        try:
            read()
        except ModelError as error:
            messages.append(str(error))
    assert all(message.isprintable() and len(message) < 200 for message in messages)


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", "[" * 100_000, '{"a": ' * 5000, "\xff"])
def test_a_file_that_is_no_object_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"^\S+c\.json (is|cannot be read as JSON)") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for_and_a_folder_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ModelError, match=r"cannot be read|no regular file"):
            read_json(path)
    with pytest.raises(ConfigError, match=r"^\S+pipe is no regular file; it must be one$"):
        read_json(tmp_path / "pipe", ConfigError)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
    with pytest.raises(ModelError, match="cannot be read"):
        read_json(tmp_path / ("n" * 5000))


def test_values_are_cut_and_escaped() -> None:
    assert shown("\x1b[2J") == r'"\u001b[2J"'
    assert shown("‮abc") == r'"\u202eabc"'
    assert len(shown("\U0010ffff" * 100)) == 61
    assert len(shown("x" * 10**6)) < 70 and len(shown(list(range(10**6)))) < 70
