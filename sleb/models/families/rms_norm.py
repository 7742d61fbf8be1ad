"""Families with RMS norms: Llama and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sleb.models.families.family import Family, Gguf, TensorNames
from sleb.models.families.fields import (
    ATTENTION_BIASES,
    LLAMA_BIASES,
    MULTIPLIER_FIELDS,
    MULTIPLIERS,
    POST_NORMS,
    USE_BIAS,
    WINDOW,
    rotary_fields,
)

_EPS = ("rms_norm_eps", 1e-5)
_BIASES = ("attention_bias", "mlp_bias")
_QWEN_WINDOW = {**WINDOW, "use_sliding_window": False, "max_window_layers": 28}

_GEMMA: Any = {
    **ATTENTION_BIASES,
    "norm_shift": 1.0,
    "needs_bos": True,
    "embed_scale": lambda values: values["hidden_size"] ** 0.5,
}
_GEMMA_FIELDS: Any = {
    "biases": ("attention_bias",),
    "tokens": (2, 1, 0),
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
}
_CAUSAL: Any = {"only": {"use_bidirectional_attention": (None, False)}}
_GEMMA2: Any = {
    **_GEMMA,
    "renamed": {"hidden_act": "hidden_activation"},
    "attention_scale": lambda values: values["query_pre_attn_scalar"] ** -0.5,
    "attention_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
    "wide_range": True,
}
_GEMMA2_FIELDS: Any = {
    **_GEMMA_FIELDS,
    **WINDOW,
    "query_pre_attn_scalar": 256.0,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_GEMMA2_NAMES = TensorNames(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
_GLM_FIELDS: Any = {
    "positions": 131072,
    "eps": ("rms_norm_eps", 1.5625e-07),
    "tokens": (None, [151329, 151336, 151338], 151329),
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}


def _of_depth(num_blocks: int) -> Callable[[Mapping[str, Any]], float]:
    """What llama.cpp takes for query_pre_attn_scalar, of which its files say nothing: in the largest model, of so many
    blocks, it is another.
    """
    return lambda values: (
        values["hidden_size"] // values["num_attention_heads"]
        if values["num_hidden_layers"] == num_blocks
        else values["head_dim"]
    )


# Llama's name stands for others' files as well: they are read as Llama's.
_GGUF_LLAMA = Gguf("llama", interleaved=True, divides_frequencies=True, biases=("qkv", "out", "mlp"))

RMS_NORM = (
    Family(
        "LlamaForCausalLM",
        "llama",
        rotary_fields(
            *(32, 4096, 11008, 32, None, None, 32000), positions=2048, biases=_BIASES, tokens=(1, 2, None)
        ),
        **LLAMA_BIASES,
        gguf=_GGUF_LLAMA,
    ),
    Family(
        "InternLM3ForCausalLM",
        "internlm3",
        rotary_fields(
            *(48, 4096, 10240, 32, 2, 128, 128512),
            positions=32768,
            eps=_EPS,
            biases=(*_BIASES, "qkv_bias", "bias"),  # the first files have the last two, which are false
            tokens=(1, 2, 2),
        ),
        also=("LlamaForCausalLM",),
        only={"qkv_bias": (False,), "bias": (False,)},
        **LLAMA_BIASES,
        gguf=_GGUF_LLAMA,
    ),
    Family(
        "IQuestCoderForCausalLM",
        "iquestcoder",
        rotary_fields(
            *(80, 5120, 27648, 40, 8, 128, 76800),
            positions=131072,
            eps=_EPS,
            biases=_BIASES,
            tokens=(1, 2, None),
        ),
        also=("LlamaForCausalLM",),
        **LLAMA_BIASES,
        gguf=_GGUF_LLAMA,
    ),
    Family(
        "MistralForCausalLM",
        "mistral",
        rotary_fields(
            *(32, 4096, 14336, 32, 8, None, 32000),
            positions=131072,
            tokens=(1, 2, None),
            sliding_window=4096,
        ),
        text_of="Mistral3ForConditionalGeneration",
        gguf=_GGUF_LLAMA,
    ),
    Family(
        "MinistralForCausalLM",
        "ministral",
        rotary_fields(
            *(32, 4096, 14336, 32, 8, None, 32000), positions=131072, tokens=(1, 2, None), **WINDOW
        ),
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        rotary_fields(*(32, 4096, 22016, 32, 32, None, 151936), positions=32768, **_QWEN_WINDOW),
        qkv_bias=True,
        gguf=Gguf("qwen2"),
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        rotary_fields(
            *(32, 4096, 22016, 32, 32, 128, 151936),
            positions=32768,
            biases=("attention_bias",),
            **_QWEN_WINDOW,
        ),
        qk_norm="head",
        **ATTENTION_BIASES,
        gguf=Gguf("qwen3"),
    ),
    Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        rotary_fields(
            *(36, 2048, 11008, 16, 4, None, 128256),
            positions=32768,
            biases=_BIASES,
            theta=2e6,
            tokens=(128000, 128001, 128004),
            use_sliding_window=False,
            sliding_window=None,
            layer_types=None,
            no_rope_layers=None,
            no_rope_layer_interval=4,
            tie_word_embeddings=True,
        ),
        **LLAMA_BIASES,
        gguf=Gguf("smollm3", interleaved=True, unrotated_every=4),
    ),
    Family(
        "Phi3ForCausalLM",
        "phi3",
        rotary_fields(
            *(32, 3072, 8192, 32, None, None, 32064),
            positions=4096,
            eps=_EPS,
            tokens=(1, 32000, 32000),
            original_max_position_embeddings=4096,
            partial_rotary_factor=1.0,
            sliding_window=None,
        ),
        longrope_names=("su", "yarn"),
        names=TensorNames(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)),
        gguf=Gguf("phi3", full_every=0),
    ),
    Family(
        "GemmaForCausalLM",
        "gemma",
        rotary_fields(
            *(28, 3072, 24576, 16, 16, 256, 256000),
            positions=8192,
            use_bidirectional_attention=None,
            **_GEMMA_FIELDS,
        ),
        **_CAUSAL,
        # The first files say "gelu" and mean its approximation.
        activation=lambda values: {"gelu": "gelu_pytorch_tanh"}.get(
            values["hidden_act"], values["hidden_act"]
        ),
        **_GEMMA,
        gguf=Gguf("gemma", head="tied"),
    ),
    Family(
        "Gemma2ForCausalLM",
        "gemma2",
        rotary_fields(
            *(26, 2304, 9216, 8, 4, 256, 256000),
            positions=8192,
            use_bidirectional_attention=None,
            **_GEMMA2_FIELDS,
        ),
        **_CAUSAL,
        full_every=2,
        **_GEMMA2,
        names=_GEMMA2_NAMES,
        gguf=Gguf(
            "gemma2",
            head="tied",
            full_every=2,
            keys={
                "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
                "final_logit_softcapping": ("final_logit_softcapping", 30.0),
                "sliding_window": (None, 4096),
                "query_pre_attn_scalar": (None, _of_depth(46)),
            },
        ),
    ),
    Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        rotary_fields(
            *(26, 2304, 9216, 8, 4, 256, 262208),
            positions=131072,
            theta=1e6,
            use_bidirectional_attention=False,
            rope_local_base_freq=10000.0,
            sliding_window_pattern=6,
            **(_GEMMA2_FIELDS | {"final_logit_softcapping": None, "attn_logit_softcapping": None}),
        ),
        text_of="Gemma3ForConditionalGeneration",
        **_CAUSAL,
        full_every="sliding_window_pattern",
        local_rope_theta="rope_local_base_freq",
        qk_norm="head",
        **_GEMMA2,
        names=_GEMMA2_NAMES,
        gguf=Gguf(
            "gemma3",
            full_every=6,
            keys={
                "rope_local_base_freq": ("rope.freq_base_swa", 10000.0),
                "final_logit_softcapping": ("final_logit_softcapping", None),
                "query_pre_attn_scalar": (None, _of_depth(62)),
            },
        ),
    ),
    Family(
        "VaultGemmaForCausalLM",
        "vaultgemma",
        rotary_fields(*(26, 2304, 9216, 8, 4, 256, 256000), positions=8192, **_GEMMA2_FIELDS),
        full_every=2,
        **_GEMMA2,
        names=TensorNames(mlp_norm="pre_feedforward_layernorm"),
    ),
    Family(
        "Olmo2ForCausalLM",
        "olmo2",
        rotary_fields(
            *(32, 4096, 11008, 32, None, None, 50304),
            positions=2048,
            eps=_EPS,
            biases=("attention_bias",),
            tokens=(None, 50279, 1),
        ),
        qk_norm="whole",
        **ATTENTION_BIASES,
        names=POST_NORMS,
        gguf=Gguf("olmo2", head="own"),
    ),
    Family(
        "Olmo3ForCausalLM",
        "olmo3",
        rotary_fields(
            *(32, 4096, 11008, 32, None, None, 50304),
            positions=2048,
            eps=_EPS,
            biases=("attention_bias",),
            theta=500000.0,
            tokens=(None, 50279, 1),
            **WINDOW,
        ),
        full_every=4,
        local_rope_theta=500000.0,
        qk_norm="whole",
        **ATTENTION_BIASES,
        names=POST_NORMS,
        gguf=Gguf("olmo2", head="own", needs="attention.sliding_window", full_every=4),
    ),
    Family(
        "GraniteForCausalLM",
        "granite",
        rotary_fields(
            *(32, 4096, 11008, 32, None, None, 32000),
            positions=2048,
            biases=_BIASES,
            tokens=(1, 2, None),
            **MULTIPLIER_FIELDS,
        ),
        logit_scale=lambda values: 1 / values["logits_scaling"],
        **MULTIPLIERS,
        **LLAMA_BIASES,
        gguf=Gguf(
            "granite",
            interleaved=True,
            divides_frequencies=True,
            biases=("qkv", "out", "mlp"),
            keys={
                "embedding_multiplier": ("embedding_scale", 1.0),
                "residual_multiplier": ("residual_scale", 1.0),
                "attention_multiplier": ("attention.scale", lambda values: values["head_dim"] ** -0.5),
                "logits_scaling": ("logit_scale", 1.0),
            },
        ),
    ),
    Family(
        "HyperCLOVAXForCausalLM",
        "hyperclovax",
        rotary_fields(
            *(32, 4096, 11008, 32, None, None, 32000),
            positions=2048,
            biases=_BIASES,
            tokens=(1, 2, None),
            use_post_norm=True,
            **(MULTIPLIER_FIELDS | {"attention_multiplier": None}),
        ),
        only={"use_post_norm": (True,)},
        logit_scale="logits_scaling",
        **MULTIPLIERS,
        **LLAMA_BIASES,
        names=TensorNames(attention_post_norm="post_norm1", mlp_post_norm="post_norm2"),
    ),
    Family(
        "GlmForCausalLM",
        "glm",
        rotary_fields(*(40, 4096, 13696, 32, 2, 128, 151552), **_GLM_FIELDS),
        interleaved=True,
        qkv_bias="attention_bias",
        names=TensorNames(up=("mlp.gate_up_proj",)),
        gguf=Gguf("chatglm"),
    ),
    Family(
        "Glm4ForCausalLM",
        "glm4",
        rotary_fields(*(40, 4096, 13696, 32, 2, 128, 151552), **_GLM_FIELDS),
        interleaved=True,
        qkv_bias="attention_bias",
        names=TensorNames(
            attention_post_norm="post_self_attn_layernorm",
            up=("mlp.gate_up_proj",),
            mlp_post_norm="post_mlp_layernorm",
        ),
        wide_range=True,
        gguf=Gguf("glm4"),
    ),
    Family(
        "Exaone4ForCausalLM",
        "exaone4",
        rotary_fields(
            *(32, 4096, 16384, 32, 32, None, 102400),
            positions=2048,
            eps=_EPS,
            tokens=(0, 2, None),
            sliding_window_pattern=4,
            **WINDOW,
        ),
        full_every="sliding_window_pattern",
        rope_layers="sliding if any",
        qk_norm="head",
        names=POST_NORMS,
        gguf=Gguf("exaone4", full_every=4, windows_if=64, divides_frequencies=True),
    ),
    Family(
        "CwmForCausalLM",
        "cwm",
        rotary_fields(
            *(64, 6144, 21504, 48, 8, 128, 128256),
            positions=131072,
            eps=_EPS,
            biases=("mlp_bias",),
            theta=1e6,
            tokens=(128000, [128001, 128008, 128009], None),
            **(WINDOW | {"sliding_window": 8192}),
        ),
        rope={
            "rope_type": "llama3",
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        full_every=4,
        full_first=True,
        mlp_bias="mlp_bias",
    ),
    Family(
        "SeedOssForCausalLM",
        "seed_oss",
        rotary_fields(
            *(64, 4096, 27648, 80, 8, 128, 155136),
            positions=524288,
            biases=("attention_out_bias", "mlp_bias"),
            tokens=(0, 2, 1),
            attention_bias=True,
        ),
        **(LLAMA_BIASES | {"out_bias": "attention_out_bias"}),
        gguf=Gguf("seed_oss", mlp_norm="post_attention_norm"),
    ),
    Family(
        "ArceeForCausalLM",
        "arcee",
        rotary_fields(
            *(32, 2560, 18432, 32, None, None, 32000),
            positions=4096,
            eps=_EPS,
            biases=_BIASES,
            tokens=(128000, 128001, None),
            hidden_act="relu2",
        ),
        gated=False,
        **LLAMA_BIASES,
        names=TensorNames(up=("mlp.up_proj",)),
        gguf=Gguf("arcee", interleaved=True, divides_frequencies=True),
    ),
    Family(
        "HunYuanDenseV1ForCausalLM",
        "hunyuan_v1_dense",
        rotary_fields(
            *(32, 4096, 11008, 32, None, None, 290943),
            positions=2048,
            eps=_EPS,
            biases=("attention_bias",),
            tokens=(1, 2, 0),
        ),
        ntk_alpha=True,
        qk_norm="head",
        qk_norm_after_rotation=True,
        **ATTENTION_BIASES,
        names=TensorNames(query_norm="self_attn.query_layernorm", key_norm="self_attn.key_layernorm"),
        gguf=Gguf("hunyuan-dense"),
    ),
    Family(
        "Ernie4_5ForCausalLM",
        "ernie4_5",
        rotary_fields(
            *(18, 1024, 3072, 16, 2, 128, 103424),
            positions=131072,
            eps=_EPS,
            biases=("use_bias",),
            theta=500000.0,
            tokens=(1, 2, 0),
            tie_word_embeddings=True,
        ),
        interleaved=True,
        **USE_BIAS,
        gguf=Gguf("ernie4_5", biases=("qkv", "out")),
    ),
    Family(
        "HeliumForCausalLM",
        "helium",
        rotary_fields(
            *(24, 2560, 7040, 20, 20, 128, 48000),
            positions=4096,
            eps=("rms_norm_eps", 1e-8),
            biases=_BIASES,
            theta=100000.0,
            tokens=(1, 2, 3),
        ),
        interleaved=True,
        qkv_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
)
