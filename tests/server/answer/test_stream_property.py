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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), route=st.sampled_from(["chat", "completions"]))
@example(case=("a€b", ["€"], [b"a\xe2", b"\x82", b"\xacb"]), route="chat")
@example(case=("aab", ["ab", "aac"], [b"aa", b"b"]), route="completions")
def test_streamed_and_whole_answers_are_the_same_bytes(streamer, case, route):
    text, stops, pieces = case
    streamer.engine.tokenizer, ids = tokenizer_of(pieces)
    streamer.engine.answer = ids
    assert streamer.engine.tokenizer.decode(ids) == text
    body = {"max_tokens": len(ids), "stop": stops or None, "return_token_ids": True}
    send = streamer.chat if route == "chat" else streamer.complete
    whole = send("x", **body).json()["choices"][0]
    lines = send("x", **body, stream=True).content.split(b"\n")
    assert lines[-3:] == [b"data: [DONE]", b"", b""]
    chunks = [json.loads(line[6:]) for line in lines[:-3] if line.startswith(b"data: ")]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    if route == "chat":
        content, deltas = (
            whole["message"]["content"],
            [each["delta"].get("content") or "" for each in choices],
        )
    else:
        content, deltas = whole["text"], [each["text"] for each in choices]
    wanted, stopped_by = expected(pieces, stops)
    assert content == "".join(deltas) == wanted
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    assert choices[-1]["stop_reason"] == whole["stop_reason"] == stopped_by
    assert [token for each in choices for token in each.get("token_ids") or []] == whole["token_ids"]
