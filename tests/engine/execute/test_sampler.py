"""From logits to tokens, against naive statements of each rule, one token at a time."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sleb.engine.execute.sampler import Sampler
from sleb.errors import ConfigError
from sleb.kernels.registry import select_kernels

EOS = frozenset({2, 5})
SIZE = 12


@pytest.fixture(scope="session", params=["torch", "cpu"])
def sampler(request):
    try:
        return Sampler(select_kernels(request.param, torch.device("cpu")), EOS)
    except ConfigError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def sample_one(sampler, make_request):
    """sample_one(logits [V], tokens=…, num_prompt_tokens=…, **params) -> SampledToken."""

    def sample(logits, tokens=(1,), num_prompt_tokens=1, **params):
        request = make_request(tokens, num_prompt_tokens=num_prompt_tokens, **params)
        return sampler.sample(logits[None].clone(), [request]).read()[0]

    return sample


def logits_of(seed, size=SIZE, spread=2.0):
    return spread * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def naive_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Temperature, then min-p, top-k and top-p, each on the distribution that the one before left."""
    scaled = [value / temperature for value in logits.tolist()]
    top = max(scaled)
    weights = {token: math.exp(value - top) for token, value in enumerate(scaled) if value > -math.inf}
    best = max(weights.values())
    weights = {token: weight for token, weight in weights.items() if weight >= min_p * best}
    order = sorted(weights, key=lambda token: -weights[token])
    if top_k > 0:
        order = order[:top_k]
    total, reached, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        kept.append(token)
        reached += weights[token] / total
        if reached >= top_p:
            break
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 5.0),
    top_k=st.sampled_from([-1, 0, 1, 2, 5, SIZE, 100]),
    top_p=st.sampled_from([1.0, 0.95, 0.7, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.2, 1.0]),
)
def test_distribution_equals_the_naive_one(seed, temperature, top_k, top_p, min_p, sampler, make_request):
    """One random number inverts the cumulative distribution: 400 of them, evenly spaced, must give its shares."""
    logits = logits_of(seed)
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    expected = naive_probabilities(logits, **filters)
    count = 400
    requests = [make_request([1], **filters) for _ in range(count)]
    for index, request in enumerate(requests):
        request.rng.random = lambda index=index: (index + 0.5) / count
    drawn = Counter(each.token_id for each in sampler.sample(logits.repeat(count, 1), requests).read())
    assert set(drawn) <= set(expected)
    for token, probability in expected.items():
        assert abs(drawn[token] / count - probability) < 1.5 / count


def test_frequencies_pass_a_chi_square_test(sampler, make_request):
    """With the requests' own random numbers: 4,000 seeds, 99.9 % quantile of chi-square."""
    logits, filters = logits_of(3, size=6, spread=1.0), {"temperature": 0.8, "top_k": 5}
    expected = naive_probabilities(logits, **filters)
    requests = [make_request([1], seed=seed, **filters) for seed in range(4000)]
    drawn = Counter(
        each.token_id for each in sampler.sample(logits.repeat(len(requests), 1), requests).read()
    )
    assert set(drawn) == set(expected)
    statistic = sum((drawn[token] - 4000 * p) ** 2 / (4000 * p) for token, p in expected.items())
    assert statistic < 18.5  # four degrees of freedom


@pytest.mark.parametrize("point", [0.0, 1.0 - 2**-53], ids=["first", "last"])
def test_the_ends_of_the_unit_interval_meet_possible_tokens(point, sampler, make_request):
    logits = torch.tensor([-math.inf, 1.0, -math.inf, 0.5, -math.inf])
    request = make_request([1], temperature=1.0)
    request.rng.random = lambda: point
    assert sampler.sample(logits[None], [request]).read()[0].token_id == (1 if point == 0.0 else 3)


def test_greedy_is_the_most_probable(sample_one):
    for seed in range(20):
        logits = logits_of(seed)
        assert sample_one(logits, temperature=0.0).token_id == int(logits.argmax())
        # Filters cannot take the most probable token away.
        assert sample_one(logits, temperature=0.0, top_p=0.1, top_k=3, min_p=0.5).token_id == int(
            logits.argmax()
        )


@pytest.mark.parametrize("temperature", [1e-3, 1e-7, 1e-30, 1e-46, 1e-310])
def test_a_tiny_temperature_is_greedy(temperature, sample_one):
    """No overflow, however small the number that divides the logits."""
    for seed in range(5):
        logits = logits_of(seed, spread=20.0)
        for filters in ({}, {"top_p": 0.9}, {"min_p": 0.1}):
            assert sample_one(logits, temperature=temperature, **filters).token_id == int(logits.argmax())


def test_rows_with_different_parameters_do_not_mix(sampler, make_request, sample_one):
    """Each row of a mixed batch is drawn as it is alone."""
    rows = [
        {"temperature": 0.0},
        {"temperature": 1.5, "seed": 3},
        {"temperature": 0.7, "top_k": 2, "seed": 4},
        {"temperature": 0.0, "logit_bias": {7: 50}},
        {"temperature": 1.0, "min_p": 0.3, "seed": 5, "logprobs": 3},
        {"temperature": 2.0, "top_p": 0.5, "repetition_penalty": 1.5, "seed": 6},
        {"temperature": 0.0, "logprobs": 0},
    ]
    logits = torch.stack([logits_of(seed) for seed in range(len(rows))])
    together = sampler.sample(logits.clone(), [make_request([1, 3], **params) for params in rows]).read()
    for row, params in enumerate(rows):
        alone = sample_one(logits[row], tokens=[1, 3], num_prompt_tokens=2, **params)
        assert together[row].token_id == alone.token_id
        assert (together[row].logprobs is None) == ("logprobs" not in params)


class TestPenalties:
    """Tokens 1, 4, 6 are the prompt; 3, 3, 3, 6 the output."""

    tokens, num_prompt_tokens = [1, 4, 6, 3, 3, 3, 6], 3

    def adjusted(self, logits, sampler, make_request, **params):
        """The logits after all adjustments, read off the sampler's own in-place change."""
        request = make_request(
            self.tokens, num_prompt_tokens=self.num_prompt_tokens, temperature=0.0, **params
        )
        changed = logits[None].clone()
        sampler.sample(changed, [request])
        return changed[0]

    def test_repetition_penalty_as_in_transformers(self, sampler, make_request):
        from transformers import RepetitionPenaltyLogitsProcessor

        for seed, penalty in ((0, 1.3), (1, 0.7), (2, 5.0)):
            logits = logits_of(seed)
            expected = RepetitionPenaltyLogitsProcessor(penalty)(
                torch.tensor([self.tokens]), logits[None].clone()
            )
            actual = self.adjusted(logits, sampler, make_request, repetition_penalty=penalty)
            torch.testing.assert_close(actual, expected[0])

    def test_presence_and_frequency_penalties_count_the_output_only(self, sampler, make_request):
        logits = logits_of(4)
        expected = logits.clone()
        for token in range(SIZE):
            count = self.tokens[self.num_prompt_tokens :].count(token)
            expected[token] -= 0.25 * count + (1.5 if count else 0.0)
        actual = self.adjusted(logits, sampler, make_request, presence_penalty=1.5, frequency_penalty=0.25)
        torch.testing.assert_close(actual, expected)

    def test_logit_bias_is_added(self, sampler, make_request):
        logits = logits_of(5)
        expected = logits.clone()
        expected[0] += 3.5
        expected[9] -= 100
        torch.testing.assert_close(
            self.adjusted(logits, sampler, make_request, logit_bias={0: 3.5, 9: -100}), expected
        )

    def test_all_of_them_together(self, sampler, make_request):
        logits = logits_of(6)
        expected = logits.clone()
        for token in set(self.tokens):
            expected[token] = expected[token] / 1.2 if expected[token] > 0 else expected[token] * 1.2
        for token, count in Counter(self.tokens[self.num_prompt_tokens :]).items():
            expected[token] -= 0.5 + 0.1 * count
        expected[3] += 2
        params = {
            "repetition_penalty": 1.2,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.1,
            "logit_bias": {3: 2},
        }
        torch.testing.assert_close(self.adjusted(logits, sampler, make_request, **params), expected)

    @pytest.mark.parametrize(
        ("params", "forbidden"),
        [
            ({"min_tokens": 5}, {2, 5}),
            ({"min_tokens": 4}, set()),
            ({"min_tokens": 5, "ignore_eos": True}, set()),
            ({"min_tokens": 9, "stop_token_ids": [7]}, {2, 5, 7}),
            ({"min_tokens": 9, "stop_token_ids": [7], "ignore_eos": True}, {7}),
            ({"stop_token_ids": [7]}, set()),
        ],
        ids=str,
    )
    def test_min_tokens_forbids_what_would_end_the_answer(self, params, forbidden, sampler, make_request):
        logits = logits_of(7)
        actual = self.adjusted(logits, sampler, make_request, **params)
        assert {token for token in range(SIZE) if actual[token] == -math.inf} == forbidden
        kept = [token for token in range(SIZE) if token not in forbidden]
        assert torch.equal(actual[kept], logits[kept])


class TestLogprobs:
    def test_they_are_the_models_own_before_any_adjustment(self, sample_one):
        logits = logits_of(8)
        result = sample_one(
            logits,
            tokens=[1, 3],
            temperature=0.3,
            top_k=1,
            logit_bias={4: 100},
            repetition_penalty=2.0,
            logprobs=3,
        )
        expected = logits.log_softmax(dim=-1)
        assert result.token_id == 4
        assert result.logprobs.token_id == 4
        assert result.logprobs.logprob == pytest.approx(expected[4].item(), abs=1e-6)
        assert [token for token, _ in result.logprobs.top] == expected.topk(3).indices.tolist()
        assert [value for _, value in result.logprobs.top] == pytest.approx(
            expected.topk(3).values.tolist(), abs=1e-6
        )

    def test_number_of_alternatives_is_each_rows_own(self, sampler, make_request):
        rows = [None, 0, 1, 20, 5]
        logits = torch.stack([logits_of(seed, size=40) for seed in range(5)])
        results = sampler.sample(
            logits, [make_request([1], temperature=0.0, logprobs=count) for count in rows]
        ).read()
        assert [None if each.logprobs is None else len(each.logprobs.top) for each in results] == rows

    @settings(max_examples=30)
    @given(seed=st.integers(0, 10_000))
    def test_a_token_never_shows_two_values(self, seed, sample_one):
        """Where the chosen token is among the alternatives, the float is identical."""
        result = sample_one(logits_of(seed), temperature=1.0, seed=seed, logprobs=SIZE).logprobs
        assert dict(result.top)[result.token_id] == result.logprob
