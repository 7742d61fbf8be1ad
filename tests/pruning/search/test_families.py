"""The search on models that scale, cap, add a bias to their logits or read a residual twice, against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sleb.engine.llm import LLM
from sleb.engine.model.scoring import DecoderScorer
from sleb.errors import ConfigError, LayerMapError
from sleb.layer_map.layer_map import LayerMap, Unit
from sleb.pruning.options import PruneOptions
from sleb.pruning.run import run_pruning
from sleb.pruning.search import SearchSettings, search

WINDOWS = torch.randint(3, 96, (3, 19), generator=torch.Generator().manual_seed(2))
NAMES = ["gemma2", "phi", "granite", "cohere2", "gpt2"]


def objective(model: Any, removed: list[int], kind: str) -> float:
    """By transformers' logits: of a window mean cross-entropy, or divergence from the whole model, × its length."""
    pruned, total = model.without(removed), 0.0
    for window in WINDOWS.tolist():
        found = pruned.logprobs(window)[:-1].double()
        if kind == "loss":
            values = -found.gather(1, torch.tensor(window[1:])[:, None])
        else:
            dense = model.logprobs(window)[:-1].double()
            values = (dense.exp() * (dense - found)).sum(-1)
        total += float(values.mean()) * len(window)
    return total


@pytest.mark.parametrize("kind", ["loss", "kl"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_brute_force(name: str, kind: str, tiny_model: Any) -> None:
    model = tiny_model(name)
    scorer = DecoderScorer.load(str(model.path), device="cpu")
    result = search(scorer, WINDOWS, num_remove=2, settings=SearchSettings(objective=kind))
    removed: list[int] = []
    for found in result.candidate_losses:
        tried = {
            block: objective(model, [*removed, block], kind) for block in (1, 2, 3) if block not in removed
        }
        best = min(tried, key=lambda block: tried[block])
        assert found[Unit(best)] == pytest.approx(tried[best], abs=2e-4)
        assert min(found, key=lambda unit: found[unit]) == Unit(best)
        removed.append(best)
    assert result.removed == tuple(map(Unit, removed))
    assert result.losses[-1] == pytest.approx(objective(model, removed, "loss"), abs=2e-4)


def test_halves_of_parallel_blocks_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    """Before anything is loaded or searched, and in a map that comes from elsewhere."""
    model = tiny_model("cohere2")
    (tmp_path / "text").write_text("x")
    options = PruneOptions(calibration=str(tmp_path / "text"), units="sublayers")
    with pytest.raises(ConfigError, match=r"--units sublayers .* the same residual.* --units blocks"):
        run_pruning(model.path, options)
    with pytest.raises(LayerMapError, match=r"removes 2\.mlp, but attention and MLP .* only go together"):
        LLM(model.path, LayerMap("halves", None, 5, removed=(Unit(1), Unit(2, "mlp"))), device="cpu")
