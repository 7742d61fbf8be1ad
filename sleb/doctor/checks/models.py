"""GET /models."""

from __future__ import annotations

from urllib.parse import quote

from sleb.doctor.check import Group
from sleb.doctor.outcome import expect
from sleb.doctor.target import Target, ok, shown

GROUP = Group("models")


@GROUP.required
def models_are_listed(target: Target) -> None:
    """GET /models is {"object": "list", "data": […]} with id, object, created and owned_by. Source: OpenAI API."""
    answer = ok(target.http.get("models"))
    expect(answer["object"] == "list", f"object is {shown(answer['object'])}")
    expect(answer["data"], "data is empty")
    for card in answer["data"]:
        expect(card["object"] == "model", f"a model's object is {shown(card['object'])}")
        expect(isinstance(card["id"], str) and card["id"], f"an id is {shown(card['id'])}")
        expect(type(card["created"]) is int, f"created is {shown(card['created'])}")
        expect(isinstance(card["owned_by"], str), f"owned_by is {shown(card['owned_by'])}")


@GROUP.required
def ids_are_distinct(target: Target) -> None:
    """No two models share an id. Source: OpenAI API."""
    ids = [card["id"] for card in ok(target.http.get("models"))["data"]]
    expect(len(set(ids)) == len(ids), f"the ids are {shown(ids)}")


@GROUP.required
def a_model_can_be_asked_for(target: Target) -> None:
    """GET /models/{id} is that model's entry of the list. Source: OpenAI API."""
    name = target.card["id"]
    card = ok(target.http.get(f"models/{quote(name)}"))
    expect(card["id"] == name and card["object"] == "model", f"GET /models/{{id}} is {shown(card)}")


@GROUP.required
def an_unknown_model_is_404(target: Target) -> None:
    """GET /models/{id} of an id that does not exist is 404 with an error body. Source: OpenAI API."""
    target.refused(target.http.get("models/no-such-model"), 404)


@GROUP.sleb_only
def the_context_length_is_told(target: Target) -> None:
    """A model's entry has max_model_len, a positive integer. Source: vLLM, sleb."""
    length = target.card["max_model_len"]
    expect(type(length) is int and length > 0, f"max_model_len is {shown(length)}")


@GROUP.sleb_only
def pruning_is_told(target: Target) -> None:
    """A model's entry has root, parent and pruning, which tells the blocks kept. Source: sleb."""
    card = target.card
    expect(isinstance(card["root"], str), f"root is {shown(card['root'])}")
    expect(card["parent"] is None or isinstance(card["parent"], str), f"parent is {shown(card['parent'])}")
    kept, total = card["pruning"]["blocks_kept"], card["pruning"]["num_blocks"]
    expect(0 < kept <= total, f"{kept} of {total} blocks are kept")
