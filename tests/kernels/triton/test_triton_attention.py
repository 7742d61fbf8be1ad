"""Attention over pages (Triton) against softmax in float64; all that a batch does not own is NaN."""

from __future__ import annotations

import dataclasses
import random
from unittest import mock

import pytest
import torch

from sleb.kernels.batch import BatchTensors, PagedBatch
from sleb.kernels.reference import device as device_reference
from sleb.kernels.triton import paged_decode, paged_items, paged_prefill
from sleb.kernels.triton.paged_attention import paged_attention
from sleb.kernels.triton.runtime import counters

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, on the NaNs under the interpreter

NAN, SENTINEL = float("nan"), 7.0
SCALE = 0.2
# Keys and probabilities are rounded to the dtype on their way.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# query heads, KV heads, head dimension; groups of 2 and 3, MHA, MQA, dimensions that are no power of two
SHAPES = [(6, 3, 64), (9, 3, 80), (4, 4, 96), (5, 1, 128), (2, 1, 256), (3, 3, 12)]
PAGE_SIZES = [1, 4, 16, 5]
WINDOWS = [None, 1, 3, 100]
BLOCK = 64  # positions of a tile in the first configurations


def expected_attention(query, keys, values, batch, window, softcap=None, sinks=None):
    """[T, H, D] float64, a sequence at a time, over its tokens gathered one by one."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    heads_of_kv = query.shape[1] // keys.shape[1]
    for row, (new, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        table = batch.page_table[row].tolist()
        slots = [
            table[at // batch.page_size] * batch.page_size + at % batch.page_size for at in range(context)
        ]
        k, v = (cache[slots].double().repeat_interleave(heads_of_kv, dim=1) for cache in (keys, values))
        start = batch.query_starts[row]
        for index in range(new):
            own = context - new + index
            seen = slice(0 if window is None else max(0, own - window + 1), own + 1)
            scores = torch.einsum("hd,nhd->hn", query[start + index].double(), k[seen]) * SCALE
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            if sinks is not None:  # one more position, whose value is 0
                scores = torch.cat((scores, sinks.double().cpu()[:, None]), dim=1)
            shares = scores.softmax(dim=1)[:, : k[seen].shape[0]]
            out[start + index] = torch.einsum("hn,nhd->hd", shares, v[seen])
    return out


class Case:
    """Sequences of (new tokens, context) over pages in random order, and two more rows past the batch's end."""

    def __init__(self, device, shape, dtype, page_size, lens, seed=0):
        generator = torch.Generator().manual_seed(seed)
        num_heads, num_kv, head_dim = shape
        query_lens, context_lens = zip(*lens, strict=True) if lens else ((), ())
        num_pages = [-(-context // page_size) for context in context_lens]
        total = sum(num_pages) + 2
        order = (torch.randperm(total - 1, generator=generator) + 1).tolist()  # page 0 is nobody's
        table = torch.zeros(len(lens), max(num_pages, default=0) + 1, dtype=torch.int64)
        for row, pages in enumerate(num_pages):
            table[row, :pages] = torch.tensor([order.pop() for _ in range(pages)], dtype=torch.int64)
        self.batch = PagedBatch(tuple(query_lens), tuple(context_lens), table, page_size)
        self.num_tokens = sum(query_lens)
        size = (total * page_size, num_kv, head_dim)
        self.caches = [torch.full(size, NAN, dtype=dtype) for _ in range(2)]
        for row, context in enumerate(context_lens):
            at = torch.arange(context)
            slots = table[row, at // page_size] * page_size + at % page_size
            for cache in self.caches:
                cache[slots] = torch.randn(context, num_kv, head_dim, generator=generator).to(dtype)
        self.query = torch.full((self.num_tokens + 5, num_heads, head_dim), NAN, dtype=dtype)
        drawn = torch.randn(self.num_tokens, num_heads, head_dim, generator=generator)
        self.query[: self.num_tokens] = (2.0 * drawn).to(dtype)
        self.on_device = [tensor.to(device) for tensor in (self.query, *self.caches)]
        # Rows past the count look like sequences of 1 and 4 tokens: only the count says that they are not there.
        past = PagedBatch(
            (*query_lens, 1, 4),
            (*context_lens, 3, 4),
            torch.cat((table, table.new_zeros(2, table.shape[1]))),
            page_size,
        )
        present = torch.tensor([len(lens)], dtype=torch.int32, device=device)
        self.tensors = BatchTensors.of(past, device)
        # The table's rows lie backwards, behind one of nobody's.
        table = self.tensors.page_table
        self.tensors = dataclasses.replace(
            self.tensors,
            page_table=torch.cat((table[:1] * 0 + (1 << 30), table.flip(0))),
            table_rows=torch.arange(len(table), 0, -1, dtype=torch.int32, device=device),
            num_rows=present,
        )

    def expected(self, window=None, *more):
        return expected_attention(self.query, *self.caches, self.batch, window, *more)

    def out(self):
        return torch.full_like(self.on_device[0], SENTINEL)

    def check(self, out, window=None, which=lambda new: True, more=()):
        """The tokens of the sequences of `which` lengths are as expected, all others untouched."""
        expected = torch.full(out.shape, SENTINEL, dtype=torch.float64)
        for row, new in enumerate(self.batch.query_lens):
            if which(new):
                tokens = slice(self.batch.query_starts[row], self.batch.query_starts[row + 1])
                expected[tokens] = self.expected(window, *more)[tokens]
        tolerance = TOLERANCE[out.dtype]
        torch.testing.assert_close(out.double().cpu(), expected, atol=tolerance, rtol=tolerance)
        assert not counters(out.device).any()


def decode(case, window=None, span=None, more=(None, None)):
    """span: tokens of an item, None: those of the kernel."""
    out, operator = case.out(), paged_decode.paged_decode
    with mock.patch.object(paged_decode, "SPAN", span or paged_decode.SPAN):
        assert operator(*case.on_device, case.tensors, SCALE, window, *more, out) is out
    case.check(out, window, lambda new: new == 1, more)


def prefill(case, window=None, more=(None, None), span=None):
    """span: tokens of a part of a context, at least, for which there are programs enough; None: as the kernel is."""
    out, several = case.out(), 64 if span else paged_prefill._PROGRAMS_A_PROCESSOR
    changed = {"SPAN": span or paged_prefill.SPAN, "_PROGRAMS_A_PROCESSOR": several}
    with mock.patch.multiple(paged_prefill, **changed):
        assert paged_prefill.paged_prefill(*case.on_device, case.tensors, SCALE, window, *more, out) is out
    case.check(out, window, lambda new: new > 1, more)


def edges(page_size):
    """Contexts around the end of a page and of a tile."""
    around = {1, page_size - 1, page_size, page_size + 1, 2 * page_size, BLOCK - 1, BLOCK, BLOCK + 1, 140}
    return sorted(around - {0})


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=lambda number: str(SHAPES[number]))
class TestShapes:
    """Every shape and dtype, each with another page size, window and length of items."""

    def test_decode(self, device, dtype, number):
        turn = number + 5 * (dtype == torch.bfloat16) + 7 * (dtype == torch.float16)
        page_size = PAGE_SIZES[turn % 4]
        lens = [(1, context) for context in (1, page_size + 1, 133)]
        case = Case(device, SHAPES[number], dtype, page_size, lens, seed=turn)
        decode(case, WINDOWS[turn // 2 % 4], (None, 70, 32)[turn % 3])

    def test_prefill(self, device, dtype, number):
        turn = number + 5 * (dtype == torch.bfloat16) + 7 * (dtype == torch.float16)
        case = Case(device, SHAPES[number], dtype, PAGE_SIZES[turn % 4], [(17, 17), (5, 130)], seed=turn)
        prefill(case, WINDOWS[turn // 2 % 4])


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("shape", [(6, 3, 64), (5, 1, 80)], ids=str)
def test_paged_attention(device, dtype, shape, randn, softcap):
    """Both operators behind one call, and the reference that stands for them, on the tokens that are there."""
    case = Case(device, shape, dtype, 4, [(1, 9), (4, 6), (1, 1), (7, 70)])
    tokens, tolerance = slice(0, case.num_tokens), TOLERANCE[dtype]
    more = (softcap, None if softcap is None else 2 * randn(shape[0], dtype=dtype))
    for operator in (paged_attention, device_reference.paged_attention):
        out = operator(*case.on_device, case.tensors, SCALE, 6, *more)[tokens]
        torch.testing.assert_close(
            out.double().cpu(), case.expected(6, *more)[tokens], atol=tolerance, rtol=tolerance
        )


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("span", [None, 150, 64])
def test_sinks_and_soft_caps_over_items(device, randn, span, window):
    """A sink is in the denominator once, whatever the items; one of −∞ is not there, a great one takes all."""
    sinks = torch.tensor([0.5, -float("inf"), 60.0], device=device)
    for softcap in (None, 4.0):
        decode(
            Case(device, (3, 1, 16), torch.float32, 4, [(1, 1), (1, 70), (1, 300)]),
            window,
            span,
            (softcap, sinks),
        )
        case = Case(device, (3, 1, 16), torch.float32, 4, [(20, 20), (3, 90)])
        prefill(case, window, (softcap, sinks), span and span // 2)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
class TestPages:
    """Every page size with every window, over contexts around the ends of pages and tiles."""

    def test_decode(self, device, page_size, window):
        case = Case(
            device, (2, 1, 16), torch.float32, page_size, [(1, context) for context in edges(page_size)]
        )
        decode(case, window, 50)

    def test_prefill(self, device, page_size, window):
        lens = [
            (min(context, 3 + row), context) for row, context in enumerate(edges(page_size)) if context > 1
        ]
        prefill(Case(device, (2, 1, 16), torch.float32, page_size, lens), window, span=32)


@pytest.mark.parametrize("window", WINDOWS)
def test_mixed_rows(device, window):
    """Each operator leaves the other's rows alone."""
    case = Case(device, (2, 2, 16), torch.float32, 5, [(3, 3), (1, 70), (66, 131), (1, 1), (2, 65)])
    prefill(case, window)
    decode(case, window, 32)


@pytest.mark.parametrize("span", [None, 300, 64, 32, 7])
@pytest.mark.parametrize("window", [None, 65])
def test_items(device, span, window):
    """Items shorter than tiles, in some rows and in all; None is the kernel's own length."""
    case = Case(device, (2, 1, 16), torch.float32, 16, [(1, 1), (1, 65), (1, 300)])
    decode(case, window, span)


@pytest.mark.parametrize("config", paged_decode.CONFIGS, ids=str)
@pytest.mark.parametrize("window", [None, 40])
def test_decode_configurations(device, monkeypatch, config, window):
    monkeypatch.setattr(paged_decode, "CONFIGS", (config,))
    case = Case(device, (2, 1, 64), torch.bfloat16, 16, [(1, 31), (1, 128), (1, 290)])
    decode(case, window, 100)


@pytest.mark.parametrize(
    "config", [*paged_prefill.CONFIGS, *paged_prefill.WIDE_CONFIGS, *paged_prefill.WIDEST_CONFIGS], ids=str
)
@pytest.mark.parametrize("window", [None, 40])
def test_prefill_configurations(device, monkeypatch, config, window):
    """Chunks of several blocks of rows, whose ends need not be those of the heads of a token."""
    monkeypatch.setattr(paged_prefill, "configs_for", lambda *sizes: (config,))
    case = Case(device, (3, 1, 64), torch.bfloat16, 16, [(90, 90), (70, 201)])
    prefill(case, window, span=None if window else 100)


@pytest.mark.parametrize("operator", [decode, prefill])
def test_no_row_is_there(device, operator):
    operator(Case(device, (2, 1, 16), torch.float32, 4, []))


@pytest.mark.parametrize("module", [paged_decode.paged_decode, paged_prefill.paged_prefill])
def test_no_row_is_laid_out(device, module):
    batch = BatchTensors.of(PagedBatch((), (), torch.zeros(0, 1, dtype=torch.int64), 4), device)
    cache = torch.zeros(4, 1, 16, device=device)
    assert module(torch.zeros(0, 2, 16, device=device), cache, cache, batch, SCALE, None).shape == (0, 2, 16)


@pytest.mark.parametrize("lens", [(1, 130), (130, 130)], ids=["decode", "prefill"])
def test_scores_far_apart(device, lens):
    """Only differences of scores matter: no exponential overflows, and one score may be all that counts."""
    case = Case(device, (2, 1, 16), torch.float32, 4, [lens])
    case.query *= 300
    case.on_device[0].mul_(300)
    (decode if lens[0] == 1 else prefill)(case)


def test_sequences_may_share_pages(device):
    """As with a common prefix: two sequences over the same pages, at different lengths."""
    case = Case(device, (2, 1, 16), torch.float32, 4, [(1, 9), (1, 9)])
    table = case.batch.page_table[:1].expand(2, -1).contiguous()
    case.batch = PagedBatch((1, 1), (9, 5), table, 4)
    case.tensors = BatchTensors.of(case.batch, device)
    decode(case)


@pytest.mark.parametrize("seed", range(3))
def test_random_mixes(device, seed):
    """Sequences of all kinds, one of them long for the items, which memory may bound to be longer."""
    rng = random.Random(seed)
    lens = [(1, rng.randint(1, 60)) for _ in range(3)] + [(1, 300), (3, 200)]
    lens += [(new := rng.randint(2, 40), new + rng.choice((0, 60)))]
    rng.shuffle(lens)
    case = Case(device, (4, 2, 16), torch.float32, 4, lens, seed=seed)
    with mock.patch.object(paged_items, "_PARTIAL_BYTES", (1 << 14, 1 << 15, 1 << 25)[seed]):
        decode(case, (None, 50, 150)[seed], 32)
        prefill(case, (None, 50, 150)[seed], span=64)


def test_results_depend_neither_on_other_sequences_nor_on_who_comes_last(device):
    case = Case(device, (2, 1, 16), torch.bfloat16, 4, [(1, 300), (1, 70), (1, 5)])
    outs = []
    for num_rows, programs in ((3, 1), (3, 4), (1, 2)):
        tensors = dataclasses.replace(case.tensors, num_rows=torch.full_like(case.tensors.num_rows, num_rows))
        changed = {"SPAN": 32, "MOST_ITEMS": 4, "_PROGRAMS_A_PROCESSOR": programs}
        with mock.patch.multiple(paged_decode, **changed):
            out = paged_decode.paged_decode(*case.on_device, tensors, SCALE, None, None, None, case.out())
        outs.append(out[0])
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("shape", [(6, 3, 64), (3, 3, 12)], ids=str)
@pytest.mark.parametrize(
    ("attend", "lens"), [(decode, [(1, 70), (1, 3)]), (prefill, [(7, 70), (1, 4), (3, 3)])], ids=["decode", "prefill"]
)  # fmt: skip
def test_attention_over_bytes(device, attend, lens, shape, window, dtype):
    """Against softmax in float64 over what the bytes stand for."""
    case = Case(device, shape, dtype, 4, lens)
    stored = [(cache * 2).to(torch.float8_e4m3fn) for cache in case.caches]
    case.caches = [each.to(dtype) for each in stored]
    case.on_device[1:] = [each.view(torch.uint8).to(device) for each in stored]
    attend(case, window)
