"""/openapi.json and /docs: the API described, the latter without a script, a style sheet or another host."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from html import escape
from threading import Lock
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from markdown_it import MarkdownIt
from pydantic import TypeAdapter

from sleb.server.context import ServerContext, get_context
from sleb.server.routing import REFERENCE, OpenRoute, Route

router = APIRouter(route_class=OpenRoute, include_in_schema=False)  # a browser's link bears no key

_SUMMARY = (
    "Every depth of a pruned model, for clients of OpenAI, Anthropic and Ollama. An error has the shape of "
    'its wire format, OpenAI\'s is `{"error": {"message", "type", "param", "code"}}`. Every answer has the headers '
    "`X-Request-Id` and `Server-Timing`."
)
_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1.5rem; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; }
details { border: 1px solid #8886; border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; }
code, pre { font: .875rem/1.4 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .6rem .8rem; border-radius: 6px; background: #8882; }
:not(pre) > code { padding: .1em .3em; border-radius: 4px; background: #8882; }
summary code { background: none; }
h4 { margin: 1rem 0 .3rem; }
p { margin: .5rem 0; }
table { border-collapse: collapse; width: 100%; }
tr { border-top: 1px solid #8884; }
td, th { padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }
td:first-child { white-space: nowrap; }
.method { display: inline-block; font-weight: 600; min-width: 4rem; }
@media (max-width: 40rem) {
  body { padding: 1rem; }
  td { display: block; padding: .1rem 0; }
}
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_LARGE = 2**53
_PARAMETER = re.compile(r"\{(\w+)\}")
_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def install(app: FastAPI, routes: Sequence[Route]) -> None:
    """Makes `app.openapi`, which /openapi.json answers, FastAPI's description with what only this server knows."""

    building = Lock()

    def openapi() -> dict[str, Any]:
        with building:
            if app.openapi_schema is None:
                app.openapi_schema = _describe(app, routes)
            return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _describe(app: FastAPI, routes: Sequence[Route]) -> dict[str, Any]:
    document = get_openapi(
        title=app.title,
        version=app.version,
        description=_SUMMARY,
        routes=app.routes,
        servers=[{"url": root}] if (root := app.state.context.options.root) else None,
        separate_input_output_schemas=False,
    )
    for route in routes:
        if route.body_model is not None:  # as pydantic says it: FastAPI makes floats of integer bounds
            _place(TypeAdapter(route.body_model).json_schema(ref_template=REFERENCE), document)
    _complete(document, app.state.context)
    return document


def _complete(document: dict[str, Any], context: ServerContext) -> None:
    """Events in their place, the token ids that the model has, and no answer that is never given."""
    schemas = document["components"]["schemas"]
    for methods in document["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", ()):
                if (
                    parameter["name"] == "model_id" and not context.options.keys
                ):  # else only key holders know it
                    parameter["example"] = next(iter(context.names))
            responses = operation["responses"]
            responses.pop("422", None)  # FastAPI's own, which `errors.install_handlers` replaces
            stream = responses.get("200", {}).get("content", {}).get("text/event-stream")
            if stream is not None:
                stream["itemSchema"] = _place(stream["itemSchema"], document)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    served = context.engine.model
    vocab_size = served.spec.vocab_size
    known = vocab_size if served.tokenizer is None else served.tokenizer.get_vocab_size()
    schemas["TokenId"]["maximum"], schemas["KnownTokenId"]["maximum"] = vocab_size - 1, known - 1
    document["components"]["schemas"] = dict(sorted(schemas.items()))


def _place(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """Puts a model's schema among the document's, with those that it refers to; returns a reference to it."""
    document["components"]["schemas"] |= schema.pop("$defs", {}) | {schema["title"]: schema}
    return {"$ref": REFERENCE.format(model=schema["title"])}


@router.get("/openapi.json")
async def openapi_json(request: Request) -> Response:
    """The description for programs."""
    return JSONResponse(await _document(request))


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The description for people."""
    url = str(request.base_url).rstrip("/") + get_context(request).options.root
    page = render(await _document(request), url)
    return Response(page, media_type="text/html", headers=_HEADERS)


async def _document(request: Request) -> dict[str, Any]:
    """Made in a thread, since the first time takes a second, for which the streams of others would wait."""
    return await asyncio.to_thread(request.app.openapi)


@cache
def _markdown() -> MarkdownIt:
    """CommonMark with tables, but what would be HTML or an image is shown as it is written."""
    options = {"html": False, "xhtmlOut": False}
    return MarkdownIt("commonmark", options).enable("table").disable("image")


def render(document: dict[str, Any], url: str) -> str:
    """An OpenAPI document as one page of HTML; it may hold any text, in its descriptions Markdown.

    url: the server's, for the examples.
    """
    info = document["info"]
    operations = "".join(
        _operation(path, method, operation, url)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    schemas = "".join(
        f"<details><summary><code>{escape(name)}</code></summary>"
        f'<div id="{escape(name)}">{_schema(schema)}</div></details>'  # inside, so that a link to it opens it
        for name, schema in document["components"]["schemas"].items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(info['title'])} API</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>{_markdown().render(info.get('description', ''))}"
        '<p><a href="openapi.json">openapi.json</a></p>'
        f"<h2>Endpoints</h2>{operations}<h2>Schemas</h2>{schemas}</body></html>"
    )


def _operation(path: str, method: str, operation: dict[str, Any], url: str) -> str:
    parts = [_markdown().render(operation.get("description") or operation.get("summary", ""))]
    content = operation.get("requestBody", {}).get("content", {})
    if content:
        parts.append(f"<h4>Body</h4><p>{_content(content)}</p>")
    commands = [_curl(method, url + path, operation, body) for body in _examples(content)]
    parts += ["<h4>Example</h4>", *(f"<pre><code>{escape(command)}</code></pre>" for command in commands)]
    rows = "".join(
        f"<tr><td>{escape(status)}</td><td>{_markdown().renderInline(answer['description'])}</td>"
        f"<td>{_content(answer.get('content', {}))}</td></tr>"
        for status, answer in operation["responses"].items()
    )
    parts.append(f"<h4>Answers</h4><table>{rows}</table>")
    return (
        f'<details><summary><span class="method">{method.upper()}</span> <code>{escape(path)}</code></summary>'
        f"{''.join(parts)}</details>"
    )


def _examples(content: dict[str, Any]) -> Iterator[Any]:
    """The bodies of an operation's examples; None where it takes no body."""
    if not content:
        yield None
    for described in content.values():
        yield from (example["value"] for example in described.get("examples", {}).values())


def _curl(method: str, url: str, operation: dict[str, Any], body: Any) -> str:
    """A command that makes the request. What only the reader knows is a variable of the shell."""
    command = "curl -N" if isinstance(body, dict) and body.get("stream") else "curl"
    if method != ("get" if body is None else "post"):
        command += f" -X {method.upper()}"
    command += " "
    known = {each["name"]: each["example"] for each in operation.get("parameters", ()) if "example" in each}
    for index, piece in enumerate(_PARAMETER.split(url)):
        if index % 2 == 0:
            command += shlex.quote(piece) if piece else ""
        else:
            command += shlex.quote(quote(known[piece], safe="/:")) if piece in known else f"${piece.upper()}"
    if operation.get("security"):
        command += ' \\\n  -H "Authorization: Bearer $API_KEY"'
    if body is not None:
        command += f" \\\n  -H 'Content-Type: application/json' \\\n  -d {shlex.quote(_json(body))}"
    return command


def _json(body: Any) -> str:
    """A body with a line a field, if it has several."""
    if not isinstance(body, dict) or len(body) < 2:
        return json.dumps(body, ensure_ascii=False)
    lines = (f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in body.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def _content(content: dict[str, Any]) -> str:
    return "<br>".join(
        f"{_type(described.get('schema') or described.get('itemSchema', {}))} ({escape(media_type)})"
        for media_type, described in content.items()
    )


def _schema(schema: dict[str, Any]) -> str:
    text: str = _markdown().render(schema.get("description", ""))
    required = schema.get("required", [])
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code>{' *' if name in required else ''}</td><td>{_type(each)}</td>"
        f"<td>{_markdown().renderInline(each.get('description', ''))}</td></tr>"
        for name, each in schema.get("properties", {}).items()
    )
    return text + (f"<table>{rows}</table>" if rows else f"<p>{_type(schema)}</p>")


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words, references as links."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(map(_type, schema[key]))
    if "contentSchema" in schema:
        return f"{_type(schema['contentSchema'])} in JSON"
    if "const" in schema or "enum" in schema:
        return escape(", ".join(json.dumps(each) for each in schema.get("enum", [schema.get("const")])))
    kind = schema.get("type", "anything")
    if isinstance(kind, list):
        return " or ".join(_type(schema | {"type": each}) for each in kind)
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return escape(f"{kind}{_range(schema)}" if kind in ("integer", "number") else str(kind))


def _range(schema: dict[str, Any]) -> str:
    """The bounds of a number, without those that only keep it exact."""
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high = schema.get("maximum", _LARGE)
    bounds = "" if above is None else f" above {_number(above)}"
    bounds += "" if low is None or low <= -_LARGE else f" from {_number(low)}"
    return bounds if high >= _LARGE else f"{bounds} to {_number(high)}"


def _number(value: float) -> str:
    return str(int(value) if value == int(value) else value)
