"""/docs: what it shows, what it would load, and that its examples are commands that work."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
from html.parser import HTMLParser

from sleb.server.api.docs import render


class Page(HTMLParser):
    """What a page would load or run, its links, and the tags that it leaves open."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.ids, self.open, self.text = [], [], set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("script", "link", "img", "iframe") or any(name.startswith("on") for name in attributes):
            self.loads.append(tag)
        self.links += [attributes["href"]] if "href" in attributes else []
        self.ids |= {attributes["id"]} if "id" in attributes else set()
        self.open += [] if tag in ("meta", "br") else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_docs_load_nothing_and_show_everything(server):
    response = server.http.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page = Page(response.text)
    assert page.loads == []
    assert page.open == []
    for link in page.links:
        assert link == "openapi.json" or (link.startswith("#") and link[1:] in page.ids)
    assert "url(" not in response.text
    document = server.http.get("/openapi.json").json()
    for name in [
        *document["paths"],
        *document["components"]["schemas"],
        "temperature",
        "max_completion_tokens",
    ]:
        assert name in page.text


ENDPOINT = re.compile(
    r'<span class="method">(\w+)</span> <code>(.*?)</code></summary>(.*?)</details>', re.DOTALL
)


def commands(text):
    return [html.unescape(each) for each in re.findall(r"<pre><code>(.*?)</code></pre>", text, re.DOTALL)]


def run(command, **variables):
    """The answer and its status."""
    done = subprocess.run(
        ["sh", "-euc", command + r" -sS -w '\n%{http_code}'"],
        env={"PATH": os.environ["PATH"], **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    answer, _, status = done.stdout.rpartition("\n")
    return answer, status


def test_every_endpoint_has_examples_and_they_are_commands_that_work(serve_engine, make_fake_engine):
    server = serve_engine(make_fake_engine(max_model_len=1024), api_keys=("secret",))
    server.http.headers["Authorization"] = "Bearer secret"
    document = server.http.get("/openapi.json").json()
    shown = ENDPOINT.findall(server.http.get("/docs").text)
    endpoints = [(path, method) for path, methods in document["paths"].items() for method in methods]
    assert [(html.unescape(path), method.lower()) for method, path, _ in shown] == endpoints
    for (path, method), (_, _, text) in zip(endpoints, shown, strict=True):
        operation = document["paths"][path][method]
        assert commands(text), f"{method} {path} has no example: Body(openapi_examples=...)"
        for command in commands(text):
            kept = ""
            if "$RESPONSE_ID" in command:
                kept = server.post("/v1/responses", input="a").json()["id"]
            answer, status = run(command, API_KEY="secret", RESPONSE_ID=kept, MODEL_ID="fake")
            assert answer and status == next(iter(operation["responses"])), f"{command}\n{answer}\n{status}"


def test_docs_render_markdown_and_nothing_else():
    text = "*Why* `a < b`\n\n- one\n\n| a |\n|-|\n| 1 |\n\n"
    text += "![i](//host/i.png) [l](javascript:alert(1)) <b onclick=x>c</b>"
    operation = {"description": text, "responses": {"200": {"description": "**good**"}}}
    schema = {"properties": {"a": {"type": "integer", "description": "`b`"}}}
    info = {"title": "t", "version": "1", "description": "[docs](https://example.org)"}
    document = {"info": info, "paths": {"/p": {"get": operation}}, "components": {"schemas": {"s": schema}}}
    page = render(document, "http://host")
    for each in (
        "<em>Why</em>",
        "<code>a &lt; b</code>",
        "<li>one</li>",
        "<td>1</td>",
        "<strong>good</strong>",
        '<a href="https://example.org">docs</a>',
        "<code>b</code>",
    ):
        assert each in page
    assert "<img" not in page and "<b" not in page.replace("<body", "") and 'href="javascript' not in page
    assert Page(page).open == []


def test_docs_of_a_document_with_markup_in_it():
    evil = "<script>alert(1)</script>'\"$(id)"
    body = {evil: {"schema": {}, "examples": {evil: {"value": {evil: evil}}}}}
    operation = {
        "description": evil,
        "responses": {evil: {"description": evil}},
        "parameters": [{"name": "a", "example": evil}],
        "requestBody": {"content": body},
    }
    schema = {"description": evil, "properties": {evil: {"type": evil, "description": evil}}}
    info = {"title": evil, "version": evil, "description": evil}
    paths = {"/{a}/" + evil: {"post": operation}}
    page = render({"info": info, "paths": paths, "components": {"schemas": {evil: schema}}}, "http://" + evil)
    assert "<script" not in page
    [command] = re.findall(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)
    script = "curl() { printf '%s\\n' \"$@\"; }\n" + html.unescape(command)  # what the shell makes of it
    done = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=True)
    address, *_, sent = done.stdout.strip().split("\n")
    assert address == f"http://{evil}/%3Cscript%3Ealert%281%29%3C/script%3E%27%22%24%28id%29/{evil}"
    assert json.loads(sent) == {evil: evil}


def test_examples_and_links_stay_below_the_path_of_a_proxy(serve_engine, fake_engine):
    server = serve_engine(fake_engine, root_path="/below")
    page = server.http.get("/docs").text
    assert f"curl {server.url}/below/v1/models" in page
    assert not [link for link in Page(page).links if link.startswith("/")]
