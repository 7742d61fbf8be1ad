"""Any text, any stop strings, any split into tokens: joined deltas are the whole answer, byte for byte."""

from __future__ import annotations

import itertools
import json
import string

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# Emoji with joiners, skin tones and flags, CJK, combining marks, right-to-left, and what frames an event stream.
PIECES = [
    *(
        "👩‍👩‍👧",
        "👍🏽",
        "🇫🇷",
        "世界",
        "한국",
        "e\u0301\u0323",
        "ü",
        "€",
        "שלום",
        "\n\n",
        "data: ",
        "\r",
        "\x00",
        "\u2028",
    ),
    *" abc",
]
# A literal U+FFFD looks like an unfinished character: what is held back then is for the detokenizer's own tests.
CHARACTERS = st.one_of(
    st.sampled_from(PIECES),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=2),
)
# Short, so that no run of tokens that end inside a character is longer than the detokenizer waits for.
TEXTS = (
    st.lists(CHARACTERS, min_size=1, max_size=8)
    .map("".join)
    .filter(lambda text: 0 < len(text.encode()) <= 42)
)


@st.composite
def cases(draw):
    """(text, stop strings, the text's bytes cut into tokens).

    Stop strings are often parts of the text, or begin as it ends.
    """
    text = draw(TEXTS)
    ends = st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))
    parts = ends.map(lambda pair: text[min(pair) : max(pair)])
    begun = st.builds(lambda start, more: text[start:] + more, st.integers(0, len(text)), CHARACTERS)
    stops = draw(st.lists(st.one_of(parts, begun, TEXTS).filter(bool), max_size=4, unique=True))
    data = text.encode()
    cuts = sorted(draw(st.sets(st.integers(1, max(len(data) - 1, 1)), max_size=len(data))))
    bounds = [0, *(cut for cut in cuts if cut < len(data)), len(data)]
    return text, stops, [data[start:end] for start, end in itertools.pairwise(bounds)]


def tokenizer_of(pieces):
    """A byte-level tokenizer that has every piece as a token, and the ids of the pieces."""
    alphabet = _byte_characters()
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    ids = [
        vocabulary.setdefault("".join(alphabet[byte] for byte in piece), len(vocabulary)) for piece in pieces
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, ids


def _byte_characters():
    """The character that byte-level vocabularies write for each byte (GPT-2's bytes_to_unicode)."""
    printable = [
        *map(ord, string.printable[:94]), *range(0xA1, 0xAD), *range(0xAE, 0x100),
    ]  # fmt: skip
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def expected(pieces, stops):
    """The answer by brute force: after each token that ends a character, is there a stop string in all so far?"""
    for count in range(1, len(pieces) + 1):
        so_far = b"".join(pieces[:count]).decode(errors="replace")
        if so_far.endswith("\ufffd"):
            continue
        found = [(so_far.index(stop), -len(stop), stop) for stop in stops if stop in so_far]
        if found:
            start, _, stop = min(found)
            return so_far[:start], stop
    return b"".join(pieces).decode(), None


@pytest.fixture(scope="module")
def streamer(start_server, make_fake_engine):
    server = start_server(make_fake_engine(max_model_len=4096))
    yield server
    server.close()


FORMATS = ("chat.completions", "completions", "responses", "messages", "ollama chat", "ollama generate")
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOOLS = (
    {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    {"name": "sum", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
)


@settings(SETTINGS, max_examples=150)
@given(case=cases(), route=st.sampled_from(FORMATS))
@example(case=("a€b", ["€"], [b"a\xe2", b"\x82", b"\xacb"]), route="chat.completions")
@example(case=("aab", ["ab", "aac"], [b"aa", b"b"]), route="completions")
@example(case=("aab", ["ab", "aac"], [b"aa", b"b"]), route="messages")
@example(case=("a€b", ["€"], [b"a\xe2", b"\x82", b"\xacb"]), route="ollama generate")
def test_streamed_and_whole_answers_are_the_same_bytes(streamer, wire, case, route):
    text, stops, pieces = case
    streamer.engine.tokenizer, ids = tokenizer_of(pieces)
    streamer.engine.answer = ids
    assert streamer.engine.tokenizer.decode(ids) == text
    format_ = wire.FORMATS[route]
    question = wire.Question("x", len(ids), tuple(stops))
    if route in ("chat.completions", "completions"):
        question = question.but(more={"return_token_ids": True})
    whole, streamed = (format_.ask(streamer, question, stream) for stream in (False, True))
    assert streamed == whole
    wanted, stopped_by = expected(pieces, stops)
    assert whole.text == wanted
    assert whole.thoughts == ""
    assert whole.calls == []
    assert whole.finish == "stop"
    assert whole.stopped_by == (stopped_by if format_.tells_stop else None)
    assert whole.num_prompt == 1
    if whole.token_ids is not None:
        assert whole.token_ids == ids[: whole.num_output]


@st.composite
def messages(draw):
    """An answer with thoughts, text and calls, good ones and broken ones, and where it is cut into tokens."""
    words = st.one_of(st.sampled_from([*PIECES, "{", "}", '"', "<", "</"]), st.text("ab {}<>", max_size=5))
    text = st.lists(words, max_size=5).map("".join)
    value = st.one_of(
        st.integers(-9, 99), st.sampled_from(["Köln", "a}b", "\n", ""]), st.none(), st.booleans()
    )
    arguments = st.dictionaries(st.sampled_from(["city", "a", "ü"]), value, max_size=3)
    call = st.builds(
        lambda name, arguments: (
            f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>'
        ),
        st.sampled_from(["weather", "sum"]),
        arguments,
    )
    broken = call.flatmap(lambda text: st.integers(1, len(text)).map(lambda end: text[:end]))
    thought = text.map(lambda words: f"<think>{words}</think>")
    answer = draw(st.one_of(thought, st.just(""), st.just("<think>\nopen")))
    answer += "".join(draw(st.lists(st.one_of(text, call, call, broken), max_size=4)))
    data = (answer or "x").encode()
    cuts = sorted(draw(st.sets(st.integers(1, len(data)), max_size=12)) - {len(data)})
    return [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]


@settings(SETTINGS, max_examples=120)
@given(
    pieces=messages(),
    route=st.sampled_from([each for each in FORMATS if each != "completions"]),
    length=st.booleans(),
)
def test_streamed_messages_are_the_whole_ones(streamer, wire, pieces, route, length):
    streamer.engine.tokenizer, ids = tokenizer_of(pieces)
    streamer.engine.answer, streamer.engine.chat_template = ids, "<think>"
    tools = () if route == "ollama generate" else TOOLS
    question = wire.Question("x", len(ids) - 1 if length and len(ids) > 1 else len(ids), tools=tools)
    format_ = wire.FORMATS[route]
    try:
        whole, streamed = (format_.ask(streamer, question, stream) for stream in (False, True))
        assert streamed == whole
        assert "<think>" not in whole.thoughts
        chat = wire.FORMATS["chat.completions"].ask(streamer, question, False)
    finally:
        streamer.engine.chat_template = None
    assert (whole.text, whole.thoughts) == (chat.text, chat.thoughts)
    assert [name for name, _ in whole.calls] == [name for name, _ in chat.calls]
    assert (whole.num_prompt, whole.num_output) == (chat.num_prompt, chat.num_output)
