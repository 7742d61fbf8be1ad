"""The model of ideal speedups, against numbers worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sleb.benchmarks.ideal import (
    DepthCost,
    context_kv_bytes,
    decode_bytes,
    decode_flops,
    ideal_speedup,
    prompt_flops,
    step_weight_bytes,
)
from sleb.benchmarks.workloads import Workload
from sleb.engine.engine import Engine
from sleb.engine.llm import LLM
from sleb.engine.model.architecture import DecoderSpec, resolve_spec
from sleb.layer_map.layer_map import LayerMap, Patch, Patches

_SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
# q and o 576 × 576, k and v 192 × 576, gate, up and down 1536 × 576
_BLOCK_LINEARS = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576
_BLOCK_WEIGHTS = _BLOCK_LINEARS + 2 * 576  # and two norms
_HEAD = 49152 * 576


def make_spec(folder: Path, **changes: Any) -> DecoderSpec:
    (folder / "config.json").write_text(json.dumps(_SMOLLM2 | changes))
    return resolve_spec(folder)


def smollm2_cost(spec: DecoderSpec, num_blocks: int) -> DepthCost:
    """In bfloat16, with the first `num_blocks` blocks."""
    blocks = tuple(range(num_blocks))
    head = _HEAD * (1 if spec.tied_embeddings else 2)
    weights = 2 * (num_blocks * _BLOCK_WEIGHTS + head + 576)
    return DepthCost(spec, blocks, blocks, weights, num_blocks * 2 * 192 * 2, 576 * 2, 2)


def test_prompt_flops_by_hand(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    linears = 2 * 100 * _BLOCK_LINEARS
    attention = 4 * 9 * 64 * (100 * 101 // 2)
    assert prompt_flops(smollm2_cost(spec, 30), 1, 100) == 30 * (linears + attention) + 2 * _HEAD
    assert prompt_flops(smollm2_cost(spec, 30), 3, 100) == 3 * prompt_flops(smollm2_cost(spec, 30), 1, 100)


def test_decode_bytes_by_hand(tmp_path: Path) -> None:
    """Three new tokens after 10: the prompt's step gives the first, contexts of 11 and 12 tokens are read."""
    spec = make_spec(tmp_path)
    weights = 2 * (30 * _BLOCK_WEIGHTS + _HEAD + 576)
    lookups = 4 * 576 * 2
    kv = 30 * 2 * 192 * 2 * (11 + 12)
    assert decode_bytes(smollm2_cost(spec, 30), 4, 10, 3) == 2 * (weights + lookups) + 4 * kv


def test_a_large_vocabulary_leaves_little_to_save_by_depth(tmp_path: Path) -> None:
    """Gemma 3 270M: the head is 168 of 268 million weights, so half of the blocks gone saves a fifth of a step's time,
    and of a prompt's, which needs the head once, half."""
    spec = make_spec(
        tmp_path,
        architectures=["Gemma3ForCausalLM"],
        model_type="gemma3_text",
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=262144,
    )
    block, head = 2 * 640 * 1024 + 2 * 640 * 256 + 3 * 640 * 2048 + 4 * 640 + 2 * 256, 262144 * 640

    def cost(num_blocks: int) -> DepthCost:
        blocks, weights = tuple(range(num_blocks)), num_blocks * block + head + 640
        return DepthCost(spec, blocks, blocks, 2 * weights, num_blocks * 2 * 256 * 2, 640 * 2, 2)

    assert head / (18 * block + head) == pytest.approx(0.63, abs=0.005)
    decode = ideal_speedup(Workload("decode", 1, 64, 128), cost(18), cost(9))
    assert decode == pytest.approx((18 * block + head) / (9 * block + head), rel=0.01) and decode < 1.24
    assert ideal_speedup(Workload("prompt", 1, 512, 1), cost(18), cost(9)) > 1.99


def test_decode_flops_by_hand(tmp_path: Path) -> None:
    """Three new tokens after 10: two steps, at contexts of 11 and 12, each with the head for every request."""
    cost = smollm2_cost(make_spec(tmp_path), 30)
    attention = 4 * 9 * 64 * (11 + 12)
    assert decode_flops(cost, 4, 10, 3) == 4 * (30 * (2 * 2 * _BLOCK_LINEARS + attention) + 2 * 2 * _HEAD)


def test_decoding_all_tokens_computes_what_a_prompt_does_and_more_heads(tmp_path: Path) -> None:
    """After one token, T − 1 steps and the first token's own work are those of a prompt of T tokens."""
    cost = smollm2_cost(make_spec(tmp_path), 30)
    steps = prompt_flops(cost, 1, 1) + decode_flops(cost, 1, 1, 20)
    assert steps == prompt_flops(cost, 1, 20) + 19 * 2 * _HEAD


def test_a_prompt_reads_every_weight_once(tmp_path: Path) -> None:
    cost = smollm2_cost(make_spec(tmp_path), 30)
    assert step_weight_bytes(cost, 3) == 2 * (30 * _BLOCK_WEIGHTS + _HEAD + 576) + 3 * 576 * 2


def test_ideal_speedups_of_six_of_thirty_blocks(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    dense, pruned = smollm2_cost(spec, 30), smollm2_cost(spec, 24)
    assert _HEAD / (dense.weight_bytes / 2) == pytest.approx(0.21, abs=0.001)
    assert ideal_speedup(Workload("decode", 1, 64, 128), dense, pruned) == pytest.approx(1.19, abs=0.005)
    assert ideal_speedup(Workload("prompt", 1, 2048, 1), dense, pruned) == pytest.approx(1.25, abs=0.001)
    assert ideal_speedup(Workload("decode", 64, 64, 128), dense, dense) == 1.0
    # Every context adds to what pruning saves, until the head no longer counts: 30 blocks over 24.
    at_64 = ideal_speedup(Workload("decode", 64, 64, 128), dense, pruned)
    assert ideal_speedup(Workload("decode", 1, 64, 128), dense, pruned) < at_64 < 30 / 24


def test_an_untied_embedding_is_only_looked_into(tmp_path: Path) -> None:
    """The head of its own is read whole, the embedding one row a sequence: as many bytes as when they are tied."""
    untied = smollm2_cost(make_spec(tmp_path, tie_word_embeddings=False), 30)
    tied = smollm2_cost(make_spec(tmp_path), 30)
    assert untied.weight_bytes > tied.weight_bytes
    assert step_weight_bytes(untied, 8) == step_weight_bytes(tied, 8)


def test_a_sliding_window_bounds_what_is_read_and_computed(tmp_path: Path) -> None:
    changes = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16}
    windowed = smollm2_cost(make_spec(tmp_path, **changes), 30)
    full = smollm2_cost(make_spec(tmp_path), 30)
    assert context_kv_bytes(windowed, 100) == context_kv_bytes(full, 16)
    visible = 16 * 17 // 2 + 84 * 16
    saved = 30 * 4 * 9 * 64 * (100 * 101 // 2 - visible)
    assert prompt_flops(full, 1, 100) - prompt_flops(windowed, 1, 100) == saved


def test_no_attention_left(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    cost = DepthCost(spec, (), (0, 1), 1000, 0, 576 * 2, 2)
    assert context_kv_bytes(cost, 100) == 0
    assert prompt_flops(cost, 1, 10) == 2 * (2 * 10 * 3 * 1536 * 576) + 2 * _HEAD


def test_costs_of_an_engine(tiny_model_dir: Path, tiny_chain: LayerMap) -> None:
    """Depth 3 of the chain lacks blocks 3 and 1, and of block 4 the attention."""
    engine: Engine = LLM(tiny_model_dir, tiny_chain, [0, 3], kv_cache_memory=0.01).engine
    cost = DepthCost.of(engine, 3)
    assert cost.attention_blocks == (0, 2, 5)
    assert cost.mlp_blocks == (0, 2, 4, 5)
    dense = DepthCost.of(engine, 0)
    spec = engine.spec
    block_kv = 2 * spec.num_kv_heads * spec.head_dim * 4
    assert (dense.kv_bytes_per_token, cost.kv_bytes_per_token) == (6 * block_kv, 3 * block_kv)
    assert dense.weight_bytes > cost.weight_bytes


def test_patches_count_in_bytes_and_operations(tiny_model_dir: Path, tiny_chain: LayerMap) -> None:
    """At depth 2 a full one and a low-rank one of rank 5, at depth 1 the first alone."""
    rng = np.random.default_rng(0)
    full = {"weight": rng.normal(size=(32, 32)), "bias": rng.normal(size=32)}
    low_rank = {"down": rng.normal(size=(5, 32)), "up": rng.normal(size=(32, 5)), "bias": rng.normal(size=32)}
    first, second = (unit.sublayers for unit in tiny_chain.removed[:2])
    patches = Patches.of(
        [
            Patch(first[0], first[-1], 1, None, "full", True, full),
            Patch(second[0], second[-1], 2, None, "low-rank", True, low_rank),
        ]
    )
    plain, patched = (
        LLM(tiny_model_dir, each, [0, 1, 2], kv_cache_memory=0.01).engine
        for each in (tiny_chain, replace(tiny_chain, patches=patches))
    )
    for depth, elements, others in [(0, 0, 0), (1, 32 * 32, 32), (2, 32 * 32 + 2 * 5 * 32, 2 * 32)]:
        bare, cost = DepthCost.of(plain, depth), DepthCost.of(patched, depth)
        assert cost.weight_bytes - bare.weight_bytes == 4 * (elements + others)
        assert prompt_flops(cost, 3, 10) - prompt_flops(bare, 3, 10) == 3 * 10 * 2 * elements


def test_the_position_table_is_only_looked_into(tiny_model: Callable[[str], Any]) -> None:
    engine = LLM(tiny_model("opt").path, kv_cache_memory=0.01).engine
    cost = DepthCost.of(engine, 0)
    table = (64 + 2) * 32 * 4
    rows = 2 * (32 + 32) * 4  # two sequences, an embedding and a position each
    assert step_weight_bytes(cost, 2) == cost.weight_bytes - table + rows


def test_projected_embeddings_count_for_prompts(tiny_model: Callable[[str], Any]) -> None:
    """OPT-350M's kind: 16 features into 32 for each of 10 tokens, and back for the one that samples."""
    engine = LLM(tiny_model("opt-350m").path, kv_cache_memory=0.01).engine
    cost = DepthCost.of(engine, 0)
    block = 2 * 10 * (4 * 32 * 32 + 2 * 32 * 48) + 4 * 32 * 55
    assert prompt_flops(cost, 1, 10) == 5 * block + 2 * 16 * 96 + 2 * 16 * 32 * 11
