"""What an entry of the table of families may say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# A number, the config's field that holds it, or a function of the fields' values. None: there is none.
Formula = float | str | Callable[[Mapping[str, Any]], float | None] | None


@dataclass(frozen=True)
class TensorNames:
    """Checkpoint names of an architecture's modules; `.weight` and `.bias` are appended.

    `qkv` and `up` list the modules that are stacked, in order, into one fused matrix; a checkpoint that stores
    them fused lists one module. A norm that is None is not there; where the MLP has none in a parallel block, the
    attention's serves both. The post norms are of a sublayer's update, before it is added.
    """

    embed: str = "model.embed_tokens"
    block: str = "model.layers.{block}"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    position_embed: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_out: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"


@dataclass(frozen=True)
class Gguf:
    """A family in GGUF files.

    Attributes:
        name: its general.architecture. needs: a key without which a file of that name is of another family.
        interleaved: the rows of q and k are stored in the order of llama.cpp's rotation, pair by pair.
        mlp_norm: what the norm before the MLP is called.
        head: "tied" where llama.cpp takes the embedding for the head, "own" where a file must have both.
        keys: for fields of config.json, the key (None: there is none) and what an absent one or 0 stands for: a value,
            or a function of the fields so far; "...": a file must have it. Those that all families have are not listed.
        full_every: where a file does not list the blocks that attend to a window only, every so manieth does not: 0:
            all do. None: windows are not known.
        grouped: llama.cpp lets queries share keys and values.
        windows_if: the number of blocks that a model must have for llama.cpp to slide windows in it; 0: any.
        unrotated_every: every so manieth block does not rotate, whatever the file says.
        divides_frequencies: llama.cpp reads rope_freqs.weight, a divisor for each frequency.
        biases: those of which modules llama.cpp adds where a file has them; all_biases: it must have all of them.
    """

    name: str
    interleaved: bool = False
    needs: str | None = None
    mlp_norm: str = "ffn_norm"
    head: Literal["any", "tied", "own"] = "any"
    keys: Mapping[str, tuple[str | None, Any]] = field(default_factory=dict)
    full_every: int | None = None
    grouped: bool = True
    windows_if: int = 0
    unrotated_every: int = 0
    divides_frequencies: bool = False
    biases: tuple[Literal["qkv", "out", "mlp"], ...] = ("qkv",)
    all_biases: bool = False


@dataclass(frozen=True)
class Experts:
    """The MLPs of a mixture of experts (arXiv 1701.06538): a router gives each token the few that it scores highest.

    Numbers are the config's fields, or functions of its values.

    Attributes:
        number, top_k, intermediate_size: how many there are, how many of them a token gets, features inside one.
        has_experts: of a block's number and the fields' values, whether it has experts; others have the family's
            ordinary MLP. None: all have.
        normalised: whether a token's shares add up to 1: a softmax over its experts alone, not over all.
        activation: inside them; None: the family's.
        router, router_bias: its module. correction: a tensor that is added to its scores for the choice alone.
        up, down: tensors. With "{expert}" each expert has its own, up listing gate and up; without, all lie stacked
            in one, [N, 2I, E] and [N, E, I], transposed: [N, E, 2I] and [N, I, E].
        up_bias, down_bias: tensors of stacked biases, [N, 2I] and [N, E].
        alternating: stacked rows are gate and up in turn.
        shared, shared_size: module of an MLP, named inside as the family's, that every token gets; its features.
        shared_gate: module of a factor on it, through a sigmoid.
    """

    number: Formula = "num_experts"
    top_k: Formula = "num_experts_per_tok"
    intermediate_size: Formula = "moe_intermediate_size"
    has_experts: Callable[[int, Mapping[str, Any]], bool] | None = None
    normalised: bool | str = True
    activation: str | None = None
    router: str = "mlp.gate"
    router_bias: bool = False
    correction: str | None = None
    up: tuple[str, ...] = (
        "mlp.experts.{expert}.gate_proj.weight",
        "mlp.experts.{expert}.up_proj.weight",
    )
    down: str = "mlp.experts.{expert}.down_proj.weight"
    transposed: bool = False
    up_bias: str | None = None
    down_bias: str | None = None
    alternating: bool = False
    shared: str | None = None
    shared_size: Formula = None
    shared_gate: str | None = None


@dataclass(frozen=True)
class Family:
    """What every checkpoint of an architecture shares.

    Attributes:
        architecture: the name of its class. model_type: as its config.json has it. also: other classes that files
            of this model_type name.
        fields: those of config.json that are read, and no other one is; each with what transformers' configuration
            class fills in where it is absent. Their types and bounds: `sleb.models.config`.
        text_of: the class of a model that also sees, of which this is the text model, with its fields in text_config.
        renamed: of these, what this family's config.json calls otherwise.
        only: of these, those of which not every value can be computed, and the ones that can.
        norm_eps: a number, or the config's field.
        norm_affine, norm_bias: whether norms have weights, and layer norms biases, or the field that says so.
        norm_shift: what is added to the norms' weights as they are stored.
        position_offset: added to positions before the learned table is read.
        rope_layers: "sliding" where blocks that attend to all of the context do not rotate; "sliding if any": unless
            the config has no window at all.
        rope: the rotation where the config says nothing of it.
        local_rope_theta: of blocks with a window, where the config does not say it for each kind of layer; None: all
            blocks rotate alike.
        longrope_names: what the family's first files call the rule "longrope".
        ntk_alpha: the rule "dynamic" with an alpha stretches the base by alpha ** (D / (D − 2)).
        interleaved: rotation pairs neighbouring features, (2i, 2i + 1), rather than (i, i + R / 2).
        full_every: where the config does not list kinds of layers, every so manieth block attends to all of the
            context and the others to a window: a number, or the config's field. full_first: of so many the first one,
            rather than the last.
        parallel: whether attention and MLP of a block read the same residual, or the config's field that says so.
        activation: the config's field, or a function of the fields' values.
        num_kv_heads: where the config does not say it; None: as many as queries have.
        qk_norm: of each head alone, weight [D], or of all heads together, weight [H · D]; of the kind of the norms.
        qk_norm_after_rotation: or before it. clip_qkv: what queries, keys and values are clamped to, ± this.
        embed_scale, residual_scale, logit_scale: factors on the embedding, on each sublayer's update, on the logits.
        attention_scale: factor on the scores; None: 1 / sqrt(D).
        attention_softcap, logit_softcap: c of c · tanh(x / c), on scores and logits.
        sinks: each head has a logit of its own in the softmax's denominator.
        qkv_bias, out_bias, mlp_bias, head_bias: whether there are biases, or the config's field that says so.
        qkv_layout: rows of the one fused module: all queries, keys and values, or those of each head in turn.
        transposed: matrices in attention and MLP are stored [in, out].
        needs_bos: each window of a text, wherever it is cut from, must begin with the beginning-of-text token: without
            it the perplexity of Gemma doubles. Others' windows are cut as the authors' implementation does.
        wide_range: its residual stream leaves float16's range, 65504 (vLLM refuses float16 for the same families).
        experts: what stands in the place of MLPs; None: nothing does.
        gguf: None where its GGUF files are not read, or say that they are of another family.
    """

    architecture: str
    model_type: str
    fields: Mapping[str, Any]
    also: tuple[str, ...] = ()
    text_of: str | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float | str = "rms_norm_eps"
    norm_affine: bool | str = True
    norm_bias: bool | str = True
    norm_shift: float = 0.0
    position: Literal["rope", "learned"] = "rope"
    position_offset: int = 0
    rope_layers: Literal["all", "sliding", "sliding if any"] = "all"
    rope: Mapping[str, Any] = field(default_factory=dict)
    local_rope_theta: float | str | None = None
    longrope_names: tuple[str, ...] = ()
    ntk_alpha: bool = False
    interleaved: bool = False
    full_every: int | str | None = None
    full_first: bool = False
    parallel: bool | str = False
    activation: str | Callable[[Mapping[str, Any]], str] = "hidden_act"
    gated: bool = True
    num_kv_heads: int | None = None
    qk_norm: Literal["head", "whole"] | None = None
    qk_norm_after_rotation: bool = False
    clip_qkv: str | None = None
    embed_scale: Formula = 1.0
    attention_scale: Formula = None
    residual_scale: Formula = 1.0
    logit_scale: Formula = 1.0
    attention_softcap: Formula = None
    logit_softcap: Formula = None
    sinks: bool = False
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool = False
    qkv_layout: Literal["stacked", "heads"] = "stacked"
    transposed: bool = False
    needs_bos: bool = False
    wide_range: bool = False
    experts: Experts | None = None
    names: TensorNames = field(default_factory=TensorNames)
    gguf: Gguf | None = None

    def own(self, field: str) -> str:
        """What this family's config.json calls `field`."""
        return self.renamed.get(field, field)
