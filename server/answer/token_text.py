"""What single tokens look like in log-probabilities: their bytes and a string for them."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE (GPT-2) writes the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenTexts:
    """Bytes and strings of a tokenizer's tokens, each worked out once. With no tokenizer, names by number."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[int, tuple[str, bytes]] = {}
        self._added: dict[int, str] = {}
        self._alphabet: dict[str, int] | None = None
        self._metaspace = False
        if tokenizer is not None:
            added = tokenizer.get_added_tokens_decoder()
            self._added = {token_id: token.content for token_id, token in added.items()}
            decoder = _decoder_json(tokenizer)
            self._alphabet = _byte_alphabet() if "ByteLevel" in decoder else None
            self._metaspace = "Metaspace" in decoder or "▁" in decoder

    def string(self, token_id: int) -> str:
        """The token's text; "bytes:\\xNN..." for a piece of a character, so that no two pieces look alike."""
        return self._entry(token_id)[0]

    def utf8(self, token_id: int) -> bytes:
        """The token's UTF-8 bytes; a token that is a piece of a character has bytes that are no whole text."""
        return self._entry(token_id)[1]

    def _entry(self, token_id: int) -> tuple[str, bytes]:
        entry = self._cache.get(token_id)
        if entry is None:
            data = self._find_bytes(token_id)
            try:
                text = data.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            entry = self._cache[token_id] = (text, data)
        return entry

    def _find_bytes(self, token_id: int) -> bytes:
        token = None if self._tokenizer is None else self._tokenizer.id_to_token(token_id)
        if token is None:
            return f"token_id:{token_id}".encode()
        if token_id in self._added:
            return self._added[token_id].encode()
        if self._alphabet is not None and all(character in self._alphabet for character in token):
            return bytes(self._alphabet[character] for character in token)
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        return (token.replace("▁", " ") if self._metaspace else token).encode()


class TextOffsets:
    """Where each token begins in the text that the tokens so far make, in characters."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def skip(self, num_characters: int) -> None:
        """Counts text that is no token's."""
        self._length += num_characters

    def push(self, token_ids: Iterable[int]) -> list[int]:
        """Offsets of the next tokens."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._length)
            self._length += len(self._decoder.decode(self._texts.utf8(token_id)))
        return offsets


def _decoder_json(tokenizer: Tokenizer) -> str:
    decoder = tokenizer.decoder
    return "" if decoder is None else json.dumps(json.loads(decoder.__getstate__()), ensure_ascii=False)
