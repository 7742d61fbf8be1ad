"""Fitting patches, against numpy on all tokens at once, and against models that are walked without any sharing."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from sleb.errors import SlebError
from sleb.layer_map.patches import Form, Patch
from sleb.layer_map.units import Unit
from sleb.pruning.options import PatchForm
from sleb.pruning.patching import Moments, Patcher, States, fit, runs, spans

Array = np.ndarray[Any, np.dtype[Any]]
WIDTH = 6


class WideModel:
    """Blocks are invented functions of a hidden state of WIDTH features, in float64."""

    num_blocks = 6

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.mix = torch.randn(12, WIDTH, WIDTH, generator=generator, dtype=torch.float64) * 0.4
        self.table = torch.randn(11, WIDTH, generator=generator, dtype=torch.float64)
        self.num_runs = 0
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()  # what `run` gave out
        self.most_alive = 0

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.table[token_ids]

    def run(self, unit: Unit, hidden: Tensor) -> Tensor:
        self.num_runs += len(hidden) * len(unit.sublayers)
        for block, part in unit.sublayers:
            mixed = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[:, None]
            hidden = hidden + torch.sin(mixed @ self.mix[2 * block + (part == "mlp")] + block)
        self.alive.add(hidden)
        self.most_alive = max(self.most_alive, sum(len(each) for each in self.alive))
        return hidden

    def normed(self, hidden: Tensor) -> Tensor:
        return (hidden * (hidden.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()).float()

    def apply(self, patch: Patch, hidden: Tensor) -> Tensor:
        tensors = {name: torch.from_numpy(tensor).double() for name, tensor in patch.tensors.items()}
        if patch.form == "scale":
            return hidden * tensors["scale"] + tensors["bias"]
        weight = tensors["weight"] if patch.form == "full" else tensors["up"] @ tensors["down"]
        return hidden + self.normed(hidden).double() @ weight.T + tensors["bias"]

    def token_losses(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        return (hidden[:, :-1] @ self.table.T).log_softmax(-1).gather(2, token_ids[:, 1:, None])[..., 0].neg()


def token_windows(num_windows: int = 7, length: int = 9) -> Tensor:
    return torch.randint(0, 11, (num_windows, length), generator=torch.Generator().manual_seed(5))


def draw(seed: int, shape: tuple[int, ...] = (40, 30)) -> tuple[Tensor, Tensor]:
    """Features and targets of windows, with means far from 0 and first tokens a thousand times as long."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(*shape, 8, generator=generator) + 20 * torch.arange(8)
    targets = (
        features.sin() @ torch.randn(8, 5, generator=generator)
        - 40
        + torch.randn(*shape, 5, generator=generator)
    )
    features[:, 0], targets[:, 0] = 1e3 * features[:, 0], 1e3 * targets[:, 0]
    return features, targets


def rows(windows: Tensor) -> Array:
    return cast(Array, windows[:, 1:].reshape(-1, windows.shape[-1]).double().numpy())


def ridge_regression(features: Array, targets: Array, ridge: float) -> tuple[Array, Array]:
    """W [E, F] and b [E] by least squares over the tokens and, for the ridge, over invented ones."""
    variances = features.var(0) * len(features)
    penalty = np.diag(np.sqrt(ridge * np.maximum(variances, 1e-3 * variances.mean())))
    centred = np.vstack([features - features.mean(0), penalty])
    wanted = np.vstack([targets - targets.mean(0), np.zeros((len(penalty), targets.shape[1]))])
    weight = np.linalg.lstsq(centred, wanted, rcond=None)[0].T
    return weight, targets.mean(0) - weight @ features.mean(0)


def moments_of(features: Tensor, targets: Tensor, **options: Any) -> Moments:
    moments = Moments(**options)
    for some, other in zip(torch.split(features, 3), torch.split(targets, 3), strict=True):
        moments.add(some, other)
    return moments


def test_moments_are_those_of_all_tokens_at_once() -> None:
    features, targets = draw(0, (40, 2000))  # more than are multiplied at once
    moments, some, other = moments_of(features, targets), rows(features), rows(targets)
    halves = [moments_of(features[each], targets[each]) for each in (slice(0, 11), slice(11, None))]
    halves[0].merge(halves[1])
    for found in (moments, halves[0]):
        assert found.count == len(some)
        np.testing.assert_allclose(found.features, some.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.targets, other.mean(0), rtol=1e-6)
        centred = some - some.mean(0)
        np.testing.assert_allclose(found.gram, centred.T @ centred, rtol=1e-5, atol=0.01)
        np.testing.assert_allclose(found.cross, centred.T @ (other - other.mean(0)), rtol=1e-5, atol=0.05)


@pytest.mark.parametrize("ridge", [1e-6, 0.3, 5.0])
def test_a_full_patch_is_the_ridge_regression(ridge: float) -> None:
    features, targets = draw(1)
    tensors = fit(moments_of(features, targets), "full", ridge=ridge)
    weight, bias = ridge_regression(rows(features), rows(targets), ridge)
    np.testing.assert_allclose(tensors["weight"], weight, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(tensors["bias"], bias, rtol=1e-3, atol=1e-2)


def test_a_planted_map_is_found_again() -> None:
    features = torch.randn(30, 20, 6, generator=torch.Generator().manual_seed(2))
    planted = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    tensors = fit(moments_of(features, features @ planted.T + 3), "full", ridge=1e-9)
    np.testing.assert_allclose(tensors["weight"], planted, atol=1e-4)
    np.testing.assert_allclose(tensors["bias"], 3, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_nothing_of_low_rank_is_better_than_the_low_rank_patch(rank: int) -> None:
    features, targets = draw(4)
    some, other, ridge = rows(features), rows(targets), 0.3
    penalty = ridge * some.var(0) * len(some)
    centred, wanted = some - some.mean(0), other - other.mean(0)

    def objective(weight: Array) -> float:
        return float(((wanted - centred @ weight.T) ** 2).sum() + (weight**2 * penalty).sum())

    tensors = fit(moments_of(features, targets), "low-rank", rank, ridge)
    assert tensors["down"].shape == (rank, 8) and tensors["up"].shape == (5, rank)
    weight = tensors["up"].astype(np.float64) @ tensors["down"]
    np.testing.assert_allclose(tensors["bias"], other.mean(0) - weight @ some.mean(0), rtol=1e-3, atol=1e-2)
    gram, cross = centred.T @ centred + np.diag(penalty), centred.T @ wanted
    best = np.inf
    for seed in range(5):  # alternating: either factor by least squares for the other, from anywhere
        up = np.random.default_rng(seed).normal(size=(5, rank))
        for _ in range(200):
            down = np.linalg.solve(gram, cross @ up @ np.linalg.inv(up.T @ up))
            up = cross.T @ down @ np.linalg.inv(down.T @ gram @ down)
        best = min(best, objective(up @ down.T))
    assert objective(weight) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_scale_is_a_line_through_each_channel(diagonal: bool) -> None:
    features, targets = draw(6)
    features = features[..., :5]
    tensors = fit(moments_of(features, targets, diagonal=diagonal), "scale", ridge=1e-9)
    for channel in range(5):
        slope, start = np.polyfit(rows(features)[:, channel], rows(features + targets)[:, channel], 1)
        assert tensors["scale"][channel] == pytest.approx(slope, rel=1e-3, abs=1e-3)
        assert tensors["bias"][channel] == pytest.approx(start, rel=1e-3, abs=0.05)


def test_states_that_are_not_finite_are_told() -> None:
    features, targets = draw(7)
    targets[3, 4, 1] = torch.inf
    with pytest.raises(SlebError, match="--dtype float32"):
        fit(moments_of(features, targets), "full")


def test_runs_are_neighbours_that_are_gone_together() -> None:
    def parse(text: str) -> list[Unit]:
        return [Unit.parse(each) for each in text.split()]

    assert runs([]) == []
    assert runs(parse("5 2 3")) == [((2, "attention"), (3, "mlp")), ((5, "attention"), (5, "mlp"))]
    assert runs(parse("4.attention 3.mlp 6.mlp")) == [
        ((3, "mlp"), (4, "attention")),
        ((6, "mlp"), (6, "mlp")),
    ]
    assert runs(parse("1.attention 2.attention")) == [((1, "attention"),) * 2, ((2, "attention"),) * 2]


ORDERS = ["2 4 3 1", "3.mlp 1.attention 4.attention 2"]


def fitted_by_hand(
    model: WideModel,
    windows: Tensor,
    removed: Sequence[Unit],
    form: Form,
    rank: int | None,
    standing: dict[Any, Patch],
) -> tuple[dict[Any, Patch], float]:
    """The patch of each run that is not in `standing`, and the loss with all: everything anew from the embedding."""
    found: dict[Any, Patch] = {}
    gone = [each for unit in removed for each in unit.sublayers]
    hidden = dense = model.embed(windows)
    last_of = dict(runs(removed))
    first = None
    for block in range(model.num_blocks):
        for sublayer in Unit(block).sublayers:
            first = sublayer if sublayer in last_of else first
            dense = model.run(Unit(*sublayer), dense)
            if sublayer not in gone:
                hidden = model.run(Unit(*sublayer), hidden)
            elif first is not None and last_of[first] == sublayer:
                if (first, sublayer) not in standing:
                    features = hidden if form == "scale" else model.normed(hidden)
                    moments = Moments()
                    moments.add(features, dense.float() - hidden.float())
                    tensors = fit(moments, form, rank)
                    patch = Patch(first, sublayer, 1, 1, form, form != "scale", tensors)
                else:
                    patch = standing[first, sublayer]
                found[first, sublayer] = patch
                hidden = model.apply(patch, hidden)
    return found, float(model.token_losses(hidden, windows).mean(1).sum() * windows.shape[1])


@pytest.mark.parametrize("form", ["full", "low-rank", "scale"])
@pytest.mark.parametrize("order", ORDERS)
def test_each_removal_makes_one_patch(form: Form, order: str) -> None:
    model, windows = WideModel(), token_windows()
    removed = [Unit.parse(each) for each in order.split()]
    rank = 2 if form == "low-rank" else None
    window_bytes = windows.shape[1] * WIDTH * 8
    states = States(model, windows, batch_windows=3, memory_bound=5 * len(windows) * window_bytes)
    patcher = Patcher(model, states, PatchForm(form, rank))
    found = [patcher.steps(removed[:depth], depth) for depth in range(len(removed) + 1)]
    patches = spans(found)
    standing: dict[Any, Patch] = {}
    for depth, program in enumerate(found):
        wanted, loss = fitted_by_hand(model, windows, removed[:depth], form, rank, standing)
        here = {(each.first, each.last): each for each in patches if each.serves(depth)}
        assert here.keys() == wanted.keys()
        assert states.loss(program) == pytest.approx(loss, rel=2e-3)
        for run, patch in here.items():
            for name, tensor in patch.tensors.items():  # stored in half precision
                np.testing.assert_allclose(
                    tensor, wanted[run].tensors[name], rtol=0.02, atol=0.02, err_msg=f"{run} {name}"
                )
        standing |= wanted


@pytest.mark.parametrize("num_kept", [0, 1, 2, 3])
def test_what_is_kept_changes_the_work_alone(num_kept: int) -> None:
    windows, removed = token_windows(), [Unit(2), Unit(4), Unit(3)]
    window_bytes = windows.shape[1] * WIDTH * 8
    losses, work = [], []
    for bound in (num_kept * len(windows) * window_bytes, 1 << 30):
        model = WideModel()
        states = States(model, windows, batch_windows=2, memory_bound=bound)
        patcher = Patcher(model, states, PatchForm("full"))
        losses.append([states.loss(patcher.steps(removed[:depth], depth)) for depth in range(4)])
        work.append(model.num_runs)
        if bound < 1 << 30:  # what is kept, and what is at work on one batch
            assert model.most_alive <= num_kept * len(windows) + 4 * 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert work[0] >= work[1]
