"""Ids of what is made here: requests, answers, their items, calls of tools."""

from __future__ import annotations

import uuid


def new_id(prefix: str, num_digits: int = 32) -> str:
    """An id that is given once, such as "msg_…": the prefix and so many hexadecimal digits."""
    return prefix + uuid.uuid4().hex[:num_digits]
