"""Bytes and strings of single tokens, for the kinds of tokenizers that models have."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

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
