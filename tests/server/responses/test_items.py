"""Items of Responses as messages, and what is refused of them."""

from __future__ import annotations

import pytest
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter

from sleb.errors import RequestError
from sleb.server.responses.items import read_input, to_messages

RESPONSE_ITEM = TypeAdapter(ResponseItem)


def read(given, kept=()):
    return read_input(given, {item["id"]: item for item in kept}.get)


def messages(given, instructions=None):
    return to_messages(read(given), instructions)


def call(name="now", call_id="call_1", arguments="{}"):
    return {"type": "function_call", "name": name, "call_id": call_id, "arguments": arguments}


def made(*calls):
    return [
        {
            "id": each["call_id"],
            "type": "function",
            "function": {"name": each["name"], "arguments": each["arguments"]},
        }
        for each in calls
    ]


def thought(text, field="content"):
    kind = "summary_text" if field == "summary" else "reasoning_text"
    return {"type": "reasoning", "summary": [], field: [{"type": kind, "text": text}]}


def result(output="12:00", call_id="call_1"):
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def told(content="12:00", call_id="call_1", name="now"):
    return {"role": "tool", "tool_call_id": call_id, "name": name, "content": content}


USER = {"role": "user", "content": "hi"}
SAID = {"role": "assistant", "content": "yes"}
PARTS = [
    {"type": "input_text", "text": "a"},
    {"type": "output_text", "text": "b", "annotations": []},
    {"type": "refusal", "refusal": "c"},
]


@pytest.mark.parametrize(
    ("given", "instructions", "wanted"),
    [
        ("hi", None, [USER]),
        ("", None, [{"role": "user", "content": ""}]),
        ("hi", "Be brief.", [{"role": "system", "content": "Be brief."}, USER]),
        ("hi", "", [USER]),
        ([USER | {"type": "message"}, SAID], None, [USER, SAID]),
        ([{"role": "user", "content": PARTS[:1] * 2}], None, [{"role": "user", "content": "a\na"}]),
        ([{"role": "assistant", "content": PARTS[1:]}], None, [{"role": "assistant", "content": "b\nc"}]),
        (
            [{"role": "system", "content": "x"}, {"role": "developer", "content": "y"}, USER],
            "Be brief.",
            [{"role": "system", "content": "Be brief.\n\nx\n\ny"}, USER],
        ),
        (
            [{"role": "developer", "content": "x"}, USER, {"role": "system", "content": "y"}],
            None,
            [{"role": "developer", "content": "x"}, USER, {"role": "system", "content": "y"}],
        ),
        (
            [USER, thought("hm"), SAID, call(), result()],
            None,
            [USER, SAID | {"reasoning_content": "hm", "tool_calls": made(call())}, told()],
        ),
        (
            [
                USER,
                thought("hm", "summary"),
                call(),
                call("then", "call_2"),
                result(),
                result("13:00", "call_2"),
            ],
            None,
            [
                USER,
                {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": "hm",
                    "tool_calls": made(call(), call("then", "call_2")),
                },
                told(),
                told("13:00", "call_2", "then"),
            ],
        ),
        (
            [call(), SAID, call("then", "call_2"), result(call_id="call_2"), result()],
            None,
            [
                {"role": "assistant", "content": "", "tool_calls": made(call())},
                SAID | {"tool_calls": made(call("then", "call_2"))},
                told(call_id="call_2", name="then"),
                told(),
            ],
        ),
        ([SAID, SAID], None, [SAID, SAID]),
        (
            [SAID, thought("a"), thought("b")],
            None,
            [
                SAID,
                {"role": "assistant", "content": "", "reasoning_content": "a"},
                {"role": "assistant", "content": "", "reasoning_content": "b"},
            ],
        ),
        ([{"type": "reasoning", "summary": [], "encrypted_content": "xyz"}, SAID], None, [SAID]),
        (
            [call(), result([{"type": "input_text", "text": "12"}, {"type": "input_text", "text": "00"}])],
            None,
            [{"role": "assistant", "content": "", "tool_calls": made(call())}, told("12\n00")],
        ),
    ],
)
def test_items_are_messages(given, instructions, wanted):
    assert messages(given, instructions) == wanted


def test_items_have_ids_and_fit_openais_types():
    given = [
        USER,
        {"role": "developer", "content": PARTS[:1]},
        {"role": "assistant", "content": PARTS},
        thought("hm"),
        {"type": "reasoning", "summary": []},
        call(),
        result(),
        result(PARTS[:1]),
        USER | {"id": "msg_mine", "status": "incomplete"},
    ]
    items = read(given)
    for item in items:
        assert RESPONSE_ITEM.validate_python(item).type == item["type"]
    ids = [item["id"] for item in items]
    assert len(set(ids)) == len(ids)
    assert (ids[-1], items[-1]["status"]) == ("msg_mine", "incomplete")
    assert read(items) == items  # what was answered may be sent again


def test_references_are_looked_up():
    kept = read([USER])[0]
    assert read([{"type": "item_reference", "id": kept["id"]}, {"id": kept["id"]}], [kept]) == [kept, kept]
    with pytest.raises(
        RequestError, match=r"input\[0\]\.id is 'msg_x', which is no item that is kept"
    ) as error:
        read([{"type": "item_reference", "id": "msg_x"}], [kept])
    assert error.value.param == "input[0].id"


DEEP = {"type": "message"}
for _ in range(500):
    DEEP = {"role": "user", "content": [DEEP]}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (5, "input"),
        ({"role": "user"}, "input"),
        ([USER] * 5000, "input"),
        (["hi"], "input[0]"),
        ([USER, None], "input[1]"),
        ([{}], "input[0].type"),
        ([{"type": "web_search_call", "id": "ws_1"}], "input[0].type"),
        ([{"type": ["message"]}], "input[0].type"),
        ([{"role": "tool", "content": "x"}], "input[0].role"),
        ([{"role": ["user"], "content": "x"}], "input[0].role"),
        ([{"role": "user"}], "input[0].content"),
        ([{"role": "user", "content": ["x"]}], "input[0].content[0]"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input[0].content[0]"),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}], "input[0].content[0]"),
        ([{"role": "user", "content": [PARTS[0], {"type": "input_audio"}]}], "input[0].content[1]"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input[0].content[0].text"),
        ([DEEP], "input[0].content[0]"),
        ([call(arguments={})], "input[0].arguments"),
        ([call(call_id="")], "input[0].call_id"),
        ([call(name=None)], "input[0].name"),
        ([result(call_id=None)], "input[0].call_id"),
        ([call(), result(None)], "input[1].output"),
        ([call(), result([{"type": "input_image"}])], "input[1].output[0]"),
        ([{"type": "reasoning", "content": "hm"}], "input[0].content"),
        ([{"type": "reasoning", "summary": [5]}], "input[0].summary[0]"),
        ([{"type": "reasoning", "summary": [{}]}], "input[0].summary[0].text"),
        ([{"type": "item_reference"}], "input[0].id"),
    ],
)
def test_what_a_text_model_cannot_read_is_refused_by_its_place(given, param):
    with pytest.raises(RequestError) as error:
        read(given)
    assert error.value.param == param
    assert len(str(error.value)) < 400


def test_an_output_without_its_call_is_refused():
    for given in ([result()], [result(), call()], [call(call_id="x"), result()]):
        with pytest.raises(RequestError, match="call_id 'call_1'"):
            messages(given)
