"""Answers bound to JSON."""

from __future__ import annotations

import json
from typing import Any

from sleb.doctor.check import Group
from sleb.doctor.outcome import expect, fail
from sleb.doctor.target import CHAT, Json, Target, shown

GROUP = Group("structured")

# Finite, so that any model finishes it, a random one too.
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "is_warm": {"type": "boolean"},
    },
    "required": ["colour", "is_warm"],
    "additionalProperties": False,
}
QUESTION = "Describe the colour of the sky as JSON with the keys colour and is_warm."


def schema_format(schema: Json) -> Json:
    """`response_format` for a schema."""
    return {"type": "json_schema", "json_schema": {"name": "colour", "strict": True, "schema": schema}}


def expect_colour(text: str) -> None:
    """Ends the check as failed unless `text` is JSON by SCHEMA."""
    value = _parse(text)
    expect(isinstance(value, dict) and set(value) == {"colour", "is_warm"}, f"the answer is {shown(text)}")
    expect(value["colour"] in ("red", "green", "blue"), f"colour is {shown(value['colour'])}")
    expect(isinstance(value["is_warm"], bool), f"is_warm is {shown(value['is_warm'])}")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        fail(f"the answer is no JSON: {shown(text)}")


@GROUP.required
def a_schema_is_kept(target: Target) -> None:
    """response_format json_schema gives JSON by the schema. Source: OpenAI API (structured outputs)."""
    answer = target.chat(QUESTION, response_format=schema_format(SCHEMA), temperature=0, max_tokens=100)
    expect_colour(answer["choices"][0]["message"]["content"])
    expect(answer["choices"][0]["finish_reason"] == "stop", "the answer did not end by itself")


@GROUP.required
def a_schema_is_kept_when_hot(target: Target) -> None:
    """The schema is kept at a temperature of 2 too. Source: OpenAI API (structured outputs)."""
    for seed in (1, 2):
        answer = target.chat(
            QUESTION, response_format=schema_format(SCHEMA), temperature=2, seed=seed, max_tokens=100
        )
        expect_colour(answer["choices"][0]["message"]["content"])


@GROUP.required
def a_schema_is_kept_in_a_stream(target: Target) -> None:
    """The joined deltas of a stream are JSON by the schema. Source: OpenAI API (structured outputs)."""
    stream = target.stream_chat(
        QUESTION, response_format=schema_format(SCHEMA), temperature=0, max_tokens=100
    )
    expect_colour(stream.text())


@GROUP.required
def json_object_gives_an_object(target: Target) -> None:
    """response_format json_object gives a JSON object, or its beginning if max_tokens cuts it. Source: OpenAI API."""
    answer = target.chat(QUESTION, response_format={"type": "json_object"}, temperature=0, max_tokens=120)
    [choice] = answer["choices"]
    text = choice["message"]["content"]
    if choice["finish_reason"] == "length":
        expect(text.lstrip().startswith("{"), f"the answer begins with {shown(text)}")
    else:
        expect(isinstance(_parse(text), dict), f"the answer is {shown(text)}")


@GROUP.required
def text_is_the_usual_format(target: Target) -> None:
    """response_format text changes nothing. Source: OpenAI API."""
    plain, text = (
        target.chat(temperature=0, max_tokens=16, **extra)["choices"][0]["message"]["content"]
        for extra in ({}, {"response_format": {"type": "text"}})
    )
    expect(plain == text, f"without it the answer is {shown(plain)}, with it {shown(text)}")


@GROUP.required
def a_bad_schema_is_refused(target: Target) -> None:
    """A schema whose type does not exist is 400. Source: OpenAI API."""
    bad = schema_format({"type": "object", "properties": {"x": {"type": "nonsense"}}})
    target.chat(QUESTION, response_format=schema_format(SCHEMA), max_tokens=8)  # not all are refused
    messages = [{"role": "user", "content": QUESTION}]
    target.refused(target.post(CHAT, messages=messages, response_format=bad, max_tokens=8), 400)


@GROUP.required
def an_unknown_format_is_refused(target: Target) -> None:
    """A response_format of an unknown type is 400. Source: OpenAI API."""
    messages = [{"role": "user", "content": QUESTION}]
    target.chat(QUESTION, response_format={"type": "json_object"}, max_tokens=8)  # not all are refused
    target.refused(target.post(CHAT, messages=messages, response_format={"type": "poem"}, max_tokens=8), 400)
