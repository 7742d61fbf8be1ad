"""Rules that choose blocks, against their formulas written out with transformers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import AutoModelForCausalLM
from which_blocks import (
    angular_distances,
    block_influence,
    contiguous_run,
    evenly_spaced,
    last_blocks,
    one_shot,
    random_blocks,
    shortgpt,
)

from sleb.engine.model.scoring import DecoderScorer
from sleb.layer_map.units import Unit


@pytest.fixture(scope="module")
def scorer(tiny_model_dir):
    return DecoderScorer.load(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, 250, (3, 20), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def hidden_states(tiny_model_dir, windows):
    """For each window, transformers' hidden states [7, 20, E], the last before the final norm."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    last = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0]))
    with torch.no_grad():
        states = [model(window[None], output_hidden_states=True).hidden_states for window in windows]
    return [torch.cat([*each[:-1], end]) for each, end in zip(states, last, strict=True)]


def blocks(units):
    return [unit.block for unit in units]


def test_block_influence_is_that_of_the_paper(scorer, windows, hidden_states):
    expected = [
        sum(
            1 - float(torch.dot(a, b) / a.norm() / b.norm())
            for states in hidden_states
            for a, b in zip(states[block], states[block + 1], strict=True)
        )
        / windows.numel()
        for block in range(6)
    ]
    assert block_influence(scorer, windows) == pytest.approx(expected, abs=1e-5)
    order = sorted(range(6), key=lambda block: expected[block])
    assert blocks(shortgpt(scorer, windows)(3)) == order[:3]


def test_the_run_is_that_of_least_angular_distance(scorer, windows, hidden_states):
    def distance(start, end):
        angles = []
        for states in hidden_states:
            one, other = states[start, -1].double(), states[end, -1].double()
            angles.append(math.acos(float(torch.dot(one, other) / one.norm() / other.norm())) / math.pi)
        return sum(angles) / len(angles)

    found = angular_distances(scorer, windows)
    for start, end in itertools.combinations(range(7), 2):
        assert float(found[start, end]) == pytest.approx(distance(start, end), abs=1e-5)
    for count in (1, 2, 4):
        best = min(range(6 - count + 1), key=lambda start: distance(start, start + count))
        assert blocks(contiguous_run(scorer, windows)(count)) == list(range(best, best + count))


def test_one_shot_orders_single_removals(scorer, windows, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    layers = list(model.model.layers)
    losses = {}
    for gone in range(1, 5):
        model.model.layers = torch.nn.ModuleList(layers[:gone] + layers[gone + 1 :])
        with torch.no_grad():
            losses[gone] = sum(
                float(model(each[None], labels=each[None], use_cache=False).loss) for each in windows
            )
    assert blocks(one_shot(scorer, windows)(4)) == sorted(losses, key=losses.__getitem__)


def test_rules_that_look_at_nothing(scorer):
    assert blocks(last_blocks(scorer)(3)) == [2, 3, 4]
    assert blocks(evenly_spaced(scorer)(2)) == [2, 4]
    first, longer = random_blocks(scorer, 1)(2), random_blocks(scorer, 1)(4)
    assert longer[:2] == first and set(longer) == set(map(Unit, range(1, 5)))
    assert len({tuple(random_blocks(scorer, seed)(4)) for seed in range(9)}) > 1
