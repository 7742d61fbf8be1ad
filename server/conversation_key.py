"""What tells that a request goes on with a conversation: a digest of its messages so far."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

_MOST = 8  # turns of a conversation that are looked for
_SIZE = 16  # bytes


def conversation_keys(owner: bytes, messages: Sequence[Mapping[str, Any]]) -> tuple[bytes, ...]:
    """Digests of the conversation up to each of its last turns of the user, its own last.

    A later request of the same conversation, by the same owner (the digest of an API key), has its own among them:
    clients send what was said before as they sent it then. No text can be read from one.
    """
    state = hashlib.blake2b(owner, digest_size=_SIZE)
    keys: list[bytes] = []
    for message in messages:
        state.update(orjson.dumps([message.get("role"), message.get("content")], default=str))
        if message.get("role") == "user":
            keys.append(state.copy().digest())
    return tuple(keys[-_MOST:])
