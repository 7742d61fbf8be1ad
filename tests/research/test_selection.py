"""Rules that choose blocks, against their formulas written out with transformers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from rules import angular_distances, block_influence, contiguous_run, replace_me, shortgpt, write_replaced
from transformers import AutoModelForCausalLM

from sleb.engine.model.scoring import DecoderScorer
from sleb.errors import ConfigError
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


def test_replace_me_is_the_least_squares_map_of_the_mlp_before_the_run(
    scorer, windows, hidden_states, tiny_model_dir, tmp_path
):
    """Against numpy's lstsq over transformers' activations, and the model that is written against its formula."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    added = []
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: added.append(output[0]))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    sums = torch.cat(added).double()
    after, end = (torch.cat([each[place] for each in hidden_states]).double() for place in (2, 4))
    wanted = end - (after - sums)  # hidden_states[2] is after block 1, [4] after block 3
    expected, *_ = np.linalg.lstsq(sums.numpy(), wanted.numpy(), rcond=None)
    found = replace_me(scorer, windows, [Unit(2), Unit(3)])
    # Fewer tokens than features would leave the map open; what it gives for these tokens is not.
    assert np.allclose(sums.numpy() @ found.numpy(), sums.numpy() @ expected, atol=1e-3)
    write_replaced(tiny_model_dir, tmp_path / "replaced", 1, found)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "replaced", dtype=torch.float32)
    one, two = (each.model.layers[1].mlp.down_proj.weight.double() for each in (model, other))
    assert torch.allclose(two, found.T @ one, atol=1e-5)
    with pytest.raises(ConfigError, match="needs a block before the run"):
        replace_me(scorer, windows, [Unit(0)])
