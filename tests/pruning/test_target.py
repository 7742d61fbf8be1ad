"""The cost model and the choice of a depth, against arithmetic written out here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap, Unit
from sleb.pruning.cost_model import CostModel, fit_cost_model, solve
from sleb.pruning.options import PruneOptions, parse_increase
from sleb.pruning.run import run_pruning
from sleb.pruning.target import FrontPoint, Target, check_reachable


def test_the_model_goes_through_its_three_measurements() -> None:
    """10 blocks: base 5 ms, attention 2, MLP 3; 4 attentions removed, then 4 MLPs. One sample is an outlier."""
    samples = ((0.055, 0.055, 0.5), (0.047, 0.047, 0.047), (0.035, 0.035, 0.035))
    model = solve(10, 4, 1, samples)
    assert (model.base, model.attention, model.mlp) == pytest.approx((0.005, 0.002, 0.003))
    assert model.seconds(()) == pytest.approx(0.055)
    removed = [Unit(3), Unit(5, "attention"), Unit(6, "mlp")]
    assert model.seconds(removed) == pytest.approx(0.055 - 0.005 - 0.002 - 0.003)
    assert model.speedup(removed) == pytest.approx(0.055 / 0.045)
    assert model.saving(Unit(3)) == pytest.approx(0.005)


def test_a_patch_takes_the_seconds_of_its_share_of_an_mlp() -> None:
    model = CostModel(0.005, 0.002, 0.003, 10, 1, mlp_parameters=6000)
    assert model.seconds([Unit(3)], 2000) == pytest.approx(0.055 - 0.005 + 0.001)
    assert model.speedup([Unit(3)], 2000) == pytest.approx(0.055 / 0.051)


def test_noise_makes_nothing_free() -> None:
    model = solve(10, 4, 1, ((0.05,), (0.06,), (0.05,)))
    assert model.attention > 0 and model.base >= 0
    assert model.speedup([Unit(3, "attention")]) > 1


def test_it_is_fitted_to_a_model_on_this_machine(tiny_model_dir: Path) -> None:
    seen: list[float] = []
    model = fit_cost_model(
        str(tiny_model_dir), device="cpu", dtype="float32", batch=2, repetitions=1, on_progress=seen.append
    )
    assert (model.num_blocks, model.batch) == (6, 2)
    assert [len(each) for each in model.samples] == [1, 1, 1]
    assert min(min(each) for each in model.samples) > 0
    assert seen == sorted(seen) and seen[-1] == 1
    with pytest.raises(ConfigError, match="batch of 0"):
        fit_cost_model(str(tiny_model_dir), batch=0)


def points(*rows: tuple[float, float | None, float | None]) -> list[FrontPoint]:
    return [
        FrontPoint(depth, Unit(depth) if depth else None, perplexity, held_out, speedup)
        for depth, (perplexity, *held_out, speedup) in enumerate(rows)
    ]


FRONT = points((20, 21, 1.0), (20.5, 22, 1.1), (21.2, 25, 1.2), (20.9, 22, 1.3), (30, 40, 1.4))


@pytest.mark.parametrize(
    ("speedup", "increase", "depth"),
    [
        (1.15, None, 2),
        (1.2, None, 2),
        (1.35, None, 4),
        (9.0, None, 4),  # cannot be met: as near as possible
        (None, 0.05, 1),  # held out: 22 is within 22.05, 25 is not; what comes behind it is never chosen
        (None, 0.20, 3),
        (None, 0.01, 0),
        (1.1, 0.05, 1),
        (1.15, 0.05, 1),  # the perplexity goes first
        (1.15, 0.5, 2),
    ],
)
def test_choices(speedup: float | None, increase: float | None, depth: int) -> None:
    target = Target(speedup, increase)
    assert target.choose(FRONT) == depth
    missed = target.shortfall(FRONT, depth)
    met = speedup is None or FRONT[depth].speedup >= speedup  # type: ignore[operator]
    assert (missed is None) == met
    assert met or f"{speedup:g}" in str(missed)


def test_the_calibration_text_decides_where_nothing_is_held_out() -> None:
    rows = points((20, None, None), (20.5, None, None), (24, None, None))
    assert Target(None, 0.05).choose(rows) == 1
    assert Target(None, 0.05).is_decided(rows) and not Target(None, 0.05).is_decided(rows[:2])
    assert Target(1.1, None).is_decided(FRONT[:2]) and not Target(1.2, None).is_decided(FRONT[:2])


def test_every_held_out_text_must_be_within_the_increase() -> None:
    rows = [FrontPoint(0, None, 20, (21, 30), None), FrontPoint(1, Unit(1), 20, (22, 30), None)]
    assert Target(None, 0.05).choose(rows) == 1
    for worse in ((22, 32), (23, 30), (22, math.inf)):
        assert Target(None, 0.05).choose([rows[0], FrontPoint(1, Unit(1), 20, worse, None)]) == 0


def test_what_is_out_of_reach_is_told_before_the_search() -> None:
    model = CostModel(0.010, 0.001, 0.001, 10, 1)
    middle = [Unit(block) for block in range(1, 9)]
    check_reachable(model, middle, 2.1)
    with pytest.raises(ConfigError, match=r"target speedup 3 .*2\.14 times"):
        check_reachable(model, middle, 3)


@pytest.mark.parametrize("increase", [0.05, "5%", "0.05", " 5 %"])
def test_increases(increase: Any) -> None:
    assert parse_increase(increase) == pytest.approx(0.05)


@pytest.mark.parametrize("increase", ["x", "-5%", "nan", "inf", ""])
def test_increases_that_are_none(increase: str) -> None:
    with pytest.raises(ConfigError, match="share of 0 or more"):
        parse_increase(increase)


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(3)
    paths = (tmp_path / "one.txt", tmp_path / "two.txt")
    for path in paths:
        codes = torch.randint(97, 123, (700,), generator=generator).tolist()
        path.write_text("".join(map(chr, codes)))
    return paths


def losses_by_hand(folder: Path, windows: torch.Tensor, removed: list[Unit]) -> float:
    """transformers, with the output projections of what is removed zeroed."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for unit in removed:
        layer = model.model.layers[unit.block]
        for _, part in unit.sublayers:
            (layer.self_attn.o_proj if part == "attention" else layer.mlp.down_proj).weight.data.zero_()
    with torch.no_grad():
        return sum(float(model(each[None], labels=each[None]).loss) * len(each) for each in windows)


@pytest.mark.parametrize("units", ["blocks", "sublayers", "attention"])
@pytest.mark.parametrize("cost", [None, "params"])
def test_losses_of_both_texts_are_those_of_transformers(
    units: str, cost: str | None, texts: tuple[Path, Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    options = PruneOptions(
        remove=3, patch="none", calibration=texts[0], held_out=texts[::-1], units=units, cost=cost, seqlen=100,
        windows=4, output=tmp_path / "map.json", device="cpu",
    )  # fmt: skip
    layer_map = run_pruning(str(tiny_model_dir), options).layer_map
    assert LayerMap.load(tmp_path / "map.json") == layer_map
    assert [text.record.source for text in layer_map.held_out] == ["two.txt", "one.txt"]
    assert layer_map.losses is not None
    told = (layer_map.losses, *(text.losses for text in layer_map.held_out))
    for path, losses in zip((texts[0], *texts[::-1]), told, strict=True):
        windows = torch.tensor([*path.read_bytes()][:400]).view(4, 100)
        for depth in (0, 2, 3):
            expected = losses_by_hand(tiny_model_dir, windows, list(layer_map.removed[:depth]))
            assert losses[depth] == pytest.approx(expected, rel=1e-5)


class Rising:
    """Ten blocks; each token loses 1, and a hundredth of the number of each block that is gone."""

    model_name, fingerprint, num_blocks, max_length = "rising", None, 10, 100

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return torch.full((*token_ids.shape, 1), 1 + sum(range(10)) / 100)

    def run(self, unit: Unit, hidden: torch.Tensor) -> torch.Tensor:
        return hidden - unit.block / 100

    def token_losses(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        return hidden[:, 1:, 0]

    def num_parameters(self, unit: Unit) -> int:
        return 1


@pytest.mark.parametrize(("limit", "depth"), [("0.5%", 0), ("1.5%", 1), ("4%", 2), (0.07, 3), ("50%", 8)])
def test_a_perplexity_target_ends_the_search_and_keeps_the_front(
    limit: Any, depth: int, texts: tuple[Path, Path], byte_tokenizer: Any
) -> None:
    """Blocks go in their order: exp(0.01), exp(0.03), exp(0.06), ... of the dense perplexity."""
    options = PruneOptions(
        calibration=texts[0], seqlen=100, windows=2, max_perplexity_increase=limit, patch="none"
    )
    report = run_pruning(Rising(byte_tokenizer), options)
    assert [unit.block for unit in report.layer_map.removed] == list(range(1, min(depth + 1, 8) + 1))
    assert report.layer_map.depth == depth
    assert report.front[1].perplexity == pytest.approx(math.exp(1.01), rel=1e-5)
    with pytest.raises(ConfigError, match="only be predicted for a model given by name"):
        run_pruning(
            Rising(byte_tokenizer), PruneOptions(calibration=texts[0], patch="none", target_speedup=1.1)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_speedup": 1.0}, "target_speedup is 1.0; it must be a number above 1"),
        ({"target_speedup": 1.2, "depth": 3}, "contradict"),
        ({"max_perplexity_increase": "-1%"}, "share of 0 or more"),
        ({"cost": "energy"}, "'energy'.*params, latency, kv"),
        ({"cost": "kv", "units": "sublayers"}, "kv.*--units blocks or attention"),
        ({"units": "heads"}, "'heads'"),
        ({"mode": "slow"}, "'slow'.*exact, fast"),
        ({"screen": "none"}, "'none'.*race, gradient"),
        ({"held_out": "nowhere.txt"}, "nowhere.txt"),
        ({"speedup_batch": 0}, "speedup_batch is 0"),
    ],
)
def test_options_that_are_no_use(options: dict[str, Any], message: str, texts: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneOptions(calibration=texts[0], **options).check()


def test_a_held_out_text_that_is_the_calibration_is_told(
    texts: tuple[Path, Path], tiny_model_dir: Path
) -> None:
    notes: list[str] = []
    options = PruneOptions(
        remove=1, calibration=texts[0], held_out=texts[0], seqlen=100, windows=2, device="cpu"
    )
    run_pruning(str(tiny_model_dir), options, note=notes.append)
    assert any("tells nothing new" in note for note in notes)
