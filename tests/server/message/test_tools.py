"""Tools and reasoning: the parsers against any split of a text, and whole conversations over fake and real engines."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import shutil

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine
from sleb.errors import RequestError
from sleb.server.grammar.grammar_spec import GrammarSpec, Part
from sleb.server.grammar.grammars import GrammarCompiler
from sleb.server.message.incoming import normalise_messages
from sleb.server.message.parser import MarkedParser
from sleb.server.message.reasoning import Delta, ReasoningParser, join_deltas
from sleb.server.message.special_tokens import literal, special_token_id, thought_rules
from sleb.server.message.tool_formats import HERMES, LLAMA, MISTRAL_LIST, PLAIN, choose
from sleb.server.message.tool_parser import CallMarks, ToolParser
from sleb.server.message.tool_prompt import offer_in_text

MARKS = tuple(sorted(set(CallMarks.of(HERMES).texts) - CallMarks.of(HERMES).kept, key=len, reverse=True))
NAMES = ("weather", "sum")
SCHEMAS = {"sum": {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}, "unit": {"$ref": "#/$defs/unit"}},
            "required": ["city", "unit"],
            "$defs": {"unit": {"enum": ["C", "F"]}},
        },
    },
}
SUM = {
    "type": "function",
    "function": {
        "name": "sum",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["a"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, SUM, NOW]


def parse(text, cuts=(), *, reasoning=None, live=False, single=False, reason="stop"):
    """What any pieces of `text` give, joined; each call as (name, arguments)."""
    parser = MarkedParser(
        None if reasoning is None else ReasoningParser(reasoning),
        ToolParser(NAMES, SCHEMAS, live=live, single=single),
    )
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    deltas = []
    for start, end in itertools.pairwise(borders):
        deltas += parser.push(text[start:end], None)
    return join_deltas(deltas + parser.push("", reason))


def told(deltas):
    """(reasoning, content, [(name, arguments), …])"""
    texts = {"reasoning": "", "content": ""}
    calls = []
    for delta in deltas:
        if delta.kind == "call":
            assert delta.index == len(calls)
            calls.append((delta.text, ""))
        elif delta.kind == "arguments":
            name, arguments = calls[delta.index]
            calls[delta.index] = (name, arguments + delta.text)
        else:
            texts[delta.kind] += delta.text
    return texts["reasoning"], texts["content"], [(name, json.loads(arguments)) for name, arguments in calls]


HERMES_CALL = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "n": [1, {"a": "}"}]}}\n</tool_call>'
)
ARGUMENTS = {"city": "Köln", "n": [1, {"a": "}"}]}


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("", "", []),
        ("  plain < text {\n", "  plain < text {\n", []),
        (HERMES_CALL, "", [("weather", ARGUMENTS)]),
        (f"Let me see.\n{HERMES_CALL}\n", "Let me see.", [("weather", ARGUMENTS)]),
        (f"{HERMES_CALL}\n{HERMES_CALL} done", " done", [("weather", ARGUMENTS)] * 2),
        ('<tool_call>{"name": "sum", "arguments": {"a": 1}}', "", [("sum", {"a": 1})]),
        ('<tool_call>{"name": "sum"}</tool_call>', "", [("sum", {})]),
        ('<tool_call>{"name": "sum", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("sum", {"a": 1})]),
        (
            '<tool_call>{"arguments": {"a": "</tool_call>"}, "name": "sum"}</tool_call>',
            "",
            [("sum", {"a": "</tool_call>"})],
        ),
        ('{"name": "sum", "parameters": {"a": 2}}', "", [("sum", {"a": 2})]),
        ('<|python_tag|>{"name": "sum", "parameters": {"a": 2}}', "", [("sum", {"a": 2})]),
        (
            '{"name": "sum", "parameters": {}}; {"name": "weather", "parameters": {}}',
            "",
            [("sum", {}), ("weather", {})],
        ),
        ('{"type": "function", "name": "sum", "parameters": {"a": 2}}', "", [("sum", {"a": 2})]),
        ('{"type": "function", "function": {"name": "sum", "arguments": {"a": 2}}}', "", [("sum", {"a": 2})]),
        ('{"name": "sum", "parameters": {"a": "line\nend"}}', "", [("sum", {"a": "line\nend"})]),
        ('[TOOL_CALLS] [{"name": "sum", "arguments": {"a": 1}}]', "", [("sum", {"a": 1})]),
        (
            'So: [TOOL_CALLS][{"name": "sum", "arguments": {"a": [1]}, "id": "x"}, {"name": "weather"}] .',
            "So: .",
            [("sum", {"a": [1]}), ("weather", {})],
        ),
        ('[TOOL_CALLS]sum[ARGS]{"a": 1}', "", [("sum", {"a": 1})]),
        ('[TOOL_CALLS]sum{"a": 1}[TOOL_CALLS]weather{}', "", [("sum", {"a": 1}), ("weather", {})]),
        ('[TOOL_CALLS]sum[CALL_ID]0aB4eF789[ARGS]{"name": "x"}', "", [("sum", {"name": "x"})]),
        ('[TOOL_CALLS]sum0aB4eF789{"a": 1}', "", [("sum", {"a": 1})]),
        (
            '<|tool_call|>[{"name": "sum", "arguments": {"a": 1}}]<|/tool_call|>',
            "",
            [("sum", {"a": 1})],
        ),
        ('Well <function=sum>{"a": 1}</function> done', "Well done", [("sum", {"a": 1})]),
        ('<function=sum>{"a": 1}', "", [("sum", {"a": 1})]),
        ("<function=weather></function>", "", [("weather", {})]),
        (
            "<tool_call>\n<function=sum>\n<parameter=a>\n12\n</parameter>\n<parameter=b>\n3\n<x>\n</parameter>\n"
            "</function>\n</tool_call>\n<tool_call>\n<function=weather>\n</function>\n</tool_call>",
            "",
            [("sum", {"a": 12, "b": "3\n<x>"}), ("weather", {})],
        ),
    ],
)
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_calls_that_models_write(text, content, calls, step):
    assert told(parse(text, range(0, len(text), step))) == ("", content, calls)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', '{"name": "other", "arguments": {}}'),
        ('<tool_call>{"name": "sum", "arguments": [1]}</tool_call>', '{"name": "sum", "arguments": [1]}'),
        ("So:\n<tool_call>\nsum(1)\n</tool_call>", "So:\nsum(1)"),
        ("<tool_call>", ""),
        ("a </tool_call> b", "a b"),
        ("<tool_call><tool_call>x", "x"),
        ("<|python_tag|>print(1)", "print(1)"),
        ('[TOOL_CALLS] [1, {"name": "sum"}]', ' [1, {"name": "sum"}]'),
        ('[TOOL_CALLS] [{"name": "other"}]', ' [{"name": "other"}]'),
        ("[TOOL_CALLS]other{}", "other{}"),
        ('<function=other>{"a": 1}</function>', '{"a": 1}'),
        ("<function=sum>a = 1</function>", "a = 1"),
        ('<tool_call>{"name": "' + "x" * 5000 + "</tool_call> <tool_", '{"name": "' + "x" * 5000 + " <tool_"),
    ],
)
@pytest.mark.parametrize("step", [1, 4, 10_000])
def test_a_broken_call_is_content_without_its_marks(text, content, step):
    wanted = [Delta("content", content)] if content else []
    assert parse(text, range(0, len(text), step)) == wanted


@pytest.mark.parametrize(
    ("text", "arguments", "content"),
    [
        ('<tool_call>{"name": "sum", "arguments": {"a": }}</tool_call>', '{"a": }', ""),
        ('<tool_call>{"name": "sum", "arguments": {"a": NaN}}</tool_call>', '{"a": NaN}', ""),
        ('<tool_call>{"name": "sum", "arguments": {"a": 1}', '{"a": 1}', ""),
        (
            'Now <tool_call>{"name": "sum", "arguments": {"a": 1</tool_call> and more',
            '{"a": 1',
            "Now and more",
        ),
        ('[TOOL_CALLS]sum[ARGS]{"a": <b>}', '{"a": ', "<b>}"),
        ("<function=sum><parameter=a>1</parameter> or so", '{"a": 1}', " or so"),
        ("<function=sum><parameter=b>x\ny", '{"b": "x\\ny', ""),
        ('<|python_tag|>[sum(a=1), sum(a="x', '{"a": 1}{"a": ', ""),
    ],
)
@pytest.mark.parametrize("step", [1, 4, 10_000])
def test_a_call_that_breaks_when_its_tool_is_known_has_the_arguments_that_came(
    text, arguments, content, step
):
    deltas = parse(text, range(0, len(text), step))
    assert "".join(delta.text for delta in deltas if delta.kind == "arguments") == arguments
    assert "".join(delta.text for delta in deltas if delta.kind == "content") == content


@pytest.mark.parametrize(
    "text",
    [
        "<tool_",
        "if a < b[TOO",
        '{"answer": {"name": "sum", "parameters": {}}}',
        '{"name": "sum"}',
        '{"name": "Ada", "parameters": {}}',
        'First: {"name": "sum", "parameters": {}}',
        '{"name": "sum", "parameters": {"a": ' + "[" * 3000 + "]" * 3000 + "}}{",
    ],
)
@pytest.mark.parametrize("step", [1, 4, 10_000])
def test_what_is_no_call_is_content_to_the_last_character(text, step):
    assert parse(text, range(0, len(text), step)) == [Delta("content", text)]


CUT = [
    HERMES_CALL + "\n" + HERMES_CALL + "\n" + HERMES_CALL,
    'Sure.\n[TOOL_CALLS] [{"name": "sum", "arguments": {"a": 1}}, {"name": "sum", "arguments": {"a": 22}}]',
    '[TOOL_CALLS]sum[ARGS]{"a": 1}[TOOL_CALLS]sum[CALL_ID]0aB4eF789[ARGS]{"a": 22}',
    '<|tool_call|>[{"name": "sum", "arguments": {"a": 1}}]<|/tool_call|>',
    '<function=sum>{"a": 1}</function> <function=sum>{"a": 22}</function>',
    "<tool_call>\n<function=sum>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nz\n</parameter>\n</function>\n</tool_call>",
    '<|python_tag|>{"name": "sum", "parameters": {"a": 1}}; {"name": "sum", "parameters": {"a": 22}}',
]


@pytest.mark.parametrize("text", CUT, ids=range(len(CUT)))
@pytest.mark.parametrize("live", [False, True])
def test_calls_that_are_cut_anywhere_leave_no_marks(text, live):
    """max_tokens may end anywhere: content is that of the whole answer or less, calls are those of the whole answer,
    and of the last one the arguments as far as they go."""
    content = told(parse(text, live=live))[1]
    whole = [delta.text for delta in parse(text, live=live) if delta.kind == "call"]
    assert len(whole) >= 1 and content in ("", "Sure.")
    for end in range(len(text)):
        deltas = parse(text[:end], live=live, reason="length")
        assert parse(text[:end], range(end), live=live, reason="length") == deltas
        said = "".join(delta.text for delta in deltas if delta.kind == "content")
        assert said.strip() in (content, content[:end]), (end, said)
        names = [delta.text for delta in deltas if delta.kind == "call"]
        assert names == whole[: len(names)]
        for number in range(len(names)):
            arguments = "".join(d.text for d in deltas if d.kind == "arguments" and d.index == number)
            if number < len(names) - 1:
                json.loads(arguments)
            else:
                assert arguments.startswith("{")


def test_a_third_call_that_is_cut(server):
    """Of required calls too: two calls, what has come of the third, and no mark; alike streamed and whole."""
    text = "\n".join(['<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call>'] * 3)
    third = text.rindex("<tool_call>")
    for end in range(third, len(text), 5):
        fields = {"tools": TOOLS, "max_tokens": end, "temperature": 0}
        whole = server.chat(text, **fields).json()
        [choice] = whole["choices"]
        message, reason = fold(events(server.chat(text, stream=True, **fields)))
        assert choice["message"]["content"] is None and message["content"] == ""
        calls = [call["function"] for call in choice["message"]["tool_calls"]]
        assert calls == message["tool_calls"] and len(calls) in (2, 3)
        assert [json.loads(call["arguments"]) for call in calls[:2]] == [{"a": 1}] * 2
        assert choice["finish_reason"] == reason == "length"
        assert whole["usage"]["completion_tokens"] == end


def test_a_call_behind_a_broken_one_is_found():
    broken = '{"arguments": {}, "name": "su'
    assert told(parse("<tool_call>" + broken + HERMES_CALL)) == ("", broken, [("weather", ARGUMENTS)])
    first, _, second, _ = parse('<tool_call>{"name": "sum", "arguments": {' + HERMES_CALL)[:4]
    assert (first, second.text) == (Delta("call", "sum"), "weather")


def test_single_drops_later_calls_and_nothing_else():
    text = f"a {HERMES_CALL} b {HERMES_CALL} c"
    assert told(parse(text, single=True)) == ("", "a b c", [("weather", ARGUMENTS)])


@pytest.mark.parametrize("opened", [False, True])
def test_reasoning(opened):
    mark = "" if opened else "<think>\n"
    text = f"{mark}I should\n\nadd.\n</think>\n\nIt is {HERMES_CALL}"
    wanted = ("I should\n\nadd.", "It is", [("weather", ARGUMENTS)])
    assert told(parse(text, reasoning=opened)) == wanted
    assert told(parse(text, range(len(text)), reasoning=opened)) == wanted
    unfinished = f"{mark}thinking of {HERMES_CALL} </thin"
    assert told(parse(unfinished, reasoning=opened)) == (f"thinking of {HERMES_CALL} </thin", "", [])
    assert told(parse("  no thoughts </think>", reasoning=False)) == ("", "  no thoughts </think>", [])
    assert told(parse(" \n", reasoning=False)) == ("", " \n", [])
    assert told(parse("<think></think>", reasoning=False)) == ("", "", [])


PIECES = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<function=sum>",
    "</function>", "<parameter=a>", "</parameter>", "[ARGS]", "<|tool_call|>", "<function=", "sum", "\n",
    " ", "<", "{", "}", '"', "\\", ";",
    "tool", "text", "é", '{"name": "sum", "arguments": {"a": 1}}', '{"name": "weather", "parameters": {}}',
    '{"name": ', '"sum"', '"arguments": {', HERMES_CALL, "[", "]", ",", ":",
]  # fmt: skip


@settings(max_examples=400)
@given(
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    st.lists(st.integers(0, 300), max_size=12),
    st.sampled_from([None, False, True]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["stop", "length"]),
)
def test_any_split_gives_what_the_whole_gives(text, cuts, reasoning, live, single, reason):
    options = {"reasoning": reasoning, "live": live, "single": single, "reason": reason}
    whole = parse(text, **options)
    assert parse(text, cuts, **options) == whole
    assert parse(text, range(len(text)), **options) == whole
    assert [delta.index for delta in whole if delta.kind == "call"] == list(
        range(sum(delta.kind == "call" for delta in whole))
    )


@settings(max_examples=200)
@given(
    st.lists(
        st.sampled_from([piece for piece in PIECES if not re.search(r"name|=sum|^[\[\]]$", piece)]),
        max_size=14,
    ).map("".join)
)
def test_without_a_call_nothing_is_lost_but_marks_and_space_before_them(text):
    said = "".join(delta.text for delta in parse(text))
    assert not any(mark in said for mark in MARKS)
    for mark in MARKS:
        text = text.replace(mark, "")
    assert "".join(said.split()) == "".join(text.split())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=4), JSON, max_size=3)), max_size=3
    ),
    st.lists(st.integers(0, 200), max_size=8),
    st.booleans(),
    st.booleans(),
)
def test_written_calls_are_read_again(calls, cuts, live, ascii_only):
    texts = [
        json.dumps({"name": name, "arguments": arguments}, ensure_ascii=ascii_only)
        for name, arguments in calls
    ]
    hermes = "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
    assert told(parse(hermes, cuts, live=live)) == ("", "", calls)
    assert told(parse("; ".join(texts), cuts, live=live)) == ("", "", calls)


def test_live_arguments_come_as_they_are_written():
    parser = ToolParser(NAMES, live=True)
    assert parser.push('<tool_call>\n{"name": "sum", "arguments": {"a": ') == [
        Delta("call", "sum", 0),
        Delta("arguments", '{"a": ', 0),
    ]
    assert parser.push("1") == [Delta("arguments", "1", 0)]
    assert parser.push("}}\n</tool") == [Delta("arguments", "}", 0)]
    assert parser.push("_call>") == parser.flush() == []


def test_a_long_run_of_marks_takes_linear_time():
    text = '<tool_call>{"name":"' * 5000
    assert told(parse(text))[1] == text.replace("<tool_call>", "")


# Over the fake engine, which answers with what it is asked.


def events(response):
    lines = [line for line in response.text.split("\n\n") if line.startswith("data: {")]
    return [json.loads(line[6:]) for line in lines]


def fold(chunks):
    """Message and finish reason of a stream, as a client folds them."""
    message = {"content": "", "reasoning_content": "", "tool_calls": []}
    reason = None
    for chunk in chunks:
        [choice] = chunk["choices"]
        delta = choice["delta"]
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", []):
            if call["index"] == len(message["tool_calls"]):
                assert call["id"].startswith("call_") and call["type"] == "function"
                message["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
            message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return message, reason


@pytest.fixture(scope="module")
def server(server):
    server.engine.chat_template = "{{ tools }} <tool_call> <think>"
    server.engine.max_model_len = 2000
    return server


TEXTS = [
    "<think>hm</think>I call. " + HERMES_CALL.replace("weather", "sum") + HERMES_CALL,
    HERMES_CALL,
    '{"name": "sum", "parameters": {"a": 1}}',
    "<think>only",
    "<tool_call>broken",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_streamed_and_whole_messages_are_the_same(server, text):
    whole = server.chat(text, tools=TOOLS).json()["choices"][0]
    message, reason = fold(events(server.chat(text, tools=TOOLS, stream=True)))
    reasoning, content, calls = told(parse(text, reasoning=False))
    assert whole["message"].get("reasoning_content", "") == reasoning == message["reasoning_content"]
    assert (whole["message"]["content"] or "") == content == message["content"]
    own = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in whole["message"].get("tool_calls", [])
    ]
    assert own == calls
    assert [(call["name"], json.loads(call["arguments"])) for call in message["tool_calls"]] == calls
    if calls and not content:
        assert whole["message"]["content"] is None
    assert whole["finish_reason"] == reason == ("tool_calls" if calls else "stop")


def test_one_call_at_most_when_calls_are_not_parallel(server):
    message = server.chat(HERMES_CALL * 3, tools=TOOLS, parallel_tool_calls=False).json()["choices"][0][
        "message"
    ]
    assert len(message["tool_calls"]) == 1


def test_no_tools_no_calls(server):
    for fields in ({}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = server.chat(HERMES_CALL, **fields).json()["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": HERMES_CALL, "refusal": None}
        assert choice["finish_reason"] == "stop"


def test_the_old_fields(server):
    fields = {"functions": [WEATHER["function"]]}
    whole = server.chat(HERMES_CALL * 2, **fields).json()["choices"][0]
    assert whole["message"]["function_call"]["name"] == "weather"
    assert json.loads(whole["message"]["function_call"]["arguments"]) == ARGUMENTS
    assert whole["finish_reason"] == "function_call"
    deltas = [
        chunk["choices"][0]["delta"]["function_call"]
        for chunk in events(server.chat(HERMES_CALL, stream=True, **fields))
        if "function_call" in chunk["choices"][0]["delta"]
    ]
    assert deltas[0]["name"] == "weather"
    assert json.loads("".join(delta["arguments"] for delta in deltas)) == ARGUMENTS


def test_logprobs_and_ids_of_all_tokens_are_streamed(server):
    chunks = events(server.chat(HERMES_CALL, tools=TOOLS, stream=True, logprobs=True, return_token_ids=True))
    ids = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    entries = [
        entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert ids == server.engine.encode(HERMES_CALL)
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == HERMES_CALL


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools[0]"),
        ({"tools": [NOW, {"type": "function", "function": {"name": "b", "parameters": []}}]}, "tools[1]"),
        (
            {"tools": [{"type": "function", "function": {"name": "b", "parameters": {"type": "array"}}}]},
            "tools[0]",
        ),
        ({"tools": [{"type": "function", "function": {"name": "b", "description": 1}}]}, "tools[0]"),
        ({"tools": [NOW, NOW]}, "tools"),
        ({"tools": [NOW] * 300}, "tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "a"}], "function_call": {"name": "b"}}, "function_call"),
    ],
)
def test_tools_that_are_refused(server, fields, param):
    response = server.chat("x", **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_some_of_the_tools_are_allowed(server):
    """OpenAI's tool_choice of type allowed_tools: the others are not there, in either mode."""
    names = [{"type": "function", "function": {"name": name}} for name in ("sum", "now")]

    def choose(mode, tools):
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}

    weather = server.chat(HERMES_CALL, tools=TOOLS, tool_choice=choose("auto", names)).json()["choices"][0]
    assert "tool_calls" not in weather["message"] and weather["finish_reason"] == "stop"
    said = HERMES_CALL.replace("weather", "sum")
    for mode in ("auto", "required"):
        answer = server.chat(said, tools=TOOLS, tool_choice=choose(mode, names)).json()["choices"][0]
        assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["sum"]
    for wrong in (
        choose("auto", []),
        choose("any", names),
        choose("auto", [{"type": "function", "function": {"name": "other"}}]),
        {"type": "allowed_tools"},
    ):
        refused = server.chat("x", tools=TOOLS, tool_choice=wrong)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "tool_choice"


def test_parts_of_messages_that_are_text():
    parts = [
        {"type": "text", "text": "a"},
        {"type": "input_text", "text": "b"},
        {"type": "output_text", "text": "c"},
        {"type": "refusal", "refusal": "d"},
    ]
    assert normalise_messages([{"role": "user", "content": parts}])[0]["content"] == "a\nb\nc\nd"
    for part in (
        {"type": "refusal", "text": "d"},
        {"type": "image_url"},
        {"type": ["text"]},
        {"type": "input_text"},
    ):
        with pytest.raises(RequestError, match=r"messages\[0\].content\[0\]"):
            normalise_messages([{"role": "user", "content": [part]}])


def test_roles_are_those_that_are_known_or_that_the_template_names():
    for role in ("system", "developer", "user", "assistant", "tool", "function"):
        normalise_messages([{"role": role, "content": "x"}])
    for role in ("alien", "", "User", 5, None, ["user"], "x' or 'y"):
        with pytest.raises(RequestError, match="developer, user, assistant") as refused:
            normalise_messages([{"role": role, "content": "x"}], "{{ message['role'] }} 'x' or 'y'")
        assert refused.value.param == "messages[0].role"
    template = "{% if message.role == 'ipython' or message.role == \"control\" %}"
    for role in ("ipython", "control"):
        assert normalise_messages([{"role": role, "content": "x"}], template)[0]["role"] == role


def test_messages_of_calls_become_what_templates_take():
    call = {"id": "1", "type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "2"}]},
        {"role": "assistant", "content": None, "function_call": {"name": "sum", "arguments": "{broken"}},
        {"role": "function", "name": "sum", "content": "3"},
        {"role": "assistant", "content": "done", "tool_calls": None},
    ]
    first, second, third, fourth, fifth = normalise_messages(messages)
    assert first["content"] == "" and first["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert second == {"role": "tool", "tool_call_id": "1", "content": "2"}
    assert third["tool_calls"] == [{"type": "function", "function": {"name": "sum", "arguments": "{broken"}}]
    assert fourth["role"] == "tool"
    assert fifth == {"role": "assistant", "content": "done"}
    assert call["function"]["arguments"] == '{"a": 1}'  # what was given is left as it is
    told_in_text = offer_in_text([first, second], [NOW])
    assert [message["role"] for message in told_in_text] == ["system", "assistant", "user"]
    assert json.dumps(NOW) in told_in_text[0]["content"]
    assert parse(told_in_text[1]["content"]) == [Delta("call", "sum"), Delta("arguments", '{"a": 1}')]
    with_system = offer_in_text([{"role": "system", "content": "Be kind."}], [NOW])
    assert len(with_system) == 1 and with_system[0]["content"].startswith("Be kind.\n\n# Tools")


def test_the_format_is_the_templates():
    assert choose("{% if tools %}<tool_call>{% endif %}") is HERMES
    assert choose("{{ tools }}<|python_tag|>") is LLAMA
    assert choose("{{ tools }}[TOOL_CALLS]") is MISTRAL_LIST
    assert choose("{{ tools }}") is PLAIN
    assert choose(None) is choose("{{ messages }}") is HERMES


def test_marks_that_are_special_tokens(byte_tokenizer):
    tokenizer = Tokenizer.from_str(byte_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    tokenizer.add_special_tokens([AddedToken("</think>", special=True)])
    assert literal("<tool_call>", tokenizer) == '"<tool_call>"'
    assert special_token_id("</think>", tokenizer) == tokenizer.token_to_id("</think>")
    assert literal("</think>", tokenizer) == f"<[{tokenizer.token_to_id('</think>')}]>"
    assert special_token_id("a", tokenizer) is special_token_id("a", None) is None


# Over the real engine and random weights.

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}MARK{% endif %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n"
    "{% for call in message.tool_calls %}{{ call.function.name }}({{ call.function.arguments.items() | list }})"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant:OPEN{% endif %}"
)
MODELS = {
    "hermes": ("<tool_call>", ""),
    "llama": ("<|python_tag|>", ""),
    "glm": ("", ""),  # which --tool-format names
    "thinking": ("<tool_call>", " <think>\n"),
    "none": None,
}


@pytest.fixture(scope="module", params=list(MODELS))
def real(request, tiny_model_dir, tiny_chain, start_server, tmp_path_factory):
    """(kind of template, a server over the tiny model with it)"""
    folder = tmp_path_factory.mktemp(request.param) / "tiny-llama"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if MODELS[request.param] is not None:
        mark, opened = MODELS[request.param]
        config["chat_template"] = TEMPLATE.replace("MARK", mark).replace("OPEN", opened)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(model_config | {"max_position_embeddings": 2048}))
    engine_config = EngineConfig(
        model=str(folder),
        layer_map=tiny_chain,
        tiers=(0, 3),
        dtype="float32",
        device="cpu",
        kv_cache_memory=0.02,
    )
    options = {"tool_format": "glm"} if request.param == "glm" else {}
    running = start_server(Engine(engine_config), max_num_seqs=8, **options)
    yield request.param, running
    running.wait_idle()
    running.engine.check_integrity()
    running.close()


def check_calls(calls):
    for call in calls:
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            assert list(arguments) == ["city", "unit"] and arguments["unit"] in ("C", "F")
            assert isinstance(arguments["city"], str) and len(arguments["city"]) <= 6
        elif call.function.name == "sum":
            assert list(arguments) == ["a"] and 0 <= arguments["a"] <= 99
        else:
            assert call.function.name == "now" and arguments == {}


def ask(client, seed, **fields):
    options = {"temperature": 1.0 + seed % 2, "seed": seed, "max_tokens": 150, "model": "tiny-llama"}
    return options | {"messages": [{"role": "user", "content": "x"}]} | fields


def test_a_required_call_is_made_by_every_seed(real):
    kind, server = real
    bias = {str(byte): -100.0 for byte in range(128, 256)}
    with server.client() as client:
        for seed in range(3):
            fields = ask(client, seed, tools=[SUM, NOW], tool_choice="required", logit_bias=bias)
            if kind == "thinking":  # it thinks until it happens to end its thoughts
                whole = client.chat.completions.create(**fields).choices[0]
                assert not whole.message.tool_calls or whole.finish_reason in ("tool_calls", "length")
                assert whole.message.reasoning_content
                continue
            whole = client.chat.completions.create(**fields, parallel_tool_calls=False).choices[0]
            assert whole.finish_reason == "tool_calls" and whole.message.content is None
            assert len(whole.message.tool_calls) == 1
            check_calls(whole.message.tool_calls)
            with client.chat.completions.stream(**fields, parallel_tool_calls=False) as stream:
                list(stream)
                streamed = stream.get_final_completion().choices[0]
            [one], [other] = whole.message.tool_calls, streamed.message.tool_calls
            assert (one.function.name, one.function.arguments) == (
                other.function.name,
                other.function.arguments,
            )


def test_a_named_call_is_of_that_tool(real):
    kind, server = real
    if kind == "thinking":
        pytest.skip("it thinks too long")
    with server.client() as client:
        for seed in range(3):
            choice = {"type": "function", "function": {"name": "weather"}}
            fields = ask(client, seed, tools=[WEATHER, SUM], tool_choice=choice)
            answer = client.chat.completions.create(**fields).choices[0]
            assert [call.function.name for call in answer.message.tool_calls] == ["weather"]
            check_calls(answer.message.tool_calls)
            assert answer.finish_reason == "tool_calls"


def test_parallel_calls_and_a_call_or_an_answer(real):
    kind, server = real
    if kind != "hermes":
        pytest.skip("one format is enough")
    numbers, kinds = set(), set()
    with server.client() as client:
        for seed in range(6):
            fields = ask(client, seed, tools=[SUM], tool_choice="required", temperature=3.0, max_tokens=250)
            answer = client.chat.completions.create(**fields).choices[0]
            if answer.finish_reason == "tool_calls":
                check_calls(answer.message.tool_calls)
                numbers.add(len(answer.message.tool_calls))
            schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["<a>", "<b>"]}}}
            either = client.chat.completions.create(
                **ask(client, seed, tools=[NOW], response_format=schema, temperature=3.0)
            ).choices[0]
            kinds.add(either.finish_reason)
            if either.finish_reason == "stop":
                assert json.loads(either.message.content) in ("<a>", "<b>")
    assert numbers and kinds <= {"tool_calls", "stop"} and len(kinds) == 2


@pytest.mark.parametrize("special", [False, True])
def test_structured_output_comes_after_the_thoughts(special, byte_tokenizer):
    tokenizer = Tokenizer.from_str(byte_tokenizer.to_str())
    if special:
        tokenizer.add_special_tokens([AddedToken("</think>", special=True)])
    spec = GrammarSpec((Part("answer", "regex", "[0-9]{3}"),), "guided_regex").after(thought_rules(tokenizer))
    source = asyncio.run(GrammarCompiler(tokenizer, 300, frozenset({258})).compile(spec))
    for gap in ("", "\n", "\n\n"):
        state = source.start()
        for token in tokenizer.encode(f"1 + 1 é\n</thin so 222</think>{gap}123").ids:
            assert not state.finished
            state.accept(token)
        assert state.finished
    state = source.start()
    for token in tokenizer.encode("</think>\n\n").ids:
        state.accept(token)
    with pytest.raises(RuntimeError):
        state.accept(ord("x"))


def test_a_schema_that_cannot_be_used_names_the_tools(real):
    _, server = real
    broken = {"name": "a", "parameters": {"type": "object", "properties": {"x": {"type": "objekt"}}}}
    with server.client() as client, pytest.raises(openai.BadRequestError, match="objekt") as refused:
        client.chat.completions.create(
            **ask(client, 0, tools=[{"type": "function", "function": broken}], tool_choice="required")
        )
    assert refused.value.param == "tools"


def test_random_text_is_told_alike_streamed_and_whole(real):
    kind, server = real
    rng = random.Random(3)
    for _ in range(2):
        fields = {"tools": [NOW], "seed": rng.randrange(99), "temperature": 2.0, "max_tokens": 30}
        whole = server.chat("x", **fields).json()["choices"][0]["message"]
        message, _ = fold(events(server.chat("x", stream=True, **fields)))
        assert message["content"] == (whole["content"] or "")
        assert message["reasoning_content"] == whole.get("reasoning_content", "")
        assert bool(message["reasoning_content"]) == (kind == "thinking")
