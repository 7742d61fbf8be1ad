"""Proof that small checks can fail: each kernel with one fault put into its text must be caught by its check."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import itertools
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from sleb.kernels.batch import BatchTensors, PagedBatch
from sleb.kernels.quantization import Groups, quantize_int4, quantize_int8
from sleb.kernels.reference import device as device_reference
from sleb.kernels.reference import ops as reference
from sleb.kernels.reference.device import HeadNorm, RowNorm
from sleb.kernels.triton import linear
from sleb.kernels.triton.runtime import counters

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="faults may read past a tensor's end"),
    pytest.mark.usefixtures("unsanitized"),  # a check of values must catch them
]


@pytest.fixture(autouse=True)
def counters_at_zero():
    """A kernel with a fault may leave counters where they were."""
    yield
    with torch.inference_mode():  # they were made in it, if another test was the first
        counters(torch.device("cpu")).zero_()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def check_norm(module):
    for kind, (num_delta, num_norm) in itertools.product(("rms", "layer", "none"), ((3, 1), (1, 3))):
        residual, delta, weight, bias = (
            randn(5, 72),
            randn(4, 72, seed=1),
            randn(72, seed=2),
            randn(72, seed=3),
        )
        other = residual.clone()
        arguments = delta, weight, bias if kind == "layer" else None, 1e-5, kind
        counts = integers(num_delta), integers(num_norm)
        out = module.add_norm(residual, *arguments, *counts)
        same(out[:num_norm], device_reference.add_norm(other, *arguments, *counts)[:num_norm])
        same(residual, other)
    for post, (start, end) in itertools.product((False, True), ((0, 2), (2, 4))):
        residual, delta, weight = randn(5, 72), randn(4, 72, seed=1), randn(72, seed=2)
        other = residual.clone()
        counts = integers(3), integers(end)
        starts = {"delta_start": integers(1), "norm_start": integers(start)}
        outs = [
            operator(rows, delta, weight, None, 1e-5, "rms", *counts, **starts, post=post)
            for operator, rows in ((module.add_norm, residual), (device_reference.add_norm, other))
        ]
        same(outs[0][start:end], outs[1][start:end])
        same(residual, other)
    for kind, bias in (("rms", None), ("layer", randn(72, seed=3))):
        residual, delta = randn(5, 72), randn(4, 72, seed=1)
        other, update = residual.clone(), {"delta_kind": kind, "delta_bias": bias, "delta_scale": 0.3}
        counts = integers(2), integers(4)
        out = module.add_norm(residual, delta, None, None, 1e-5, "rms", *counts, **update)
        expected = device_reference.add_norm(other, delta, None, None, 1e-5, "rms", *counts, **update)
        same(out[:4], expected[:4])
        same(residual, other)


def check_activation(module):
    x = randn(3, 140)
    for name in ("silu", "relu", "gelu", "gelu_new"):
        same(module.gated_activate(x, name, integers(3)), reference.gated_activate(x, name))


def check_rope(module):
    heads, rotation = randn(4, 12, 20), (randn(9, 6, seed=3), randn(9, 6, seed=4))
    places = integers(0, 8, 5, 2), integers(3, 5, 0, 1)
    vectors = [1 + randn(heads * 20, seed=seed) for seed, heads in enumerate((6, 3, 6, 3))]
    small = [each[:20] for each in vectors]
    for norm, clip in (
        (HeadNorm("rms", *small[:2]), None),
        (HeadNorm("layer", *small, after_rotation=True), 0.7),
        (HeadNorm("layer", *vectors, whole=True), 0.7),
    ):
        caches = [[randn(8, 3, 20, seed=5), randn(8, 3, 20, seed=6)] for _ in range(2)]
        queries = [
            operator(heads, 6, rotation, places[0], norm, *cache, places[1], integers(3), clip)
            for operator, cache in zip((module.rope_store, device_reference.rope_store), caches, strict=True)
        ]
        same(queries[0][:3], queries[1][:3])
        same(caches[0], caches[1])


def attention_batch(lens):
    """Sequences of (new tokens, context) and two more past the count; pages of 4 in reverse order."""
    query_lens, context_lens = zip(*lens, (1, 3), (2, 4), strict=True)
    table = torch.zeros(len(query_lens), 100, dtype=torch.int64)
    page = 95
    for row, context in enumerate(context_lens):
        for place in range(-(-context // 4)):
            table[row, place], page = page, page - 1
    full = BatchTensors.of(PagedBatch(query_lens, context_lens, table, 4), torch.device("cpu"))
    present = len(lens)
    batch = PagedBatch(query_lens[:present], context_lens[:present], table[:present], 4)
    backwards = {"page_table": full.page_table.flip(0), "table_rows": full.table_rows.flip(0)}
    return batch, dataclasses.replace(full, num_rows=integers(present), **backwards)


def check_attention(operator, lens, which, windows):
    batch, tensors = attention_batch(lens)
    tokens = batch.query_starts[-1]
    query, keys, values = 2 * randn(tokens + 3, 4, 16), randn(400, 2, 16, seed=1), randn(400, 2, 16, seed=2)
    for window, more in itertools.product(windows, ((None, None), (2.0, randn(4, seed=3)))):
        expected = reference.paged_attention(query[:tokens], keys, values, batch, 0.3, window, *more)
        out = torch.full_like(query, 7.0)
        operator(query, keys, values, tensors, 0.3, window, *more, out)
        for row, new in enumerate(batch.query_lens):
            at = slice(batch.query_starts[row], batch.query_starts[row + 1])
            same(out[at], expected[at] if which(new) else torch.full_like(expected[at], 7.0))
        assert (out[tokens:] == 7.0).all()


def check_decode(module):
    lens = [(1, 140), (3, 5), (1, 67), (1, 1)]
    module._PROGRAMS_A_PROCESSOR, module._JOINED_VALUES = (
        2,
        1,
    )  # several units a program, several steps to join
    for module.SPAN in (256, 64):
        check_attention(module.paged_decode, lens, lambda new: new == 1, (None, 6))


def check_prefill(module):
    module._PROGRAMS_A_PROCESSOR, module._JOINED_VALUES = (
        8,
        64,
    )  # as many parts as SPAN makes, several steps to join
    for module.SPAN in (1024, 64):
        check_attention(
            module.paged_prefill, [(40, 300), (1, 9), (3, 3)], lambda new: new > 1, (None, 6, 100)
        )


def check_greedy(module):
    module._BLOCK = 16
    logits = (2 * randn(12, 90)).round()
    logits[4, [20, 50, 88]] = float("nan")
    logits[5] = 3.0
    for row, token in enumerate((3, 20, 40, 50, 70, 88), start=6):  # first and later in what a lane looks at
        logits[row, token] = float("nan")
    expected = [-1 if row.isnan().any() else (row == row.max()).nonzero()[0] for row in logits]
    assert module.greedy(logits).tolist() == [int(token) for token in expected]
    ids = torch.tensor([3, 80, 41, 0])
    same(module.log_softmax_gather(logits[:4], ids), reference.log_softmax_gather(logits[:4], ids))


def check_sample(module):
    module._BLOCK, module._LANES = 16, 4
    logits = randn(11, 50).round()
    logits[5, 7], logits[5, 8:] = 0.0, -2.0  # under min-p
    logits[6:8] = 0.0  # ties at the cut, before and after the best
    logits[6, 8] = logits[7, 49] = 1.0
    logits[:, :7] = -float("inf")
    logits[9:] = -float("inf")
    logits[9, ::8] = -torch.arange(7) / 5  # top-p needs six groups' highest
    logits[10, [9, 12]] = 0.0  # the point at the end of a token
    numbers = (
        [1.0, 0.7, 5.0, 0.5, 5.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0],  # temperature
        [0, 9, 0, 12, 9, 0, 10, 10, 0, 0, 0],
        [1.0, 1.0, 0.5, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 0.9, 1.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.97, 0.5, 0.97, 0.5, 0.97, 0.999, 0.999, 0.8, 0.999, 0.5],  # point
    )
    assert (
        module.sample_packed(logits, torch.tensor(numbers, dtype=torch.float64)).tolist()
        == reference.sample(logits, *numbers).tolist()
    )


def stored_weights():
    """Of 140 outputs and 150 inputs, in formats with all that a product reads."""
    weight = randn(140, 150, seed=2) + 0.5
    grouped = [Groups(4, 64, "zero").empty(140, 150), Groups(8, 32, "middle").empty(140, 150)]
    for each in grouped:
        each.values.copy_(torch.arange(each.values.numel()).view(each.values.shape) * 37 % 256)
        each.scale.copy_(0.01 * randn(*each.scale.shape, seed=3))
        if each.minimum is not None:
            each.minimum.copy_(7 * randn(*each.minimum.shape, seed=4))
    return [weight, quantize_int8(weight), quantize_int4(weight), *grouped]


def near(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)


@contextmanager
def split(module, parts):
    """Inputs in so many parts, whose counters are 0 again afterwards."""
    with mock.patch.object(module, "choose_num_parts", return_value=parts):
        yield
        assert not counters(torch.device("cpu")).any()


def check_product(module):
    x, bias = randn(3, 150), randn(140, seed=1)
    norm = RowNorm(1 + randn(150, seed=5), 1e-5, device_reference.moments(x))
    names = ("product", "arrive", "joined")
    with mock.patch.multiple(linear, **{name: getattr(module, name) for name in names}):
        for number, weight in enumerate(stored_weights()):
            with split(linear, 1 + number % 2):
                out = linear.linear(x, weight, bias, norm=norm, config=linear.CONFIGS[0])
                near(out, reference.linear(norm(x), weight, bias))


def check_linear(module):
    weight, bias, x = randn(140, 260, seed=2) / 10, randn(140, seed=1), randn(18, 260)
    config = module.CONFIGS[0]
    expected = reference.linear(x, weight, bias)
    for parts, (start, end) in ((1, (17, 18)), (2, (3, 16))):
        with split(module, parts):
            rows = integers(start), integers(end)
            out = module.linear(x, weight, bias, rows, config=config)
            near(out[start:end], expected[start:end])
            out = module.linear_activate(x, weight, bias, "silu", True, integers(end), config=config)
            near(out[:end], reference.gated_activate(expected, "silu")[:end])
            residuals = [randn(18, 140, seed=3) for _ in range(2)]
            moments = [torch.full((18, 3), 7.0) for _ in range(2)]
            more, options = {"start": rows[0], "scale": 0.3}, {"config": config}
            module.linear_add(x, weight, bias, residuals[0], moments[0], rows[1], **more, **options)
            device_reference.linear_add(x, weight, bias, residuals[1], moments[1], rows[1], **more)
            near(*residuals)
            near(*moments)


def check_linear_rope(module):
    rotation = (randn(20, 6, seed=3), randn(20, 6, seed=4))
    vectors = [1 + randn(16, seed=seed) for seed in range(4)]
    x, bias, places = randn(3, 260), randn(96, seed=7), integers(0, 8, 5)
    for parts, norm in enumerate((None, HeadNorm("layer", *vectors, after_rotation=True)), start=1):
        caches = [[randn(8, 1, 16, seed=5), randn(8, 1, 16, seed=6)] for _ in range(2)]
        weight = randn(96, 260, seed=2) / 10
        arguments = (x, weight, bias, 4, rotation, places, norm)
        with split(module, parts):
            config = module.configs_for(x, weight, 16)[0]
            query = module.linear_rope_store(
                *arguments, *caches[0], integers(3, 5, 0), integers(2), config=config
            )
        expected = device_reference.linear_rope_store(*arguments, *caches[1], integers(3, 5, 0), integers(2))
        near(query[:2], expected[:2])
        near(*caches)


def check_experts(module):
    number, inner, hidden, tokens = 4, 10, 24, 40
    x = randn(tokens, hidden)
    up, up_bias = randn(number * 2 * inner, hidden, seed=1), randn(number * 2 * inner, seed=2)
    down, down_bias = randn(number * hidden, inner, seed=3), randn(number * hidden, seed=4)
    chosen = torch.stack(
        [torch.randperm(3, generator=torch.Generator().manual_seed(n))[:2] for n in range(tokens)]
    )
    chosen[chosen == 1] = 3  # expert 1 has no tokens, the others more than one block
    shares, count = randn(tokens, 2, seed=5).abs(), integers(tokens - 1)
    arguments = (x, up, up_bias, down, down_bias, chosen, shares, number, "silu", True, count)
    expected = device_reference.mix_experts(*arguments)
    torch.testing.assert_close(module.mix_experts(*arguments)[:-1], expected[:-1], atol=1e-3, rtol=1e-4)


CHECKS = {
    "add_norm": check_norm,
    "activation": check_activation,
    "rope_store": check_rope,
    "paged_decode": check_decode,
    "paged_prefill": check_prefill,
    "greedy": check_greedy,
    "sample": check_sample,
    "product": check_product,
    "linear": check_linear,
    "linear_rope": check_linear_rope,
    "experts": check_experts,
}
# module, text in it, the fault in its place; where the text occurs several times, all are replaced
MUTATIONS = [
    ("add_norm", "at = row * size + columns", "at = row * (size - 1) + columns"),
    ("add_norm", "mask=inside & is_added, other=0.0", "mask=inside, other=0.0"),
    ("add_norm", "if not is_touched:", "if not is_normed:"),
    ("add_norm", "is_added &= row >= tl.load(delta_start)", "is_added &= row >= 0"),
    ("add_norm", "is_normed &= row >= tl.load(norm_start)", "is_normed &= row >= 0"),
    ("add_norm", "is_kept &= not is_normed", "is_kept &= is_normed"),
    ("add_norm", '    if KIND != "none":', "    if True:"),
    ("add_norm", "x = tl.where(inside, x - mean, 0.0)", "x = x - mean"),
    ("add_norm", "/ size + eps", "/ (size + 1) + eps"),
    ("add_norm", "mean = tl.sum(x, axis=0) / size", "mean = 0.0"),
    ("add_norm", "added = tl.where(is_added, added, 0.0)", "added = added"),
    ("add_norm", "added.to(tl.float32) * delta_scale", "added.to(tl.float32)"),
    ("add_norm", 'if DELTA_KIND != "none":', "if False:"),
    ("activation", "* size + size + columns", "* size + columns"),
    ("activation", "0.7071067811865476", "0.5"),
    ("activation", "2.0 * inner", "inner"),
    ("activation", "tl.where(x < 0.0, 0.0, x)", "x"),
    ("rope_store", "first * c - second * s", "first * c + second * s"),
    ("rope_store", "second * c + first * s", "second * c - first * s"),
    ("rope_store", 'KIND != "none":', "False:"),
    ("rope_store", "if token >= tl.load(num_tokens):", "if token < 0:"),
    ("rope_store", "tl.load(positions + token)", "tl.load(positions)"),
    ("rope_store", "tl.load(slots + token)", "tl.load(slots)"),
    ("rope_store", "tl.where(head < NUM_HEADS, of_query, of_key)", "of_query"),
    ("rope_store", "tl.where(x < -clip, -clip, x)", "x"),
    ("rope_store", "after == AFTER", "after == 0"),
    ("rope_store", "tl.where(in_rest, rest - mean[:, None], 0.0)", "tl.where(in_rest, rest, 0.0)"),
    (
        "rope_store",
        "second = tl.where(in_half, second - mean[:, None], 0.0)",
        "second = second - mean[:, None]",
    ),
    (
        "rope_store",
        "tl.where(at < SIZE, _clipped(x, clip, CLIPS) - mean, 0.0)",
        "_clipped(x, clip, CLIPS) - mean",
    ),
    ("rope_store", "tl.where(head < NUM_HEADS, inverse, key_inverse)", "inverse"),
    ("rope_store", "(head - NUM_HEADS) * STRIDE", "head * 0"),
    ("rope_store", "y += _of_head", "y += 0.0 * _of_head"),
    ("rope_store", "rest = 2 * HALF +", "rest = HALF +"),
    ("rope_store", "squares / HEAD_DIM", "squares / (HEAD_DIM - 1)"),
    ("rope_store", "first = tl.where(is_value, first, turned)", "first = turned"),
    ("paged_decode", 'scores = tl.where(visible[None, :], scores, float("-inf"))', "scores = scores"),
    ("paged_decode", "stop = tl.minimum(start + span, context)", "stop = start + span"),
    ("paged_decode", "tl.maximum(context - WINDOW, 0)", "tl.maximum(context - WINDOW - 1, 0)"),
    ("paged_decode", "PRECISION) * scale", "PRECISION)"),
    ("paged_decode", "- 1.0) * cap", "- 1.0)"),
    ("paged_decode", "(group < GROUP) & (part == 0)", "group < GROUP"),
    ("paged_decode", "* 1.4426950408889634", "* 1.0"),
    ("paged_decode", "tl.where(new == 1, context, 0)", "context"),
    ("paged_decode", "item - before", "(item - before + 1) % 2"),
    ("paged_decode", "(kept_before + part) * NUM_KV", "part * NUM_KV"),
    ("paged_decode", "counters + kept_before * NUM_KV + kv_head, number", "counters + kv_head, number"),
    ("paged_decode", "(first + part) * NUM_KV", "(first + number - 1) * NUM_KV"),
    ("paged_decode", "tl.load(table_rows + row)", "row"),
    ("paged_prefill", "tl.load(table_rows + row)", "row"),
    ("paged_decode", "+ position % PAGE_SIZE", "+ (position + 1) % PAGE_SIZE"),
    ("paged_decode", "head = kv_head * GROUP + group", "head = kv_head + group * NUM_KV"),
    ("paged_decode", "attended = attended * fade[:, None]", "attended = attended"),
    ("paged_decode", "total = total * fade +", "total = total +"),
    ("paged_decode", "weights = tl.exp2(logs - shift[None, :])", "weights = tl.where(inside, 1.0, 0.0)"),
    ("paged_decode", "joined = joined * fade +", "joined = joined +"),
    ("paged_decode", "highest + tl.log2(total)", "highest"),
    ("paged_prefill", "visible = position[None, :] <= own[:, None]", "visible = position[None, :] >= 0"),
    ("paged_prefill", "position[None, :] <= own[:, None]", "position[None, :] < own[:, None]"),
    ("paged_prefill", "own[:, None] - WINDOW)", "own[:, None] - WINDOW - 1)"),
    ("paged_prefill", "own = context - num_queries + index", "own = index"),
    ("paged_prefill", "(lowest + 1) // BLOCK * BLOCK", "(lowest + BLOCK) // BLOCK * BLOCK"),
    (
        "paged_prefill",
        "tl.cdiv(tl.maximum(last - WINDOW + 1, 0), BLOCK)",
        "(tl.maximum(last - WINDOW + 1, 0) // BLOCK)",
    ),
    (
        "paged_prefill",
        "tl.maximum(lowest - WINDOW + 1, 0) // BLOCK * BLOCK",
        "tl.maximum(lowest, 0) // BLOCK * BLOCK",
    ),
    ("paged_prefill", "tl.where(new > 1, new, 0)", "new"),
    ("paged_prefill", "(index < num_queries) & (part == 0)", "index < num_queries"),
    ("paged_prefill", "tl.minimum(start + span, stop)", "stop"),
    ("paged_prefill", "highest + tl.log2(total)", "highest"),
    ("paged_prefill", "weights = tl.exp2(logs - shift)", "weights = tl.where(logs == logs, 1.0, 0.0)"),
    ("paged_prefill", "joined = joined * fade[:, None] +", "joined = joined +"),
    ("paged_prefill", "for begin in range(0, ROWS, JOINED):", "for begin in range(0, JOINED, JOINED):"),
    ("paged_prefill", "first_score(sinks, head,", "first_score(sinks, head * 0,"),
    ("paged_prefill", "+ position % PAGE_SIZE", "+ (position + 1) % PAGE_SIZE"),
    ("paged_prefill", "attended = attended * fade[:, None]", "attended = attended"),
    ("paged_prefill", "index = line // GROUP", "index = line % num_queries"),
    ("greedy", "(x > highest)", "(x >= highest)"),
    ("greedy", "| ((x != x) & (highest == highest))", ""),
    (
        "greedy",
        "index_out + at, tl.min(tl.where(winner, index, 2147483647)",
        "index_out + at, tl.max(tl.where(winner, index, -1)",
    ),
    ("greedy", "- (tl.log(total) + shift)", "- tl.log(total)"),
    ("greedy", "sums * tl.exp(highest - shift), 0.0", "sums, 0.0"),
    ("greedy", "total = total * tl.exp(highest - shift) +", "total = total +"),
    ("sample", "(rank <= ties)", "(rank >= 0)"),
    ("sample", "ties = top_k - above", "ties = top_k - above + 1"),
    ("sample", "goal = tl.minimum(top_p * total, at_most)", "goal = at_most"),
    ("sample", "tl.where(scaled >= least, tl.exp(scaled), 0.0)", "tl.exp(scaled)"),
    ("sample", "(cumulative > goal)", "(cumulative >= goal)"),
    ("sample", "until - lane_mass, 0.0)", "0.0, 0.0)"),
    ("sample", "point * kept", "point * total"),
    ("sample", "point * total - before", "point * total"),
    ("sample", "== goal_tile) & (group", "== 0) & (group"),
    ("sample", "(x - highest) * inverse_temperature", "(x - highest)"),
    ("sample", "- seen, 0.0)", ", 0.0)"),
    ("sample", "top_p * total * 1.0001", "top_p * total * 0.5"),
    ("sample", "tl.where(by_count, 1.0, weight)", "weight * 0.0 + 1.0"),
    ("sample", "low = tl.maximum(low, up)", "low = tl.maximum(low, bound)"),
    ("sample", "tl.where(enough, above, mass)", "above"),
    ("experts", "(expert.to(tl.int64) * num_outputs + output)", "(output.to(tl.int64))"),
    ("experts", "at = expert.to(tl.int64) * num_outputs + outputs", "at = outputs"),
    ("experts", "tl.load(shares + token * TOP_K + choice) * update", "update"),
    ("experts", "(order // top_k)", "(order % top_k)"),
    ("product", "tl.join(q & 15, q >> 4)", "tl.join(q >> 4, q & 15)"),
    ("product", "wide * step + base", "wide * step"),
    ("product", "(wide - base) * step if", "wide * step if"),
    ("product", "(8.0 if KIND == 2 else 128.0)", "8.0"),
    ("product", "unit = begin // UNIT +", "unit ="),
    ("product", "unit // (SIZE // UNIT)", "unit"),
    ("product", "part.to(tl.float32) * factors", "part.to(tl.float32)"),
    ("product", "tl.load(norm_weight + column,", "tl.load(norm_weight + column * 0,"),
    ("product", "in_columns = column < num_inputs", "in_columns = column < num_inputs - 1"),
    ("product", "total *= tl.load(scale", "total *= 1 + 0 * tl.load(scale"),
    ("product", "tl.atomic_xchg(counters + tile, 0)", "pass"),
    ("linear", "start = part * length", "start = 0"),
    ("linear", "tl.minimum(start + length, num_inputs)", "num_inputs"),
    ("linear", "!= num_parts - 1", "!= 0"),
    ("linear", "of_tile % 2 * num_outputs", "of_tile % 2"),
    ("linear", "tl.load(bias + output,", "tl.load(bias + output * 0,"),
    ("linear", "(row >= first) & (row < end) & (column", "(row < end) & (column"),
    ("linear", "(row < end) & (column < num_outputs)", "(column < num_outputs)"),
    ("linear", "tl.maximum(first, tl.program_id(1) * ROWS)", "first * ROWS"),
    ("linear", "(tl.program_id(1) + 1) * ROWS", "tl.program_id(1) * ROWS"),
    ("linear", "(delta * delta_scale)", "delta"),
    ("linear", "in_range = in_rows & (row >= first) & (row < end)", "in_range = in_rows"),
    ("linear", "chunk = tl.program_id(0) * (OUTPUTS // CHUNK) +", "chunk ="),
    ("linear_rope", "start = part * length", "start = 0"),
    ("linear_rope", "tl.minimum(start + length, num_inputs)", "num_inputs"),
    ("linear_rope", "column // 2 + column % 2 * HALF", "column // 2 + column % 2 * (HALF - 1)"),
    ("linear_rope", "column < 2 * HALF", "column < HALF"),
    ("linear_rope", "HAS_BIAS:\n        total +=", "HAS_BIAS:\n        total -="),
    ("linear_rope", "first * c - second * s", "first * c + second * s"),
    ("linear_rope", "second * c + first * s", "second * c - first * s"),
    ("linear_rope", "& is_rotated", "& (head >= 0)"),
    ("linear_rope", "HALF + pair, 2 * pair + 1", "HALF + pair, 2 * pair"),
    ("linear_rope", "tl.load(positions + row", "tl.load(positions + row * 0"),
    ("linear_rope", "tl.load(slots + row", "tl.load(slots + row * 0"),
    ("linear_rope", "in_rows = row < end", "in_rows = row < num_rows"),
    ("linear_rope", "after == AFTER", "after == 0"),
    ("linear_rope", "every, pair < 0,", "every, every,"),
]


def load(name, folder, old="", new=""):
    """A copy of a module of kernels; a jitted function needs a file that holds its text."""
    text = Path(importlib.import_module(f"sleb.kernels.triton.{name}").__file__).read_text(encoding="utf-8")
    assert not old or old in text, f"{name}.py no longer holds {old!r}: give the fault a new place"
    path = folder / f"copy_of_{name}.py"
    path.write_text(text.replace(old, new) if old else text, encoding="utf-8")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CHECKS)
def test_the_check_passes_without_a_fault(tmp_path, name):
    CHECKS[name](load(name, tmp_path))


def first_of_each(mutations):
    """One fault a kernel by default; `.ci/run` tries them all."""
    seen = set()
    for case in mutations:
        yield pytest.param(*case, marks=[pytest.mark.slow] if case[0] in seen else [])
        seen.add(case[0])


@pytest.mark.parametrize(("name", "old", "new"), first_of_each(MUTATIONS))
def test_a_fault_is_caught(tmp_path, name, old, new):
    with pytest.raises(AssertionError):
        CHECKS[name](load(name, tmp_path, old, new))
