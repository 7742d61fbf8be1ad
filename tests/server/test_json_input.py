"""JSON from clients: refused by what it would become in memory, before it is parsed."""

from collections import Counter

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from sleb.engine.encoding import encode_text
from sleb.errors import RequestError
from sleb.server.api.messages import MessagesBody
from sleb.server.api.ollama import OllamaChatBody, OllamaGenerateBody
from sleb.server.body_parser import parse_body
from sleb.server.json_input import MAX_OBJECTS, MAX_STRINGS, MAX_VALUES, load_json
from sleb.server.protocol import (
    MAX_FIELDS,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    whole_numbers,
)

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(alphabet='a"\\[]{},:é\n\u2028'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
)


@given(values)
def test_what_is_small_is_parsed(value):
    assert load_json(orjson.dumps(value)) == value
    assert load_json(orjson.dumps(value).decode()) == value


@pytest.mark.parametrize(
    ("unit", "number"),
    [(b"[]", MAX_OBJECTS + 1), (b"{}", MAX_OBJECTS + 1), (b"1", MAX_VALUES + 2), (b'"a"', MAX_STRINGS + 1)],
)
def test_too_many_values_are_refused(unit, number):
    data = b"[" + b",".join([unit] * number) + b"]"
    with pytest.raises(RequestError, match="too many values"):
        load_json(data)
    assert len(load_json(b"[" + b",".join([unit] * (number - 2)) + b"]")) == number - 2


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a": [1, 2]}, ' * 40_000, '\\"[[' * 10**5, '"' * 10**5])
def test_marks_inside_a_string_are_no_values(text):
    assert load_json(orjson.dumps({"text": text})) == {"text": text}


def test_a_context_of_more_tokens_than_that_may_be_sent_as_numbers():
    data = b"[" + b",".join([b"7"] * (MAX_VALUES + 2)) + b"]"
    assert len(load_json(data, max_values=2 * MAX_VALUES)) == MAX_VALUES + 2


BODIES = {
    ChatBody: {"messages": [{"role": "user", "content": "x"}]},
    CompletionBody: {"prompt": "x"},
    TokenizeBody: {"prompt": "x"},
    DetokenizeBody: {"tokens": [1]},
    MessagesBody: {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}]},
    OllamaChatBody: {"messages": [{"role": "user", "content": "x"}]},
    OllamaGenerateBody: {"prompt": "x"},
}
LISTS = {
    "lists": [[]] * 9000,
    "objects": [{}] * 9000,
    "numbers": [1.5] * 9000,
    "strings": [""] * 9000,
    "fields": {str(number): [] for number in range(9000)},
}


@pytest.mark.parametrize("model", BODIES, ids=lambda model: model.__name__)
def test_no_field_has_thousands_of_errors(model, monkeypatch):
    """Each would be an object, and its text: a few are enough to say what is wrong."""
    seen = []
    monkeypatch.setattr(
        "sleb.server.body_parser._type_error",
        lambda error, content: seen.append(error.error_count()) or RequestError(""),
    )
    for field in [*model.model_fields, "unheard_of"]:
        for value in LISTS.values():
            try:
                parse_body(orjson.dumps(BODIES[model] | {field: value}), model, Counter())
            except RequestError:
                pass
    assert max(seen) <= 4 * MAX_FIELDS


def test_a_list_of_empty_lists_is_one_short_error(server):
    body = b'{"messages": [' + b"[]," * 700_000 + b"[]]}"
    response = server.http.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert len(response.content) < 1000
    response = server.post("/v1/chat/completions", messages=[[]] * 60_000)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"
    assert len(response.content) < 1000


def test_arguments_of_calls_have_values_too(server):
    calls = [{"function": {"name": "f", "arguments": "[" + "[]," * 2000 + "[]]"}}] * 40
    response = server.post("/v1/chat/completions", messages=[{"role": "assistant", "tool_calls": calls}])
    assert response.status_code == 400
    assert "too many values" in response.json()["error"]["message"]


def test_a_schema_in_a_string_has_values_too(server):
    schema = '{"enum": [' + "[]," * 70_000 + "[]]}"
    response = server.chat(guided_json=schema)
    assert response.status_code == 400
    assert "too many values" in response.json()["error"]["message"]


def test_many_unknown_fields_are_not_many_lines_of_the_log(server, caplog):
    assert server.complete("x", max_tokens=1, **{f"unknown{i}": 1 for i in range(1000)}).status_code == 200
    assert caplog.text.count("unknown request field") <= 16
    response = server.complete("x", **{f"unknown{i}": 1 for i in range(5000)})
    assert response.status_code == 400
    assert f"at most {MAX_FIELDS}" in response.json()["error"]["message"]


@pytest.mark.parametrize("text", ["1" * 70_000, "word " * 15_000, "é\U0001f600 " * 5_000, "\n" * 20_000])
def test_long_texts_have_the_ids_of_short_ones(byte_tokenizer, text):
    assert encode_text(byte_tokenizer, text, True, 10**6) == byte_tokenizer.encode(text).ids


def test_a_text_with_far_too_many_tokens_is_not_encoded(byte_tokenizer):
    with pytest.raises(RequestError, match="more than 65536 tokens") as caught:
        encode_text(byte_tokenizer, "1" * 4_000_000, True)
    assert caught.value.code == "context_length_exceeded"


def test_a_text_that_makes_few_tokens_is_not_encoded_whole():
    tokenizer = Tokenizer(
        models.BPE(
            {" ": 0, "x": 1, **{" " * 2**k: 1 + k for k in range(1, 8)}},
            [(" " * 2**k,) * 2 for k in range(7)],
        )
    )
    assert len(encode_text(tokenizer, " " * 2**17, True)) == 2**10
    with pytest.raises(RequestError, match="repeats itself") as caught:
        encode_text(tokenizer, " " * 2**19, True)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("values", "whole"),
    [
        ([5.0, 6], [5, 6]),
        ([5.0, 6.5], [5, 6.5]),
        ([0.0, 2.0**53 - 1], [0, 2**53 - 1]),
        ([5.0, "a"], [5.0, "a"]),
        ([True, 1.0], [True, 1.0]),
        (5.0, 5.0),
    ],
)
def test_whole_floats_are_integers(values, whole):
    assert repr(whole_numbers(values)) == repr(whole)


def test_a_body_with_too_many_values_is_not_called_invalid(server):
    error = server.chat(metadata=[[]] * 70_000).json()["error"]
    assert error["message"].startswith("the body has too many values")
    assert error["code"] == "too_many_values"
