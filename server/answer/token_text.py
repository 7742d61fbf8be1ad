"""What single tokens look like in log-probabilities: their bytes and a string for them."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Sequence

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
        self._special: frozenset[int] = frozenset()
        self._alphabet: dict[str, int] | None = None
        self._metaspace = False
        if tokenizer is not None:
            added = tokenizer.get_added_tokens_decoder()
            self._added = {token_id: token.content for token_id, token in added.items()}
            self._special = frozenset(token_id for token_id, token in added.items() if token.special)
            decoder = _decoder_json(tokenizer)
            self._alphabet = _byte_alphabet() if "ByteLevel" in decoder else None
            self._metaspace = "Metaspace" in decoder or "▁" in decoder

    def string(self, token_id: int) -> str:
        """The token's text; "bytes:\\xNN..." for a piece of a character, so that no two pieces look alike."""
        return self._entry(token_id)[0]

    def utf8(self, token_id: int) -> bytes:
        """The token's UTF-8 bytes; a token that is a piece of a character has bytes that are no whole text."""
        return self._entry(token_id)[1]

    def is_special(self, token_id: int) -> bool:
        """Whether it is a special token, which a decoder may leave out."""
        return token_id in self._special

    def is_known(self, token_id: int) -> bool:
        """Whether the tokenizer has it: a model may have more, which have no text."""
        return self._tokenizer is not None and self._tokenizer.id_to_token(token_id) is not None

    def loses_space(self, token_id: int) -> bool:
        """Whether the token begins with a space that its decoder takes away at the beginning of a text."""
        if self._tokenizer is None or not self.string(token_id).startswith(" "):
            return False
        return not self._tokenizer.decode([token_id], skip_special_tokens=False).startswith(" ")

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
    """Where each token begins in a text, in characters: that of a prompt, then that of the tokens generated after it.

    Args:
        skip_special: whether special tokens that are generated are left out of the text.
        begins: whether nothing that a decoder sees stands before the first token that is generated.
    """

    def __init__(self, texts: TokenTexts, *, skip_special: bool = True, begins: bool = False) -> None:
        self._texts = texts
        self._skip_special = skip_special
        self._begins = begins
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def align(self, token_ids: Sequence[int], text: str) -> list[int]:
        """Offsets of a prompt's tokens in its `text`.

        A special token that is not there takes no room, and neither does a space that the tokenizer put before the text
        or behind a special token.
        """
        data = text.encode()
        found = (self._walk(token_ids, data, spaces_added) for spaces_added in (False, True))
        starts = next((starts for starts in found if starts is not None), None)
        self._length = len(text)
        if starts is None:  # the tokenizer rewrites its text, so that this is nearly it
            lengths = (len(self._texts.utf8(token_id)) for token_id in token_ids)
            starts = [min(end, len(data)) for end in itertools.accumulate(lengths, initial=0)][:-1]
        return _characters_before(data, starts)

    def _walk(self, token_ids: Sequence[int], data: bytes, spaces_added: bool) -> list[int] | None:
        """Where each token begins in UTF-8; None if that is not the text of the tokens.

        spaces_added: whether a space before the text is the tokenizer's, even where the text begins with one.
        """
        place, begins = 0, True
        starts = []
        for token_id in token_ids:
            starts.append(place)
            token = self._texts.utf8(token_id)
            if self._texts.is_special(token_id) or not self._texts.is_known(token_id):
                place += len(token) if data.startswith(token, place) else 0
                begins = True
                continue
            if begins and token.startswith(b" ") and (spaces_added or not data.startswith(token, place)):
                token = token[1:]
            if not data.startswith(token, place):
                return None
            place, begins = place + len(token), False
        return starts if place == len(data) else None

    def push(self, token_ids: Iterable[int]) -> list[int]:
        """Offsets of the next tokens generated."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._length)
            hidden = self._skip_special and self._texts.is_special(token_id)
            if hidden or not self._texts.is_known(token_id):
                continue
            token = self._texts.utf8(token_id)
            if self._begins and self._texts.loses_space(token_id):
                token = token[1:]
            self._begins = False
            self._length += len(self._decoder.decode(token))
        return offsets


def _characters_before(data: bytes, places: Iterable[int]) -> list[int]:
    """How many whole characters of UTF-8 stand before each of rising places."""
    counts, decoder, last, count = [], codecs.getincrementaldecoder("utf-8")("replace"), 0, 0
    for place in places:
        count += len(decoder.decode(data[last:place]))
        last = place
        counts.append(count)
    return counts


def _decoder_json(tokenizer: Tokenizer) -> str:
    decoder = tokenizer.decoder
    return "" if decoder is None else json.dumps(json.loads(decoder.__getstate__()), ensure_ascii=False)
