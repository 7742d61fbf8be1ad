"""What a result may tell of where things are: neither this machine's paths nor the addresses of servers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

# Up to a space: what a password may hold is not guessed at. Punctuation behind it belongs to the sentence.
_ADDRESS = re.compile(r"(https?)://(\S+?)(?=[.,;:'\")\]]*(?:\s|$))", re.IGNORECASE)
# As Python's sockets name the other end: ('10.0.0.7', 8000).
_SOCKET = re.compile(r"\('[^']*', (\d+)(?:, \d+)*\)")


def public_text(text: str) -> str:
    """A message with every address cut to http://server:PORT, every absolute path to its last component."""
    text = _SOCKET.sub(r"(server:\1)", _ADDRESS.sub(_neutral, text))
    return re.sub(r"(?<![\w/:.])/[^\s'\",;:()]+", lambda found: Path(found[0]).name, text)


def _neutral(found: re.Match[str]) -> str:
    authority = re.split(r"[/?#]", found[2].rpartition("@")[2])[0]
    port = re.search(r":\d+$", authority)
    return f"{found[1]}://server{port[0] if port else ''}"


def shown_arguments(arguments: Sequence[str], model: str = "") -> list[str]:
    """The command line without this machine's paths and the servers' addresses.

    Every path is cut to its last component, those inside NAME=PATH:FORMAT=PATH too. `model` stays whole where it is a
    hub id, which looks like a path but is none.
    """
    public = {model} if model and not Path(model).expanduser().exists() else set()
    return [each if each in public else _without_addresses(each) for each in arguments]


def _without_addresses(argument: str) -> str:
    hidden = re.sub(r"https?://[^\s#]+", "URL", argument)
    return "".join(map(_last_component, re.split(r"([=:,#])", hidden)))


def _last_component(text: str) -> str:
    return Path(text).name if "/" in text else text
