"""From what an answer's text is made of to the items and the typed events of OpenAI's Responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sleb.engine.outputs import TokenLogprobs
from sleb.server.answer.logprobs import chat_logprobs
from sleb.server.answer.token_text import TokenTexts
from sleb.server.ids import new_id
from sleb.server.message.reasoning import Delta
from sleb.server.responses.items import Item

Event = dict[str, Any]


class TokenSpans:
    """Which of the tokens generated made which text, found by their bytes."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._data = bytearray()
        self._ends: list[int] = []  # of each token in the data
        self._place = 0  # up to where texts have been found
        self._new = 0  # where the tokens of the last `add` begin
        self._next = 0  # the first token that made none of them

    def add(self, token_ids: Sequence[int]) -> None:
        """Takes the next tokens."""
        self._new = len(self._data)
        for token_id in token_ids:
            self._data += self._texts.utf8(token_id)
            self._ends.append(len(self._data))

    def take(self, text: str, opens: bool) -> range:
        """The numbers of the tokens that made the next text, without those of an earlier one.

        Texts come in their order. Between them are marks and calls, which may hold the same letters: a text that
        `opens` an item is looked for first in the newest tokens, behind those. Where the bytes are not found (those of
        a broken character are not), it is all tokens that are left.
        """
        wanted = text.encode()
        begin = self._data.rfind(wanted, max(self._place, self._new)) if opens else -1
        if begin < 0:
            begin = self._data.find(wanted, self._place)
        end = begin + len(wanted) if begin >= 0 else len(self._data)
        begin = max(begin, self._place)
        first = self._next
        while first < len(self._ends) and self._ends[first] <= begin:
            first += 1
        last = first
        while last < len(self._ends) and (self._ends[last - 1] if last else 0) < end:
            last += 1
        self._place, self._next = end, last
        return range(first, last)


class OutputBuilder:
    """The output of an answer, item by item, and the events by which a stream tells it.

    Args:
        num_top: alternatives told with each token of an output text; None: no log-probabilities.

    Attributes:
        output: the items so far; the last one may be open.
        num_reasoning_tokens: tokens of what was thought, without the marks around it.
    """

    def __init__(self, texts: TokenTexts, num_top: int | None) -> None:
        self.output: list[Item] = []
        self.num_reasoning_tokens = 0
        self._texts = texts
        self._num_top = num_top
        self._spans = TokenSpans(texts)
        self._logprobs: list[TokenLogprobs] = []
        self._open: str | None = None  # the kind of the last item, while it is open
        self._pieces: list[str] = []  # of the open item's text
        self._number = 0

    def event(self, kind: str, **fields: Any) -> Event:
        """An event with the next number."""
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def push(
        self, deltas: Sequence[Delta], token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None
    ) -> list[Event]:
        """The events of a step's deltas, which `token_ids` made."""
        self._spans.add(token_ids)
        self._logprobs += logprobs or ()
        events: list[Event] = []
        for delta in deltas:
            kind = "arguments" if delta.kind == "call" else delta.kind
            if delta.kind == "call" or kind != self._open:
                events += self.close()
                events += self._begin(kind, delta.text)
            if delta.kind != "call":
                events.append(self._continue(delta))
        return events

    def _begin(self, kind: str, name: str) -> list[Event]:
        self._open, self._pieces = kind, []
        item: Item
        fields: Item
        if kind == "arguments":
            fields = {"call_id": new_id("call_"), "name": name, "arguments": ""}
            item = {"id": new_id("fc_"), "type": "function_call", "status": "in_progress", **fields}
        elif kind == "reasoning":
            fields = {"summary": [], "content": [], "encrypted_content": None}
            item = {"id": new_id("rs_"), "type": "reasoning", "status": "in_progress", **fields}
        else:
            fields = {"role": "assistant", "content": []}
            item = {"id": new_id("msg_"), "type": "message", "status": "in_progress", **fields}
        self.output.append(item)
        # Events keep what an item was when they were made.
        events = [self.event("response.output_item.added", output_index=self._index, item=dict(item))]
        if kind != "arguments":
            item["content"] = [_part(kind, "")]
            events.append(self._of_part("response.content_part.added", part=_part(kind, "")))
        return events

    def _continue(self, delta: Delta) -> Event:
        opens = not self._pieces
        self._pieces.append(delta.text)
        if delta.kind == "arguments":
            return self._of_item("response.function_call_arguments.delta", delta=delta.text)
        if delta.kind == "reasoning":
            self.num_reasoning_tokens += len(self._spans.take(delta.text, opens))
            return self._of_part("response.reasoning_text.delta", delta=delta.text)
        entries: list[Any] = []
        made = self._spans.take(delta.text, opens)
        if self._num_top is not None:
            tokens = self._logprobs[made.start : made.stop]
            entries = chat_logprobs(tokens, self._num_top, self._texts)["content"] or []
            self.output[-1]["content"][0]["logprobs"] += entries
        return self._of_part("response.output_text.delta", delta=delta.text, logprobs=entries)

    def add_content(self, text: str) -> int:
        """Takes text of the open item, behind which nothing but text comes; the number of the event that tells it."""
        self._pieces.append(text)
        self._number += 1
        return self._number - 1

    def content_event(self, number: int, text: str) -> Event:
        """The event of that number, which tells `text` of the open item, without log-probabilities."""
        before, self._number = self._number, number
        event = self._of_part("response.output_text.delta", delta=text, logprobs=[])
        self._number = before
        return event

    def close(self, status: str = "completed") -> list[Event]:
        """Ends the open item, if there is one."""
        kind, item = self._open, self.output[-1] if self.output else {}
        if kind is None:
            return []
        self._open = None
        item["status"], text = status, "".join(self._pieces)
        if kind == "arguments":
            item["arguments"] = text
            events = [
                self._of_item("response.function_call_arguments.done", name=item["name"], arguments=text)
            ]
        else:
            [part] = item["content"]
            part["text"] = text
            done = (
                self._of_part("response.reasoning_text.done", text=text)
                if kind == "reasoning"
                else self._of_part("response.output_text.done", text=text, logprobs=part["logprobs"])
            )
            events = [done, self._of_part("response.content_part.done", part=part)]
        return [*events, self.event("response.output_item.done", output_index=self._index, item=item)]

    def finish(self, status: str) -> list[Event]:
        """Ends the output with the status that its last item gets; one with nothing to say is an empty message."""
        events = self.close(status)
        silent = all(item["type"] == "reasoning" for item in self.output)
        if silent and (status == "completed" or not self.output):
            events += self._begin("content", "")
            events += self.close(status)
        return events

    def snapshot(self) -> list[Item]:
        """The items so far, as they would be told now."""
        if self._open is None:
            return list(self.output)
        *whole, item = self.output
        text = "".join(self._pieces)
        if self._open == "arguments":
            return [*whole, item | {"arguments": text}]
        return [*whole, item | {"content": [item["content"][0] | {"text": text}]}]

    @property
    def _index(self) -> int:
        return len(self.output) - 1

    def _of_item(self, kind: str, **fields: Any) -> Event:
        self._number += 1  # once a token, hence without a detour by `event`
        return {
            "type": kind,
            "sequence_number": self._number - 1,
            "item_id": self.output[-1]["id"],
            "output_index": len(self.output) - 1,
            **fields,
        }

    def _of_part(self, kind: str, **fields: Any) -> Event:
        return self._of_item(kind, content_index=0, **fields)


def _part(kind: str, text: str) -> Item:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
