"""The beginning of an object that a text holds: against brute force, and readers that clients have."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json

import jiter
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sleb.server.answer.partial_json import JsonBeginning, read_object

# What JSON is made of, and what models write in its place.
PARTS = [
    *'{}[]:," \n\t\\/0123456789-+.eE',
    *("true", "false", "null", "None", "NaN", "nul", "'", "\x00", "\x1f", "é", "👍"),
    *(
        '"',
        '"',
        '"a"',
        '"a":',
        '"b": ',
        "{}",
        "[]",
        '{"',
        '":',
        ", ",
        '"x\\',
        "\\n",
        "\\u00e9",
        "\\ud83d",
        "\\ude00",
        "\\u12",
    ),
]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)  # beyond, answers hold what a double holds
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.builds(
    lambda value, ascii_, indent: json.dumps(value, ensure_ascii=ascii_, indent=indent),
    st.dictionaries(st.text(max_size=3), VALUES, max_size=4),
    st.booleans(),
    st.sampled_from([None, 1]),
)


@st.composite
def texts(draw):
    """Objects, objects with something put in their middle, and anything that is made of their parts."""
    rest = "".join(draw(st.lists(st.sampled_from(PARTS), max_size=8)))
    text = draw(st.just("{") | OBJECTS)
    cut = draw(st.integers(0, len(text)))
    return text[:cut] + rest + draw(st.sampled_from(["", text[cut:]]))


def is_flat(text):
    return sum(text.count(bracket) for bracket in "{[") <= 4


_HEX = ["0000", "000", "00", "0"]
_ESCAPED = [*_HEX, "n", *(f"{begun}\\udc00" for begun in ("00", "0", "")), "udc00", "dc00", "c00"]
_STRINGS = ["", *_ESCAPED]
_SCALARS = ["0", "rue", "ue", "e", "alse", "lse", "se", "ull", "ll", "l"]
_TAILS = ["", *_SCALARS, ":0", '"":0', *(f'{each}"{after}' for each in _STRINGS for after in ("", ":0"))]
_CLOSERS = ["".join(each) for depth in range(5) for each in itertools.product("]}", repeat=depth)]


def can_become_an_object(text):
    """By brute force: whether anything put behind it makes it an object."""
    for tail, closers in itertools.product(
        ["{}", *_TAILS] if not text.strip(" \t\n\r") else _TAILS, _CLOSERS
    ):
        with contextlib.suppress(ValueError):
            if isinstance(orjson.loads(text + tail + closers), dict):
                return True
    return False


def beginning(text):
    """The longest part of a text that can become an object; what begins no longer one does not become one again."""
    return text[
        : bisect.bisect_left(
            range(1, len(text) + 1), True, key=lambda end: not can_become_an_object(text[:end])
        )
    ]


@settings(max_examples=150)
@given(texts().filter(is_flat), st.sets(st.integers(0, 60)))
@example('{"a": -1.5e+3, "b": [true, {}, []]} x', {3, 9})
@example('{"a": 01}', set())
@example('{"a": "\\ud83d\\ude00\\ud83d"}', set())
def test_beginning_is_all_that_can_become_an_object(text, cuts):
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    follower = JsonBeginning()
    assert "".join(follower.push(text[a:b]) for a, b in itertools.pairwise(bounds)) == beginning(text)


@settings(max_examples=100)
@given(texts())
def test_beginning_is_what_clients_read(text):
    told = JsonBeginning().push(text)
    assert not told.strip() or isinstance(jiter.from_json(told.encode(), partial_mode=True), dict)


@settings(max_examples=100)
@given(st.dictionaries(st.text(max_size=3), VALUES, max_size=4))
def test_whole_objects_are_read_as_they_are(value):
    text = json.dumps(value)
    assert JsonBeginning().push(text) == text
    assert read_object(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1, "b": "cu', {"a": 1}),
        ('{"a": 1, "b": None}', {"a": 1}),
        ('{"a": {"b": 1}, c}', {"a": {"b": 1}}),
        ('{"a": 1}}', {"a": 1}),
        ('[{"a": 1}]', {}),
        ("", {}),
    ],
)
def test_of_a_broken_object_the_whole_fields_stay(text, value):
    assert read_object(text) == value


@pytest.mark.parametrize(
    "text", ['{"a": ' + "[" * 200_000, '{"a": ' + "9" * 200_000, '{"a": "' + "x" * 200_000]
)
def test_what_no_reader_takes_is_not_told(text):
    told = JsonBeginning().push(text)
    assert isinstance(jiter.from_json(told.encode(), partial_mode=True), dict)
