"""Response templates: what they make of an answer is what transformers makes of it, in any pieces."""

from __future__ import annotations

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleb.engine.response_template import read_response_template
from sleb.engine.text import TextProcessor
from sleb.errors import ModelError
from sleb.server.message.reading import AnswerReading
from sleb.server.message.reasoning import join_deltas
from sleb.server.message.response_template import TemplateParser
from sleb.server.message.tools import ToolUse

parse_response = pytest.importorskip("transformers.utils.chat_parsing.response_parser").parse_response
NUMBERS = {"properties": {"a": {"type": "integer"}, "text": {"type": "string"}}}
SCHEMAS = {"sum": NUMBERS, "now": None}
TOOLS = [{"type": "function", "function": {"name": n, "parameters": p or {}}} for n, p in SCHEMAS.items()]
THOUGHTS = {"open": "<think>", "close_pattern": r"</think>\s*"}
CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
OBJECTS = {
    "start_anchor": "assistant:",
    "defaults": {"role": "assistant"},
    "fields": {
        "reasoning_content": THOUGHTS,
        "tool_calls": {
            "open": "<call>",
            "close_pattern": r"</call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<end>"},
    },
}
TAGS = {
    "start_anchor_pattern": r"assistant:\s?",
    "fields": {
        "thinking": THOUGHTS,
        "tool_calls": {
            "open_pattern": r"<call>\s*(?P<name>\w+)",
            "close": "</call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"<(?P<key>\w+)>\s*(?P<value>.*?)\s*</\1>"},
            "transform": CALL,
        },
        "content": {},
    },
}
CHANNELS = {
    "start_anchor": "assistant:",
    "fields": {
        "thinking": {"open": "[analysis]", "close": "[end]"},
        "content": {"open": "[final]", "close": "[end]", "content_args": {"strip": False}},
        "tool_calls": {
            "open_pattern": r"\[to=(?P<name>\w+)\]",
            "close": "[end]",
            "repeats": True,
            "content": "json",
            "transform": CALL,
        },
    },
}
TEMPLATES = {"objects": OBJECTS, "tags": TAGS, "channels": CHANNELS}
ANSWERS = {
    "objects": [
        "Just text.",
        "<think>\nI think </thin\n</think>\n\nSo: <call>\n{\"name\": \"now\", \"arguments\": {}}\n</call> <end>",
        '<call>{"name": "sum", "arguments": {"a": 1, "text": "<"}}</call><call>{"name": "now", "arguments": {}}</call>',
        '<call>{"arguments": {"text": "é"}, "name": "sum"}</call>',
    ],
    "tags": [
        "It is <b>.",
        "<think>Hm.</think>\n<call>sum<a>3</a><text> x\ny </text></call><call> now</call>",
    ],
    "channels": ["[analysis]I.[end][final] So. [end]", '[to=sum]{"a": 2}[end]', '[final]x [end][to=now]{}[end]'],
}  # fmt: skip


def parse(name, text, cuts=(), prompt="assistant:", reason="stop", **options):
    """What any pieces of `text` give: a message as `told` has it."""
    parser = TemplateParser(read_response_template(TEMPLATES[name], "x"), SCHEMAS, prompt, **options)
    deltas, start = [], 0
    for end in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        deltas += parser.push(text[start:end], None)
        start = end
    return join_deltas(deltas + parser.push("", reason))


def told(deltas):
    text = {"reasoning": "", "content": ""}
    calls = []
    for delta in deltas:
        if delta.kind == "call":
            calls.append([delta.text, ""])
        elif delta.kind == "arguments":
            calls[delta.index][1] += delta.text
        else:
            text[delta.kind] += delta.text
    return text["reasoning"], text["content"], [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize(
    ("name", "text"), [(name, each) for name, texts in ANSWERS.items() for each in texts]
)
def test_transformers_own_parser_agrees(name, text):
    message = parse_response(text, TEMPLATES[name], prefix="assistant:", tools=TOOLS)
    calls = [
        (each["function"]["name"], each["function"]["arguments"]) for each in message.get("tool_calls", ())
    ]
    thoughts = message.get("reasoning_content", message.get("thinking", ""))
    assert told(parse(name, text)) == (thoughts, message.get("content", ""), calls)


PIECES = st.sampled_from(
    [
        *(text for texts in ANSWERS.values() for text in texts),
        *(
            "<think>",
            "</think>",
            "<call>",
            "</call>",
            "<end>",
            "[final]",
            "[end]",
            "[to=sum]",
            " ",
            "\n",
            "<",
            "x",
        ),
        *('{"name": "now", "arguments": {', "sum", "<a>", "</a>", "{", "}}"),
    ]
)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(PIECES, max_size=8).map("".join),
    st.lists(st.integers(0, 300), max_size=8),
    st.sampled_from(["", "assistant:", "assistant:<think>"]),
    st.booleans(),
    st.sampled_from(["stop", "length"]),
)
def test_any_split_gives_what_the_whole_gives(name, text, cuts, prompt, single, reason):
    options = {"prompt": prompt, "single": single, "reason": reason}
    whole = parse(name, text, **options)
    assert parse(name, text, cuts, **options) == whole
    assert parse(name, text, range(len(text)), **options) == whole
    assert len([delta for delta in whole if delta.kind == "call"]) <= (1 if single else 99)


def test_what_is_no_call_is_content():
    for body in (
        '{"name": "other", "arguments": {}}',
        '{"name": "sum", "arguments": [1]}',
        "[1, 2]",
        "{broken",
    ):
        assert told(parse("objects", f"<call>{body}</call>")) == ("", body, [])
        assert told(parse("objects", f"<call>{body}", reason="length")) == ("", "", [])
    assert told(parse("objects", "so</think>It is.", prompt="assistant:<think>")) == ("so", "It is.", [])


def test_arguments_of_an_object_come_as_they_are_written():
    text = '<call>{"name": "sum", "arguments": {"text": "' + "x" * 50
    parser = TemplateParser(read_response_template(OBJECTS, "x"), SCHEMAS, "assistant:")
    pieces = [[delta.text for delta in parser.push(each, None) if delta.kind == "arguments"] for each in text]
    assert sum(map(bool, pieces)) >= 50


def test_it_reads_answers_unless_a_format_is_named_or_kept_by_a_grammar():
    own = read_response_template(OBJECTS, "x")
    text = '<call>{"name": "now", "arguments": {}}</call>'
    for tool_format, choice, num_calls in (
        ("auto", "auto", 1),
        ("hermes", "auto", 0),
        ("auto", "required", 0),
    ):
        use = ToolUse(TOOLS, choice, False, True, False)
        reading = AnswerReading("{{ tools }}<tool_call>", own, None, use, None, tool_format, "assistant:")
        assert len(told(reading.make_parser().push(text, "stop"))[2]) == num_calls


def with_template(model_dir, tmp_path, template):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"response_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoints_template_belongs_to_its_chat_template(tiny_model_dir, tmp_path):
    folder = with_template(tiny_model_dir, tmp_path, OBJECTS)
    own = TextProcessor(folder).response_template
    assert own is not None and own.fields.keys() == OBJECTS["fields"].keys()
    (tmp_path / "other.jinja").write_text("{{ messages }}")
    assert TextProcessor(folder, chat_template=tmp_path / "other.jinja").response_template is None
    assert TextProcessor(tiny_model_dir).response_template is None


def test_a_pattern_that_takes_for_ever_makes_the_rest_content(caplog):
    slow = json.loads(json.dumps(OBJECTS))
    slow["fields"]["content"] = {"close_pattern": "(b|bb)+c"}
    parser = TemplateParser(read_response_template(slow, "x"), SCHEMAS, "assistant:")
    deltas = parser.push("So: " + "b" * 200, None) + parser.push(" and more", "stop")
    assert "and more" in told(deltas)[1] and "too long" in caplog.text


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("text", "must be a dict"),
        ({"fields": {"content": {}}}, "start_anchor"),
        (OBJECTS | {"fields": {"content": {"content": "yaml"}}}, "yaml"),
        (OBJECTS | {"fields": {"content": {"close_pattern": "("}}}, "regex"),
        (OBJECTS | {"fields": {"content": {"close_pattern": "(a|aa)+b"}}}, "takes longer"),
        (OBJECTS | {"fields": {"tool_calls": {"content": "xml-inline"}}}, "tag_pattern"),
        (OBJECTS | {"defaults": {"role": "x" * 70_000}}, "characters"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_when_the_model_is_loaded(
    template, reason, tiny_model_dir, tmp_path
):
    folder = with_template(tiny_model_dir, tmp_path, template)
    with pytest.raises(ModelError, match=r"response_template in .*tokenizer_config\.json") as refused:
        TextProcessor(folder, None)
    assert reason in str(refused.value) and "--tool-format" in str(refused.value)
