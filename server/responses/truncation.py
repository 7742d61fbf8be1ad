"""`truncation: auto`: the oldest messages of a conversation go until the rest fits the context."""

from __future__ import annotations

from dataclasses import replace

from fastapi import Request

from sleb.errors import RequestError
from sleb.server.answer.converse import count_tokens
from sleb.server.context import get_context
from sleb.server.conversation import Conversation


async def shortened(request: Request, conversation: Conversation) -> Conversation:
    """The conversation without as many of its oldest messages as keep it from fitting beside its answer.

    The messages of the system that begin it stay, and so does the last message. It goes on with a message of the user
    if one of those fits, and never with the result of a call that is gone. If nothing fits it is as it was.
    """
    messages = conversation.messages
    num_kept = next(
        (place for place, each in enumerate(messages) if each["role"] not in ("system", "developer")), 0
    )
    head = messages[:num_kept]
    rest = range(num_kept + 1, len(messages))
    users = [place for place in rest if messages[place]["role"] == "user"]
    others = [place for place in rest if messages[place]["role"] != "tool"]

    def beginning(place: int) -> Conversation:
        return replace(conversation, messages=head + messages[place:])

    most = get_context(request).engine.model.max_model_len
    wanted = conversation.sampling.get("max_tokens")
    room = most - (wanted if wanted and 0 < wanted < most else 1)
    if await _fits(request, conversation, room):
        return conversation
    for places in (users, others):
        if places and await _fits(request, beginning(places[-1]), room):
            low, high = 0, len(places) - 1  # places[high] fits
            while low < high:
                middle = (low + high) // 2
                if await _fits(request, beginning(places[middle]), room):
                    high = middle
                else:
                    low = middle + 1
            return beginning(places[high])
    return conversation


async def _fits(request: Request, conversation: Conversation, room: int) -> bool:
    try:
        return await count_tokens(request, conversation) <= room
    except RequestError as error:
        if error.code != "context_length_exceeded":
            raise
        return False
