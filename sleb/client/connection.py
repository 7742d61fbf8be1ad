"""A connection to an OpenAI-compatible server, and its failures as one line with the remedy."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from sleb.errors import ConfigError, SlebError

CONNECT_SECONDS = 10.0
_MAX_MESSAGE = 500  # characters of a server's own message that are shown
_CONTEXT_WORDS = re.compile(r"context (length|size|window)|maximum context|too many tokens", re.IGNORECASE)


class ClientError(SlebError):
    """A server that cannot be reached, or refused a request. `status` is the HTTP status; None if there is none."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def base_url(url: str) -> str:
    """`url` with a scheme, with /v1 where it has no path, without a slash at the end.

    Raises ConfigError for what is no HTTP address, and for one with a user or a password, which it does not repeat.
    """
    full = url.strip() if "://" in url else f"http://{url.strip()}"
    try:
        parts = urlsplit(full)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        has_user = "@" in parts.netloc
        httpx.URL(full)
    except (ValueError, httpx.InvalidURL):
        is_address = has_user = False
    if has_user or (not is_address and "@" in full):  # a password with a slash in it makes no address
        raise ConfigError(
            "an address must not hold a user or a password (what stands before an @); give the key with --api-key, or "
            "set SLEB_API_KEY, and write the address like http://127.0.0.1:8000/v1"
        )
    if not is_address or parts.query or parts.fragment:
        raise ConfigError(f"'{url}' is not the address of a server; write it like http://127.0.0.1:8000/v1")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def is_loopback(url: str) -> bool:
    """Whether `url` names this machine: then no proxy of the environment is asked."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_client(url: str, api_key: str | None, seconds: float) -> httpx.Client:
    """An HTTP client for paths below `url`; `seconds` of silence end a request.

    Raises ConfigError for a key that no header can hold.
    """
    if api_key is not None and (not api_key.isascii() or not api_key.isprintable()):
        raise ConfigError("the API key holds characters that no HTTP header can; check --api-key")
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return httpx.Client(
        base_url=url,
        headers=headers,
        timeout=httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)),
        trust_env=not is_loopback(url),
        verify=httpx.create_ssl_context(),  # by SSL_CERT_FILE, for this machine as well
    )


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Makes every failure of the network inside a ClientError."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        reason = "it does not answer" if isinstance(error, httpx.TimeoutException) else shorten(str(error))
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            raise ClientError(
                f"the certificate of {url} is not trusted ({reason}); set SSL_CERT_FILE to a file with the certificate "
                "that signed it, or give the address by a name that is in it"
            ) from error
        if "WRONG_VERSION_NUMBER" in reason:
            raise ClientError(f"what is at {url} does not speak https ({reason}); write http://") from error
        raise ClientError(
            f"no server at {url} ({reason}); start one, as with `sleb serve smollm2`, or give another address"
        ) from error
    except httpx.TimeoutException as error:
        raise ClientError(f"{url} has been silent for too long; the server may be busy: try again") from error
    except httpx.HTTPError as error:
        says_nothing = isinstance(error, httpx.RemoteProtocolError) and url.startswith("http:")
        remedy = "try again, with https:// if the server has TLS" if says_nothing else "try again"
        raise ClientError(
            f"the connection to {url} broke off ({shorten(str(error)) or type(error).__name__}); {remedy}"
        ) from error


def list_models(client: httpx.Client) -> list[str]:
    """The ids that GET /models tells, in its order. Raises ClientError."""
    url = str(client.base_url).rstrip("/")
    with explained(url):
        response = client.get("models")
    if response.status_code != 200:
        raise refusal(response, url)
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        message = f"{url}/models is no list of models; is this an OpenAI-compatible server?"
        raise ClientError(message, status=response.status_code) from None


def refusal(response: httpx.Response, url: str) -> ClientError:
    """An answer other than 200, whose body has been read, as an error with the remedy."""
    return refusal_of(response.status_code, error_of(response), url)


def error_of(response: httpx.Response) -> Mapping[str, Any]:
    """The `error` object of a body, or one made of whatever the body is."""
    try:
        content = response.json()
    except ValueError:
        content = response.text
    return error_object(content)


def error_object(content: Any) -> Mapping[str, Any]:
    """The error in a JSON value: OpenAI's {"error": {…}}, FastAPI's {"detail": …}, or anything else as its message."""
    inner = content
    if isinstance(content, dict):
        inner = content.get("error", content.get("detail", content.get("message", content)))
    if isinstance(inner, dict) and isinstance(inner.get("message"), str):
        return inner
    return {"message": inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)}


def refusal_of(status: int, error: Mapping[str, Any], url: str) -> ClientError:
    """What the server said, and what to do about it."""
    said = shorten(str(error["message"])) or f"HTTP {status}"
    code = str(error.get("code"))
    if status in (401, 403):
        remedy = "give the key with --api-key, or set SLEB_API_KEY or OPENAI_API_KEY"
    elif code == "model_not_found" or (status == 404 and "model" in said.lower()):
        remedy = "choose a model with --model, or /model in the chat"
    elif status in (404, 405):
        remedy = f"is {url} right? Such an address mostly ends in /v1"
    elif code == "context_length_exceeded" or (status == 400 and _CONTEXT_WORDS.search(said)):
        remedy = "begin anew with /reset, ask less, or lower --max-tokens"
    elif status in (429, 503):
        remedy = "the server is busy: /retry in a while"
    elif status >= 500:
        remedy = "the server's log has the details; /retry asks again"
    else:
        remedy = "change the request"
    return ClientError(f"{said} (HTTP {status}); {remedy}", status=status)


def shorten(text: str) -> str:
    """One line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_MESSAGE else line[: _MAX_MESSAGE - 3] + "..."
