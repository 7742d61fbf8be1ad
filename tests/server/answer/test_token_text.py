"""Bytes and strings of single tokens, for the kinds of tokenizers that models have."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sleb.engine.requests.detokenizer import Detokenizer
from sleb.server.answer.token_text import TextOffsets, TokenTexts


def byte_level():
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|é|>", special=True)])
    return tokenizer


def byte_fallback():
    vocab = {"▁a": 0, "b": 1, "▁": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize("text", ["plain", "Grüße 世界 🌍\n\t", "\x00\x7f ¡"])
def test_bytes_of_byte_level_tokens_make_up_the_text(text):
    tokenizer = byte_level()
    texts = TokenTexts(tokenizer)
    assert b"".join(map(texts.utf8, tokenizer.encode(text).ids)) == text.encode()


def test_added_tokens_are_themselves():
    tokenizer = byte_level()
    assert TokenTexts(tokenizer).string(tokenizer.token_to_id("<|é|>")) == "<|é|>"


def test_pieces_of_characters_do_not_look_alike():
    texts = TokenTexts(byte_level())
    strings = [texts.string(token_id) for token_id in range(256)]
    assert len(set(strings)) == 256
    assert sum(string.startswith("bytes:\\x") for string in strings) == 128


def test_byte_fallback_tokens():
    texts = TokenTexts(byte_fallback())
    assert texts.string(0) == " a"
    assert texts.string(1) == "b"
    assert texts.utf8(3 + 0xE4) == b"\xe4"
    assert texts.string(3 + 0x41) == "A"


def test_without_a_tokenizer_tokens_are_named_by_number():
    assert TokenTexts(None).string(17) == "token_id:17"
    assert TokenTexts(byte_level()).string(10**6) == "token_id:1000000"


def test_offsets_count_characters_not_bytes():
    tokenizer = byte_level()
    offsets = TextOffsets(TokenTexts(tokenizer))
    ids = tokenizer.encode("aé世b").ids
    assert offsets.push(ids[:3]) + offsets.push(ids[3:]) == [0, 1, 1, 2, 2, 2, 3]


WORDS = ["▁Hello", "▁world", "▁", "▁▁", "Hello", "wor", "ld", "▁wor", ",", "é", "▁a", "<"]
TEXTS = [
    "Hello world, Hello",
    " Hello world",
    "  Hello",
    "world<s>Hello",
    "<s>Hello",
    "é世 Hello 世界\n Hello  a",
    "",
    " ",
    "Hello ",
    "<unk> Hello",
]


def sentencepiece(kind):
    """As Llama 2's ("prepend") or newer ones' are converted; "none" puts no space before a text."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for word in WORDS:
        vocab[word] = len(vocab)
    letters = sorted({letter for word in WORDS for letter in word} - set(vocab))
    vocab |= {letter: len(vocab) + place for place, letter in enumerate(letters)}
    made, merges = set(letters) | {word for word in WORDS if len(word) == 1}, []
    for word in sorted(WORDS, key=len):  # by whichever first halves there are
        parts = list(word)
        while len(parts) > 1:
            parts[:2] = [parts[0] + parts[1]]
            if parts[0] not in vocab:
                vocab[parts[0]] = len(vocab)
            if parts[0] not in made:
                made.add(parts[0])
                merges.append((parts[0][:-1], parts[0][-1]))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    strip = [] if kind == "none" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = {"first": "first", "always": "always", "none": "never"}[kind]
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


@pytest.mark.parametrize("kind", ["prepend", "first", "always", "none"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_text_begins_with_each_token_of_a_prompt_at_its_offset(kind, text):
    tokenizer = sentencepiece(kind)
    texts, ids = TokenTexts(tokenizer), tokenizer.encode(text).ids
    offsets = TextOffsets(texts).align(ids, text)
    assert len(offsets) == len(ids) and offsets == sorted(offsets) and offsets[0] == 0
    data = text.encode()
    starts = [len(text[:offset].encode()) for offset in [*offsets, len(text)]]
    after_special = True
    for token_id, start, end in zip(ids, starts, starts[1:], strict=False):
        token = texts.utf8(token_id)
        if len(token) == 1 and token >= b"\x80":  # a byte of a character, whose beginning is told
            assert token in text[len(data[:start].decode())].encode()
        elif start == end:  # what the tokenizer put there itself
            assert token == b"<s>" or (token == b" " and after_special)
        else:
            assert data[start:end] == token or (data[start:end] == token[1:] and after_special)
        after_special = texts.is_special(token_id)


@pytest.mark.parametrize("kind", ["prepend", "first", "always", "none"])
def test_offsets_of_generated_tokens_are_those_of_their_text(kind):
    """As `Detokenizer` makes it: the first word loses its space where nothing stands before it."""
    tokenizer = sentencepiece(kind)
    texts = TokenTexts(tokenizer)
    new = [tokenizer.token_to_id(token) for token in ("▁Hello", "▁world", "</s>", ",", "▁a")]
    for prompt in ([1], tokenizer.encode("a").ids):
        for skip in (True, False):
            detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
            begins = all(map(texts.is_special, prompt)) and skip
            offsets, text = TextOffsets(texts, skip_special=skip, begins=begins), ""
            for token_id in new:
                [offset] = offsets.push([token_id])
                assert offset == len(text)
                text += detokenizer.push(token_id)
