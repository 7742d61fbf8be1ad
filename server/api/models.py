"""GET /v1/models: every tier under every name, what was removed from it and what that brings."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, NotRequired

from fastapi import APIRouter, Request, Response
from typing_extensions import TypedDict

from sleb.engine.generation import SAMPLING
from sleb.server.answer_models import Count
from sleb.server.bench_result import Perplexity, Questions, perplexities, why_unknown
from sleb.server.context import ServerContext, get_context
from sleb.server.errors import json_response
from sleb.server.routing import Route, errors, success

if TYPE_CHECKING:
    from sleb.engine.requests.tier import Tier

router = APIRouter(route_class=Route)


class HeldOutPerplexity(Perplexity):
    """Of a text that took no part in the search. others: of further texts, the calibration's last."""

    others: list[Perplexity]


class Pruning(TypedDict):
    """speedup: value, test, batch, device. perplexity_unknown: why `perplexity` is null. Null where not measured."""

    depth: Count
    num_blocks: Count
    blocks_kept: Count
    units_removed: list[str]
    weight_bytes: Count
    kv_bytes_per_token: Count
    perplexity: HeldOutPerplexity | None
    perplexity_unknown: str | None
    speedup: dict[str, Any] | None
    questions: Questions | None


class Policy(TypedDict):
    """How a server chooses the depth of a model whose name ends in :auto. allowed: those of `depths` that lose no more
    than the bound, a share of the full model's perplexity."""

    depths: list[Count]
    allowed: list[Count]
    target_ttft_ms: float
    max_perplexity_increase: float
    hold_seconds: float


class Model(TypedDict):
    """`root` is the unpruned model, `parent` the same for a pruned tier, else null. sampling: for requests without.

    policy: where the server chooses the depth; `pruning` is then of the shallowest.
    type, display_name, created_at, lifecycle and max_input_tokens are Anthropic's.
    """

    id: str
    object: Literal["model"]
    created: Count
    type: Literal["model"]
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: Count
    owned_by: str
    root: str
    parent: str | None
    max_model_len: Count
    sampling: dict[str, float]
    pruning: Pruning
    policy: NotRequired[Policy]


class ModelList(TypedDict):
    """has_more, first_id and last_id are Anthropic's."""

    object: Literal["list"]
    data: list[Model]
    has_more: Literal[False]
    first_id: str
    last_id: str


@router.get(
    "/v1/models",
    response_model=ModelList,
    responses=success(
        links={"model": {"operationId": "get_model", "parameters": {"model_id": "$response.body#/data/0/id"}}}
    ),
)
async def list_models(request: Request) -> Response:
    """All tiers, first the one that answers where no model is named, then the same under their other names."""
    context = get_context(request)
    models = [model_card(context, context.tier(name), name) for name in context.listed]
    ends = {"first_id": models[0]["id"], "last_id": models[-1]["id"]}
    return json_response({"object": "list", "data": models, "has_more": False} | ends)


@router.get(
    "/v1/models/{model_id:path}",
    operation_id="get_model",
    response_model=Model,
    responses=success() | errors(404),
)
async def get_model(request: Request, model_id: str) -> Response:
    """One tier."""
    context = get_context(request)
    tier = context.tier(model_id)
    name = next(name for name in context.listed if name.lower() == model_id.lower())
    return json_response(model_card(context, tier, name))


def model_card(context: ServerContext, tier: Tier, name: str) -> Model:
    """What the API tells of a tier."""
    served, results = context.engine.model, context.results
    speedup = next((found for each in results if (found := each.speedup(tier.depth))), None)
    told = perplexities(served.layer_map, results, tier.depth)
    unknown = why_unknown(told)
    perplexity: HeldOutPerplexity | None = None
    if unknown is None:
        perplexity = {**told[0], "others": told[1:]}
    card: Model = {
        "id": name,
        "object": "model",
        "created": context.created,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(context.created, UTC).isoformat(),
        "lifecycle": "active",
        "max_input_tokens": served.max_model_len,
        "owned_by": "sleb",
        "root": served.model_name,
        "parent": served.model_name if tier.depth else None,
        "max_model_len": served.max_model_len,
        "sampling": {field: getattr(served.defaults, field) for field in SAMPLING},
        "pruning": {
            "depth": tier.depth,
            "num_blocks": served.layer_map.num_blocks,
            "blocks_kept": tier.num_blocks_kept,
            "units_removed": [str(unit) for unit in tier.removed],
            "weight_bytes": served.weight_bytes(tier.depth),
            "kv_bytes_per_token": served.kv_bytes_per_token(tier.depth),
            "perplexity": perplexity,
            "perplexity_unknown": unknown,
            "speedup": speedup,
            "questions": next(
                (each.questions[tier.depth] for each in results if tier.depth in each.questions), None
            ),
        },
    }
    auto = context.auto
    if auto is not None and name == auto.name:
        card["policy"] = {
            "depths": list(auto.policy.depths),
            "allowed": list(auto.depths),
            "target_ttft_ms": auto.policy.ttft * 1e3,
            "max_perplexity_increase": auto.policy.max_perplexity,
            "hold_seconds": auto.policy.hold,
        }
    return card
