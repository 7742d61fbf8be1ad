"""GET /v1/models: every tier, and what was removed from it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from sleb.server.context import ServerContext, get_context
from sleb.server.errors import json_response

if TYPE_CHECKING:
    from sleb.engine.request import Tier
    from sleb.layer_map import LayerMap

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """All tiers, in the order asked."""
    context = get_context(request)
    cards = [model_card(context, tier) for tier in context.engine.engine.tiers]
    return json_response({"object": "list", "data": cards})


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> Response:
    """One tier."""
    context = get_context(request)
    return json_response(model_card(context, context.tier(model_id)))


def model_card(context: ServerContext, tier: Tier) -> dict[str, Any]:
    """What the API tells of a tier. `root` is the unpruned model, `parent` the same for a pruned tier, else null."""
    engine = context.engine.engine
    return {
        "id": tier.id,
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
            "perplexity": perplexities(engine.layer_map, tier.depth),
            "speedup": None,
        },
    }


def perplexities(layer_map: LayerMap, depth: int) -> dict[str, Any] | None:
    """Perplexity of the dense model and at `depth` on the map's calibration text; None unless all of it is known.

    The map's loss is the sum over windows of mean cross-entropy × window length.
    """
    record, losses = layer_map.calibration, layer_map.losses
    if record is None or losses is None or not (record.source and record.windows and record.seqlen):
        return None
    num_tokens = record.windows * record.seqlen
    try:
        dense, pruned = (math.exp(losses[k] / num_tokens) for k in (0, depth))
    except OverflowError:
        return None
    return {"dense": dense, "pruned": pruned, "dataset": record.source}
