"""The most probable token, log-probabilities and random tokens (Triton), against float64 and a sort."""

from __future__ import annotations

import math
import random
import signal

import numpy as np
import pytest
import torch

from sleb.kernels.reference import device as device_reference
from sleb.kernels.reference import ops as reference
from sleb.kernels.registry import triton_gpu_kernels
from sleb.kernels.triton import greedy as greedy_module
from sleb.kernels.triton import sample as sample_module
from sleb.kernels.triton.greedy import greedy, log_softmax_gather
from sleb.kernels.triton.sample import sample_packed

sample = triton_gpu_kernels().sample

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, on infinities under the interpreter

INF, NAN = float("inf"), float("nan")
# vocabulary, block: the ends of a block, of a run of several, and a vocabulary that real blocks do not divide
LENGTHS = [(1, 16), (2, 4096), (15, 16), (16, 16), (97, 16), (256, 4096), (300, 16), (9001, 4096)]


@pytest.fixture(params=[16, 4096], ids=["blocks", "block"])
def block(request, monkeypatch):
    """Small blocks, so that small vocabularies take several, and the real ones."""
    for module in (greedy_module, sample_module):
        monkeypatch.setattr(module, "_BLOCK", request.param)


@pytest.fixture
def blocks(monkeypatch):
    """Small ones alone; two tests of `sample` below take the real ones."""
    for module in (greedy_module, sample_module):
        monkeypatch.setattr(module, "_BLOCK", 16)
    monkeypatch.setattr(sample_module, "_LANES", 4)


class TestGreedy:
    @pytest.mark.parametrize(("vocab_size", "block"), LENGTHS, indirect=["block"])
    def test_random_rows(self, block, randn, dtype, vocab_size):
        logits = randn(3, vocab_size, dtype=dtype)
        # The lowest of equals, which 16-bit logits have many of; torch does not promise which one argmax gives.
        top = logits.max(dim=1, keepdim=True).values
        expected = [row.nonzero()[0].item() for row in (logits == top).cpu()]
        tokens = greedy(logits)
        assert tokens.dtype == torch.int64 and tokens.tolist() == expected

    def test_ties_go_to_the_lowest_token(self, block, device):
        logits = torch.zeros(40, 100, device=device)
        for row, low in enumerate(range(0, 80, 2)):
            logits[row, low :: 1 + row] = 3.0
        assert greedy(logits).tolist() == list(range(0, 80, 2))

    @pytest.mark.parametrize("at", [0, 15, 16, 99])
    def test_rows_that_are_not_finite(self, block, randn, at):
        logits = randn(8, 100)
        logits[0] = -INF
        logits[1, at] = INF
        logits[2, at] = NAN
        logits[3, [at, 99]] = NAN
        logits[4] = NAN
        logits[5, [3, 7]] = INF
        logits[5, at] = NAN
        logits[6] = -INF
        logits[6, at] = -1e30
        logits[7] = INF
        expected = [-1, -1, -1, -1, -1, -1, at, -1]
        assert greedy(logits).tolist() == reference.greedy(logits.cpu()).tolist() == expected

    def test_no_rows(self, device):
        assert greedy(torch.zeros(0, 7, device=device)).tolist() == []
        ids = torch.zeros(0, dtype=torch.int64, device=device)
        assert log_softmax_gather(torch.zeros(0, 7, device=device), ids).shape == (0,)


class TestLogSoftmaxGather:
    @pytest.mark.parametrize(("vocab_size", "block"), LENGTHS, indirect=["block"])
    def test_against_float64(self, block, randn, device, dtype, vocab_size):
        scales = torch.tensor([1.0, 1.0, 30.0, 30.0], device=device)[:, None]
        logits = (scales * randn(4, vocab_size)).to(dtype)
        ids = torch.tensor([0, vocab_size - 1, vocab_size // 2, 0], device=device)
        exact = logits.double().log_softmax(dim=1).gather(1, ids[:, None])[:, 0].float()
        actual = log_softmax_gather(logits, ids)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, exact, atol=2e-5, rtol=1e-5)

    @pytest.mark.parametrize("num_ids", [1, 3, 21])
    def test_several_tokens_a_row(self, block, randn, device, num_ids):
        logits = randn(3, 97)
        ids = (torch.arange(3 * num_ids, device=device).view(3, num_ids) * 31) % 97
        exact = logits.double().log_softmax(dim=1).gather(1, ids).float()
        torch.testing.assert_close(log_softmax_gather(logits, ids), exact, atol=2e-5, rtol=1e-5)

    def test_of_large_logits(self, block, device):
        """Relative to the highest, so neither overflow nor a sum of zeros."""
        logits = torch.full((2, 50), -3e38, device=device)
        logits[0, 7] = 3e38
        logits[1] = 1000.0
        actual = log_softmax_gather(logits, torch.tensor([7, 3], device=device))
        torch.testing.assert_close(actual.cpu(), torch.tensor([0.0, -math.log(50)]), atol=1e-4, rtol=0)

    def test_of_banned_tokens(self, block, randn, device):
        """A ban of -inf takes nothing from the others; a whole row of them has no distribution."""
        logits = randn(2, 100)
        logits[0, 3:90] = -INF
        logits[1] = -INF
        exact = logits.double().log_softmax(dim=1).float()
        for token in (0, 3, 95):
            actual = log_softmax_gather(logits, torch.tensor([token, token], device=device))
            torch.testing.assert_close(actual, exact[:, token], equal_nan=True, atol=2e-5, rtol=1e-5)


def distribution(logits, temperature, top_k, top_p, min_p):
    """[V] float64 probabilities of one row after the filters, by sorting its tokens one by one."""
    highest = max(logits)
    weights = [math.exp((x - highest) / temperature) if x > -INF else 0.0 for x in logits]
    weights = [weight if weight >= min_p else 0.0 for weight in weights]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    kept = order[:top_k] if top_k > 0 else order
    goal, reached, chosen = top_p * sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if chosen and top_p < 1.0 and reached >= goal:
            break
        chosen.append(token)
        reached += weights[token]
    probabilities = [0.0] * len(logits)
    for token in chosen:
        probabilities[token] = weights[token] / reached
    return probabilities


def check_sample(logits, *numbers):
    """Every row's token holds the row's point, and is the reference's but where the point is at a boundary."""
    tokens = sample(logits, *numbers).tolist()
    expected = reference.sample(logits.float().cpu(), *numbers).tolist()
    for row, (token, wanted) in enumerate(zip(tokens, expected, strict=True)):
        *filters, point = (column[row] for column in numbers)
        probabilities = distribution(logits[row].tolist(), *filters)
        described = f"row {row}: {token}, not {wanted}; {filters}, {point}"
        assert probabilities[token] > 0.0, described
        before = math.fsum(probabilities[:token])
        assert before - 1e-6 <= point <= before + probabilities[token] + 1e-6, described
        if token != wanted:
            boundary = math.fsum(probabilities[: max(token, wanted)])
            assert abs(boundary - point) < 1e-6, described


def numbers_of(num_rows, seed):
    rng = random.Random(seed)
    choices = ([0.3, 1.0, 2.0], [0, 1, 5, 40, 1000], [1.0, 0.9, 0.5, 0.01], [0.0, 0.05, 0.5])
    filters = [[rng.choice(values) for _ in range(num_rows)] for values in choices]
    return *filters, [rng.choice([0.0, 0.999999, rng.random()]) for _ in range(num_rows)]


class TestDraw:
    @pytest.mark.parametrize("vocab_size", [1, 70])
    @pytest.mark.parametrize("ties", [False, True])
    def test_random_filters(self, blocks, randn, vocab_size, ties):
        logits = 2 * randn(6, vocab_size)
        logits = logits.round() if ties else logits
        check_sample(logits, *numbers_of(6, vocab_size))

    @pytest.mark.parametrize("top_k", [0, 20])
    @pytest.mark.parametrize("top_p", [0.02, 0.5, 0.9, 0.99])
    def test_top_p_of_flat_distributions(self, randn, top_k, top_p):
        """The least probable token weighs nearly as much as the others."""
        points = [0.0, 0.3, 0.999999]
        check_sample(randn(3, 50), [5.0] * 3, [top_k] * 3, [top_p] * 3, [0.0] * 3, points)

    def test_16_bit_logits(self, randn, dtype):
        check_sample((2 * randn(4, 100)).to(dtype), *numbers_of(4, 1))

    def test_a_vocabulary_of_several_blocks(self, randn):
        check_sample(2 * randn(2, 9001), [1.0, 0.7], [0, 50], [1.0, 0.9], [0.0, 0.0], [0.7, 0.999999])

    def test_banned_tokens_are_never_drawn(self, blocks, randn):
        logits = randn(6, 60)
        logits[:, 1:50] = -INF
        logits[:, 55:] = -INF
        points = [0.0, 0.2, 0.5, 0.9, 0.999999, 1 - 2**-53]
        check_sample(logits, [1.0, 5.0] * 3, [0, 3, 30] * 2, [1.0] * 4 + [0.5] * 2, [0.0] * 6, points)

    @pytest.mark.parametrize("top_k", [1, 3, 6])
    def test_of_ties_at_the_cut_the_lowest_stay(self, blocks, device, top_k):
        logits = torch.tensor([[0.0] * 20 + [2.0] + [1.0] * 3 + [0.0] * 10], device=device)
        highest = [20, 21, 22, 23, 0, 1][:top_k]
        points = [index / 8 for index in range(8)]
        sampled = sample(logits.repeat(8, 1), *([value] * 8 for value in (100.0, top_k, 1.0, 0.0)), points)
        assert set(sampled.tolist()) == set(highest)

    @pytest.mark.parametrize(
        ("top_p", "kept"), [(0.24, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (1.0, 4)]
    )
    def test_top_p_stops_at_the_token_that_reaches_it(self, device, top_p, kept):
        logits = torch.full((8, 40), -INF, device=device)
        logits[:, [3, 17, 18, 39]] = 1.5
        points = [index / 8 for index in range(8)]
        sampled = sample(logits, *([value] * 8 for value in (1.0, 0, top_p, 0.0)), points)
        assert sorted(set(sampled.tolist())) == [3, 17, 18, 39][:kept]

    def test_min_p_of_one_keeps_the_best(self, blocks, device):
        logits = torch.tensor([[0.0, 1.0, 0.999, 1.0]] * 4, device=device)
        sampled = sample(logits, *([value] * 4 for value in (1.0, 0, 1.0, 1.0)), [0.0, 0.49, 0.51, 0.999999])
        assert sampled.tolist() == [1, 1, 3, 3]

    def test_logits_further_apart_than_the_largest_number(self, device):
        """Half the distance between the two must not overflow: that search would never end."""

        def stop(*_):
            raise TimeoutError

        before = signal.signal(signal.SIGALRM, stop)
        signal.alarm(3)
        try:
            logits = torch.tensor([[-3e38, 0.0, 3e38, -2e38]], device=device)
            assert sample(logits, [1.0], [2], [1.0], [0.0], [0.999999]).tolist() == [2]
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    @pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-38, 1e-45, 1e-300, 5e-324])
    def test_the_smallest_temperatures_take_the_best(self, device, temperature):
        logits = torch.tensor([[0.0, 3.0, 2.999, -INF], [-1e4, -1e4, -1e3, 1e4]], device=device)
        for filters in ((0, 1.0, 0.0), (2, 0.9, 0.0), (0, 1.0, 0.1)):
            sampled = sample(logits, [temperature] * 2, *([value] * 2 for value in filters), [0.3, 0.999999])
            assert sampled.tolist() == [1, 3]

    def test_a_high_temperature_is_almost_uniform(self, device):
        logits = torch.linspace(-5, 5, 50, device=device).repeat(10, 1)
        check_sample(
            logits, *([value] * 10 for value in (100.0, 0, 1.0, 0.0)), [index / 10 for index in range(10)]
        )

    @pytest.mark.parametrize("point", [0.0, 0.5, 0.999999])
    def test_rows_without_a_distribution_give_no_token(self, blocks, randn, point):
        logits = randn(6, 40)
        logits[0, 30] = INF
        logits[1, [20, 30]] = INF
        logits[2] = -INF
        logits[3, 17] = NAN
        logits[4, [5, 25]] = NAN
        logits[4, 2] = INF
        numbers = [[value] * 6 for value in (1.0, 3, 0.9, 0.1, point)]
        assert sample(logits, *numbers).tolist()[:5] == [-1] * 5
        assert sample(logits, *numbers).tolist() == reference.sample(logits.cpu(), *numbers).tolist()

    def test_frequencies_are_the_probabilities(self, device):
        logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5], device=device)
        points = [(index + 0.5) / 30 for index in range(30)]
        sampled = sample(logits.repeat(30, 1), *([value] * 30 for value in (0.7, 0, 1.0, 0.0)), points)
        shares = torch.bincount(sampled.cpu(), minlength=5) / 30
        torch.testing.assert_close(
            shares.double(), (logits.cpu().double() / 0.7).softmax(0), atol=1 / 25, rtol=0
        )

    def test_packed_numbers(self, device, randn):
        numbers = torch.tensor(
            [list(column) for column in numbers_of(6, 5)], dtype=torch.float64, device=device
        )
        logits = randn(6, 50)
        assert torch.equal(sample_packed(logits, numbers), device_reference.sample_packed(logits, numbers))
        assert sample_packed(logits[:0], numbers[:, :0].contiguous()).tolist() == []


FILTERS = {  # temperature, top-k, top-p, min-p, and how often the vocabulary may be loaded
    "none": (0.8, 0, 1.0, 0.0, 1.3),
    "min-p": (0.8, 0, 1.0, 0.05, 1.3),
    "top-k": (0.8, 40, 1.0, 0.0, 1.5),
    "top-p": (0.8, 0, 0.9, 0.0, 3.0),
    "top-k and top-p": (0.8, 40, 0.9, 0.0, 1.5),
}


class TestPasses:
    @pytest.fixture
    def loaded(self, monkeypatch):
        """A list whose sum is how many elements masked loads have read."""
        from triton.runtime.interpreter import InterpreterBuilder

        counts, load = [], InterpreterBuilder.create_masked_load

        def count(self, pointers, mask, *rest):
            counts.append(int(np.sum(mask.data)))
            return load(self, pointers, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", count)
        return counts

    @pytest.mark.parametrize("vocab_size", [32000, pytest.param(128256, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("filters", FILTERS)
    def test_the_vocabulary_is_read_about_once(self, loaded, randn, device, vocab_size, filters):
        if device.type != "cpu":
            pytest.skip("compiled kernels do not count")
        *numbers, most = FILTERS[filters]
        check_sample(3 * randn(1, vocab_size), *([number] for number in (*numbers, 0.5)))
        assert sum(loaded) <= most * vocab_size, f"{sum(loaded) / vocab_size:.2f} times"
