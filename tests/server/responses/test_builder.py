"""Which tokens an output's texts are made of, where marks and calls hold the same letters."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from sleb.engine.outputs import TokenLogprobs
from sleb.server.message.parser import MarkedParser
from sleb.server.message.reasoning import ReasoningParser
from sleb.server.message.tool_parser import ToolParser
from sleb.server.responses.builder import OutputBuilder

CALL = '<tool_call>\n{"name": "think", "arguments": {"h": "call"}}\n</tool_call>'


class Texts:
    """The table of tokens, as TokenTexts has it."""

    def __init__(self):
        self.pieces = []

    def string(self, token_id):
        return self.pieces[token_id]

    def utf8(self, token_id):
        return self.pieces[token_id].encode()


# Letters that the marks and the call have too, none of which is the beginning of one.
WORDS = st.lists(st.text("thinkcal\u00e9", min_size=1, max_size=3), min_size=1, max_size=5)
BODIES = st.lists(WORDS, min_size=1, max_size=3)


@given(thoughts=WORDS, bodies=BODIES, cuts=st.sets(st.integers(1, len(CALL) - 1), max_size=4))
def test_logprobs_are_of_the_tokens_that_made_the_text(thoughts, bodies, cuts):
    """An answer with a token for each mark: thoughts, then words with a call between them, cut anywhere."""
    bounds = [0, *sorted(cuts), len(CALL)]
    call = [CALL[begin:end] for begin, end in itertools.pairwise(bounds)]
    pieces = [("<think>", ""), *((word, "thought") for word in thoughts), ("</think>", "")]
    for number, words in enumerate(bodies):
        pieces += [(piece, "") for piece in call] if number else []
        pieces += [(word, f"text {number}") for word in words]
    texts = Texts()
    texts.pieces = [piece for piece, _ in pieces]
    parser = MarkedParser(ReasoningParser(False), ToolParser(["think"], {}))
    builder = OutputBuilder(texts, 0)
    told = []
    for token_id, (piece, _) in enumerate(pieces):
        deltas = parser.push(piece, "stop" if token_id == len(pieces) - 1 else None)
        told += builder.push(deltas, [token_id], [TokenLogprobs(token_id, -float(token_id), [])])
    builder.finish("completed")
    assert builder.num_reasoning_tokens == len(thoughts)
    said = [item for item in builder.output if item["type"] == "message"]
    assert ["".join(words) for words in bodies] == [item["content"][0]["text"] for item in said]
    for number, item in enumerate(said):
        made = [-entry["logprob"] for entry in item["content"][0]["logprobs"]]
        assert made == [place for place, (_, kind) in enumerate(pieces) if kind == f"text {number}"]
    streamed = [entry for event in told for entry in event.get("logprobs", ()) if "delta" in event]
    assert streamed == [entry for item in said for entry in item["content"][0]["logprobs"]]
