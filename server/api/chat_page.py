"""The chat page at / and the files that it loads.

Everything comes from this server: the policy forbids other hosts, and scripts and styles inside the page. The files
are open without a key, since the page has to ask for it; what the page then calls is guarded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from sleb.server.routing import OpenRoute

router = APIRouter(route_class=OpenRoute, include_in_schema=False)

FOLDER = Path(__file__).parents[1] / "page"
CONTENT_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
_HEADERS = {
    # no-cache: kept, and asked for anew, which costs a 304; so a newer server never meets an older script.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent; `etag` is a digest of its content."""

    content: bytes
    content_type: str
    etag: str


@cache
def page_files() -> dict[str, PageFile]:
    """Every file of a known type in the folder, by its path there; read once."""
    paths = sorted(path for path in FOLDER.rglob("*") if path.suffix in CONTENT_TYPES)
    return {path.relative_to(FOLDER).as_posix(): _read(path) for path in paths}


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:32]
    return PageFile(content, CONTENT_TYPES[path.suffix], f'"{digest}"')


@router.get("/")
async def index(request: Request) -> Response:
    """The page."""
    return _send(request, "index.html")


@router.get("/page/{name:path}")
async def page_file(request: Request, name: str) -> Response:
    """A file of the page; index.html has its place at / alone, where its relative links are right."""
    if name == "index.html" or name not in page_files():
        raise HTTPException(404)
    return _send(request, name)


def _send(request: Request, name: str) -> Response:
    file = page_files()[name]
    headers = _HEADERS | {"ETag": file.etag}
    known = {each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")}
    if file.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers | {"Content-Type": file.content_type})
