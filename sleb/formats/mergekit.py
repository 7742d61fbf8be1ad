"""mergekit's passthrough merges of one model (github.com/arcee-ai/mergekit, mergekit/config.py, docs/merge_methods.md).

    slices:
      - sources:
          - model: meta-llama/Llama-2-7b-hf
            layer_range: [0, 10]          # the second number is not in it
      - sources:
          - model: meta-llama/Llama-2-7b-hf
            layer_range: [12, 13]
            parameters:
              scale:                      # multiplies the tensors whose name has `filter` in it; the first that fits
                - filter: o_proj
                  value: 0.0
    merge_method: passthrough
    dtype: bfloat16

Blocks in no slice are left out. A scale of zero on an output projection leaves out that attention or MLP: it adds
zero. mergekit reads `scale` from the source, the slice, the module and the whole file, in this order, and keeps in
config.json whatever lists a value for every block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]

from sleb.errors import ConfigError, LayerMapError
from sleb.formats.model_config import per_block_lists
from sleb.formats.removal import Imported, Removal
from sleb.layer_map.units import Part, Unit, is_int

if TYPE_CHECKING:  # it needs torch, which reading a list does not
    from sleb.engine.model.architecture import DecoderSpec

_MAX_BLOCKS = 10_000  # a slip of the pen should not take the machine's memory
# Names of a block's output projections in all architectures, and of what stands before them.
_OUTPUTS: dict[Part, tuple[str, ...]] = {
    "attention": ("self_attn.o_proj.weight", "self_attn.out_proj.weight"),
    "mlp": ("mlp.down_proj.weight", "fc2.weight"),
}
_INPUTS: dict[Part, tuple[str, ...]] = {
    "attention": ("input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.v_proj.weight"),
    "mlp": ("post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


def write_mergekit(removal: Removal, spec: DecoderSpec, model: str) -> str:
    """The YAML; `model` is a hub id or a folder. Raises ConfigError for parts of a model with norms last."""
    if removal.parts and not spec.norm_first:
        raise ConfigError(
            f"{spec.architecture} has its norms after the residual add, so scaling a projection to zero does not "
            "leave a part out: use --format llm-drop or blockpruner, or a depth of whole blocks"
        )
    if spec.experts is not None and any(part == "mlp" for _, part in removal.parts):
        raise ConfigError(
            f"the MLPs of {spec.architecture} are mixtures of experts, which mergekit cannot leave out alone: use "
            "--format zeroed, llm-drop or blockpruner, or a depth of whole blocks"
        )
    _check_filters(removal, spec)
    slices: list[dict[str, Any]] = []
    for filters, run in itertools.groupby(
        removal.kept_blocks, key=lambda block: _filters(removal, spec, block)
    ):
        for first, last in _ranges(run):
            source: dict[str, Any] = {"model": model, "layer_range": [first, last + 1]}
            if filters:
                source["parameters"] = {"scale": [{"filter": each, "value": 0.0} for each in filters]}
            slices.append({"sources": [source]})
    document: dict[str, Any] = {"slices": slices, "merge_method": "passthrough"}
    if spec.checkpoint_dtype:
        document["dtype"] = spec.checkpoint_dtype
    text: str = yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=110)
    return _warning(removal, spec) + text


def _check_filters(removal: Removal, spec: DecoderSpec) -> None:
    """A filter must name one projection alone: GPT-2 calls both of a block c_proj. Raises ConfigError."""
    names = spec.names
    modules = (*names.qkv, names.attention_out, *names.up, names.down)
    for part, module in (("attention", names.attention_out), ("mlp", names.down)):
        meant = [each for each in modules if module.rpartition(".")[2] in each]
        if len(meant) > 1 and any(each == part for _, each in removal.parts):
            raise ConfigError(
                f"a filter of mergekit for {module} of {spec.architecture} is one for {meant[-1]} too: use --format "
                "zeroed, llm-drop or blockpruner, or a depth of whole blocks"
            )


def _filters(removal: Removal, spec: DecoderSpec, block: int) -> tuple[str, ...]:
    modules = {"attention": spec.names.attention_out, "mlp": spec.names.down}
    return tuple(modules[part].rpartition(".")[2] for each, part in sorted(removal.parts) if each == block)


def _ranges(blocks: Iterator[int]) -> Iterator[tuple[int, int]]:
    """First and last of every run of consecutive numbers."""
    for _, run in itertools.groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0]):
        numbers = [block for _, block in run]
        yield numbers[0], numbers[-1]


def _warning(removal: Removal, spec: DecoderSpec) -> str:
    lists = per_block_lists(spec, removal.kept_blocks)
    if not lists or not removal.blocks:
        return ""
    lines = [
        "mergekit keeps lists with a value for every block as they were: set these in the merged config.json."
    ]
    lines += [f"{name}: {values}" for name, values in lists.items()]
    return "".join(f"# {line}\n" for line in lines)


def is_mergekit(document: Any) -> bool:
    return isinstance(document, dict) and "merge_method" in document


def read_mergekit(text: str) -> Imported:
    """Which blocks and parts a merge leaves out; how many blocks the model has is not said there.

    Raises LayerMapError for a merge of more than one model, one that repeats or reorders blocks, and other scales.
    """
    document = parse_yaml(text)
    if not is_mergekit(document):
        raise LayerMapError("it is no mergekit configuration: it has no merge_method")
    if document["merge_method"] != "passthrough":
        raise LayerMapError(f"merge_method is {document['merge_method']!r}; only passthrough keeps weights")
    slices = _slices(document)
    models = sorted({each.model for each in slices})
    if len(models) != 1:
        raise LayerMapError(
            f"it merges {len(models)} models ({', '.join(models[:3])}); only one can be pruned"
        )
    units, next_block = [], 0
    for each in slices:
        if each.first < next_block:
            raise LayerMapError(
                f"layer_range [{each.first}, {each.end}] goes back to block {each.first}: a layer map removes blocks, "
                "it does not repeat or reorder them"
            )
        units += [Unit(block) for block in range(next_block, each.first)]
        units += [unit for block in range(each.first, each.end) for unit in _scaled_away(each.scales, block)]
        next_block = each.end
    return Imported(tuple(units), model=models[0], source="mergekit, passthrough", rest_from=next_block)


def parse_yaml(text: str) -> Any:
    """Plain data only. Raises LayerMapError for what is no YAML, or has tags for other objects."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        where = str(error).replace("\n", " ")[:120]
        raise LayerMapError(f"it is not YAML, or is cut short: {where}") from None


@dataclass(frozen=True)
class _Slice:
    """Blocks first to end - 1 of a model, with the settings of `scale` that count, nearest first."""

    model: str
    first: int
    end: int
    scales: tuple[Any, ...]


def _slices(document: Mapping[str, Any]) -> list[_Slice]:
    module: Mapping[str, Any] = document
    if "modules" in document:
        modules = document["modules"]
        if not isinstance(modules, dict) or len(modules) != 1:
            raise LayerMapError("modules must name one module; merges of several cannot be imported")
        [module] = modules.values()
    slices = module.get("slices") if isinstance(module, dict) else None
    if not isinstance(slices, list) or not slices:
        raise LayerMapError("it has no slices with a layer_range; a merge of whole models removes nothing")
    outer = [_scale(module)] if module is not document else []
    return [_slice(each, index, (*outer, _scale(document))) for index, each in enumerate(slices)]


def _slice(value: Any, index: int, outer: Sequence[Any]) -> _Slice:
    sources = value.get("sources") if isinstance(value, dict) else None
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        raise LayerMapError(f"slices[{index}] must have one source with a model and a layer_range")
    [source] = sources
    model, span = source.get("model"), source.get("layer_range")
    if isinstance(model, dict):  # the long form: {model: {path: …}}
        inner = model.get("model")
        model = inner.get("path") if isinstance(inner, dict) else inner
    if not isinstance(model, str) or "+" in model:
        raise LayerMapError(
            f"slices[{index}] has model {str(model)[:60]!r}; a name is needed, without a LoRA"
        )
    if not isinstance(span, list) or len(span) != 2 or not all(map(is_int, span)):
        raise LayerMapError(f"slices[{index}] has layer_range {str(span)[:40]}; it must be like [0, 10]")
    if not 0 <= span[0] < span[1] <= _MAX_BLOCKS:
        raise LayerMapError(
            f"slices[{index}] has layer_range {span}; it must rise, from 0 on, to {_MAX_BLOCKS} at most"
        )
    return _Slice(model.partition("@")[0], span[0], span[1], (_scale(source), _scale(value), *outer))


def _scale(node: Mapping[str, Any]) -> Any:
    parameters = node.get("parameters")
    return parameters.get("scale") if isinstance(parameters, dict) else None


def _scaled_away(scales: Sequence[Any], block: int) -> list[Unit]:
    """The parts of a block whose output projection is scaled to zero."""
    gone: list[Part] = []
    for part, outputs in _OUTPUTS.items():
        factors = [_factor(scales, f"layers.{block}.{name}") for name in (*outputs, *_INPUTS[part])]
        if 0.0 in factors[: len(outputs)]:
            gone.append(part)
        elif odd := [factor for factor in factors if factor != 1.0]:
            raise LayerMapError(
                f"block {block} is scaled by {odd[0]:g}; only a scale of 0 on an output projection removes something"
            )
    return [Unit(block)] if len(gone) == len(_OUTPUTS) else [Unit(block, part) for part in gone]


def _factor(scales: Sequence[Any], tensor: str) -> float:
    """What mergekit multiplies a tensor by (evaluate_setting and ConfigReader.parameter in its config.py)."""
    for setting in scales:
        value = _evaluate(setting, tensor)
        if value is not None:
            return value
    return 1.0


def _evaluate(setting: Any, tensor: str) -> float | None:
    if setting is None or (isinstance(setting, int | float) and not isinstance(setting, bool)):
        return None if setting is None else float(setting)
    conditions = setting if isinstance(setting, list) else [setting]
    for condition in conditions:
        if not isinstance(condition, dict) or "value" not in condition:
            raise LayerMapError(f"scale {str(setting)[:60]} is no number and no list of filters with values")
        wanted = condition.get("filter")
        if wanted in (None, "*") or str(wanted) in tensor:
            return _evaluate(condition["value"], tensor)
    return None
