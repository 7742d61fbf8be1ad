"""What must be known of a server before it is loaded: its models, the fields that it takes, how it counts tokens."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from sleb.benchmarks.load.events import EventSplitter, Outcome, StreamError, error_message, is_count
from sleb.benchmarks.serving_options import ENDPOINTS, ServeOptions, shown_url
from sleb.client.connection import ClientError, explained, shorten

Content = str | Sequence[Mapping[str, str]]
MAX_REPLY = 4 << 20  # bytes
# Fields that a server may refuse, and what is lost without them.
_OPTIONAL: Mapping[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}}
_LEFT_OUT: tuple[tuple[str, ...], ...] = ((), ("ignore_eos",), ("stream_options",), tuple(_OPTIONAL))
_NO_LIST = (404, 405, 501)
_FACT_SECONDS = 10.0  # for what is only of interest
_MAX_FACT = 100  # characters


@dataclass(frozen=True)
class Dialect:
    """How requests for one model are written. fields: the optional ones that it takes."""

    endpoint: str
    model: str
    fields: Mapping[str, Any]

    def body(self, content: Content, max_tokens: int, *, stream: bool = True) -> dict[str, Any]:
        """A greedy request."""
        if self.endpoint == "chat":
            messages = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
            asked: dict[str, Any] = {"messages": messages}
        else:
            asked = {"prompt": content}
        fields = {
            name: value for name, value in self.fields.items() if stream or not name.startswith("stream")
        }
        return {
            "model": self.model, **asked, "max_tokens": max_tokens, "temperature": 0, "stream": stream, **fields,
        }  # fmt: skip


@dataclass(frozen=True)
class _Reply:
    """A whole answer."""

    status: int
    headers: httpx.Headers
    body: bytes

    def find(self, *path: str | int) -> Any:
        """What a JSON body holds there; None if nothing."""
        with contextlib.suppress(orjson.JSONDecodeError, LookupError, TypeError):
            found = orjson.loads(self.body)
            for key in path:
                found = found[key]
            return found
        return None


class Server:
    """An OpenAI-compatible server, asked one thing at a time. All methods raise ClientError, a line with the remedy.

    http: whose address, headers and proxies are taken. An answer has `options.timeout` seconds in all.
    """

    def __init__(self, http: httpx.Client, options: ServeOptions) -> None:
        self._http, self._options = http, options
        self._url = str(http.base_url).rstrip("/")
        self._path = ENDPOINTS[options.endpoint]
        self._tls = httpx.create_ssl_context(trust_env=http.trust_env)  # which takes longer than a request
        self._listed: list[str] = []
        self.notices: list[str] = []

    def choose_models(self, asked: Sequence[str]) -> list[str]:
        """The models asked for, or the server's first."""
        reply = self._request("GET", "models")
        if reply.status == 200:
            self._listed = self._ids(reply)
        elif reply.status not in _NO_LIST:
            raise self._refusal(reply, "models")
        if not asked and not self._listed:
            raise ClientError(f"{self._url} lists no models; name one with --model")
        for model in asked:
            if self._listed and model not in self._listed:
                self.notices.append(
                    f"{model} is not in the server's list of models: {', '.join(self._listed[:20])}."
                )
        return list(asked) or self._listed[:1]

    def _ids(self, reply: _Reply) -> list[str]:
        models = reply.find("data")
        try:
            return [str(model["id"]) for model in models]
        except (LookupError, TypeError):
            message = f"{self._url}/models is no list of models; is this an OpenAI-compatible server?"
            raise ClientError(message, status=reply.status) from None

    def negotiate(self, model: str) -> Dialect:
        """Sends a request for two tokens until the server takes one, with fewer and fewer optional fields."""
        refused = None
        for left_out in _LEFT_OUT:
            fields = {name: value for name, value in _OPTIONAL.items() if name not in left_out}
            dialect = Dialect(self._options.endpoint, model, fields)
            reply = self._request("POST", self._path, dialect.body("Hello", 2))
            if reply.status == 200:
                self._check_stream(reply, dialect)
                return dialect
            refused = refused or reply
            if reply.status not in (400, 422):
                break
        assert refused is not None
        raise self._refusal(refused, self._path)

    def _check_stream(self, reply: _Reply, dialect: Dialect) -> None:
        if "json" in reply.headers.get("content-type", "json"):
            raise ClientError(
                f"{self._url} answers at once although a stream was asked for; times cannot be told"
            )
        outcome, events = Outcome(dialect.model), EventSplitter()
        try:
            for data in [*events.feed(reply.body), *events.finish()]:
                outcome.take(data, 0.0)
        except StreamError as error:
            outcome.error = str(error)
        if outcome.error or not outcome.has_ended:
            problem = self._options.without_key(outcome.error) or "its stream has no end"
            raise ClientError(f"{dialect.model} gives no whole answer ({problem})")
        if "ignore_eos" not in dialect.fields:
            self.notices.append(f"{dialect.model}: the server refuses ignore_eos, so answers may end early.")
        if "completion_tokens" not in outcome.usage:
            self.notices.append(
                f"{dialect.model}: the server's streams tell no usage: each chunk with text counts as one token, and "
                "prompts as what was asked for."
            )

    def count_tokens(self, dialect: Dialect, text: str) -> int | None:
        """Tokens of a request with `text`, template and all; None if the server does not tell."""
        reply = self._request("POST", self._path, dialect.body(text, 1, stream=False))
        if reply.status != 200:
            raise self._refusal(reply, self._path)
        found = reply.find("usage", "prompt_tokens")
        return found if is_count(found) else None

    def describe(self) -> dict[str, Any]:
        """What the server says of itself, for the result file; null where it says nothing."""
        hide = self._options.without_key
        found: dict[str, Any] = {"url": hide(shown_url(self._url)), "owned_by": None, "software": None}
        with contextlib.suppress(ClientError):
            reply = self._request("GET", "models", seconds=_FACT_SECONDS)
            found["software"] = self._fact(reply.headers.get("server"))
            found["owned_by"] = self._fact(reply.find("data", 0, "owned_by"))
        found["version"] = None
        with contextlib.suppress(ClientError):  # vLLM and sleb have it
            reply = self._request("GET", f"{self._url.removesuffix('/v1')}/version", seconds=_FACT_SECONDS)
            found["version"] = self._fact(reply.find("version"))
        return found

    def _fact(self, told: Any) -> str | None:
        return self._options.without_key(shorten(told))[:_MAX_FACT] if isinstance(told, str) else None

    def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        seconds: float = math.inf,
    ) -> _Reply:
        """Within `seconds`, or those of --timeout if they are fewer."""
        seconds = min(seconds, self._options.timeout)
        try:
            with explained(self._url):
                return asyncio.run(self._exchange(method, path, body, seconds))
        except TimeoutError:
            raise ClientError(
                f"{self._url} gave no whole answer within {seconds:g} s; the server may be busy: try again, or give a "
                "longer --timeout"
            ) from None

    async def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float
    ) -> _Reply:
        """asyncio ends a request whatever it waits for; timeouts of httpx are for each silence."""
        http = self._http
        client = httpx.AsyncClient(
            base_url=http.base_url,
            headers=http.headers,
            timeout=httpx.Timeout(None, connect=http.timeout.connect),
            trust_env=http.trust_env,
            verify=self._tls,
        )
        async with asyncio.timeout(seconds), client, client.stream(method, path, json=body) as response:
            content = bytearray()
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > MAX_REPLY:
                    raise ClientError(
                        f"{self._url} answers a short question with more than {MAX_REPLY >> 20} MiB; is this an "
                        "OpenAI-compatible server?"
                    )
            return _Reply(response.status_code, response.headers, bytes(content))

    def _refusal(self, reply: _Reply, path: str) -> ClientError:
        status = reply.status
        said = self._options.without_key(error_message(reply.body)) or "no message"
        if status in (401, 403):
            remedy = "give the key with --api-key, or set SLEB_API_KEY or OPENAI_API_KEY"
        elif status == 404 and "model" in said.lower():
            listed = ", ".join(self._listed[:20])
            remedy = f"--model may be one of: {listed}" if listed else "name another with --model"
        elif status in (404, 405):
            remedy = f"does {self._url} have {path}? Else give another --url or --endpoint"
        elif status in (429, 503):
            remedy = "the server is busy: try again in a while"
        elif status >= 500:
            remedy = "the server's log may say more"
        elif path == "models":
            remedy = f"is {self._url} right? Such an address mostly ends in /v1"
        else:
            remedy = "change the lengths, --endpoint or --model"
        return ClientError(f"{said} (HTTP {status}); {remedy}", status=status)
