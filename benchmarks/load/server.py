"""What must be known of a server before it is loaded: its models, the fields that it takes, how it counts tokens."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import orjson

from sleb.benchmarks.load.client import LoadClient, Reply
from sleb.benchmarks.load.events import Outcome, error_message, is_count, without_key
from sleb.client.connection import ClientError, is_loopback, shorten

ENDPOINTS = {"chat": "chat/completions", "completions": "completions"}
Content = str | Sequence[Mapping[str, str]]
_GENERATION_CONFIG = "generation_config"
# What a server may refuse, and what is lost without it; the last is how `transformers serve` is told the same.
_OPTIONAL: Mapping[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}}
_LEFT_OUT: tuple[tuple[str, ...], ...] = ((), ("ignore_eos",), ("stream_options",), tuple(_OPTIONAL))
_NO_LIST = (404, 405, 501)
_FACT_SECONDS = 10.0  # for what is only of interest


@dataclass(frozen=True)
class Dialect:
    """How requests for one model are written. fields: the optional ones that it takes."""

    endpoint: str
    model: str
    fields: Mapping[str, Any]

    @property
    def path(self) -> str:
        return ENDPOINTS[self.endpoint]

    def body(self, content: Content, max_tokens: int, *, stream: bool = True) -> bytes:
        """A greedy request for a text or a conversation, as JSON."""
        if self.endpoint == "chat":
            messages = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
            asked: dict[str, Any] = {"messages": messages}
        else:
            asked = {"prompt": content}
        fields = {name: value for name, value in self.fields.items() if stream or name != "stream_options"}
        body = {"model": self.model, **asked, "max_tokens": max_tokens, "stream": stream, **fields}
        if _GENERATION_CONFIG in fields:
            lengths = {"max_new_tokens": max_tokens, "min_new_tokens": max_tokens}
            body[_GENERATION_CONFIG] = json.dumps({"do_sample": False, **lengths})
        return orjson.dumps(body)


class Server:
    """An OpenAI-compatible server, asked one thing at a time. All methods raise ClientError, a line with the remedy.

    Attributes:
        notices: what a reader of the results must know. listed: the models that it names.
    """

    def __init__(self, client: LoadClient, api_key: str | None) -> None:
        self.client = client
        self.notices: list[str] = []
        self.listed: list[str] = []
        self._api_key = api_key

    async def choose_models(self, asked: Sequence[str]) -> list[str]:
        """The models asked for, or the server's first."""
        url = self.client.url
        reply = await self.client.ask("GET", "models")
        if reply.status == 200:
            try:
                self.listed = [str(model["id"]) for model in reply.find("data")]
            except (LookupError, TypeError):
                message = f"{url}/models is no list of models; is this an OpenAI-compatible server?"
                raise ClientError(message, status=reply.status) from None
        elif reply.status not in _NO_LIST:
            raise self._refusal(reply.status, error_message(reply.body), "models")
        if not asked and not self.listed:
            raise ClientError(f"{url} lists no models; name one with --model")
        for model in asked:
            if self.listed and model not in self.listed:
                listed = ", ".join(self.listed[:20])
                self.notices.append(f"{model} is not in the server's list of models: {listed}.")
        return list(dict.fromkeys(asked)) or self.listed[:1]

    async def negotiate(self, endpoint: str, model: str, fields: Mapping[str, Any]) -> Dialect:
        """Sends a request for two tokens until the server takes one, with fewer and fewer optional fields.

        fields: wanted besides; they are left out together with ignore_eos.
        """
        greedy = {"temperature": 0, **_OPTIONAL}
        tried = [
            {name: value for name, value in greedy.items() if name not in left_out}
            | ({} if "ignore_eos" in left_out else dict(fields))
            for left_out in _LEFT_OUT
        ]
        if fields:  # lengths must be exact, which `transformers serve` grants in its own way
            tried.insert(1, {_GENERATION_CONFIG: ""})
        refused: Outcome | None = None
        for each in tried:
            dialect, outcome = Dialect(endpoint, model, each), Outcome(model)
            await self.client.stream(dialect.path, dialect.body("Hello", 2), outcome)
            if outcome.status == 200:
                self._check_stream(dialect, outcome)
                return dialect
            refused = refused or outcome
            if outcome.status not in (400, 422):
                break
        assert refused is not None
        if refused.timed_out or not refused.status:
            raise ClientError(
                f"{self.client.url}: {refused.error}; the server may be busy: try again, or give a longer --timeout"
            )
        said = refused.error.removeprefix(f"HTTP {refused.status}: ")
        raise self._refusal(refused.status, said, ENDPOINTS[endpoint])

    def _check_stream(self, dialect: Dialect, outcome: Outcome) -> None:
        if outcome.error == "the answer is no event stream":
            raise ClientError(
                f"{self.client.url} answers at once although a stream was asked for; times cannot be told"
            )
        if outcome.error:
            raise ClientError(f"{dialect.model} gives no whole answer ({outcome.error})")
        if not {"ignore_eos", _GENERATION_CONFIG} & set(dialect.fields):
            self.notices.append(f"{dialect.model}: the server refuses ignore_eos, so answers may end early.")
        if "completion_tokens" not in outcome.usage:
            self.notices.append(
                f"{dialect.model}: the server's streams tell no usage: each chunk with text counts as one token, and "
                "prompts as what was asked for."
            )

    async def count_tokens(self, dialect: Dialect, text: str) -> int | None:
        """Tokens of a request with `text`, template and all; None if the server does not tell."""
        reply = await self.client.ask("POST", dialect.path, dialect.body(text, 1, stream=False))
        if reply.status != 200:
            raise self._refusal(reply.status, error_message(reply.body), dialect.path)
        found = reply.find("usage", "prompt_tokens")
        return found if is_count(found) else None

    async def describe(self) -> dict[str, Any]:
        """What the server says of itself, without the name of its machine; None where it says nothing."""
        listed = await self._fact("models")
        told = [await self._fact(path) for path in ("/version", "/props", "/get_server_info")]
        version, props, info = ({} if each is None else each.find() or {} for each in told)
        owner = None if listed is None else listed.find("data", 0, "owned_by")
        facts = {
            "url": shown_url(self.client.url),
            "software": owner or (listed and listed.headers.get("server")),
            "version": version.get("version") or props.get("build_info") or info.get("version"),
            "weights": props.get("model_ftype"),
            "parallel": props.get("total_slots"),
        }
        return {name: self._shown(value) for name, value in facts.items()}

    async def _fact(self, path: str) -> Reply | None:
        """vLLM and sleb have /version, llama.cpp /props, SGLang /get_server_info."""
        with contextlib.suppress(ClientError):
            reply = await self.client.ask("GET", path, seconds=_FACT_SECONDS)
            if path == "models" or isinstance(reply.find(), dict):
                return reply
        return None

    def _shown(self, told: Any) -> Any:
        if isinstance(told, int):
            return told
        return without_key(shorten(told), self._api_key)[:100] if isinstance(told, str) else None

    def _refusal(self, status: int, said: str, path: str) -> ClientError:
        url = self.client.url
        if status in (401, 403):
            remedy = "give the key with --api-key, or set SLEB_API_KEY or OPENAI_API_KEY"
        elif status == 404 and "model" in said.lower():
            listed = ", ".join(self.listed[:20])
            remedy = f"--model may be one of: {listed}" if listed else "name another with --model"
        elif status in (404, 405):
            remedy = f"does {url} have {path}? Else give another --url or --endpoint"
        elif status in (429, 503):
            remedy = "the server is busy: try again in a while"
        elif status >= 500:
            remedy = "the server's log may say more"
        elif path == "models":
            remedy = f"is {url} right? Such an address mostly ends in /v1"
        else:
            remedy = "change the lengths, --endpoint or --model"
        said = without_key(said, self._api_key) or "no message"
        return ClientError(f"{said} (HTTP {status}); {remedy}", status=status)


def shown_url(url: str) -> str:
    """An address without the name of the machine, unless it is this one, and without a password."""
    if is_loopback(url):
        return url
    parts = urlsplit(url)
    port = re.search(r":[0-9]+$", parts.netloc)
    return f"{parts.scheme}://server{port[0] if port else ''}{parts.path}"


def public_text(text: str) -> str:
    """What a result may tell of where things are: addresses as `shown_url`, absolute paths by their last component."""
    text = re.sub(r"https?://[^\s'\"<>]*[^\s'\"<>.,;:)\]]", lambda found: shown_url(found[0]), text)
    text = re.sub(
        r"\('[^']*', (\d+)(?:, \d+)*\)", r"(server:\1)", text
    )  # as Python's sockets name the other end
    return re.sub(
        r"(?<![\w/.])/(?!/)[^\s'\",;:()#]+", lambda found: found[0].rstrip("/").rpartition("/")[2], text
    )


def public_command(words: Sequence[str], api_key: str | None, public: Sequence[str] = ()) -> list[str]:
    """A command line as `public_text`, without keys. public: words that stay whole, as hub ids do."""
    shown: list[str] = []
    for word in words:
        if shown and shown[-1] == "--api-key":
            word = "…"
        word = re.sub(r"^(--api-key=).*", r"\1…", without_key(word, api_key))
        shown.append(word if word in public else public_text(word))
    return shown
