"""The chat page as files: what is served and how, and that the page asks for nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import pytest

from sleb.server.api.chat_page import FOLDER, page_files

TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "txt": "text/plain; charset=utf-8",
}
NAMES = sorted(page_files())
OWN = [name for name in NAMES if not name.startswith("vendor/")]
MODULES = [name for name in OWN if name.endswith(".js")]
INDEX = (FOLDER / "index.html").read_text("utf-8")


def path_of(name):
    return "/" if name == "index.html" else f"/page/{name}"


class Elements(HTMLParser):
    """The start tags of a page as (tag, attributes, texts); `inline` code.

    The texts are those inside a button or label, for other elements those of the one around.
    """

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.inline = ""
        self._texts = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag in ("button", "label"):
            self._texts = []
        self.found.append((tag, dict(attrs), [] if self._texts is None else self._texts))

    def handle_endtag(self, tag):
        if tag in ("button", "label"):
            self._texts = None

    def handle_data(self, data):
        if self.cdata_elem:
            self.inline += data.strip()
        elif self._texts is not None and data.strip():
            self._texts.append(data.strip())


ELEMENTS = Elements(INDEX)


@pytest.mark.parametrize("name", NAMES)
def test_files_are_served_as_they_are(server, name):
    response = server.http.get(path_of(name))
    assert response.status_code == 200
    assert response.headers["content-type"] == TYPES[name.rpartition(".")[2]]
    assert response.content == (FOLDER / name).read_bytes()
    head = server.http.head(path_of(name))
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(response.content))


def test_files_are_kept_and_asked_for_anew(server):
    first = server.http.get("/page/app.js")
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for given in (tag, f"W/{tag}", f'"other", {tag}'):
        again = server.http.get("/page/app.js", headers={"If-None-Match": given})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert server.http.get("/page/app.js", headers={"If-None-Match": '"other"'}).status_code == 200
    assert server.http.get("/page/style.css").headers["etag"] != tag


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/page/icon.svg", "/page/vendor/marked.LICENSE.txt"])
def test_policy_forbids_other_hosts_and_inline_code(server, path):
    headers = server.http.get(path).headers
    policy = {}
    for directive in headers["content-security-policy"].split(";"):
        name, *sources = directive.split()
        policy[name] = sources
    assert policy["default-src"] == ["'none'"]
    for name in ("script-src", "worker-src", "style-src", "img-src", "connect-src", "font-src"):
        assert policy[name] == ["'self'"]
    for name in ("base-uri", "form-action", "frame-ancestors"):
        assert policy[name] == ["'none'"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    "path",
    [
        "/page",
        "/page/",
        "/page/index.html",  # its place is /
        "/page/nothing.js",
        "/page/VENDOR.md",
        "/page/../page.py",
        "/page/%2e%2e/page.py",
        "/page/vendor/../../app.py",
        "/page//etc/passwd",
    ],
)
def test_nothing_else_is_served(server, path):
    response = server.http.get(server.url + path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_page_is_open_where_the_api_needs_a_key(serve_engine, fake_engine):
    server = serve_engine(fake_engine, api_keys=("secret",))
    for name in NAMES:
        assert server.http.get(path_of(name)).status_code == 200
        assert server.http.head(path_of(name)).status_code == 200
    for path in ("/v1/models", "/page/../v1/models", "//v1/models"):
        response = server.http.get(server.url + path)
        assert response.status_code in (401, 404)
        assert "fake:sleb-1" not in response.text
    assert server.http.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize("name", OWN)
def test_own_files_name_no_other_host(name):
    text = (FOLDER / name).read_text("utf-8").replace("http://www.w3.org/2000/svg", "")  # a namespace
    assert not re.search(r"[a-z]+://|[\"'(]//|\bdata:[a-z]+/", text), name


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("vendor/")])
def test_vendored_files_load_nothing(name):
    text = (FOLDER / name).read_text("utf-8")
    assert not re.search(r"@import|\bimport\s*\(|importScripts|XMLHttpRequest|\bfetch\s*\(", text)
    assert not name.endswith(".css") or "url(" not in text


def test_vendored_files_are_those_that_the_list_names():
    rows = re.findall(
        r"^\| `(\S+)` \| .* \| ([\d.]+) \| .* \| `([0-9a-f]{64})` \|$",
        (FOLDER / "VENDOR.md").read_text("utf-8"),
        re.MULTILINE,
    )
    code = {path.name for path in (FOLDER / "vendor").iterdir() if path.suffix in (".js", ".css")}
    assert {name for name, _, _ in rows} == code
    for name, version, digest in rows:
        content = (FOLDER / "vendor" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
        assert version.encode() in content[:400] or name.endswith(".css")
        [licence] = (FOLDER / "vendor").glob(f"{name.split('.')[0]}.LICENSE.txt")
        assert "licen" in licence.read_text("utf-8").lower()


def test_the_page_has_no_inline_code():
    assert ELEMENTS.inline == ""
    for tag, attributes, _ in ELEMENTS.found:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag
        assert tag != "style"
        assert tag != "script" or attributes.get("src")


def references():
    """(file, what it refers to) for every address in the page, its modules and its styles."""
    for _, attributes, _ in ELEMENTS.found:
        for value in (attributes.get("src"), attributes.get("href")):
            if value and not value.startswith("#"):
                yield "index.html", value
    for name in MODULES:
        text = (FOLDER / name).read_text("utf-8")
        yield from ((name, found) for found in re.findall(r'\b(?:from|new URL\()\s*"(\./[^"]+)"', text))
    for name in (name for name in OWN if name.endswith(".css")):
        text = (FOLDER / name).read_text("utf-8")
        yield from ((name, found) for found in re.findall(r"url\(([^)]*)\)", text))


def test_everything_referred_to_is_there():
    found = set()
    for name, value in references():
        path = urlsplit(urljoin(f"http://host{path_of(name)}", value)).path
        assert path.removeprefix("/page/") in [*NAMES, "/docs"], f"{name} refers to {value}"
        found.add(path.removeprefix("/page/"))
    unused = set(NAMES) - found - {"index.html"}
    assert all(name.endswith(".LICENSE.txt") for name in unused), unused


def test_ids_and_icons_that_the_scripts_name_exist():
    ids = [attributes["id"] for _, attributes, _ in ELEMENTS.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    text = "\n".join((FOLDER / name).read_text("utf-8") for name in MODULES)
    assert set(re.findall(r'\$\("([\w-]+)"\)', text)) <= set(ids)
    icons = re.findall(r'\b(?:icon|iconButton)\("([\w-]+)"', text)
    icons += [value["href"][3:] for tag, value, _ in ELEMENTS.found if tag == "use"]
    assert {f"i-{name}" for name in icons} <= set(ids)


def test_controls_have_names():
    """A button has a text or a label, a field lies in a label or is named by one."""
    labelled = {attributes.get("for") for tag, attributes, _ in ELEMENTS.found if tag == "label"}
    filled_by_script = {"tier-a", "tier-b", "theme"}
    for tag, attributes, texts in ELEMENTS.found:
        if tag in ("button", "input", "textarea"):
            name = attributes.get("id")
            assert texts or attributes.get("aria-label") or name in labelled | filled_by_script, attributes


NODE = shutil.which("node")
RENDER = """
import { toHtml } from "./markdown-html.js";
let input = "";
for await (const piece of process.stdin) input += piece;
console.log(JSON.stringify(JSON.parse(input).map(toHtml)));
"""


@pytest.mark.skipif(NODE is None, reason="there is no Node.js here")
def test_markdown_is_bounded_in_depth_and_size(tmp_path):
    """What Markdown means is marked's; the bounds are ours, and HTML of a text is text."""
    shutil.copytree(FOLDER / "vendor", tmp_path / "vendor")
    shutil.copy(FOLDER / "markdown-html.js", tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "render.js").write_text(RENDER)
    shown = {
        "*a* <b onclick=x>": "<p><em>a</em> &lt;b onclick=x&gt;</p>\n",
        "![p](https://a.b/c)": '<p><a href="https://a.b/c">p</a></p>\n',
        "> a\n" * 2000: None,  # any
        "> " * 49 + "a": None,
        "a\n" * 2400: None,
    }
    plain = ["> " * 50 + "a", ">" * 2000, "- " * 2000 + "x", "a\n\n" * 5001, "[a](b)" * 5001, "a" * 200_001]
    given = json.dumps([*shown, *plain])
    done = subprocess.run(
        [NODE, "render.js"], input=given, capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    answers = json.loads(done.stdout)
    for text, wanted, found in zip(shown, shown.values(), answers, strict=False):
        assert found is not None and wanted in (None, found), text[:20]
    assert answers[len(shown) :] == [None] * len(plain)
