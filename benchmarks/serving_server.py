"""What must be known of a server before it is loaded: its models, the fields that it takes, how it counts tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from sleb.benchmarks.load_events import EventSplitter, Outcome
from sleb.benchmarks.serving_options import ENDPOINTS, shown_url
from sleb.client.connection import ClientError, error_of, explained, list_models, shorten

Content = str | Sequence[Mapping[str, str]]
# Fields that a server may refuse, and what is lost without them.
_OPTIONAL: Mapping[str, Any] = {"ignore_eos": True, "stream_options": {"include_usage": True}}
_LEFT_OUT: tuple[tuple[str, ...], ...] = ((), ("ignore_eos",), ("stream_options",), tuple(_OPTIONAL))
_NO_LIST = (404, 405, 501)


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


class Server:
    """An OpenAI-compatible server, asked one thing at a time. All methods raise ClientError, a line with the remedy."""

    def __init__(self, http: httpx.Client, endpoint: str) -> None:
        self._http, self._endpoint = http, endpoint
        self._url = str(http.base_url).rstrip("/")
        self._listed: list[str] = []
        self.notices: list[str] = []

    def choose_models(self, asked: Sequence[str]) -> list[str]:
        """The models asked for, or the server's first."""
        try:
            self._listed = list_models(self._http)
        except ClientError as error:
            if error.status not in _NO_LIST:
                raise
        if not asked and not self._listed:
            raise ClientError(f"{self._url} lists no models; name one with --model")
        for model in asked:
            if self._listed and model not in self._listed:
                self.notices.append(
                    f"{model} is not in the server's list of models: {', '.join(self._listed[:20])}."
                )
        return list(asked) or self._listed[:1]

    def negotiate(self, model: str) -> Dialect:
        """Sends a request for two tokens until the server takes one, with fewer and fewer optional fields."""
        refused = None
        for left_out in _LEFT_OUT:
            fields = {name: value for name, value in _OPTIONAL.items() if name not in left_out}
            dialect = Dialect(self._endpoint, model, fields)
            response = self._post(dialect.body("Hello", 2))
            if response.status_code == 200:
                self._check_stream(response, dialect)
                return dialect
            refused = refused or response
            if response.status_code not in (400, 422):
                break
        assert refused is not None
        raise self._refusal(refused)

    def _check_stream(self, response: httpx.Response, dialect: Dialect) -> None:
        if "json" in response.headers.get("content-type", "json"):
            raise ClientError(
                f"{self._url} answers at once although a stream was asked for; times cannot be told"
            )
        outcome, events = Outcome(dialect.model), EventSplitter()
        for data in [*events.feed(response.content), *events.finish()]:
            outcome.take(data, 0.0)
        if outcome.error or not outcome.has_ended:
            raise ClientError(
                f"{dialect.model} gives no whole answer ({outcome.error or 'its stream has no end'})"
            )
        if "ignore_eos" not in dialect.fields:
            self.notices.append(f"{dialect.model}: the server refuses ignore_eos, so answers may end early.")
        if "completion_tokens" not in outcome.usage:
            self.notices.append(
                f"{dialect.model}: the server's streams tell no usage: each chunk with text counts as one token, and "
                "prompts as what was asked for."
            )

    def count_tokens(self, dialect: Dialect, text: str) -> int | None:
        """Tokens of a request with `text`, template and all; None if the server does not tell."""
        response = self._post(dialect.body(text, 1, stream=False))
        if response.status_code != 200:
            raise self._refusal(response)
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(response.json()["usage"]["prompt_tokens"])
        return None

    def describe(self) -> dict[str, Any]:
        """What the server says of itself, for the result file; null where it says nothing."""
        found: dict[str, Any] = {
            "url": shown_url(self._url),
            "owned_by": None,
            "software": None,
            "version": None,
        }
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
            response = self._http.get("models")
            found["software"] = response.headers.get("server")
            found["owned_by"] = str(response.json()["data"][0]["owned_by"])
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError, TypeError):  # vLLM and sleb have it
            found["version"] = str(
                self._http.get(f"{self._url.removesuffix('/v1')}/version").json()["version"]
            )
        return found

    def _post(self, body: Mapping[str, Any]) -> httpx.Response:
        with explained(self._url):
            return self._http.post(ENDPOINTS[self._endpoint], json=body)

    def _refusal(self, response: httpx.Response) -> ClientError:
        status, said = response.status_code, shorten(str(error_of(response)["message"]))
        if status in (401, 403):
            remedy = "give the key with --api-key, or set SLEB_API_KEY or OPENAI_API_KEY"
        elif status == 404 and "model" in said.lower():
            listed = ", ".join(self._listed[:20])
            remedy = f"--model may be one of: {listed}" if listed else "name another with --model"
        elif status in (404, 405):
            remedy = (
                f"does {self._url} have {ENDPOINTS[self._endpoint]}? Else give another --url or --endpoint"
            )
        elif status < 500:
            remedy = "change the lengths, --endpoint or --model"
        else:
            remedy = "the server's log may say more"
        return ClientError(f"{said} (HTTP {status}); {remedy}", status=status)
