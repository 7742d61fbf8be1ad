"""The search with patches in the loop, against one written out in numpy over transformers' model in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sleb.engine.model.scoring import DecoderScorer
from sleb.errors import ConfigError, LayerMapError
from sleb.layer_map.layer_map import LayerMap, Patches, Unit
from sleb.pruning.options import PatchForm, PruneOptions
from sleb.pruning.patching import RunFit
from sleb.pruning.run import run_pruning
from sleb.pruning.search import SearchProgress, SearchSettings, search

Removed = frozenset[int]  # places: 2 × block, and one more for its MLP
Fitted = dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]  # first and last place: W and b
LENGTH = 48


@dataclass
class Plain:
    """A Llama of transformers, run a sublayer at a time; nothing is kept, and every fit begins at the embedding."""

    model: Any
    fit_windows: Tensor
    judge_windows: Tensor
    form: str
    objective: str

    def sublayer(self, place: int, hidden: Tensor) -> Tensor:
        inner, layer = self.model.model, self.model.model.layers[place // 2]
        if place % 2:
            return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        length = hidden.shape[1]
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), -torch.inf, dtype=hidden.dtype).triu(1)[None, None]
        return (
            hidden
            + layer.self_attn(
                layer.input_layernorm(hidden),
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=inner.rotary_emb(hidden, positions),
            )[0]
        )

    def hidden(self, windows: Tensor, removed: Removed, patches: Fitted, end: int) -> np.ndarray:
        """After the places below `end`."""
        state = self.model.model.embed_tokens(windows)
        for place in range(end):
            if place not in removed:
                state = self.sublayer(place, state)
            for (_, last), (weight, bias) in patches.items():
                if last == place:
                    state = torch.from_numpy(self.apply(state.numpy(), weight, bias))
        return state.numpy()

    def apply(self, state: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        return state * weight + bias if self.form == "scale" else state + self.normed(state) @ weight.T + bias

    def normed(self, state: np.ndarray) -> np.ndarray:
        eps = self.model.config.rms_norm_eps
        return state / np.sqrt((state**2).mean(-1, keepdims=True) + eps)

    def fit(self, removed: Removed, below: Fitted, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Ridge by the normal equations of data with rows for the penalty."""
        before = self.hidden(self.fit_windows, removed, below, first)
        after = self.hidden(self.fit_windows, frozenset(), {}, last + 1)
        features = before if self.form == "scale" else self.normed(before)
        x, y = (each[:, 1:].reshape(-1, each.shape[-1]) for each in (features, after - before))
        centred, targets = x - x.mean(0), y - y.mean(0)
        energy = (centred**2).sum(0)
        ridge = 0.3 * np.maximum(energy, 1e-3 * energy.mean())
        if self.form == "scale":
            change = (centred * targets).sum(0) / (energy + ridge)
            weight, bias = 1 + change, y.mean(0) - change * x.mean(0)
        else:
            rows = np.concatenate([centred, np.diag(np.sqrt(ridge))])
            wanted = np.concatenate([targets, np.zeros_like(np.diag(ridge))])
            weight = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
            bias = y.mean(0) - weight @ x.mean(0)
        return tuple(each.astype(np.float16).astype(np.float64) for each in (weight, bias))  # type: ignore[return-value]

    def log_probabilities(self, removed: Removed, patches: Fitted) -> Tensor:
        hidden = torch.from_numpy(self.hidden(self.judge_windows, removed, patches, 12))
        return self.model.lm_head(self.model.model.norm(hidden)).log_softmax(-1)[:, :-1]

    def values(self, removed: Removed, patches: Fitted) -> tuple[float, float]:
        """The objective and the loss, of all windows if the others are like those that judge."""
        found, dense = self.log_probabilities(removed, patches), self.log_probabilities(frozenset(), {})
        loss = -found.gather(-1, self.judge_windows[:, 1:, None])[..., 0]
        kl = (dense.exp() * (dense - found)).sum(-1)
        num_windows = len(self.fit_windows) + len(self.judge_windows)
        kl_total, loss_total = (float(each.mean()) * num_windows * LENGTH for each in (kl, loss))
        return (kl_total if self.objective == "kl" else loss_total), loss_total


def brute_force(
    plain: Plain, units: str, num_remove: int
) -> tuple[list[Unit], list[dict[Unit, float]], list[float]]:
    """Every candidate with the patch of the run that it makes or joins; patches of other runs stay."""
    blocks = range(1, 5)
    candidates = (
        {Unit(each): {2 * each, 2 * each + 1} for each in blocks}
        if units == "blocks"
        else {Unit(each, part): {2 * each + at} for each in blocks for at, part in enumerate(("attention", "mlp"))}
    )  # fmt: skip
    removed: Removed = frozenset()
    patches: Fitted = {}
    order, rounds, losses = [], [], [plain.values(removed, patches)[1]]
    for _ in range(num_remove):
        found = {}
        for unit, places in candidates.items():
            if unit in order:
                continue
            gone = removed | places
            first, last = min(places), max(places)
            while first - 1 in gone:
                first -= 1
            while last + 1 in gone:
                last += 1
            others = {run: each for run, each in patches.items() if not first <= run[0] <= last}
            below = {run: each for run, each in others.items() if run[1] < first}
            with_it = {**others, (first, last): plain.fit(gone, below, first, last)}
            found[unit] = (*plain.values(gone, with_it), gone, with_it)
        best = min(found, key=lambda unit: (found[unit][0], unit))
        _, loss, removed, patches = found[best]
        order.append(best)
        losses.append(loss)
        rounds.append({unit: each[0] for unit, each in found.items()})
    return order, rounds, losses


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    codes = torch.randint(97, 123, (1000,), generator=torch.Generator().manual_seed(3)).tolist()
    path.write_text("".join(map(chr, codes)))
    return path


def options_for(text: Path, **changes: Any) -> PruneOptions:
    return PruneOptions(
        **{"remove": 3, "calibration": text, "seqlen": LENGTH, "windows": 9, "device": "cpu", **changes}
    )


@pytest.mark.parametrize(
    ("units", "patch", "objective"),
    [("blocks", "full", "kl"), ("sublayers", "full", "kl"), ("blocks", "scale", "loss")],
)
def test_equals_brute_force(
    units: str, patch: str, objective: str, text: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    num_remove = 4 if units == "blocks" else 5
    path = tmp_path / "map.json"
    options = options_for(text, remove=num_remove, units=units, patch=patch, objective=objective, output=path)
    layer_map = run_pruning(str(tiny_model_dir), options).layer_map
    windows = torch.tensor([*text.read_bytes()][: 9 * LENGTH]).view(9, LENGTH)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64).eval()
        plain = Plain(model, windows[::2], windows[1::2], patch, objective)
        order, rounds, losses = brute_force(plain, units, num_remove)
    assert list(layer_map.removed) == order
    assert layer_map.losses == pytest.approx(losses, rel=1e-4)
    assert layer_map.candidate_losses is not None
    for best, found, wanted in zip(order, layer_map.candidate_losses, rounds, strict=True):
        assert best in found  # some others may have been abandoned
        assert found == pytest.approx({unit: wanted[unit] for unit in found}, rel=1e-3)
    assert LayerMap.load(path) == layer_map


@pytest.mark.parametrize(("units", "stop_round"), [("blocks", 3), ("sublayers", 4)])
def test_a_search_with_patches_goes_on_where_it_was_interrupted(
    units: str, stop_round: int, text: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The same map with the same patches, and of each map's file of patches only the last is there."""
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole, parts = (
        options_for(text, remove=4, units=units, patch="full", output=each / "map.json") for each in folders
    )
    run_pruning(str(tiny_model_dir), whole)

    def stop(at: SearchProgress) -> None:
        if at.round == stop_round and at.candidate_index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pruning(str(tiny_model_dir), parts, progress=stop)
    assert LayerMap.load(folders[1] / "map.json").max_depth == stop_round - 1
    run_pruning(str(tiny_model_dir), replace(parts, resume=True))
    one, other = (LayerMap.load(folder / "map.json") for folder in folders)
    assert (one.removed, one.losses, one.patches) == (other.removed, other.losses, other.patches)
    files = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert one.patches is not None and files[0] == files[1] == [one.patches.file_name("map"), "map.json"]
    with pytest.raises(LayerMapError, match="patch is full, this run's is scale"):
        run_pruning(str(tiny_model_dir), replace(parts, resume=True, patch="scale"))
    later = replace(
        one.patches.record, ridge=1.0, form="scale"
    )  # as `sleb patch` would fit others afterwards
    replace(other, patches=Patches.of(one.patches.load(), later)).save(folders[1] / "map.json")
    with pytest.raises(LayerMapError, match="patches is scale, fitted to the tokens sha256"):
        run_pruning(str(tiny_model_dir), replace(parts, resume=True))
    with pytest.raises(LayerMapError, match="objective is kl, this run's is loss"):
        run_pruning(str(tiny_model_dir), replace(parts, resume=True, objective="loss"))


def test_a_search_killed_between_the_two_files_leaves_a_map_with_its_patches(
    text: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, save = tmp_path / "map.json", Path.write_text
    options, num_maps = options_for(text, output=path), 0

    def write(self: Path, *arguments: Any, **more: Any) -> int:
        nonlocal num_maps
        num_maps += 1
        if num_maps == 3:  # the patches of the third round are there, its map is not
            raise KeyboardInterrupt
        return save(self, *arguments, **more)

    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(KeyboardInterrupt):
        run_pruning(str(tiny_model_dir), options)
    left = LayerMap.load(path)
    assert left.max_depth == 2 and left.patches is not None and left.patches.at(2)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    done = run_pruning(str(tiny_model_dir), replace(options, resume=True)).layer_map
    assert LayerMap.load(path) == done and len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_race_finds_the_same_where_it_is_clear(text: Path, tiny_model_dir: Path) -> None:
    """And what it says of its winners is exact. Patches are fitted all the same: only judging is less."""
    options = options_for(text, remove=2, seqlen=80, windows=12, patch="low-rank=4")
    exact, fast = (
        run_pruning(str(tiny_model_dir), replace(options, mode=mode)) for mode in ("exact", "fast")
    )
    assert fast.layer_map.removed == exact.layer_map.removed
    assert fast.layer_map.losses == pytest.approx(exact.layer_map.losses, rel=1e-5)
    assert fast.result.cost.num_evaluations < exact.result.cost.num_evaluations
    assert fast.layer_map.search is not None and fast.layer_map.search.patch == "low-rank=4"


def test_patches_cost_no_more_than_half_as_many_passes_again(text: Path, tiny_model_dir: Path) -> None:
    """Even where nothing is kept between candidates, and where all is: half the windows are judged, half fitted."""
    model = DecoderScorer.load(str(tiny_model_dir), device="cpu")
    windows = torch.tensor([*text.read_bytes()][:768]).view(16, 48)
    for bound in (1, 10**9):
        plain, patched = (
            search(
                model, windows, num_remove=4,
                settings=SearchSettings(fit=fit, objective=objective, batch_windows=16, trunk_bound=bound),
            ).cost.num_passes
            for fit, objective in ((None, "loss"), (partial(RunFit, model, PatchForm("full")), "kl"))
        )  # fmt: skip
        assert patched <= 1.5 * plain


def test_the_loss_may_be_the_divergence_without_patches(text: Path, tiny_model_dir: Path) -> None:
    plain = options_for(text, remove=2, patch="none")
    found = run_pruning(str(tiny_model_dir), replace(plain, objective="kl")).layer_map
    judged = run_pruning(str(tiny_model_dir), plain).layer_map
    assert found.patches is None and found.losses is not None and found.candidate_losses is not None
    assert judged.losses is not None
    assert found.losses[0] == pytest.approx(judged.losses[0], rel=1e-6)
    assert 0 < found.candidate_losses[0][found.removed[0]] < found.losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": "half"}, "'half'.*none, scale, low-rank"),
        ({"patch": "low-rank=0"}, "'low-rank=0'"),
        ({"patch": "low-rank=" + "9" * 5000}, "is not known; choose none"),
        ({"objective": "mse"}, "'mse'.*loss, kl"),
        ({"patch": "full", "mode": "fast", "screen": "gradient"}, "--screen race"),
        ({"objective": "kl", "mode": "fast", "screen": "gradient"}, "--screen race"),
        ({"patch": "full", "windows": 1}, "--windows 2 or more"),
    ],
)
def test_options_that_are_no_use(changes: dict[str, Any], message: str, text: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        options_for(text, **changes).check()
