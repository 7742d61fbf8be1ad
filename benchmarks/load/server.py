"""What must be known of a server before it is loaded: its models, the fields that it takes, how it counts tokens."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import orjson

from sleb.benchmarks.load.client import LoadClient, Outcome, count_of, error_message, without_key
from sleb.client.connection import ClientError, is_loopback

ENDPOINTS = {"chat": "chat/completions", "completions": "completions"}
# What a server may refuse, and what is tried without it.
_OPTIONAL: Mapping[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}}
_LEFT_OUT: tuple[tuple[str, ...], ...] = ((), ("ignore_eos",), ("stream_options",), tuple(_OPTIONAL))
_MODELS: tuple[Any, ...] = ("models", "software", "data", 0, "owned_by")
_DESCRIBED = (_MODELS, ("/version", "version", "version"), ("/props", "version", "build_info"))


@dataclass(frozen=True)
class Dialect:
    """How requests for one model are written. fields: the optional ones that it takes."""

    endpoint: str
    model: str
    fields: Mapping[str, Any]

    @property
    def path(self) -> str:
        return ENDPOINTS[self.endpoint]

    def body(self, text: str, max_tokens: int, *, stream: bool = True) -> bytes:
        """A greedy request for an answer to `text`, as JSON."""
        is_chat = self.endpoint == "chat"
        asked = {"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": text}
        fields = {name: value for name, value in self.fields.items() if stream or name != "stream_options"}
        common = {"model": self.model, "max_tokens": max_tokens, "stream": stream, "temperature": 0}
        return orjson.dumps({**common, **asked, **fields})


class Server:
    """An OpenAI-compatible server, asked one thing at a time. All methods raise ClientError, a line with the remedy.

    Attributes:
        notices: what a reader of the results must know. listed: the models that it names.
        losses: by model, how many times the full model's perplexity it has, where the server (sleb) tells.
    """

    def __init__(self, client: LoadClient) -> None:
        self.client = client
        self.notices: list[str] = []
        self.listed: list[str] = []
        self.losses: dict[str, float] = {}

    async def choose_models(self, asked: Sequence[str]) -> list[str]:
        """The models asked for, or the server's first."""
        url = self.client.url
        reply = await self.client.ask("GET", "models")
        if reply.status == 200:
            try:
                told = reply.find("data")
                self.listed = [str(model["id"]) for model in told]
                self.losses = {str(model["id"]): loss for model in told if (loss := _loss(model)) is not None}
            except (LookupError, TypeError):
                message = f"{url}/models is no list of models; is this an OpenAI-compatible server?"
                raise ClientError(message, status=reply.status) from None
        elif reply.status not in (404, 405, 501):  # which have no list, but may have models
            raise self._refusal(reply.status, error_message(reply.body), "models")
        if not asked and not self.listed:
            raise ClientError(f"{url} lists no models; name one with --model")
        return list(dict.fromkeys(asked)) or self.listed[:1]

    async def negotiate(self, endpoint: str, model: str, fields: dict[str, Any]) -> Dialect:
        """Sends a request for two tokens until the server takes one, with fewer and fewer optional fields.

        fields: wanted besides; they are left out together with ignore_eos.
        """
        for left_out in _LEFT_OUT:
            optional = {name: value for name, value in _OPTIONAL.items() if name not in left_out}
            dialect = Dialect(endpoint, model, optional | (fields if "ignore_eos" in optional else {}))
            outcome = Outcome(model)
            await self.client.stream(dialect.path, dialect.body("Hello", 2), outcome)
            if outcome.status not in (400, 422):
                break
        if not outcome.status:
            remedy = "the server may be busy: try again, or give a longer --timeout"
            raise ClientError(f"{self.client.url}: {outcome.error}; {remedy}")
        if outcome.status != 200:
            said = outcome.error.removeprefix(f"HTTP {outcome.status}: ")
            raise self._refusal(outcome.status, said, dialect.path)
        if outcome.error:
            raise ClientError(f"{model} gives no whole streamed answer ({outcome.error})")
        if "ignore_eos" not in dialect.fields:
            self.notices.append(f"{model}: the server refuses ignore_eos, so answers may end early.")
        if "completion_tokens" not in outcome.usage:
            self.notices.append(f"{model}: streams tell no usage: each chunk with text counts as one token.")
        return dialect

    async def count_tokens(self, dialect: Dialect, text: str) -> int | None:
        """Tokens of a request with `text`, template and all; None if the server does not tell."""
        reply = await self.client.ask("POST", dialect.path, dialect.body(text, 1, stream=False))
        if reply.status != 200:
            raise self._refusal(reply.status, error_message(reply.body), dialect.path)
        return count_of(reply.find("usage"), "prompt_tokens", None)

    async def describe(self) -> dict[str, Any]:
        """What the server says of itself; None where it says nothing. Versions are of vLLM, sleb and llama.cpp."""
        facts: dict[str, Any] = {"url": shown_url(self.client.url), "software": None, "version": None}
        for path, fact, *place in _DESCRIBED:
            with contextlib.suppress(ClientError):
                told = (await self.client.ask("GET", path)).find(*place)
                facts[fact] = told[:100] if isinstance(told, str) else facts[fact]
        return facts

    def _refusal(self, status: int, said: str, path: str) -> ClientError:
        listed = ", ".join(self.listed[:20])
        remedy = "change the lengths, --endpoint or --model"
        if status in (401, 403):
            remedy = "give the key with --api-key, or set SLEB_API_KEY or OPENAI_API_KEY"
        elif status == 404 and listed and "model" in said.lower():
            remedy = f"--model may be one of: {listed}"
        elif status in (404, 405) or (status < 429 and path == "models"):
            remedy = f"is {self.client.url} right, with {path} below it? Such an address mostly ends in /v1"
        elif status >= 429:
            remedy = "the server is busy or in trouble: try again, its log may say more"
        return ClientError(f"{said or 'no message'} (HTTP {status}); {remedy}", status=status)


def _loss(model: Mapping[str, Any]) -> float | None:
    """Of a model as sleb's /v1/models tells it; None for one that tells no perplexity, and for one of any depth."""
    pruning = model.get("pruning")
    if not isinstance(pruning, Mapping) or "policy" in model:
        return None
    if pruning.get("depth") == 0:
        return 1.0
    found = pruning.get("perplexity")
    return float(found["pruned"]) / float(found["dense"]) if isinstance(found, Mapping) else None


def shown_url(url: str) -> str:
    """An address without the name of the machine, unless it is this one, and without a password."""
    return url if is_loopback(url) else re.sub(r"//[^/]*?(:[0-9]+)?(?=/|$)", r"//server\1", url, count=1)


def public_text(text: str) -> str:
    """What a result may tell of where things are: addresses as `shown_url`, absolute paths by their last component."""
    text = re.sub(r"https?://[^\s'\"<>]*[^\s'\"<>.,;:)\]]", lambda found: shown_url(found[0]), text)
    # As Python's sockets name the other end.
    text = re.sub(r"\('[^']*', (\d+)(?:, \d+)*\)", r"(server:\1)", text)
    return re.sub(
        r"(?<![\w/.])/(?!/)[^\s'\",;:()#]+", lambda found: found[0].rstrip("/").rpartition("/")[2], text
    )


def public_command(words: Sequence[str], api_key: str | None, public: Sequence[str] = ()) -> list[str]:
    """A command line as `public_text`, without the key. public: words that stay whole, as hub ids do."""
    hidden = [
        "…" if last == "--api-key" else without_key(word, api_key) for last, word in pairwise(("", *words))
    ]
    hidden = [re.sub(r"^(--api-key=).*", r"\1…", word) for word in hidden]
    return [word if word in public else public_text(word) for word in hidden]
