"""Families whose MLPs are mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sleb.models.families.family import Experts, Family, Gguf
from sleb.models.families.fields import (
    ATTENTION_BIASES,
    MULTIPLIER_FIELDS,
    MULTIPLIERS,
    USE_BIAS,
    rotary_fields,
)

_EPS = ("rms_norm_eps", 1e-5)
_COUNTS: Any = {
    "num_experts": ("expert_count", ...),
    "num_experts_per_tok": ("expert_used_count", ...),
}
_LOCAL = {"num_experts": "num_local_experts"}
_QWEN_FIELDS: Any = {
    "positions": 32768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": False,
}


def _qwen_sparse(block: int, values: Mapping[str, Any]) -> bool:
    return block not in values["mlp_only_layers"] and (block + 1) % values["decoder_sparse_step"] == 0


def _ernie_sparse(block: int, values: Mapping[str, Any]) -> bool:
    last = values["moe_layer_end_index"]
    return (
        int(values["moe_layer_start_index"]) <= block <= (block if last in (None, -1) else int(last))
        and (block + 1) % int(values["moe_layer_interval"]) == 0
    )


EXPERTS = (
    Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        rotary_fields(
            *(24, 2048, 6144, 32, 4, None, 151936),
            biases=("attention_bias", "use_sliding_window"),
            sliding_window=4096,
            num_experts=128,
            num_local_experts=None,  # the same: transformers' newer versions write it, the published files do not
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            **_QWEN_FIELDS,
        ),
        qk_norm="head",
        **ATTENTION_BIASES,
        experts=Experts(
            number=lambda values: values["num_local_experts"] or values["num_experts"],
            has_experts=_qwen_sparse,
            normalised="norm_topk_prob",
        ),
        gguf=Gguf(
            "qwen3moe",
            keys={
                **_COUNTS,
                "num_local_experts": ("expert_count", ...),
                "moe_intermediate_size": (
                    "expert_feed_forward_length",
                    lambda values: values["intermediate_size"] // values["num_experts_per_tok"],
                ),
                "norm_topk_prob": (None, lambda values: True),
            },
        ),
    ),
    Family(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        rotary_fields(
            *(24, 2048, 5632, 16, 16, None, 151936),
            biases=("use_sliding_window",),
            sliding_window=4096,
            layer_types=None,
            qkv_bias=True,
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
            **_QWEN_FIELDS,
        ),
        full_every=2,
        qkv_bias="qkv_bias",
        experts=Experts(
            has_experts=_qwen_sparse,
            normalised="norm_topk_prob",
            shared="mlp.shared_expert",
            shared_size="shared_expert_intermediate_size",
            shared_gate="mlp.shared_expert_gate",
        ),
    ),
    Family(
        "MixtralForCausalLM",
        "mixtral",
        rotary_fields(
            *(32, 4096, 14336, 32, 8, None, 32000),
            positions=131072,
            eps=_EPS,
            theta=1e6,
            tokens=(1, 2, None),
            sliding_window=None,
            num_experts=8,
            num_experts_per_tok=2,
        ),
        renamed=_LOCAL,
        experts=Experts(
            intermediate_size="intermediate_size",
            router="block_sparse_moe.gate",
            up=(
                "block_sparse_moe.experts.{expert}.w1.weight",
                "block_sparse_moe.experts.{expert}.w3.weight",
            ),
            down="block_sparse_moe.experts.{expert}.w2.weight",
        ),
        gguf=Gguf(
            "llama",
            needs="expert_count",
            interleaved=True,
            divides_frequencies=True,
            biases=("qkv", "out"),
            keys=_COUNTS,
        ),
    ),
    Family(
        "OlmoeForCausalLM",
        "olmoe",
        rotary_fields(
            *(16, 2048, 2048, 16, None, None, 50304),
            positions=4096,
            eps=_EPS,
            biases=("attention_bias", "norm_topk_prob"),
            tokens=(None, 50279, 1),
            clip_qkv=None,
            num_experts=64,
            num_experts_per_tok=8,
        ),
        qk_norm="whole",
        clip_qkv="clip_qkv",
        **ATTENTION_BIASES,
        experts=Experts(intermediate_size="intermediate_size", normalised="norm_topk_prob"),
        gguf=Gguf(
            "olmoe",
            head="own",
            grouped=False,
            keys={**_COUNTS, "norm_topk_prob": (None, lambda values: False)},
        ),
    ),
    Family(
        "GraniteMoeForCausalLM",
        "granitemoe",
        rotary_fields(
            *(32, 4096, 11008, 32, None, None, 32000),
            positions=2048,
            biases=("attention_bias",),
            tokens=(1, 2, None),
            num_experts=8,
            num_experts_per_tok=2,
            **MULTIPLIER_FIELDS,
        ),
        renamed=_LOCAL,
        logit_scale=lambda values: 1 / values["logits_scaling"],
        **MULTIPLIERS,
        **ATTENTION_BIASES,
        experts=Experts(
            intermediate_size="intermediate_size",
            router="block_sparse_moe.router.layer",
            up=("block_sparse_moe.input_linear.weight",),
            down="block_sparse_moe.output_linear.weight",
        ),
    ),
    Family(
        "GptOssForCausalLM",
        "gpt_oss",
        rotary_fields(
            *(36, 2880, 2880, 64, 8, 64, 201088),
            positions=131072,
            eps=_EPS,
            theta=150000.0,
            attention_bias=True,
            sliding_window=128,
            layer_types=None,
            swiglu_alpha=1.702,
            swiglu_limit=7.0,
            num_experts=128,
            num_experts_per_tok=4,
        ),
        renamed=_LOCAL,
        only={"swiglu_alpha": (1.702,), "swiglu_limit": (7.0,)},
        rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        full_every=2,
        sinks=True,
        **ATTENTION_BIASES,
        experts=Experts(
            intermediate_size="intermediate_size",
            activation="clamped_swiglu",
            router="mlp.router",
            router_bias=True,
            up=("mlp.experts.gate_up_proj",),
            down="mlp.experts.down_proj",
            transposed=True,
            up_bias="mlp.experts.gate_up_proj_bias",
            down_bias="mlp.experts.down_proj_bias",
            alternating=True,
        ),
    ),
    Family(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        rotary_fields(
            *(28, 2560, 12288, 20, 4, None, 103424),
            positions=131072,
            eps=_EPS,
            biases=("use_bias",),
            theta=500000.0,
            tokens=(1, 2, 0),
            tie_word_embeddings=True,
            num_experts=64,
            num_experts_per_tok=6,
            moe_intermediate_size=1536,
            moe_num_shared_experts=2,
            moe_layer_start_index=1,
            moe_layer_end_index=None,
            moe_layer_interval=1,
        ),
        renamed={"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
        interleaved=True,
        **USE_BIAS,
        experts=Experts(
            has_experts=_ernie_sparse,
            correction="mlp.moe_statics.e_score_correction_bias",
            shared="mlp.shared_experts",
            shared_size=lambda values: values["moe_intermediate_size"] * values["moe_num_shared_experts"],
        ),
    ),
)
