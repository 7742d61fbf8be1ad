"""The search on SmolLM2 in float32 against the paper's loop written out with transformers: minutes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sleb.engine.model.scoring import DecoderScorer
from sleb.models.resolve import resolve_model
from sleb.pruning.search import SearchSettings, search

NUM_REMOVE = 3
TEXT = Path(__file__).resolve().parents[3] / "CONTRIBUTING.md"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def all_threads():
    """The other tests run on one thread; this model is worth all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scorer():
    return DecoderScorer.load("smollm2", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def windows(scorer):
    """[2, 96]: two places of a text."""
    token_ids = torch.tensor(scorer.text.encode(TEXT.read_text("utf-8")))
    return torch.stack([token_ids[start : start + 96] for start in (0, 900)])


@torch.no_grad()
def brute_force(windows: Tensor) -> tuple[list[int], list[float]]:
    """Blocks in the order of their removal and the loss after each: every candidate computed whole, every time."""
    model = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2").path, dtype=torch.float32).eval()
    blocks = list(model.model.layers)
    kept, removed, losses = list(range(len(blocks))), [], []
    for _ in range(NUM_REMOVE):
        found = {}
        for candidate in kept[1:-1]:
            model.model.layers = nn.ModuleList(blocks[block] for block in kept if block != candidate)
            outputs = [model(window[None], labels=window[None], use_cache=False) for window in windows]
            found[candidate] = sum(float(each.loss) * windows.shape[1] for each in outputs)
        best = min(found, key=lambda block: (found[block], block))
        kept.remove(best)
        removed.append(best)
        losses.append(found[best])
    return removed, losses


def test_exact_search_is_the_loop_of_the_paper(scorer, windows):
    """All that makes it faster is on: the trunk, abandoning, the order of the last round, pieces of the vocabulary."""
    removed, losses = brute_force(windows)
    result = search(scorer, windows, num_remove=NUM_REMOVE)
    assert [unit.block for unit in result.removed] == removed
    assert result.losses[1:] == pytest.approx(losses, rel=1e-5)
    assert result.cost.num_passes < result.cost.reference_passes / 1.8


def test_what_the_race_picks_has_its_true_loss(scorer, windows):
    """It may pick others; what it says of them must be so."""
    result = search(scorer, windows, num_remove=2, settings=SearchSettings(mode="race"))
    again = search(scorer, windows, num_remove=1)
    assert result.losses[0] == pytest.approx(again.losses[0], rel=1e-6)
    assert result.losses[1] >= again.losses[1] * (1 - 1e-6)
