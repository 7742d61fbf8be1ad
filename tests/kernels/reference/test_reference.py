"""The reference operators against loops over single numbers and against transformers' own functions."""

from __future__ import annotations

import math
import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sleb.kernels.batch import PagedBatch
from sleb.kernels.reference import ops as reference


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


def naive_attention(query, keys, values, position, scale, window):
    """One query [H, D] at `position` over keys and values [L, K, D] in order of position, head by head."""
    num_heads, group = query.shape[0], query.shape[0] // keys.shape[1]
    first = 0 if window is None else max(0, position - window + 1)
    output = torch.zeros_like(query)
    for head in range(num_heads):
        scores = [scale * float(query[head] @ keys[at, head // group]) for at in range(first, position + 1)]
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        for at, weight in zip(range(first, position + 1), weights, strict=True):
            output[head] += weight / sum(weights) * values[at, head // group]
    return output


class Case:
    """Sequences with a context in scattered pages, and new tokens at their ends."""

    def __init__(self, query_lens, context_lens, page_size, num_heads=4, num_kv_heads=2, head_dim=8, seed=0):
        self.query_lens, self.context_lens, self.page_size = tuple(query_lens), tuple(context_lens), page_size
        num_pages = [-(-length // page_size) for length in context_lens]
        order = list(range(sum(num_pages) + 3))
        random.Random(seed).shuffle(order)
        self.pages = [[order.pop() for _ in range(count)] for count in num_pages]
        num_slots = (sum(num_pages) + 3) * page_size
        # What belongs to no sequence is NaN: whoever reads it shows.
        self.key_cache = torch.full((num_slots, num_kv_heads, head_dim), math.nan)
        self.value_cache = torch.full((num_slots, num_kv_heads, head_dim), math.nan)
        self.keys = [
            randn(length, num_kv_heads, head_dim, seed=seed + 1 + row)
            for row, length in enumerate(context_lens)
        ]
        self.values = [
            randn(length, num_kv_heads, head_dim, seed=seed + 50 + row)
            for row, length in enumerate(context_lens)
        ]
        for pages, keys, values in zip(self.pages, self.keys, self.values, strict=True):
            for at in range(keys.shape[0]):
                slot = pages[at // page_size] * page_size + at % page_size
                self.key_cache[slot], self.value_cache[slot] = keys[at], values[at]
        self.query = randn(sum(query_lens), num_heads, head_dim, seed=seed + 99)
        width = max(num_pages)
        unspecified = order[0]
        table = [pages + [unspecified] * (width - len(pages)) for pages in self.pages]
        self.batch = PagedBatch(self.query_lens, self.context_lens, torch.tensor(table), page_size)

    def check(self, window=None, scale=0.3):
        actual = reference.paged_attention(
            self.query, self.key_cache, self.value_cache, self.batch, scale, window
        )
        token = 0
        for row, (new, length) in enumerate(zip(self.query_lens, self.context_lens, strict=True)):
            for position in range(length - new, length):
                expected = naive_attention(
                    self.query[token], self.keys[row], self.values[row], position, scale, window
                )
                close(actual[token], expected)
                token += 1
        assert token == actual.shape[0]


class TestPagedAttention:
    @pytest.mark.parametrize("window", [None, 1, 2, 5, 100])
    @pytest.mark.parametrize(
        ("query_lens", "context_lens"),
        [
            ([1], [1]),
            ([5], [5]),
            ([3], [11]),
            ([1, 1, 1], [3, 4, 5]),
            ([1, 1, 4, 6], [9, 1, 4, 10]),
            ([4, 1, 6, 1, 2], [4, 8, 10, 1, 9]),
        ],
        ids=str,
    )
    def test_against_loops(self, query_lens, context_lens, window):
        Case(query_lens, context_lens, page_size=4).check(window)

    @pytest.mark.parametrize("length", [3, 4, 5, 7, 8, 9])
    @pytest.mark.parametrize("new", [1, 2, 3])
    def test_at_page_borders(self, length, new):
        Case([new, 1], [length, length], page_size=4).check()
        Case([new, 1], [length, length], page_size=4).check(window=4)

    @pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (4, 4), (6, 3), (6, 1), (9, 3)])
    def test_grouped_heads(self, num_heads, num_kv_heads):
        Case([1, 3], [7, 6], 4, num_heads, num_kv_heads).check()
        Case([1, 3], [7, 6], 4, num_heads, num_kv_heads).check(window=3)

    @settings(max_examples=40)
    @given(
        data=st.data(),
        seed=st.integers(0, 1000),
        page_size=st.integers(1, 5),
        window=st.sampled_from([None, 1, 3, 6]),
    )
    def test_any_batch(self, data, seed, page_size, window):
        query_lens = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
        context_lens = [new + data.draw(st.integers(0, 7)) for new in query_lens]
        Case(query_lens, context_lens, page_size, seed=seed).check(window)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("num_queries", [1, 4, 7])
def test_causal_attention(window, num_queries):
    """With and without leading dimensions; the queries are the last of the positions."""
    query, key, value = randn(2, num_queries, 4, 8), randn(2, 7, 2, 8, seed=1), randn(2, 7, 2, 8, seed=2)
    actual = reference.causal_attention(query, key, value, 0.4, window)
    for batch in range(2):
        close(reference.causal_attention(query[batch], key[batch], value[batch], 0.4, window), actual[batch])
        for index in range(num_queries):
            position = 7 - num_queries + index
            expected = naive_attention(query[batch, index], key[batch], value[batch], position, 0.4, window)
            close(actual[batch, index], expected)


class TestRope:
    def test_against_transformers(self):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        heads, angles = randn(9, 5, 16), randn(9, 8, seed=1) * 10
        cos, sin = angles.cos(), angles.sin()
        expected, _ = apply_rotary_pos_emb(
            heads.transpose(0, 1)[None],
            heads.transpose(0, 1)[None],
            cos.repeat(1, 2)[None],
            sin.repeat(1, 2)[None],
        )
        close(reference.rope(heads, cos, sin), expected[0].transpose(0, 1))

    def test_partial_rotation_leaves_the_rest(self):
        heads, angles = randn(4, 3, 16), randn(4, 3, seed=1)
        rotated = reference.rope(heads, angles.cos(), angles.sin())
        assert torch.equal(rotated[..., 6:], heads[..., 6:])
        close(rotated[..., :6], reference.rope(heads[..., :6].contiguous(), angles.cos(), angles.sin()))

    def test_is_a_rotation_of_pairs(self):
        heads, angles = randn(1, 1, 4), torch.tensor([[0.3, 1.1]])
        rotated = reference.rope(heads, angles.cos(), angles.sin())[0, 0]
        for pair, angle in enumerate([0.3, 1.1]):
            point = complex(heads[0, 0, pair], heads[0, 0, pair + 2]) * complex(
                math.cos(angle), math.sin(angle)
            )
            assert complex(rotated[pair], rotated[pair + 2]) == pytest.approx(point, abs=1e-6)

    def test_low_precision_is_computed_in_float32(self):
        heads, angles = randn(4, 3, 16).bfloat16(), randn(4, 8, seed=1)
        exact = reference.rope(heads.float(), angles.cos(), angles.sin())
        assert torch.equal(reference.rope(heads, angles.cos(), angles.sin()), exact.bfloat16())


class TestNorms:
    def test_rms_norm(self):
        x, weight = randn(3, 5, 8) * 3, randn(8, seed=1)
        expected = x / (x.pow(2).mean(dim=-1, keepdim=True) + 0.01).sqrt()
        close(reference.rms_norm(x, weight, 0.01), expected * weight)
        close(reference.rms_norm(x, None, 0.01), expected)

    def test_layer_norm(self):
        x, weight, bias = randn(3, 8) * 3 + 1, randn(8, seed=1), randn(8, seed=2)
        centred = x - x.mean(dim=-1, keepdim=True)
        expected = centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 0.01).sqrt()
        close(reference.layer_norm(x, weight, bias, 0.01), expected * weight + bias)
        close(reference.layer_norm(x, None, None, 0.01), expected)


@pytest.mark.parametrize("name", list(reference.ACTIVATIONS))
def test_activations_against_transformers(name):
    from transformers.activations import ACT2FN

    x = randn(5, 12) * 3
    close(reference.activate(x, name), ACT2FN[name](x))
    close(reference.gated_activate(x, name), ACT2FN[name](x[:, :6]) * x[:, 6:])


def test_linear():
    x, weight, bias = randn(3, 4), randn(5, 4, seed=1), randn(5, seed=2)
    expected = torch.tensor([[float(row @ column) for column in weight] for row in x])
    close(reference.linear(x, weight, None), expected)
    close(reference.linear(x, weight, bias), expected + bias)


def test_store_kv_writes_its_slots_and_no_others():
    key, value = randn(3, 2, 4), randn(3, 2, 4, seed=1)
    keys, values = torch.zeros(10, 2, 4), torch.zeros(10, 2, 4)
    reference.store_kv(key, value, keys, values, torch.tensor([7, 0, 4]))
    for index, slot in enumerate([7, 0, 4]):
        assert torch.equal(keys[slot], key[index]) and torch.equal(values[slot], value[index])
    others = [1, 2, 3, 5, 6, 8, 9]
    assert not keys[others].any() and not values[others].any()


def test_log_softmax_gather_and_greedy():
    logits = randn(6, 11) * 5
    ids = torch.tensor([0, 10, 3, 3, 7, 1])
    close(reference.log_softmax_gather(logits, ids), logits.log_softmax(dim=-1)[range(6), ids])
    assert reference.log_softmax_gather(logits.bfloat16(), ids).dtype == torch.float32
    assert reference.greedy(logits).tolist() == [row.index(max(row)) for row in logits.tolist()]


class TestRegistry:
    def test_auto_on_a_gpu_is_triton_and_torch_where_triton_is_not(self, monkeypatch):
        from sleb.errors import ConfigError
        from sleb.kernels.registry import select_kernels

        pytest.importorskip("triton")
        gpu = torch.device("cuda", 0)
        kernels = select_kernels("auto", gpu)
        assert (kernels.name, kernels.gpu.name) == ("triton", "triton")
        monkeypatch.setitem(sys.modules, "triton", None)
        kernels = select_kernels("auto", gpu)
        assert (kernels.name, kernels.gpu) == ("torch", None)
        assert "need Triton" in kernels.why_slower
        with pytest.raises(ConfigError, match="pip install triton"):
            select_kernels("triton", gpu)

    def test_auto_is_the_torch_backend_where_the_c_kernels_cannot_run(self, monkeypatch):
        from sleb.errors import ConfigError
        from sleb.kernels.registry import select_kernels

        monkeypatch.setenv("SLEB_CPU_ISA", "none")
        kernels = select_kernels("auto", torch.device("cpu"))
        assert (kernels.name, kernels.cpu) == ("torch", None)
        assert "SLEB_CPU_ISA" in kernels.why_slower
        with pytest.raises(ConfigError, match="SLEB_CPU_ISA"):
            select_kernels("cpu", torch.device("cpu"))

    def test_an_explicit_choice_that_cannot_be_met_lists_what_can(self):
        from sleb.errors import ConfigError
        from sleb.kernels.names import KERNELS
        from sleb.kernels.registry import select_kernels

        with pytest.raises(ConfigError, match="'cuda-graph'") as caught:
            select_kernels("cuda-graph", torch.device("cpu"))
        assert all(name in str(caught.value) for name in KERNELS)
