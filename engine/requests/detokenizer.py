"""Text from tokens, one at a time: never a broken character, never a piece of a stop string.

An answer's text is by definition the concatenation of what `push` and `flush` return, so a streamed answer and a
whole one are the same bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from tokenizers import Tokenizer

NUM_CONTEXT_TOKENS = 8  # how many earlier tokens a decoder may look back at to place a space
_UNFINISHED = "\ufffd"  # what bytes that are no whole character decode to
# A character is at most 4 tokens; far more without a whole one are broken bytes, not to be held for ever.
_MAX_PENDING_TOKENS = 32
_MAX_TOKENS_PER_CHARACTER = 4
# Halves of surrogate pairs, which no decoded text holds, stand for special tokens while stop strings are looked for.
_STAND_INS = range(0xD800, 0xE000)


def special_texts(tokenizer: Tokenizer | None) -> dict[int, str]:
    """The tokens that a decoder leaves out when it skips special ones: id to text."""
    added = {} if tokenizer is None else tokenizer.get_added_tokens_decoder()
    return {token_id: token.content for token_id, token in added.items() if token.special and token.content}


class Detokenizer:
    """The text of one request's output.

    Args:
        tokenizer: None for a model without one: all text is empty.
        prompt_token_ids: its end gives the decoder the context that the output continues.
        stop: strings that end the answer; special tokens count as their text there, also where they are left out.
        include_stop: whether the stop string that was found stays in the text.
        special: the tokenizer's `special_texts`; None: to be found out. shown: those whose text stays in any case.
        texts: of tokens alone, kept here for all requests of a tokenizer and of skip_special_tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        special: Mapping[int, str] | None = None,
        shown: Collection[int] = (),
        texts: dict[int, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._alone = {} if texts is None else texts
        self._skip_special = skip_special_tokens
        self._stop: dict[str, str] = {text: text for text in stop}  # as looked for, to as given
        self._texts: dict[int, str] = {}  # of special tokens that the decoder would leave out
        self._stand_ins: dict[int, None] = {}  # for str.translate
        if skip_special_tokens and (stop or shown):
            self._name_special(special_texts(tokenizer) if special is None else special, shown)
        self._include_stop = include_stop
        self._held = ""  # text that may turn out to be the start of a stop string
        self._pending: list[int] = []  # tokens whose text is not out yet
        self._context = self._whole_characters(list(prompt_token_ids[-NUM_CONTEXT_TOKENS:]))
        self._settled = self._text(self._context)
        self.stopped_by: str | None = None

    def push(self, token_id: int, *, check_stop: bool = True) -> str:
        """The text that `token_id` makes certain; sets `stopped_by` when it completes a stop string."""
        text = self._held
        if token_id in self._texts:
            text += self._settle(len(self._pending)) + self._texts[token_id]
        else:
            text += self._decode(token_id)
        if not self._stop:
            return text
        self._held = ""
        if check_stop:
            text = self._cut(text)
        if self.stopped_by is not None:
            return text.translate(self._stand_ins)
        # A stop string that was complete too early to count is text now, and must not be looked at again.
        past = max((text.rfind(stop) + len(stop) for stop in self._stop if stop in text), default=0)
        keep = self._num_held(text[past:])
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep].translate(self._stand_ins)

    def flush(self, *, check_stop: bool = True) -> str:
        """What was held back; an unfinished character becomes U+FFFD. Call once, when the answer has ended.

        A token that ends inside a character holds back what it has before that; a stop string found there sets
        `stopped_by` as in `push`.
        """
        text = self._held + self._settle(len(self._pending))
        self._held = ""
        return (self._cut(text) if check_stop else text).translate(self._stand_ins)

    def _name_special(self, special: Mapping[int, str], shown: Collection[int]) -> None:
        """Gives the special tokens that are shown their text, and a character to those that stop strings name."""
        self._texts = {token_id: special[token_id] for token_id in shown if token_id in special}
        named = [
            token_id
            for token_id, text in special.items()
            if token_id not in self._texts and any(text in stop for stop in self._stop)
        ]
        named.sort(key=lambda token_id: -len(special[token_id]))  # one may begin with another
        stand_ins = dict(zip(named, _STAND_INS, strict=False))
        self._texts |= {token_id: chr(character) for token_id, character in stand_ins.items()}
        self._stand_ins = dict.fromkeys(stand_ins.values())
        for given in list(self._stop):
            looked_for = given
            for token_id in stand_ins:
                looked_for = looked_for.replace(special[token_id], self._texts[token_id])
            self._stop[looked_for] = given

    def _cut(self, text: str) -> str:
        """`text`, or what stands before (and with) the first stop string in it, which is then noted."""
        found = self._find_stop(text)
        if found is None:
            return text
        self.stopped_by = self._stop[found]
        self._pending.clear()
        start = text.index(found)
        return text[:start] + (self.stopped_by if self._include_stop else "")

    def _decode(self, token_id: int) -> str:
        """The text of the pending tokens and this one; empty while they end inside a character.

        `tokenizers.DecodeStream` does the same, but gives up where a decoder rewrites what stands before, and
        mistakes a prompt that ends inside a character for text of the answer.
        """
        alone = None
        if not self._pending:
            alone = self._alone.get(token_id)
            if alone is None:
                alone = self._alone[token_id] = self._text([token_id])
        self._pending.append(token_id)
        if alone is None:
            alone = self._text(self._pending)
        if not alone.endswith(_UNFINISHED):
            return self._settle(len(self._pending), alone)
        if len(self._pending) > _MAX_PENDING_TOKENS:
            return self._settle(len(self._pending) - _MAX_TOKENS_PER_CHARACTER)
        return ""

    def _settle(self, num_tokens: int, alone: str | None = None) -> str:
        """The text of the first pending tokens, which become the context of the next ones. alone: without context.

        The context is what was settled last and no more: cut anywhere else it could begin inside a character,
        and then a decoder that joins bytes makes nothing of them all.
        """
        tokens, self._pending = self._pending[:num_tokens], self._pending[num_tokens:]
        whole = self._text(self._context + tokens)
        if alone is None:
            alone = self._text(tokens)
        piece = whole[len(self._settled) :] if whole.startswith(self._settled) else alone
        if piece:
            self._context, self._settled = tokens, alone
        return piece

    def _whole_characters(self, token_ids: list[int]) -> list[int]:
        """The longest end of a prompt that begins between characters, less a character that it leaves open."""
        while token_ids and self._text(token_ids).endswith(_UNFINISHED):
            token_ids.pop()
        while _UNFINISHED in self._text(token_ids):
            token_ids.pop(0)
        return token_ids

    def _text(self, token_ids: list[int]) -> str:
        if self._tokenizer is None or not token_ids:
            return ""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special)
        return text

    def _find_stop(self, text: str) -> str | None:
        """The stop string that begins first in `text`; the longest of those that begin together."""
        found = [(text.find(stop), -len(stop), stop) for stop in self._stop if stop in text]
        return min(found)[2] if found else None

    def _num_held(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a proper prefix of some stop string."""
        longest = max(len(stop) for stop in self._stop) - 1
        for length in range(min(longest, len(text)), 0, -1):
            suffix = text[-length:]
            if any(stop.startswith(suffix) for stop in self._stop):
                return length
        return 0
