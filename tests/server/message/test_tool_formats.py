"""Every format against chat templates that write calls as its models' templates do: rendered by transformers, read by
our parsers, held by the grammar of required calls, which llguidance follows at random."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from sleb.server.grammar.notation import as_llguidance
from sleb.server.message.channels import ChannelParser
from sleb.server.message.parser import MarkedParser
from sleb.server.message.reasoning import REASONING, ReasoningParser, join_deltas, reasoning_marks
from sleb.server.message.tool_formats import FORMATS, GPT_OSS, HERMES, PLAIN, choose
from sleb.server.message.tool_parser import CallMarks, ToolParser
from sleb.server.message.tools import ToolUse

PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "sure": {"type": "boolean"},
        "at": {"$ref": "#/$defs/at"},
    },
    "required": ["city", "unit"],
    "$defs": {"at": {"type": "array", "items": {"enum": [1, 20]}, "maxItems": 2}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now"}},
]
SCHEMAS = {"get_weather": PLACE, "now": None}
CALLS = [
    ("get_weather", {"city": "Köln", "unit": "C", "days": 3, "sure": True, "at": [1, 20]}),
    ("now", {}),
    ("get_weather", {"city": 'a "b"', "unit": "F"}),
]
# How each family's chat template writes what an assistant called: EACH of the functions, an OBJECT with its name, EVERY
# argument and its VALUE, NEXT after a comma.
WORDS = {
    "EACH": "{% for f in calls %}",
    "EVERY": "{% for k, v in f.arguments.items() %}",
    "OBJECT": '{"name": "NAME", "arguments": ARGUMENTS}',
    "NAME": "{{ f.name }}",
    "ARGUMENTS": "{{ f.arguments | tojson }}",
    "VALUE": "{{ v if v is string else v | tojson }}",
    "PYTHON": "{{ v | string if v is boolean else v | tojson }}",
    "NEXT": "{% if not loop.last %}, {% endif %}END",
    "END": "{% endfor %}",
}
TEMPLATES = {
    "hermes": "EACH\n<tool_call>\nOBJECT\n</tool_call>END",
    "llama3-json": '{# <|python_tag|> #}EACH{"name": "NAME", "parameters": ARGUMENTS}END',
    "mistral": "EACH[TOOL_CALLS]NAME[CALL_ID]aB3456789[ARGS]ARGUMENTSEND",
    "mistral-list": '[TOOL_CALLS][EACH{{ (f | tojson)[:-1] }}, "id": "aB3456789"}NEXT]',
    "qwen3-coder": "EACH\n<tool_call>\n<function=NAME>\nEVERY<parameter={{ k }}>\n"
    "{{ v | string if v is string or v is boolean else v | tojson }}\n</parameter>\nEND</function>\n</tool_call>END",
    "seed-oss": "EACH\n<seed:tool_call>\n<function=NAME>\nEVERY<parameter={{ k }}>VALUE</parameter>\nEND</function>\n"
    "</seed:tool_call>END",
    "minimax-m2": '\n<minimax:tool_call>\nEACH<invoke name="NAME">\n'
    'EVERY<parameter name="{{ k }}">VALUE</parameter>\nEND</invoke>\nEND</minimax:tool_call>',
    "minimax-m1": "<tool_calls>\nEACHOBJECT\nEND</tool_calls>",
    "glm": "EACH\n<tool_call>NAME\nEVERY<arg_key>{{ k }}</arg_key>\n<arg_value>VALUE</arg_value>\nEND</tool_call>END",
    "functionary": "{# <|python_tag|> #}EACH<function=NAME>ARGUMENTS</function>END",
    "pythonic": "{# [func_name1(params_name1=params_value1)] #}[EACHNAME(EVERY{{ k }}={{ v | tojson }}NEXT)NEXT]",
    "lfm2": "<|tool_call_start|>[EACHNAME(EVERY{{ k }}={% if v is string %}'{{ v }}'{% else %}PYTHON{% endif %}NEXT)"
    "NEXT]<|tool_call_end|>",
    "phi4-mini": "<|tool_call|>[EACHOBJECTNEXT]<|/tool_call|>",
    "functools": " functools[EACHOBJECTNEXT]",
    "granite": "<|tool_call|>[EACHOBJECTNEXT]",
    "nemotron": "<TOOLCALL>[EACHOBJECTNEXT]</TOOLCALL>",
    "apriel": '\n<tool_calls>[EACH{"name": "NAME", "arguments": ARGUMENTS, "id": "a1"}NEXT]</tool_calls>',
    "deepseek-v3.1": "<｜tool▁calls▁begin｜>EACH<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>END"
    "<｜tool▁calls▁end｜>",
    "kimi-k2": "<|tool_calls_section_begin|>EACH<|tool_call_begin|>functions.NAME:{{ loop.index0 }}"
    "<|tool_call_argument_begin|>ARGUMENTS<|tool_call_end|>END<|tool_calls_section_end|>",
    "gpt-oss": "EACH<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGUMENTSEND",
    "fenced": "EACH```json\nOBJECT\n```\nEND",
    "json": "EACHOBJECT{% if not loop.last %};{% endif %}END",
}
FORMS = {form.name: form for form in FORMATS}
SINGLE = ("llama3-json", "gpt-oss")  # their templates write one call a message
BARE = {"json", "llama3-json", "pythonic"}  # where no mark tells a call from text
TOKENS = LLTokenizer("byte")


def template(name):
    calls = "{% set calls = messages[-1].tool_calls | map(attribute='function') | list %}"
    text = TEMPLATES[name]
    for word, meaning in WORDS.items():
        text = text.replace(word, meaning)
    return f"{{{{- '' if tools else '' -}}}}{calls}{text}"


def written(name, calls=CALLS):
    made = [{"id": "x", "type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    message = {"role": "assistant", "content": "", "tool_calls": made}
    [text], _ = render_jinja_template(conversations=[[message]], tools=TOOLS, chat_template=template(name))
    return text


def make_parser(name, *, alone=True, live=False, single=False):
    form = FORMS[name]
    if form is GPT_OSS:
        return ChannelParser(SCHEMAS, "<|start|>assistant", single=single)
    marks = CallMarks.of(form, alone=alone)
    return MarkedParser(None, ToolParser(SCHEMAS, SCHEMAS, marks, live=live, single=single))


def parse(name, text, cuts=(), reason="stop", **options):
    parser = make_parser(name, **options)
    deltas, start = [], 0
    for end in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        deltas += parser.push(text[start:end], None)
        start = end
    return join_deltas(deltas + parser.push("", reason))


def told(deltas):
    calls = []
    for delta in deltas:
        if delta.kind == "call":
            calls.append([delta.text, ""])
        elif delta.kind == "arguments":
            calls[delta.index][1] += delta.text
    content = "".join(delta.text for delta in deltas if delta.kind == "content")
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


def matcher(name, choice="required", parallel=True):
    use = ToolUse(TOOLS, choice, choice != "required", parallel, False)
    parts = use.grammar(FORMS[name], None).parts
    grammars = [as_llguidance(LLMatcher, part) | {"name": part.name} for part in parts]
    made = LLMatcher(TOKENS, json.dumps({"grammars": grammars}))
    assert not made.is_error(), made.get_error()
    return made


def test_there_is_a_template_for_every_format():
    assert TEMPLATES.keys() == FORMS.keys()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_shows_its_format(name):
    assert choose(template(name)).name == name
    assert choose("{{ nothing }}", name) is choose(None, name) is FORMS[name]
    assert choose(template(name), "auto") is FORMS[name]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("alone", [False, True])
def test_what_a_template_writes_is_read_as_it_was(name, alone):
    calls = CALLS[:1] if name in SINGLE else CALLS
    if name == "lfm2":  # its template does not escape quotes
        calls = calls[:2]
    assert told(parse(name, written(name, calls), alone=alone)) == ("", calls)
    [first, *_] = calls
    assert told(parse(name, written(name, calls), alone=alone, single=True)) == ("", [first])


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - BARE - {"gpt-oss"}))
def test_text_before_calls_is_content(name):
    content, calls = told(parse(name, "Let me see.\n" + written(name, CALLS[:1])))
    if name == "fenced":  # it is a block of an answer like any
        assert not calls and "```json" in content
    else:
        assert (content, calls) == ("Let me see.", CALLS[:1])


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_grammar_of_required_calls_takes_what_the_template_writes(name):
    calls = CALLS[:1] if name in SINGLE else CALLS[:2]
    text = list(written(name, calls).strip().encode())
    whole = matcher(name)
    assert whole.validate_tokens(text) == len(text)
    whole.consume_tokens(text)
    assert whole.is_accepting()
    other = list(written(name, [("now", {})]).strip().encode())
    assert matcher(name, "get_weather").validate_tokens(other) < len(
        other
    )  # it is not the tool that was named
    if name not in SINGLE:
        assert matcher(name, parallel=False).validate_tokens(text) < len(text)
    wrong = list(written(name, [("get_weather", {"city": "Köln", "unit": "K"})]).strip().encode())
    assert whole.reset() is not False and matcher(name).validate_tokens(wrong) < len(wrong)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_follows_the_grammar_at_random_is_calls(name):
    rng = random.Random(name)
    for _ in range(4):
        state, text = matcher(name, parallel=False), b""
        while not state.is_stopped() and len(text) < 1500:
            words = np.frombuffer(state.compute_bitmask(), dtype=np.uint8)
            allowed = [
                token for token in np.flatnonzero(np.unpackbits(words, bitorder="little")) if token < 256
            ]
            if not allowed or (state.is_accepting() and rng.random() < 0.5):
                break
            plain = [token for token in allowed if 32 <= token < 127]
            token = int(rng.choice(plain or allowed))
            state.consume_token(token)
            text += bytes([token])
        if name == "gpt-oss" and not state.is_accepting():
            continue  # it thinks for as long as it likes
        assert state.is_accepting(), text
        [(called, arguments)] = told(parse(name, text.decode(), live=True))[1]
        if called == "get_weather":
            assert {"city", "unit"} <= arguments.keys() <= PLACE["properties"].keys()
            assert arguments["unit"] in ("C", "F") and isinstance(arguments["city"], str)
            assert isinstance(arguments.get("sure", True), bool)
        else:
            assert (called, arguments) == ("now", {})


BROKEN = st.sampled_from(
    ["", " ", "\n", '"', "'", "{", "}", "(", ")", ",", "x", "now", "C", "true", "3", "<", "]"]
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), st.data())
def test_what_the_grammar_takes_of_a_changed_text_is_a_call_that_fits_the_schema(name, data):
    text = written(name, CALLS[:1]).strip()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 12)))
    changed = text[:start] + data.draw(BROKEN) + text[end:]
    state = matcher(name)
    if state.try_consume_tokens(list(changed.encode())) == len(changed.encode()) and state.is_accepting():
        content, [(called, arguments)] = told(parse(name, changed, live=True))
        assert not content and called == "get_weather"
        jsonschema.validate(arguments, PLACE)


SYMBOLS = [
    *"(){}[],;:<`",
    "city=",
    "'x'",
    "```",
    "text",
    "to=",
    "true",
    "assistant",
    "analysis",
    "final",
    "functions.",
]
JSON_PIECES = [
    '"',
    " ",
    "\n",
    '{"name": "now", "arguments": {}}',
    '{"name": "now", ',
    '"arguments": {"city": "a',
]
PIECES = st.sampled_from(
    [*(mark for form in FORMATS for mark in form.marks), *SCHEMAS, *SYMBOLS, *JSON_PIECES]
)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(PIECES | st.sampled_from(sorted(TEMPLATES)).map(written), max_size=10).map("".join),
    st.lists(st.integers(0, 400), max_size=10),
    st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(["stop", "length"]),
)  # fmt: skip
def test_any_split_gives_what_the_whole_gives(name, text, cuts, alone, live, single, reason):
    options = {"alone": alone, "live": live, "single": single, "reason": reason}
    whole = parse(name, text, **options)
    assert parse(name, text, cuts, **options) == whole
    assert parse(name, text, range(len(text)), **options) == whole
    assert len([delta for delta in whole if delta.kind == "call"]) <= (1 if single else 99)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_cut_anywhere_leaves_beginnings_of_calls_and_no_marks(name):
    text = written(name, CALLS[:1] if name in SINGLE else CALLS[:2])
    for end in range(len(text)):
        deltas = parse(name, text[:end], reason="length", live=True)
        names = [delta.text for delta in deltas if delta.kind == "call"]
        assert names == ["get_weather", "now"][: len(names)]
        said = "".join(delta.text for delta in deltas if delta.kind == "content").strip()
        assert not said or (name in ("functools", "fenced") and text.strip().startswith(said)), (end, said)
        first = "".join(delta.text for delta in deltas if delta.kind == "arguments" and delta.index == 0)
        if names[1:]:
            assert json.loads(first) == CALLS[0][1]


@pytest.mark.parametrize(
    "name", [name for name in TEMPLATES if name not in ("json", "llama3-json", "pythonic", "fenced")]
)
def test_arguments_stream_behind_a_mark(name):
    """A long text comes as it is written, before the call ends; Python's values come one at a time."""
    text = written(name, [("get_weather", {"city": "x" * 50, "unit": "C"})])
    parser = make_parser(name)
    pieces = [[delta.text for delta in parser.push(each, None) if delta.kind == "arguments"] for each in text]
    assert sum(map(bool, pieces)) >= (2 if name == "lfm2" else 50)


def test_pythonic_calls_as_templates_of_llama_write_them():
    """Without the quotes of texts (3.2), or with quotes about every value (4)."""
    bare = "[get_weather(city=New York, unit=C, days=3, sure=True, at=[1]), now()]"
    quoted = '[get_weather(city="New York", unit="C", days="3", sure="True", at="[1]"), now()]'
    wanted = [
        ("get_weather", {"city": "New York", "unit": "C", "days": 3, "sure": True, "at": [1]}),
        ("now", {}),
    ]
    assert told(parse("pythonic", bare)) == told(parse("pythonic", quoted)) == ("", wanted)
    assert not told(parse("pythonic", "[get_weather(city=f(1))]"))[1]


def test_the_documentation_names_every_format():
    text = (Path(__file__).parents[3] / "docs/serving.md").read_text()
    assert [name for name in TEMPLATES if f"`{name}`" not in text] == []


def test_a_format_that_is_named_reads_no_other():
    assert told(parse("mistral", written("hermes"), alone=True))[1] == []
    assert told(parse("mistral", written("hermes"), alone=False))[1] == CALLS
    with pytest.raises(StopIteration):
        choose(None, "nothing")


def test_channels():
    text = (
        "<|channel|>analysis<|message|>I think.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
        "<|end|><|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>"
        "<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{\"city\": \"a\nb\"}<|call|>"
        "<|start|>assistant<|channel|>final<|message|>Done.<|return|>"
    )  # fmt: skip
    for cuts in ((), range(len(text))):
        deltas = parse("gpt-oss", text, cuts)
        assert told(deltas) == ("I look.\nDone.", [("now", {}), ("get_weather", {"city": "a\nb"})])
        assert "".join(delta.text for delta in deltas if delta.kind == "reasoning") == "I think."
    assert told(parse("gpt-oss", "Plain <b>text</b>, to=you")) == ("Plain <b>text</b>, to=you", [])
    assert told(parse("gpt-oss", "<|channel|>commentary to=browser.search<|message|>x")) == ("x", [])
    begun = ChannelParser((), "user<|end|><|start|>assistant<|channel|>final<|message|>It ")
    assert [delta.text for delta in begun.push("is.", "stop")] == ["is."]


@pytest.mark.parametrize("marks", REASONING, ids=range(len(REASONING)))
def test_reasoning_between_the_marks_that_a_template_shows(marks):
    shown = "".join(marks.shown[0]) if marks.shown else marks.begin + marks.end
    assert reasoning_marks("{{ messages }}" + shown, None) is marks
    before, behind = marks.answer or ("", "")
    text = f"{marks.begin}\nI\n\nthink.\n{marks.end}\n{before}It is.{behind}"
    for step in (1, 3, 100):
        parser = ReasoningParser(False, marks)
        pieces = [parser.push(text[start : start + step]) for start in range(0, len(text), step)]
        told = join_deltas([delta for piece in [*pieces, parser.flush()] for delta in piece])
        assert [(delta.kind, delta.text) for delta in told] == [
            ("reasoning", "I\n\nthink."),
            ("content", "It is."),
        ]
    assert reasoning_marks("{{ messages }}", None) is None


def test_a_template_without_tools_is_told_of_hermes():
    assert choose("{{ messages }}[TOOL_CALLS]") is choose(None) is HERMES
    assert choose("{{ tools }}") is PLAIN
