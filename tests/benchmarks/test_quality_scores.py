"""Losses, agreement and divergence of every depth, against transformers with the same units deleted or zeroed."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from sleb.benchmarks.quality import scores as quality_scores
from sleb.benchmarks.quality.evaluate import measure_scores
from sleb.benchmarks.quality.scores import Chain, TextScores, TokenScores, compare, score_texts
from sleb.benchmarks.quality.texts import Text, WindowedText, packed_windows, rolling_windows
from sleb.engine.model.scoring import DecoderScorer
from sleb.layer_map.layer_map import LayerMap, Patch, Patches, Unit

TOKENS = torch.randint(3, 96, (150,), generator=torch.Generator().manual_seed(7)).tolist()
ORDER = (Unit(3), Unit(1, "mlp"), Unit(1, "attention"), Unit(2, "attention"), Unit(4, "mlp"))


def layer_map(order=ORDER, num_blocks=5):
    return LayerMap(model="tiny", fingerprint=None, num_blocks=num_blocks, removed=order)


def windowed(windows, name="t"):
    return WindowedText(Text(name, "x"), tuple(windows), True)


def scores_at(scorer, chain, windows):
    found: list[TextScores] = []
    score_texts(scorer, chain, [windowed(windows)], found)
    return [found[0].at(place) for place in range(len(chain.steps))]


def brute_force(dense, pruned, windows):
    """(loss, agrees, divergence) of every scored token, from whole softmaxes in float64."""
    made = []
    for window in windows:
        ids = list(window.token_ids)
        p, q = (model.logits(ids).double().softmax(-1) for model in (dense, pruned))
        for place in range(len(ids) - window.num_scored, len(ids)):
            one, other = p[place - 1], q[place - 1]
            made.append(
                (
                    -math.log(other[ids[place]]),
                    float(one.argmax() == other.argmax()),
                    float((one * (one.log() - other.log())).sum()),
                )
            )
    return torch.tensor(made, dtype=torch.float64).T


@pytest.mark.parametrize(
    "name", ["llama-gqa", "opt-untied", "qwen3-window", "mistral-window", "phi3-longrope"]
)
@pytest.mark.parametrize("scheme", [packed_windows, lambda ids, seqlen: rolling_windows(ids, 1, seqlen)])
def test_against_transformers(name, scheme, tiny_model):
    model = tiny_model(name)
    scorer = DecoderScorer.load(str(model.path), device="cpu")
    depths = (0, 1, 3, 5)
    windows = scheme(TOKENS, 40)
    found = scores_at(scorer, Chain.of(layer_map(), depths, 32), windows)
    for depth, scores in zip(depths, found, strict=True):
        expected = brute_force(model, model.without_sublayers(ORDER[:depth]), windows)
        losses, agreed, divergences = expected
        torch.testing.assert_close(scores.losses.double(), losses, atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.divergences.double(), divergences, atol=1e-4, rtol=0)
        assert scores.agreed.tolist() == agreed.tolist()
    assert 0 < found[-1].agreed.mean() < 1
    assert found[0].agreed.min() == 1 and found[0].divergences.abs().max() < 1e-6


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3-window"])
def test_patched_depths_against_transformers_with_hooks(name, tiny_model):
    model = tiny_model(name)
    scorer = DecoderScorer.load(str(model.path), device="cpu")
    order, rng = (Unit(3), Unit(1, "attention"), Unit(2), Unit(1, "mlp")), np.random.default_rng(3)

    def patch(first, last, first_depth, last_depth, form="full", **shapes):
        drawn = {key: rng.normal(0, 0.2, shape).astype(np.float32) for key, shape in shapes.items()}
        tensors = {"bias": rng.normal(0, 0.2, 32).astype(np.float32)} | drawn
        return Patch(first, last, first_depth, last_depth, form, form == "full", tensors)

    patches = (
        patch((3, "attention"), (3, "mlp"), 1, 2, weight=(32, 32)),
        patch((1, "attention"), (1, "attention"), 2, 3, "scale", scale=(32,)),
        patch((2, "attention"), (3, "mlp"), 3, 3, "low-rank", down=(4, 32), up=(32, 4)),
        patch((1, "attention"), (3, "mlp"), 4, None, weight=(32, 32)),
    )
    layers = replace(layer_map(order), patches=Patches.of(patches))
    patches, windows, depths = layers.patches.load(), packed_windows(TOKENS, 40), (0, 1, 2, 3, 4)
    found = scores_at(scorer, Chain.of(layers, depths, 32), windows)
    for depth, scores in zip(depths, found, strict=True):
        served = [each for each in patches if depth and each.serves(depth)]
        losses, agreed, divergences = brute_force(model, model.patched(order[:depth], served), windows)
        torch.testing.assert_close(scores.losses.double(), losses, atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.divergences.double(), divergences, atol=1e-4, rtol=0)
        assert scores.agreed.tolist() == agreed.tolist()


def test_whole_blocks_against_deleted_layers(tiny_model):
    model = tiny_model("llama3")
    scorer = DecoderScorer.load(str(model.path), device="cpu")
    windows = packed_windows(TOKENS, 50)
    found = scores_at(scorer, Chain.of(layer_map((Unit(2), Unit(0), Unit(3))), (0, 3), 32), windows)
    losses, _, divergences = brute_force(model, model.without([2, 0, 3]), windows)
    torch.testing.assert_close(found[1].losses.double(), losses, atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1].divergences.double(), divergences, atol=1e-4, rtol=0)


class Counting:
    """A scorer that adds, instead of running, the number of each sublayer, so that a state says what made it."""

    vocab_size = 7

    def __init__(self):
        self.ran = []
        self.rows = []

    def embed(self, token_ids):
        return torch.zeros(*token_ids.shape, 1, dtype=torch.float64)

    def run(self, unit, hidden):
        [(block, part)] = unit.sublayers
        self.ran.append((block, part))
        return hidden * 3 + 2 * block + (part == "mlp") + 1

    def head_states(self, hidden):
        return hidden.reshape(-1, 1)

    def logits(self, states):
        self.rows.append(len(states))
        return torch.zeros(len(states), self.vocab_size)


def alone(chain_map, depth):
    """The state of one depth, computed from the start."""
    [state] = Chain.of(chain_map, (depth,), 1).states(Counting(), torch.zeros(1, 1))
    return state


@pytest.mark.parametrize("seed", range(6))
def test_depths_share_what_they_have_in_common(seed):
    """Every depth gets its own state, and nothing is run twice that two neighbours have in common."""
    generator = torch.Generator().manual_seed(seed)
    units = [Unit(block, part) for block in range(8) for part in ("attention", "mlp")]
    order = [units[place] for place in torch.randperm(16, generator=generator)[:9]]
    chain_map = layer_map(tuple(order), 8)
    depths = sorted(torch.randperm(10, generator=generator)[:5].tolist())
    chain, scorer = Chain.of(chain_map, depths, 1), Counting()
    states = list(chain.states(scorer, torch.zeros(1, 1)))
    for depth, state in zip(depths, states, strict=True):
        assert torch.equal(state, alone(chain_map, depth))
    expected = 16 - depths[0]
    for shallower, deeper in pairwise(depths):
        first = min(units.index(unit) for unit in order[shallower:deeper])
        expected += sum(unit not in order[:deeper] for unit in units[first:])
    assert len(scorer.ran) == expected


def test_logits_are_there_for_a_few_rows_at_a_time(monkeypatch, tiny_model):
    scorer = DecoderScorer.load(str(tiny_model("llama").path), device="cpu")
    chain, windows = Chain.of(layer_map(), (0, 2), 32), packed_windows(TOKENS, 50)
    whole = scores_at(scorer, chain, windows)
    monkeypatch.setattr(quality_scores, "_LOGIT_ENTRIES", 96 * 7)
    rows = []
    logits = DecoderScorer.logits

    def counted(self, states):
        rows.append(len(states))
        return logits(self, states)

    monkeypatch.setattr(DecoderScorer, "logits", counted)
    parts = scores_at(scorer, chain, windows)
    assert max(rows) == 7
    assert len(rows) == 2 * -(-3 * 49 // 7)  # the head once a depth
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.losses, other.losses)
        torch.testing.assert_close(one.divergences, other.divergences, atol=1e-6, rtol=0)


def test_a_small_divergence():
    """Two almost equal models, with a vocabulary of a real one's size."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(3, 50000, generator=generator)
    shift = 1e-2 * torch.randn(3, 50000, generator=generator)

    class Fixed(Counting):
        vocab_size = 50000

        def logits(self, states):
            return states

    found = compare(Fixed(), [logits, logits + shift], torch.tensor([0, 1, 2]))[1].divergences
    p, q = logits.double().log_softmax(-1), (logits + shift).double().log_softmax(-1)
    torch.testing.assert_close(found.double(), (p.exp() * (p - q)).sum(-1), atol=1e-6, rtol=0)


def test_an_interrupt_loses_the_batch_under_way_alone(monkeypatch, tiny_model):
    monkeypatch.setattr(quality_scores, "_BATCH_TOKENS", 60)
    scorer = DecoderScorer.load(str(tiny_model("llama").path), device="cpu")
    found: list[TextScores] = []

    def interrupt(done, total):
        assert total == 2 * 5
        if done == 5:  # the third window's first depth
            raise KeyboardInterrupt

    texts = [windowed(packed_windows(TOKENS, 50), "one"), windowed(packed_windows(TOKENS[:100], 50), "two")]
    with pytest.raises(KeyboardInterrupt):
        score_texts(scorer, Chain.of(layer_map(), (0, 1), 32), texts, found, interrupt)
    assert [each.num_windows for each in found] == [2]
    assert len(found[0].at(1).losses) == 98 and not found[0].is_whole


class TestRows:
    def scores(self, losses, agreed=None, divergences=None):
        values = torch.tensor(losses)
        zeros = torch.zeros(len(values))
        return TokenScores(
            values, zeros if agreed is None else agreed, zeros if divergences is None else divergences
        )

    def test_means_over_all_texts(self):
        one, other = windowed(rolling_windows(range(3), 9, 8), "a"), windowed(rolling_windows([5], 9, 8), "b")
        found = [
            TextScores(one, [(1, [self.scores([1.0, 2.0, 3.0]), self.scores([2.0, 2.0, 5.0])])]),
            TextScores(other, [(1, [self.scores([4.0]), self.scores([5.0])])]),
        ]
        measured = measure_scores(found, (0, 2))
        by_key = {each.key: each for each in measured}
        dense, pruned = (by_key["a+b", f"depth {depth}", "perplexity"] for depth in (0, 2))
        assert (dense.facts["tokens"], pruned.facts["tokens"]) == (4, 4)
        assert dense.value == pytest.approx(math.exp(2.5))
        assert pruned.value == pytest.approx(math.exp(3.5))
        assert pruned.ratio.estimate == pytest.approx(1 / math.e)
        assert dense.ratio is None and dense.spread is None
        assert ("a+b", "depth 0", "KL") not in by_key and ("a+b", "depth 0", "same token") not in by_key
        for name, tokens, loss in (("a", 3, 3.0), ("b", 1, 5.0)):
            own = by_key[name, "depth 2", "perplexity"]
            assert (own.facts["tokens"], own.value) == (tokens, pytest.approx(math.exp(loss)))
            assert own.ratio.estimate == pytest.approx(1 / math.e)
        # Each text is the one letter x: 2 words, 2 bytes.
        assert by_key["a+b", "depth 0", "word perplexity"].value == pytest.approx(math.exp(5))
        assert by_key["a+b", "depth 0", "bits per byte"].value == pytest.approx(5 / math.log(2))

    def test_what_is_not_finite_is_left_out(self):
        found = [
            TextScores(windowed(()), [(1, [self.scores([1.0] * 40), self.scores([1e30] * 39 + [math.nan])])])
        ]
        measured = measure_scores(found, (0, 1))
        dense, pruned = (each for each in measured if each.metric == "perplexity")
        assert dense.value == pytest.approx(math.e) and dense.spread is not None
        assert pruned.value is None and pruned.ratio is None and "finite" in pruned.facts["failed"]

    def test_shares_stay_shares(self):
        agreed = torch.tensor([1.0] * 79 + [0.0])
        found = [
            TextScores(
                windowed(()),
                [
                    (
                        1,
                        [
                            self.scores([1.0] * 80, agreed=torch.ones(80)),
                            self.scores([1.0] * 80, agreed, agreed / 99),
                        ],
                    )
                ],
            )
        ]
        measured = measure_scores(found, (0, 1))
        [agreement] = [each for each in measured if each.metric == "same token"]
        assert agreement.value == pytest.approx(79 / 80)
        assert agreement.spread[1] == 1.0 and 0.9 < agreement.spread[0] < 79 / 80
