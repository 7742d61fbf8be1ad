"""An endpoint is one module: its routes, its models, whether it needs a key, and how its errors are told."""

from __future__ import annotations

import sys

import jsonschema
import pytest

from sleb.server import api

SOURCE = '''
from fastapi import APIRouter, Request, Response
from pydantic import Field
from typing_extensions import TypedDict

from sleb.server.errors import json_response
from sleb.server.protocol import Body
from sleb.server.routing import OpenRoute, Route, errors, success

{more}
router = APIRouter(route_class={route})


class ToyBody(Body):
    number: int = Field(ge=1, le=2**63 - 1)


class Twice(TypedDict):
    twice: int


@router.post("/toy", response_model=Twice, responses=success() | errors(400))
async def double(request: Request, body: ToyBody) -> Response:
    """Twice the number."""
    return json_response({{"twice": 2 * body.number}})
'''

OWN_ROUTE = """
class Told(TypedDict):
    told: str


class OwnRoute(Route):
    error_model = Told

    @classmethod
    def error_body(cls, error, request_id):
        return {"told": f"{error}", "request": request_id}

    @classmethod
    def error_status(cls, error):
        return 422 if error.status == 400 else error.status
"""


@pytest.fixture
def toy_server(serve_engine, fake_engine, tmp_path, monkeypatch):
    """toy_server(route, more) -> a server with a key, which has the module, `more` of it before the router."""

    def start(route, more=""):
        (tmp_path / "toy.py").write_text(SOURCE.format(route=route, more=more))
        monkeypatch.setattr(api, "__path__", [*api.__path__, str(tmp_path)])
        return serve_engine(fake_engine, api_keys=("key",))

    yield start
    sys.modules.pop("sleb.server.api.toy", None)


@pytest.mark.parametrize(("route", "is_open"), [("Route", False), ("OpenRoute", True)])
def test_a_module_is_served_described_and_guarded(toy_server, route, is_open):
    server = toy_server(route)
    assert server.post("/toy", number=4).status_code == (200 if is_open else 401)
    assert server.http.get("/v1/models").status_code == 401
    server.http.headers["Authorization"] = "Bearer key"
    assert server.post("/toy", number=4).json() == {"twice": 8}
    assert server.http.options("/toy").headers["allow"] == "OPTIONS, POST"

    document = server.http.get("/openapi.json").json()
    operation, schemas = document["paths"]["/toy"]["post"], document["components"]["schemas"]
    assert operation["description"] == "Twice the number."
    assert ("security" in operation) == ("401" in operation["responses"]) == (not is_open)
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ToyBody"}
    number = schemas["ToyBody"]["properties"]["number"]
    assert (number["type"], number["minimum"], number["maximum"]) == ("integer", 1, 2**63 - 1)
    content = operation["responses"]["200"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/Twice"}
    assert "/toy" in server.http.get("/docs").text


def test_its_errors_are_the_usual_ones(toy_server):
    server = toy_server("OpenRoute")
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    refused = [
        (server.post("/toy"), "'number' is missing"),
        (
            server.post("/toy", number=0),
            "bad value 0 for 'number': input should be greater than or equal to 1",
        ),
        (server.http.post("/toy", content=b"{"), "the body is not valid JSON"),
        (server.http.post("/toy", content=b"x" * (33 * 2**20)), "the body is larger"),
    ]
    for response, message in refused:
        assert response.status_code in (400, 413)
        jsonschema.validate(response.json(), schemas["Error"] | {"components": {"schemas": schemas}})
        assert response.json()["error"]["message"].startswith(message)


def test_a_route_may_tell_every_error_of_its_path_in_a_shape_of_its_own(toy_server):
    server = toy_server("OwnRoute", OWN_ROUTE)
    key = {"Authorization": "Bearer key", "X-Request-Id": "mine"}
    post = server.http.post
    refused = [
        (post("/toy", headers={"X-Request-Id": "mine"}, json={"number": 1}), 401),
        (post("/toy", headers=key | {"Host": "evil.example"}, json={"number": 1}), 403),
        (post("/toy/", headers=key, json={}), 422),  # as the path is read
        (post("/toy", headers=key, content=b"{"), 422),
        (post("/toy", headers=key, content=b"x" * (33 * 2**20)), 413),
        (post("/toy", headers=key | {"Content-Encoding": "gzip"}, content=b"x"), 415),
        (server.http.get("/toy", headers=key), 405),
    ]
    for response, status in refused:
        assert response.status_code == status, response.text
        assert response.json().keys() == {"told", "request"}
        assert response.json()["request"] == response.headers["x-request-id"] == "mine"
    assert refused[0][0].headers["www-authenticate"] == "Bearer"
    for response in (post("/toys", headers=key, json={}), server.chat("", max_tokens=-5)):
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}  # nobody else's
    server.http.headers.update(key)
    operation = server.http.get("/openapi.json").json()["paths"]["/toy"]["post"]
    told = operation["responses"]["401"]["content"]["application/json"]["schema"]
    assert told == {"$ref": "#/components/schemas/Told"}
