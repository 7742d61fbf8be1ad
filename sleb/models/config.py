"""config.json: read once, and only the fields that the model's family names, each of the type and size it may have.

What is absent is what transformers' configuration class fills in. The bounds stand well above every published model;
what lies beyond them is a damaged file, and nobody is to allocate or count so far.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sleb.errors import ModelError
from sleb.fields import Fields, as_integer, read_json, shown, shown_path
from sleb.layer_map.fingerprint import shape_fingerprint
from sleb.layer_map.units import MAX_BLOCKS
from sleb.models.families import FAMILIES, Family

MAX_WIDTH = 1 << 17  # features of the residual stream: Llama 3.1 405B has 16,384
MAX_INNER = 1 << 20  # features inside an MLP: 53,248
MAX_HEADS = 1 << 10  # 128; and features of a head
MAX_EXPERTS = 1 << 10  # of a block: 512 in Qwen3-Next
MAX_VOCABULARY = 1 << 23  # tokens: 262,144 in Gemma
MAX_POSITIONS = 1 << 27  # tokens: the longest context that a model claims is 10 million

DTYPES = ("float32", "bfloat16", "float16", "float64")
_MAX_IDS = 1 << 10  # tokens that end a text

# What the config of a model that also sees says for its text model as well.
_OF_THE_WHOLE = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype"),
    *("quantization_config", "tokenizer_class"),
)

Rule = Callable[[Fields, str, Any], Any]
_RUNS = f"sleb runs {len(FAMILIES)} architectures, which docs/models.md lists"


def read_config(path: Path) -> Fields:
    """The fields of `path`/config.json, of a model that also sees those of its text model.

    Raises ModelError when it is absent or not a JSON object.
    """
    try:
        config = read_json(path / "config.json")
    except FileNotFoundError:
        raise ModelError(
            f"{shown_path(path)} has no config.json; MODEL must be a Hugging Face model folder"
        ) from None
    named = config.values.get("architectures")
    for family in FAMILIES.values():
        if family.text_of is not None and named == [family.text_of]:
            text: Fields = config.object("text_config")
            if text.values.get("model_type", family.model_type) == family.model_type:
                whole = {name: config.values[name] for name in _OF_THE_WHOLE if name in config}
                stated = {
                    name: each for name, each in text.values.items() if each is not None or name not in whole
                }
                named = {"architectures": [family.architecture], "model_type": family.model_type}
                return text.beside(whole | stated | named)
    return config


def check_config(path: Path) -> None:
    """Raises ModelError for what can be told of `path`/config.json without torch: all but how positions rotate."""
    config = read_config(path)
    read_fields(config, family_of(config))
    checkpoint_dtype(config)


def family_of(config: Fields) -> Family:
    """The family that `architectures` names, or model_type where that is empty. Raises ModelError for others."""
    wanted = f"a list of names; {_RUNS}"
    named = config.items("architectures", 64, [])
    if not all(isinstance(each, str) for each in named):
        raise config.wrong("architectures", wanted)
    model_type = config.string("model_type", default=None)
    for family in FAMILIES.values():
        if family.model_type == model_type and set(named) & set(family.also):
            return family
    for family in FAMILIES.values():
        if family.architecture in named or (not named and family.model_type == model_type):
            if model_type not in (None, family.model_type):
                raise config.wrong(
                    "model_type", f"{family.model_type}, since architectures names {family.architecture}"
                )
            return family
    found = f"architectures {shown(named)}" if named else f"model_type {shown(model_type)}"
    raise ModelError(
        f"{shown_path(config.source)}: {found} is not supported; {_RUNS}. `sleb prune --runtime transformers` finds "
        "what another architecture can do without, and `sleb export` writes the smaller checkpoint"
    )


def is_known(config: Fields) -> bool:
    """Whether the engine has a family of that model_type, or of one of the architectures."""
    named = config.values.get("architectures")
    names = [config.values.get("model_type"), *(named if isinstance(named, list) else [])]
    return any(
        each in names for family in FAMILIES.values() for each in (family.model_type, family.architecture)
    )


def read_fields(config: Fields, family: Family) -> dict[str, Any]:
    """The value of every field that `family` reads, and of no other. Raises ModelError for the first wrong one."""
    values = {}
    for name, default in family.fields.items():
        own = family.own(name)
        is_null = own in config.values and config.values[own] is None
        values[name] = _RULES[name](config, own, None if is_null and name in _NULLABLE else default)
        if values[name] not in family.only.get(name, (values[name],)):
            allowed = " or ".join(json.dumps(each) for each in family.only[name])
            raise config.wrong(own, f"{allowed}: no other variant of {family.architecture} is supported")
    return values


def checkpoint_dtype(config: Fields) -> str | None:
    """What the weights are stored in, as the file says: one of DTYPES, or None."""
    name = "dtype" if "dtype" in config else "torch_dtype"
    stated: str | None = config.string(name, default=None)
    if stated is not None and stated.removeprefix("torch.") not in DTYPES:
        raise config.wrong(name, f"one of {', '.join(DTYPES)}")
    return None if stated is None else stated.removeprefix("torch.")


def model_fingerprint(config: Fields | Mapping[str, Any]) -> str:
    """The fingerprint of the shape in a config.json, with what its family fills in: see `shape_fingerprint`."""
    fields = config if isinstance(config, Fields) else Fields(config, "config.json")
    model_type = fields.string("model_type", default="unknown")
    known = [family for family in FAMILIES.values() if family.model_type == model_type]
    own = {family.own(name): value for family in known for name, value in family.fields.items()}
    return shape_fingerprint(model_type, fields, own)


def _integer(least: int, most: int) -> Rule:
    return lambda config, name, default: config.integer(name, least, most, default)


def _number(least: float, most: float, *, above: bool = False) -> Rule:
    return lambda config, name, default: config.number(name, least, most, default, above=above)


def _boolean(config: Fields, name: str, default: Any) -> Any:
    return config.boolean(name, default)


def _string(config: Fields, name: str, default: Any) -> Any:
    return config.string(name, default=default)


def _pattern(config: Fields, name: str, default: Any) -> Any:
    """How many blocks a pattern has; none, or 0, where the kinds of layers are listed beside one that is spelt out."""
    if isinstance(config.values.get(name), str):
        return None
    return config.integer(name, 0, MAX_POSITIONS, default)


def _token_ids(config: Fields, name: str, default: Any) -> tuple[int, ...]:
    """One id or a list of them; whether the vocabulary has them is not looked at."""
    value = config.values.get(name, default)
    found = value if isinstance(value, list) else [] if value is None else [value]
    ids = [as_integer(each) for each in found[: _MAX_IDS + 1]]
    if len(ids) > _MAX_IDS or None in ids:
        raise config.wrong(name, f"a token's id, or a list of at most {_MAX_IDS}")
    return tuple(each for each in ids if each is not None)


def _blocks(config: Fields, name: str, default: Any) -> Any:
    """A list of blocks' numbers."""
    values = config.items(name, MAX_BLOCKS, default)
    if values is not default and any(as_integer(each) is None for each in values):
        raise config.wrong(name, "a list of blocks' numbers")
    return values


def _each_of(*choices: Any) -> Rule:
    """A list with one of `choices` for every block; it may be longer."""

    def read(config: Fields, name: str, default: Any) -> Any:
        values = config.items(name, 4 * MAX_BLOCKS, default)
        if values is not default and any(type(each) is bool or each not in choices for each in values):
            raise config.wrong(name, f"a list of {' and '.join(map(str, choices))}")
        return values

    return read


_RULES: Mapping[str, Rule] = {
    "num_hidden_layers": _integer(1, MAX_BLOCKS),
    **dict.fromkeys(("hidden_size", "word_embed_proj_dim"), _integer(1, MAX_WIDTH)),
    **dict.fromkeys(
        ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
        _integer(1, MAX_INNER),
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), _integer(1, MAX_EXPERTS)),
    "moe_num_shared_experts": _integer(0, MAX_EXPERTS),
    **dict.fromkeys(("decoder_sparse_step", "moe_layer_interval"), _integer(1, MAX_BLOCKS)),
    "moe_layer_start_index": _integer(0, MAX_BLOCKS),
    "moe_layer_end_index": _integer(-1, MAX_BLOCKS),
    "mlp_only_layers": _blocks,
    **dict.fromkeys(("swiglu_alpha", "swiglu_limit"), _number(0.0, 1e6)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), _integer(1, MAX_HEADS)),
    "vocab_size": _integer(1, MAX_VOCABULARY),
    "max_position_embeddings": _integer(1, MAX_POSITIONS),
    "original_max_position_embeddings": _integer(2, MAX_POSITIONS),
    "sliding_window": _integer(0, MAX_POSITIONS),
    "max_window_layers": _integer(0, MAX_POSITIONS),
    "no_rope_layer_interval": _integer(1, MAX_POSITIONS),
    **dict.fromkeys(
        ("rms_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon"),
        _number(0.0, 1.0),
    ),
    # The largest in use are near 1e8.
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), _number(1.0, 1e15, above=True)),
    "rotary_dim": _integer(2, MAX_HEADS),
    "partial_rotary_factor": _number(0.0, 1.0, above=True),
    "sliding_window_pattern": _pattern,
    **dict.fromkeys(
        (
            *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
            *("logit_scale", "query_pre_attn_scalar", "clip_qkv"),
            *("attn_logit_softcapping", "final_logit_softcapping"),
        ),
        _number(0.0, 1e6, above=True),
    ),
    "layer_types": _each_of("full_attention", "sliding_attention"),
    "attention_layers": _each_of("global", "local"),
    "no_rope_layers": _each_of(0, 1),
    "hidden_act": _string,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _token_ids),
    **dict.fromkeys(
        (
            *("attention_bias", "mlp_bias", "enable_bias", "tie_word_embeddings", "use_sliding_window"),
            "norm_topk_prob",
            *("do_layer_norm_before", "layer_norm_elementwise_affine", "_remove_final_layer_norm"),
            *(
                "attention_out_bias",
                "qkv_bias",
                "use_qkv_bias",
                "use_bias",
                "bias",
                "use_bidirectional_attention",
            ),
            *("qk_layernorm", "use_qk_norm", "use_post_norm", "use_parallel_residual", "parallel_attn"),
            *("alibi", "multi_query", "new_decoder_architecture", "scale_embedding", "add_cross_attention"),
            *("scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
        ),
        _boolean,
    ),
}
# Where null is a value: it is not what an absent field stands for.
_NULLABLE = frozenset(
    {
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
        "layer_types",
        "no_rope_layers",
        "word_embed_proj_dim",
    }
    | {"original_max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
    | {"attn_logit_softcapping", "final_logit_softcapping"}
)
