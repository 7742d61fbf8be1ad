"""A family's tensors in GGUF files, for what reads and what writes them: names, shapes, and the order of their rows.

llama.cpp rotates neighbours (0, 1), (2, 3), … of a head where transformers rotates halves (0, d/2), (1, d/2 + 1), …:
for some architectures its converters put a head's rows of q and k from [2, d/2] into [d/2, 2]. They add 1 to norms that
compute with 1 + w, turn matrices that are stored [in, out], and put a fused q, k, v of each head in turn one after the
other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sleb.models.families import Family, Formula
from sleb.models.families.family import Experts

Order = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Placed:
    """A tensor of a model.

    Attributes:
        name: in the checkpoint. shape: in the file, slowest dimension first.
        order: the file's row of each of the checkpoint's rows; None: the same.
        shift: what the file's values have more than the checkpoint's. transposed: in the checkpoint, [in, out].
        part: its name in the file, without block and kind.
    """

    name: str
    shape: tuple[int, ...]
    order: Order | None = None
    shift: float = 0.0
    transposed: bool = False
    part: str = ""

    @property
    def checkpoint_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape


@dataclass(frozen=True)
class _Module:
    """What has a weight, a bias, or both. `part`, `name`: in the file and in the checkpoint; `expert`: whose it is."""

    part: str
    name: str | None
    shape: tuple[int, ...]
    bias: bool | str = False
    order: Order | None = None
    is_norm: bool = False
    expert: int | None = None


def family_tensors(family: Family, config: Mapping[str, Any]) -> dict[str, Placed]:
    """Every tensor that the model has, by its name in the file.

    Experts' tensors of one kind lie in one there, [N, rows, columns], of which each has a name of its own here: "…#3".

    config: its fields by the table's names for them, with those that name sizes and with the switches of biases.
    """
    assert family.gguf is not None

    def switch(flag: bool | str) -> bool:
        return bool(config[flag]) if isinstance(flag, str) else flag

    weighted = switch(family.norm_affine)
    with_bias = weighted and family.norm == "layer" and switch(family.norm_bias)

    def placed(module: _Module, prefix: str, before: str) -> Iterator[tuple[str, Placed]]:
        if module.name is None or (module.is_norm and not weighted):
            return
        name, shift = before + module.name, family.norm_shift if module.is_norm else 0.0
        turned = family.transposed and not module.is_norm and prefix != ""
        yield (
            f"{prefix}{module.part}.weight" + ("" if module.expert is None else f"#{module.expert}"),
            Placed(f"{name}.weight", module.shape, module.order, shift, turned, module.part),
        )
        if with_bias if module.is_norm else switch(module.bias):
            yield (
                f"{prefix}{module.part}.bias",
                Placed(f"{name}.bias", module.shape[:1], module.order, part=module.part),
            )

    found: dict[str, Placed] = {}
    for module in _outer(family, config):
        found |= placed(module, "", "")
    for block in range(config["num_hidden_layers"]):
        for module in _block(family, config, block):
            found |= placed(module, f"blk.{block}.", f"{family.names.block.format(block=block)}.")
    return found


def _outer(family: Family, config: Mapping[str, Any]) -> list[_Module]:
    names, hidden = family.names, config["hidden_size"]
    table = (config["vocab_size"], hidden)
    head = None if config["tie_word_embeddings"] else names.head
    return [
        _Module("token_embd", names.embed, table),
        _Module("position_embd", names.position_embed, (config["max_position_embeddings"], hidden)),
        _Module("output_norm", names.final_norm, (hidden,), is_norm=True),
        _Module("output", head, table, family.head_bias),
    ]


def _block(family: Family, config: Mapping[str, Any], block: int) -> list[_Module]:
    names, hidden, inner = family.names, config["hidden_size"], config["intermediate_size"]
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    query, key = num_heads * config["head_dim"], num_kv_heads * config["head_dim"]
    assert family.gguf is not None
    norms = {
        "attn_norm": names.attention_norm,
        "post_attention_norm": names.attention_post_norm,
        "post_ffw_norm": names.mlp_post_norm,
    }
    norms |= {family.gguf.mlp_norm: names.mlp_norm} if names.mlp_norm else {}
    modules = [_Module(part, name, (hidden,), is_norm=True) for part, name in norms.items()]
    if family.qk_norm:
        query_norm, key_norm = (query, key) if family.qk_norm == "whole" else (config["head_dim"],) * 2
        modules.append(_Module("attn_q_norm", names.query_norm, (query_norm,), is_norm=True))
        modules.append(_Module("attn_k_norm", names.key_norm, (key_norm,), is_norm=True))
    if len(names.qkv) == 1:
        order = (
            _by_heads(num_heads, num_kv_heads, config["head_dim"]) if family.qkv_layout == "heads" else None
        )
        fused = (query + 2 * key, hidden)
        modules.append(_Module("attn_qkv", names.qkv[0], fused, family.qkv_bias, order))
    else:
        pairs = family.gguf.interleaved
        counts, rows = (num_heads, num_kv_heads, 0), (query, key, key)
        for letter, name, count, size in zip("qkv", names.qkv, counts, rows, strict=True):
            order = _halves(count, size) if pairs and count else None
            modules.append(_Module(f"attn_{letter}", name, (size, hidden), family.qkv_bias, order))
    modules.append(_Module("attn_output", names.attention_out, (hidden, query), family.out_bias))
    experts = family.experts
    if experts is not None and (experts.has_experts is None or experts.has_experts(block, config)):
        return modules + _experts(experts, config)
    both = (inner * (1 + (family.gated and len(names.up) == 1)), hidden)
    parts = ("ffn_up",) if len(names.up) == 1 else ("ffn_gate", "ffn_up")
    modules += [
        _Module(part, name, both, family.mlp_bias) for part, name in zip(parts, names.up, strict=True)
    ]
    return [*modules, _Module("ffn_down", names.down, (hidden, inner), family.mlp_bias)]


def num_experts(experts: Experts, config: Mapping[str, Any]) -> int:
    """How many a block has."""
    return int(_formula(experts.number, config))


def _formula(formula: Formula, config: Mapping[str, Any]) -> Any:
    return formula(config) if callable(formula) else config[formula] if isinstance(formula, str) else formula


def _experts(experts: Experts, config: Mapping[str, Any]) -> list[_Module]:
    """Of experts that have their own tensors in the checkpoint."""
    hidden, inner = config["hidden_size"], int(_formula(experts.intermediate_size, config))
    number = num_experts(experts, config)
    names = (*experts.up, experts.down)
    shapes = {
        "ffn_gate_exps": (inner, hidden),
        "ffn_up_exps": (inner, hidden),
        "ffn_down_exps": (hidden, inner),
    }
    each = [
        _Module(part, name.format(expert=expert).removesuffix(".weight"), shape, expert=expert)
        for expert in range(number)
        for (part, shape), name in zip(shapes.items(), names, strict=True)
    ]
    return [_Module("ffn_gate_inp", experts.router, (number, hidden)), *each]


def _halves(num_heads: int, num_rows: int) -> Order:
    """Rows of heads in pairs, as halves."""
    return np.arange(num_rows).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _by_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> Order:
    """Rows of all queries, keys and values, as those of each head in turn."""
    assert num_heads == num_kv_heads
    return np.arange(3 * num_heads * head_dim).reshape(3, num_heads, head_dim).swapaxes(0, 1).reshape(-1)


def place_of(name: str) -> tuple[int | None, str]:
    """The block of a tensor in the file, and its name there."""
    found = re.fullmatch(r"blk\.(\d{1,9})\.(.+)", name)
    return (int(found[1]), found[2]) if found else (None, name)
