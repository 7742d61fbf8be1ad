"""GET /v1/models: every tier under every name, what was removed from it and what that brings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from sleb.server.bench_result import perplexities
from sleb.server.context import ServerContext, get_context
from sleb.server.errors import json_response

if TYPE_CHECKING:
    from sleb.engine.requests.tier import Tier

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """All tiers, in the order asked, then the same under their other names."""
    context = get_context(request)
    cards = [model_card(context, tier, name) for name, tier in context.names.items()]
    return json_response({"object": "list", "data": cards})


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> Response:
    """One tier."""
    context = get_context(request)
    tier = context.tier(model_id)
    name = next(name for name in context.names if name.lower() == model_id.lower())
    return json_response(model_card(context, tier, name))


def model_card(context: ServerContext, tier: Tier, name: str) -> dict[str, Any]:
    """What the API tells of a tier. `root` is the unpruned model, `parent` the same for a pruned tier, else null."""
    engine, results = context.engine.engine, context.options.bench_results
    speedup = next((found for each in results if (found := each.speedup(tier.depth))), None)
    perplexity = perplexities(engine.layer_map, tier.depth)
    if perplexity is None:
        perplexity = next((found for each in results if (found := each.perplexities(tier.depth))), None)
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "sleb",
        "root": engine.model_name,
        "parent": engine.model_name if tier.depth else None,
        "max_model_len": engine.max_model_len,
        "pruning": {
            "depth": tier.depth,
            "num_blocks": engine.layer_map.num_blocks,
            "blocks_kept": tier.num_blocks_kept,
            "units_removed": [str(unit) for unit in tier.removed],
            "weight_bytes": engine.weight_bytes(tier.depth),
            "kv_bytes_per_token": engine.kv_bytes_per_token(tier.depth),
            "perplexity": perplexity,
            "speedup": speedup,
        },
    }
