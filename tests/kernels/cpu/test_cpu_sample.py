"""Sampling of tokens in C, at every instruction set that this machine can run, against the reference that sorts.

Where a random number or a share of top-p comes within EDGE of a boundary, either neighbour is right.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sleb.kernels.cpu import library
from sleb.kernels.cpu.features import cpu_features
from sleb.kernels.reference import ops as reference

LEVELS = {
    "none": [],
    "avx512": ["avx512"],
    "avx512bf16": ["avx512", "avx512bf16", library.EMULATED],
    "amx": ["avx512", "avx512bf16", "amx", library.EMULATED],
}[cpu_features().level]
EDGE = 1e-8
HIGHEST_POINT = 1.0 - 2**-53
INF = math.inf

pytestmark = [
    pytest.mark.skipif(not LEVELS, reason="the C kernels need AVX-512 with VNNI"),
    pytest.mark.usefixtures("one_processor"),
]


@pytest.fixture(scope="module", params=LEVELS)
def kernels(request):
    return library.CpuKernels.load(num_threads=3, level=request.param)


def normal(*shape, seed=0, spread=3.0):
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def columns(num_rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    return [[value] * num_rows for value in (temperature, top_k, top_p, min_p)]


def evenly(count):
    """Random numbers in the middles of `count` equal parts of the unit interval, not in order."""
    points = [(index + 0.5) / count for index in range(count)]
    random.Random(count).shuffle(points)
    return points


def check(kernels, logits, temperature, top_k, top_p, min_p, points):
    """Every row's token is the reference's, or lies between those that it gives for numbers that differ by EDGE."""
    actual = kernels.sample(logits, temperature, top_k, top_p, min_p, points)
    assert actual.dtype == torch.int64
    wrong = reference.sample(logits, temperature, top_k, top_p, min_p, points) != actual
    for row in wrong.nonzero().flatten().tolist():
        share, point = top_p[row], points[row]
        shares = [min(1.0, share * (1 + step)) for step in (-EDGE, 0, EDGE)]
        first, last = (
            reference.sample(
                logits[row].repeat(3, 1),
                [temperature[row]] * 3,
                [top_k[row]] * 3,
                shares,
                [min_p[row]] * 3,
                [near] * 3,
            )
            for near in (max(0.0, point - EDGE), min(1.0, point + EDGE))
        )
        # All tokens between the two have a probability of less than EDGE together.
        assert any((first <= actual[row]) & (actual[row] <= last)), f"row {row}"


def check_grid(kernels, row, points=(0.0, 0.31, 0.5, 0.77, HIGHEST_POINT)):
    """One row [V] under many filters at once."""
    size = len(row)
    grid = list(
        itertools.product(
            [1e-6, 0.7, 1.0, 50.0],
            sorted({0, 1, 2, 7, size // 2, size - 1, size, size + 5}),
            [0.0, 1e-300, 1e-9, 0.3, 0.95, 1 - 1e-12, 1.0],
            [0.0, 0.05, 1.0],
            points,
        )
    )
    check(kernels, row.repeat(len(grid), 1), *(list(column) for column in zip(*grid, strict=True)))


@settings(max_examples=100)
@given(data=st.data())
def test_equals_the_reference(data, kernels):
    """Small vocabularies with many ties and infinities, each row under filters of its own."""
    size = data.draw(st.integers(1, 40), label="size")
    num_rows = data.draw(st.integers(1, 4), label="rows")
    # A few values, so that there are ties; float32, so that both sides see the same.
    values = st.one_of(
        st.sampled_from([-INF, -2.0, -0.0, 0.0, 1.0, 1.5]),
        st.floats(-30, 30, width=32, allow_subnormal=False),
    )
    rows = data.draw(
        st.lists(st.lists(values, min_size=size, max_size=size), min_size=num_rows, max_size=num_rows)
    )

    def each(strategy):
        return data.draw(st.lists(strategy, min_size=num_rows, max_size=num_rows))

    check(
        kernels,
        torch.tensor(rows, dtype=torch.float32),
        each(st.sampled_from([1e-310, 1e-6, 0.1, 0.7, 1.0, 2.0, 100.0])),
        each(st.integers(-1, 45)),
        each(st.one_of(st.just(1.0), st.floats(1e-6, 1.0))),
        each(st.one_of(st.just(0.0), st.floats(0.0, 1.0))),
        each(st.floats(0.0, HIGHEST_POINT)),
    )


@settings(max_examples=40)
@given(
    size=st.integers(1, 3000),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    temperature=st.floats(0.05, 5.0),
    top_k=st.sampled_from([0, 1, 3, 40, 300, 2000]),
    top_p=st.sampled_from([1.0, 0.999, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 0.9]),
    rounded=st.booleans(),
)
def test_equals_the_reference_on_long_rows(
    kernels, size, seed, spread, temperature, top_k, top_p, min_p, rounded
):
    logits = normal(1, size, seed=seed, spread=spread)
    if rounded:  # as from a head in bfloat16: hundreds of equal logits
        logits = logits.bfloat16().float()
    points = evenly(16)
    check(kernels, logits.repeat(16, 1), *columns(16, temperature, top_k, top_p, min_p), points)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 255, 256, 257, 1000])
def test_many_filters_on_odd_sizes(size, kernels):
    check_grid(kernels, normal(size, seed=size))


@pytest.mark.parametrize(
    "row",
    [
        torch.zeros(300),
        torch.full((300,), -87.25),
        torch.tensor([-INF] * 299 + [3.0]),
        torch.tensor([3.0] + [-INF] * 299),
        torch.tensor([-INF, 1.0, -INF, 0.5, -INF]),
        torch.tensor([0.0, -0.0] * 150),
        torch.tensor([1.0] * 40 + [2.0] * 3 + [1.0] * 257),
        torch.arange(300, dtype=torch.float32),
        -torch.arange(300, dtype=torch.float32) / 16,
        torch.tensor([3e38, -3e38, 2.9e38, 0.0] * 75),
        # Values that differ by one unit in the last place, and by hundreds of orders of magnitude.
        (torch.full((300,), 1.0).view(torch.int32) + torch.arange(300, dtype=torch.int32) % 7).view(
            torch.float32
        ),
        torch.cat([-(2.0 ** torch.arange(-140, 128)), torch.zeros(32)]),
        torch.cat([2.0 ** torch.arange(-149, 6), -(2.0 ** torch.arange(-149, 6))]),
    ],
    ids=range(13),
)
def test_adversarial_rows(row, kernels):
    check_grid(kernels, row)


@pytest.mark.parametrize("seed", range(3))
def test_a_whole_vocabulary(seed, kernels):
    size, num_rows = 49152 + 7, 24
    logits = normal(num_rows, size, seed=seed, spread=[0.5, 2.0, 6.0][seed])
    filters = itertools.cycle(
        [
            (1.0, 0, 1.0, 0.0),
            (0.8, 50, 1.0, 0.0),
            (1.0, 0, 0.95, 0.0),
            (1.3, 4000, 0.9, 0.0),
            (1.0, 0, 0.99, 0.02),
        ]
    )
    numbers = [list(column) for column in zip(*itertools.islice(filters, num_rows), strict=True)]
    check(kernels, logits, *numbers, evenly(num_rows))


def test_top_k_keeps_the_lowest_of_equal_tokens(kernels):
    logits = torch.zeros(1, 100)
    logits[0, 60] = 1e-3
    expected = [0, 1, 2, 60]
    for sample in (reference.sample, kernels.sample):
        sampled = sample(logits.repeat(40, 1), *columns(40, top_k=4), evenly(40))
        assert sorted(set(sampled.tolist())) == expected


def test_top_p_keeps_the_token_that_crosses(kernels):
    """Ten equal tokens: a share of 0.25 is crossed by the third; 0.2 is reached by the second."""
    for top_p, kept in ((0.25, 3), (0.2 - 1e-12, 2), (0.2 + 1e-6, 3), (1e-12, 1)):
        for sample in (reference.sample, kernels.sample):
            sampled = sample(torch.zeros(100, 10), *columns(100, top_p=top_p), evenly(100))
            assert set(sampled.tolist()) == set(range(kept))


@pytest.mark.parametrize("filters", [{}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5}])
@pytest.mark.parametrize(
    "values", [[-INF] * 40, [0.0, math.nan, 1.0, math.nan], [0.0, INF, 1.0, INF], [INF, math.nan]]
)
def test_rows_without_a_distribution(values, filters, kernels):
    """Such as a model's that has lost its numbers: nothing hangs, and both agree."""
    logits = torch.tensor([values, values])
    for sample in (reference.sample, kernels.sample):
        assert sample(logits, *columns(2, **filters), [0.0, 0.9]).tolist() == [-1] * 2


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9, "temperature": 1.7}],
    ids=str,
)
def test_frequencies_pass_a_chi_square_test(filters, kernels):
    """20,000 samples against probabilities by hand; six standard deviations of chi-square."""
    count, logits = 20_000, normal(20, seed=4, spread=1.0)
    order = sorted(range(20), key=lambda token: -float(logits[token]))
    weights = {token: math.exp(float(logits[token]) / filters.get("temperature", 1.0)) for token in order}
    best = max(weights.values())
    weights = {token: w for token, w in weights.items() if w >= filters.get("min_p", 0.0) * best}
    kept = order[: filters.get("top_k", 20)]
    weights = {token: w for token, w in weights.items() if token in kept}
    total, reached = sum(weights.values()), 0.0
    for token in list(weights):
        if reached >= filters.get("top_p", 1.0) * total:
            del weights[token]
        else:
            reached += weights[token]
    numbers = random.Random(0)
    points = [numbers.random() for _ in range(count)]
    sampled = Counter(kernels.sample(logits.repeat(count, 1), *columns(count, **filters), points).tolist())
    assert set(sampled) == set(weights)
    expected = {token: count * w / sum(weights.values()) for token, w in weights.items()}
    statistic = sum((sampled[token] - mean) ** 2 / mean for token, mean in expected.items())
    freedom = len(weights) - 1
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)


def test_scratch_is_kept_and_grows(kernels):
    """A small vocabulary after a large one and the other way round; parameters as tensors; rows not contiguous."""
    for size in (300, 5000, 17, 9000):
        logits = normal(6, 2 * size, seed=size)[:, ::2]
        numbers = [torch.tensor(column) for column in columns(6, top_k=5, top_p=0.9)]
        points = torch.tensor(evenly(6), dtype=torch.float64)
        expected = reference.sample(logits, *numbers, points)
        assert torch.equal(kernels.sample(logits, *numbers, points), expected)
    scratch = kernels._scratch.data_ptr()
    kernels.sample(logits, *numbers, points)
    assert kernels._scratch.data_ptr() == scratch


def test_no_rows(kernels):
    assert kernels.sample(torch.empty(0, 50), *columns(0), []).shape == (0,)
