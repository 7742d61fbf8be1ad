"""Ollama's paths about models: what is served, and what this server does not do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from pydantic import Field
from typing_extensions import TypedDict

from sleb.server.answer.ollama_writer import timestamp
from sleb.server.answer_models import Count
from sleb.server.api.ollama import OllamaError, OllamaRoute, find_model
from sleb.server.context import ServerContext, get_context
from sleb.server.errors import ApiError, json_response
from sleb.server.message.thinking import can_think
from sleb.server.protocol import Body as RequestBody
from sleb.server.routing import errors, success

if TYPE_CHECKING:
    from sleb.engine.requests.tier import Tier

# The version of Ollama whose API this is: clients ask for one from which on a feature exists.
API_VERSION = "0.12.11"
_FORMATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ALWAYS = timedelta(days=365 * 100)


class OllamaShowBody(RequestBody):
    """POST /api/show."""

    model: str | None = None
    name: str | None = Field(None, description="The older name of model.")
    verbose: bool | None = None


class OllamaDetails(TypedDict):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(TypedDict):
    name: str
    model: str
    modified_at: str
    size: Count
    digest: str
    details: OllamaDetails


class OllamaModels(TypedDict):
    models: list[OllamaModel]


class OllamaRunningModel(OllamaModel):
    expires_at: str
    size_vram: Count
    context_length: Count


class OllamaRunningModels(TypedDict):
    models: list[OllamaRunningModel]


class OllamaShown(TypedDict):
    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaVersion(TypedDict):
    version: str


router = APIRouter(route_class=OllamaRoute)


@router.get("/api/tags", response_model=OllamaModels, responses=success())
async def tags(request: Request) -> Response:
    """All tiers under all their names."""
    context = get_context(request)
    return json_response({"models": [_model(context, tier, name) for name, tier in context.names.items()]})


@router.get("/api/ps", response_model=OllamaRunningModels, responses=success())
async def running(request: Request) -> Response:
    """The same: all are loaded."""
    context = get_context(request)
    forever = {"expires_at": timestamp(datetime.now(UTC) + _ALWAYS)}
    more = forever | {"context_length": context.engine.model.max_model_len}
    models = [_model(context, context.tier(name), name) for name in context.listed]
    return json_response({"models": [model | more | {"size_vram": model["size"]} for model in models]})


@router.post(
    "/api/show", response_model=OllamaShown, responses=success() | errors(400, 404, 413, model=OllamaError)
)
async def show(
    request: Request, body: Annotated[OllamaShowBody, Body(openapi_examples={"default": {"value": {}}})]
) -> Response:
    """What is known of one tier."""
    context = get_context(request)
    served = context.engine.model
    tier = context.tier(find_model(context, body.model or body.name))
    template = served.chat_template_for(False)
    family = _family(context)
    capabilities = ["completion"]
    if template is not None:
        capabilities += ["tools", *(["thinking"] if can_think(template) else [])]
    return json_response(
        {
            "modelfile": f"FROM {tier.id}",
            "parameters": "",
            "template": template or "{{ .Prompt }}",
            "details": _details(context, tier),
            "model_info": {
                "general.architecture": family,
                "general.basename": served.model_name,
                "general.parameter_count": served.num_parameters(tier.depth),
                f"{family}.block_count": tier.num_blocks_kept,
                f"{family}.context_length": served.max_model_len,
                f"{family}.embedding_length": served.spec.hidden_size,
                f"{family}.attention.head_count": served.spec.num_heads,
                f"{family}.attention.head_count_kv": served.spec.num_kv_heads,
            },
            "capabilities": capabilities,
            "modified_at": _created(context),
        }
    )


@router.get("/api/version", response_model=OllamaVersion, responses=success())
async def version() -> Response:
    """The version of Ollama whose API this is."""
    return json_response({"version": API_VERSION})


@router.post("/api/embed", include_in_schema=False)
@router.post("/api/embeddings", include_in_schema=False)
async def embed() -> Response:
    """Not what this server does: 501."""
    raise ApiError(
        501,
        "this server generates text and makes no embeddings; send them to a server with an embedding model",
        code="unsupported",
    )


@router.post("/api/pull", include_in_schema=False)
@router.post("/api/push", include_in_schema=False)
@router.post("/api/create", include_in_schema=False)
@router.post("/api/copy", include_in_schema=False)
@router.delete("/api/delete", include_in_schema=False)
@router.post("/api/blobs/{digest}", include_in_schema=False)
async def manage(request: Request) -> Response:
    """Not what this server does: 501."""
    names = ", ".join(get_context(request).names)
    raise ApiError(
        501,
        f"what is served was chosen when the server started: {names}; `sleb serve MODEL` serves another model",
        code="unsupported",
    )


def _model(context: ServerContext, tier: Tier, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "modified_at": _created(context),
        "size": context.engine.model.weight_bytes(tier.depth),
        "digest": tier.digest,
        "details": _details(context, tier),
    }


def _details(context: ServerContext, tier: Tier) -> OllamaDetails:
    served, family = context.engine.model, _family(context)
    size = served.num_parameters(tier.depth)
    return {
        "parent_model": served.model_name if tier.depth else "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": f"{size / 1e9:.1f}B" if size >= 1e9 else f"{size / 1e6:.2f}M",
        "quantization_level": _FORMATS.get(served.weights_name, served.weights_name.upper()),
    }


def _family(context: ServerContext) -> str:
    architecture: str = context.engine.model.spec.architecture
    return architecture.removesuffix("ForCausalLM").lower()


def _created(context: ServerContext) -> str:
    return timestamp(datetime.fromtimestamp(context.created, UTC))
