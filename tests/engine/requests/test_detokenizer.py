"""Text token by token: joined pieces are the whole text, cut at stop strings; nothing broken leaves early."""

from __future__ import annotations

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sleb.engine.requests.detokenizer import Detokenizer

BROKEN = "\ufffd"
byte_ids = st.lists(
    st.one_of(st.integers(0, 255), st.sampled_from([0xE2, 0x82, 0xAC, 0xF0, 0x9F])), max_size=24
)
text_ids = st.text(st.sampled_from("abc €ü😀é\n"), max_size=12).map(lambda text: list(text.encode()))
token_ids = st.one_of(
    byte_ids,
    text_ids,
    st.builds(lambda before, broken, after: [*before, *broken, *after], text_ids, byte_ids, text_ids),
)
stop_lists = st.lists(st.text(st.sampled_from("abc €ü"), min_size=1, max_size=4), max_size=3)


def feed(detokenizer, ids, check_from=0):
    """The pieces of `ids` up to a stop string, or with the flush at the end, and how many ids were used."""
    pieces = []
    for index, token in enumerate(ids):
        pieces.append(detokenizer.push(token, check_stop=index >= check_from))
        if detokenizer.stopped_by is not None:
            return pieces, len(pieces)
    return [*pieces, detokenizer.flush(check_stop=len(ids) > check_from)], len(ids)


def first_stop(text, stops):
    """(start, stop) of the stop string that begins first, the longest of those; None without one."""
    found = [(text.index(stop), -len(stop), stop) for stop in stops if stop in text]
    return (min(found)[0], min(found)[2]) if found else None


@pytest.fixture(scope="session", params=["bytes", "merges"])
def tokenizer(request, byte_tokenizer, merged_tokenizer):
    return byte_tokenizer if request.param == "bytes" else merged_tokenizer


@settings(max_examples=200)
@given(ids=token_ids, context=text_ids)
@example(ids=[0xE2, 0x82], context=[])
@example(ids=[0xE2, 0x82, 0xAC, 0xFF, 0xFF], context=[0x61])
@example(ids=list("�a�".encode()), context=[])
@example(ids=[0xE2] * 40 + list("€a".encode()), context=list("€€€€".encode()))
@example(ids=list("€😀".encode()) * 12, context=list("€€€€€".encode()))
def test_joined_pieces_are_the_whole_text(ids, context, byte_tokenizer):
    pieces, _ = feed(Detokenizer(byte_tokenizer, context), ids)
    assert "".join(pieces) == bytes(ids).decode(errors="replace") == byte_tokenizer.decode(ids)


@settings(max_examples=200)
@given(ids=token_ids)
def test_no_broken_character_before_it_is_certain(ids, byte_tokenizer):
    """After each token the text so far is a prefix of the whole, without the character that is under way."""
    whole, detokenizer, text = bytes(ids).decode(errors="replace"), Detokenizer(byte_tokenizer, []), ""
    for index, token in enumerate(ids):
        text += detokenizer.push(token)
        assert whole.startswith(text)
        complete = bytes(ids[: index + 1]).decode(errors="ignore")
        assert text.replace(BROKEN, "") == complete or text.replace(BROKEN, "") == complete[: len(text)]
        so_far = bytes(ids[: index + 1]).decode(errors="replace")
        assert text == so_far or so_far.endswith(BROKEN), "text that is certain is held back"
    assert text + detokenizer.flush() == whole


@settings(max_examples=300)
@given(ids=token_ids, stops=stop_lists, include=st.booleans())
def test_stop_strings_in_any_tokenisation(ids, stops, include, byte_tokenizer):
    detokenizer = Detokenizer(byte_tokenizer, [], stops, include_stop=include)
    pieces, num_used = feed(detokenizer, ids)
    whole = bytes(ids[:num_used]).decode(errors="replace")
    before = bytes(ids[: num_used - 1]).decode(errors="replace") if num_used else ""
    assert first_stop(before, stops) is None or before.endswith(BROKEN), "stopped too late"
    found = first_stop(whole, stops)
    if found is None:
        assert detokenizer.stopped_by is None and "".join(pieces) == whole
        return
    start, stop = found
    assert detokenizer.stopped_by == stop
    assert "".join(pieces) == (whole[: start + len(stop)] if include else whole[:start])


@settings(max_examples=300)
@given(ids=text_ids, stops=stop_lists)
def test_only_a_possible_beginning_of_a_stop_string_is_held_back(ids, stops, byte_tokenizer):
    detokenizer, text = Detokenizer(byte_tokenizer, [], stops), ""
    for index, token in enumerate(ids):
        text += detokenizer.push(token)
        if detokenizer.stopped_by is not None:
            return
        so_far = bytes(ids[: index + 1]).decode(errors="ignore")
        held = so_far[len(text) :]
        assert so_far.startswith(text)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@settings(max_examples=200)
@given(text=st.text(st.sampled_from("abc €"), max_size=14), stops=stop_lists, cut=st.integers(0, 14))
@example(text="b €", stops=[" "], cut=2)
def test_tokens_that_end_inside_a_character(text, stops, cut, merged_tokenizer):
    """Merged vocabularies have tokens such as a space and the first byte of a character together.

    What such a token completes is text like any other: a stop string in it must not come out with the flush.
    """
    ids = merged_tokenizer.encode(text).ids[:cut]
    detokenizer = Detokenizer(merged_tokenizer, [], stops)
    pieces, num_used = feed(detokenizer, ids)
    whole = merged_tokenizer.decode(ids[:num_used])
    found = first_stop(whole, stops)
    assert "".join(pieces) == (whole if found is None else whole[: found[0]])


@settings(max_examples=100)
@given(ids=text_ids, stops=stop_lists, check_from=st.integers(0, 8))
def test_stop_strings_that_may_not_stop_yet_are_text(ids, stops, check_from, byte_tokenizer):
    """min_tokens: stop strings do not end the answer before then, and nothing that they held back is lost."""
    detokenizer = Detokenizer(byte_tokenizer, [], stops)
    pieces, num_used = feed(detokenizer, ids, check_from)
    whole = bytes(ids[:num_used]).decode(errors="replace")
    if detokenizer.stopped_by is None:
        assert "".join(pieces) == whole
    else:
        assert num_used > check_from
        assert whole.startswith("".join(pieces) + detokenizer.stopped_by)


def test_a_stop_string_that_came_too_early_is_not_looked_at_again(byte_tokenizer):
    """ "ab" is complete before it may stop, and also begins "abc": it is text, whatever comes after."""
    detokenizer = Detokenizer(byte_tokenizer, [], ["ab", "abc"])
    pieces, num_used = feed(detokenizer, list(b"abdab!"), check_from=2)
    assert ("".join(pieces), num_used, detokenizer.stopped_by) == ("abd", 5, "ab")


@settings(max_examples=200)
@given(context=byte_ids, ids=token_ids)
@example(context=[0xE2], ids=[0x82, 0xAC, 0x61])
@example(context=[0xE2, 0x82], ids=[0xAC])
@example(context=[0xC3], ids=[0xBC, 0xBC, 0x61])
@example(context=[0x61, 0xE2], ids=[0x62])
def test_a_prompt_that_ends_inside_a_character(context, ids, byte_tokenizer):
    """Whatever becomes of the character that prompt and answer share, nothing else of the answer is lost."""
    assume(context)
    pieces, _ = feed(Detokenizer(byte_tokenizer, context), ids)
    alone = bytes(ids).decode(errors="replace")
    continued = bytes(context + ids).decode(errors="replace")
    assert "".join(pieces) == alone or continued.endswith("".join(pieces))
    assert [each for each in "".join(pieces) if each.isascii()] == [each for each in alone if each.isascii()]


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens(skip, tokenizer):
    ids = [104, 105, 258, 33]
    pieces, _ = feed(Detokenizer(tokenizer, [], skip_special_tokens=skip), ids)
    assert "".join(pieces) == ("hi!" if skip else "hi<|im_end|>!")


def test_a_stop_string_may_be_a_special_token_that_is_shown(byte_tokenizer):
    detokenizer = Detokenizer(byte_tokenizer, [], ["<|im_end|>"], skip_special_tokens=False)
    assert feed(detokenizer, [104, 258, 33]) == (["h", ""], 2)


def test_ids_that_the_tokenizer_does_not_know_are_no_text(byte_tokenizer):
    """A padded vocabulary has more rows than the tokenizer has tokens."""
    pieces, _ = feed(Detokenizer(byte_tokenizer, []), [104, 262, 105, 263])
    assert "".join(pieces) == "hi"


def test_without_a_tokenizer_there_is_no_text():
    assert feed(Detokenizer(None, [1, 2], ["x"]), [1, 2, 3]) == (["", "", "", ""], 3)


@pytest.fixture(scope="module")
def llama2():
    """A tokenizer whose decoder is Llama 2's: spaces as ▁, the first of a text stripped, bytes as a fall-back."""
    from tokenizers import Tokenizer, decoders, models

    words = ["<unk>", "▁Hello", "▁world", "▁", "a", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


class TestSentencePiece:
    def test_the_space_after_the_prompt_is_kept(self, llama2):
        pieces, _ = feed(Detokenizer(llama2, [1]), [2, 5])
        assert "".join(pieces) == " world!"

    def test_a_character_in_bytes(self, llama2):
        euro = [6 + byte for byte in "€".encode()]
        pieces, _ = feed(Detokenizer(llama2, [1]), [2, *euro, 5])
        assert pieces == [" world", "", "", "€", "!", ""]

    def test_a_long_run_of_characters_in_bytes(self, llama2):
        """Longer than any window that the decoder looks back over, in the prompt and in the answer."""
        run = [6 + byte for byte in ("€" * 12).encode()]
        for prompt in ([1], [1, *run], run):
            pieces, _ = feed(Detokenizer(llama2, prompt), [*run, 5])
            assert "".join(pieces) == "€" * 12 + "!"

    @settings(max_examples=200)
    @given(
        ids=st.lists(st.sampled_from([1, 2, 3, 4, 5, 6 + 0x41, 6 + 0xE2, 6 + 0x82, 6 + 0xAC]), max_size=10)
    )
    def test_nothing_is_lost(self, ids, llama2):
        """The decoder rewrites earlier bytes when a run of them turns out broken; the rest comes out all the same."""
        detokenizer = Detokenizer(llama2, [1])
        pieces, _ = feed(detokenizer, ids)
        words = {1: " Hello", 2: " world", 3: " ", 4: "a", 5: "!"}
        expected = "".join(words.get(token, "") for token in ids)
        text = "".join(pieces)
        plain = "".join(each for each in text if each.isascii() and each != "A")
        assert plain == expected


IM_START, IM_END = 257, 258
SPECIAL = {IM_START: "<|im_start|>", IM_END: "<|im_end|>"}  # of the byte tokenizer, which leaves both out
special_stops = st.lists(
    st.sampled_from(
        ["<|im_end|>", "a<|im_end|>", "<|im_end|>b", "<|im_end|><|im_start|>", "<|im_start|>€", "bc"]
    ),
    max_size=3,
)


@settings(max_examples=200)
@given(
    ids=st.lists(st.sampled_from([*b"abc", IM_END, IM_START, 0xE2, 0x82, 0xAC]), max_size=10),
    stops=special_stops,
    include=st.booleans(),
    shown=st.sampled_from([(), (IM_START,)]),
)
@example(ids=[*b"ab", IM_END, *b"c"], stops=["<|im_end|>"], include=True, shown=())
@example(ids=[*b"ab", IM_END, *b"c"], stops=["b<|im_end|>c"], include=False, shown=())
@example(ids=[IM_END, *b"ab"], stops=["a<|im_end|>"], include=False, shown=())
def test_stop_strings_that_name_special_tokens(ids, stops, include, shown, byte_tokenizer):
    """They are found where the tokens are, of whose text none is seen but what is shown or asked for."""
    detokenizer = Detokenizer(byte_tokenizer, [], stops, include_stop=include, shown=shown)
    pieces, num_used = feed(detokenizer, ids)
    spelled = {token for token in SPECIAL if token in shown or any(SPECIAL[token] in stop for stop in stops)}
    # A character a byte, so that what is unfinished counts too.
    spoken = "".join(
        SPECIAL[token] if token in spelled else chr(token)
        for token in ids[:num_used]
        if token < 256 or token in spelled
    )
    found = first_stop(spoken, [stop.encode().decode("latin-1") for stop in stops])
    text, stopped_by = "".join(pieces), detokenizer.stopped_by
    assert (stopped_by or "").encode().decode("latin-1") == ("" if found is None else found[1])
    if include and stopped_by is not None:
        assert text.endswith(stopped_by)
        text = text.removesuffix(stopped_by)
    seen = spoken if found is None else spoken[: found[0]]
    for token in spelled - set(shown):
        seen = seen.replace(SPECIAL[token], "")
    assert text == seen.encode("latin-1").decode(errors="replace") or BROKEN in text
