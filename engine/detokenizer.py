"""Text from tokens, one at a time: never a broken character, never a piece of a stop string.

An answer's text is by definition the concatenation of what `push` and `flush` return, so a streamed answer and a
whole one are the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_NUM_CONTEXT_TOKENS = 8  # how many prompt tokens a decoder may look back at to place a space


class Detokenizer:
    """The text of one request's output.

    Args:
        tokenizer: None for a model without one: all text is empty.
        prompt_token_ids: its end gives the decoder the context that the output continues.
        stop: strings that end the answer.
        include_stop: whether the stop string that was found stays in the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""  # text that may turn out to be the start of a stop string
        self._pending: list[int] = []  # tokens whose text is not out yet
        self._stream = self._new_stream(list(prompt_token_ids[-_NUM_CONTEXT_TOKENS:]))
        self.stopped_by: str | None = None

    def push(self, token_id: int, *, check_stop: bool = True) -> str:
        """The text that `token_id` makes certain; sets `stopped_by` when it completes a stop string."""
        text = self._held + self._decode(token_id)
        self._held = ""
        if not self._stop:
            return text
        if check_stop:
            found = self._find_stop(text)
            if found is not None:
                self.stopped_by = found
                start = text.index(found)
                self._pending.clear()
                return text[: start + len(found)] if self._include_stop else text[:start]
        keep = self._num_held(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD. Call once, when the answer has ended."""
        text = self._held
        if self._pending and self._tokenizer is not None:
            text += self._tokenizer.decode(self._pending, skip_special_tokens=self._skip_special)
        self._held = ""
        self._pending.clear()
        return text

    def _new_stream(self, context: list[int]) -> DecodeStream:
        return DecodeStream(ids=context, skip_special_tokens=self._skip_special)

    def _decode(self, token_id: int) -> str:
        if self._tokenizer is None:
            return ""
        self._pending.append(token_id)
        try:
            piece = self._stream.step(self._tokenizer, token_id)
        except Exception as error:
            # Some decoders rewrite earlier text when a token is added; the stream then refuses to go on.
            if "prefix" not in str(error).lower():
                raise
            self._stream = self._new_stream([])
            piece = self._stream.step(self._tokenizer, token_id)
        if piece is None:
            return ""
        self._pending.clear()
        return piece

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
