"""The search against a brute-force one that copies the model, deletes blocks and recomputes everything."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sleb.errors import ConfigError, SlebError
from sleb.layer_map.units import Part, Unit
from sleb.pruning.search import SearchProgress, SearchResult, SearchSettings, search
from sleb.pruning.search.fast import gate_gradients
from sleb.pruning.search.rounds import SearchState

PARTS: tuple[Part, Part] = ("attention", "mlp")


class NumericModel:
    """Blocks are invented functions of the hidden state; counts the block passes that it is asked for.

    Units may be blocks or their halves. The last feature says which have run: two bits a block.
    """

    def __init__(self, num_blocks: int, seed: int, nan_without: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_blocks = num_blocks
        self.scale = torch.randn(num_blocks, 3, generator=generator, dtype=torch.float64)
        self.nan_without = nan_without
        self.num_passes = 0.0

    def embed(self, token_ids: Tensor) -> Tensor:
        table = torch.linspace(-1, 1, 30, dtype=torch.float64).view(10, 3)
        return torch.cat(
            [table[token_ids], torch.zeros_like(token_ids, dtype=torch.float64)[..., None]], dim=-1
        )

    def run(self, unit: Unit, hidden: Tensor) -> Tensor:
        self.num_passes += len(hidden) * len(unit.sublayers) / 2
        for block, part in unit.sublayers:
            shift = 0.3 if part == "attention" else -0.2
            state = hidden[..., :3] + torch.sin(hidden[..., :3] * (block + 1) + self.scale[block] + shift)
            ran = hidden[..., 3:] + 4.0**block * (1 if part == "attention" else 2)
            hidden = torch.cat([state, ran], dim=-1)
        return hidden

    def token_losses(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        losses = hidden[:, :-1, :3].cos().mean(-1) + 1.5
        if self.nan_without is not None and not int(hidden[0, 0, 3]) >> 2 * self.nan_without & 1:
            losses = losses * math.nan
        return losses


class LlamaScorer:
    """transformers' Llama as a scoring model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.num_blocks = len(model.model.layers)

    def embed(self, token_ids: Tensor) -> Tensor:
        return cast(Tensor, self.model.model.embed_tokens(token_ids))

    def run(self, unit: Unit, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1])[None]
        rotary = self.model.model.rotary_emb(hidden, positions)
        mask = torch.full((hidden.shape[1], hidden.shape[1]), -torch.inf).triu(1)[None, None]
        layer = self.model.model.layers[unit.block]
        for _, part in unit.sublayers:
            if part == "attention":
                hidden = (
                    hidden
                    + layer.self_attn(
                        layer.input_layernorm(hidden),
                        attention_mask=mask,
                        position_ids=positions,
                        position_embeddings=rotary,
                    )[0]
                )
            else:
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden

    def token_losses(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        logits = self.model.lm_head(self.model.model.norm(hidden))
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), token_ids[:, 1:], reduction="none"
        )


def candidates_of(units: str, num_blocks: int, removed: Sequence[Unit]) -> list[Unit]:
    """By the words of the documentation: the units that may go next, in order."""
    parts: dict[str, tuple[Part, ...]] = {
        "blocks": ("block",), "sublayers": ("attention", "mlp"), "attention": ("attention",),
    }  # fmt: skip
    every = [Unit(block, part) for block in range(1, num_blocks - 1) for part in parts[units]]
    return [unit for unit in every if unit not in removed]


def brute_force(
    loss_without: Callable[[list[Unit]], float],
    num_blocks: int,
    num_remove: int,
    units: str = "blocks",
    savings: dict[Unit, float] | None = None,
) -> tuple[list[Unit], list[float], list[dict[Unit, float]]]:
    """The paper's algorithm word by word: one whole evaluation for each candidate of each round."""
    removed: list[Unit] = []
    losses, rounds = [loss_without([])], []
    for _ in range(num_remove):
        tried = {unit: loss_without([*removed, unit]) for unit in candidates_of(units, num_blocks, removed)}
        finite = {unit: loss for unit, loss in tried.items() if math.isfinite(loss)}

        def score(unit: Unit, losses: list[float] = losses, finite: dict[Unit, float] = finite) -> float:
            if savings is None:
                return finite[unit]
            added = finite[unit] - losses[-1]
            return added / savings[unit] if added > 0 else added * savings[unit]

        best = min(finite, key=lambda unit: (score(unit), unit))
        removed.append(best)
        losses.append(tried[best])
        rounds.append({unit: loss if math.isfinite(loss) else math.inf for unit, loss in tried.items()})
    return removed, losses, rounds


def numeric_loss_without(model: NumericModel, windows: Tensor) -> Callable[[list[Unit]], float]:
    def loss(removed: list[Unit]) -> float:
        gone = {sublayer for unit in removed for sublayer in unit.sublayers}
        total = 0.0
        for window in windows:
            hidden = model.embed(window[None])
            for block in range(model.num_blocks):
                for part in PARTS:
                    if (block, part) not in gone:
                        hidden = model.run(Unit(block, part), hidden)
            total += float(model.token_losses(hidden, window[None]).mean()) * len(window)
        return total

    return loss


def assert_equals(
    result: SearchResult,
    expected: tuple[list[Unit], list[float], list[dict[Unit, float]]],
    exact: bool = True,
) -> None:
    """The same order and losses; of candidates, those that are told, and the winner is."""
    removed, losses, rounds = expected
    assert list(result.removed) == removed
    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert len(result.candidate_losses) == len(rounds)
    for unit, found, wanted in zip(removed, result.candidate_losses, rounds, strict=True):
        assert unit in found
        assert found == pytest.approx({each: wanted[each] for each in found}, rel=1e-5)


def token_windows(num_windows: int, length: int, vocabulary: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(0, vocabulary, (num_windows, length), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    num_blocks=st.integers(3, 8),
    seed=st.integers(0, 10**6),
    num_windows=st.integers(1, 7),
    batch_windows=st.one_of(st.none(), st.integers(1, 4)),
    units=st.sampled_from(["blocks", "sublayers", "attention"]),
    trunk_bound=st.sampled_from([1, 700, 3000, 10**9]),
    weighed=st.booleans(),
    data=st.data(),
)
def test_equals_brute_force_on_invented_blocks(
    num_blocks: int,
    seed: int,
    num_windows: int,
    batch_windows: int | None,
    units: str,
    trunk_bound: int,
    weighed: bool,
    data: st.DataObject,
) -> None:
    candidates = candidates_of(units, num_blocks, [])
    num_remove = data.draw(st.integers(1, len(candidates)))
    rng = random.Random(seed)
    savings = {unit: rng.uniform(0.2, 3) for unit in candidates} if weighed else None
    model, windows = NumericModel(num_blocks, seed), token_windows(num_windows, 5, seed=seed)
    options = SearchSettings(
        units=units, savings=savings, batch_windows=batch_windows, trunk_bound=trunk_bound
    )
    result = search(model, windows, num_remove=num_remove, settings=options)
    expected = brute_force(numeric_loss_without(model, windows), num_blocks, num_remove, units, savings)
    assert_equals(result, expected)


@pytest.mark.parametrize("units", ["blocks", "sublayers"])
@pytest.mark.parametrize("bound", [1, 10**9])
def test_equals_brute_force_on_a_transformer(bound: int, units: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        initializer_range=0.3,
    )
    model: Any = LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    windows = token_windows(3, 12, vocabulary=50)

    def loss_without(removed: list[Unit]) -> float:
        pruned = copy.deepcopy(model)
        for unit in removed:  # a projection of zeros adds nothing to the residual stream
            layer = pruned.model.layers[unit.block]
            for _, part in unit.sublayers:
                (layer.self_attn.o_proj if part == "attention" else layer.mlp.down_proj).weight.data.zero_()
        with torch.no_grad():
            logits = pruned(windows, use_cache=False).logits
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, 50), windows[:, 1:].reshape(-1), reduction="none"
        )
        return float(each.view(3, 11).mean(1).sum() * 12)

    options = SearchSettings(units=units, memory_bound=bound, trunk_bound=bound)
    result = search(LlamaScorer(model), windows, num_remove=4, settings=options)
    assert_equals(result, brute_force(loss_without, 6, 4, units))


def test_ties_go_to_the_shallower_block() -> None:
    class Indifferent(NumericModel):
        def token_losses(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
            return torch.ones(len(hidden), hidden.shape[1] - 1)

    for mode in ("exact", "race"):
        result = search(
            Indifferent(6, 0), token_windows(2, 4), num_remove=4, settings=SearchSettings(mode=mode)
        )
        assert [unit.block for unit in result.removed] == [1, 2, 3, 4]


@pytest.mark.parametrize("nan_without", [1, 2, 3])
def test_a_candidate_whose_loss_is_not_finite_is_disqualified(nan_without: int) -> None:
    model, windows = NumericModel(5, 3, nan_without=nan_without), token_windows(3, 4)
    result = search(model, windows, num_remove=2, settings=SearchSettings(batch_windows=2))
    assert nan_without not in [unit.block for unit in result.removed]
    assert_equals(result, brute_force(numeric_loss_without(model, windows), 5, 2))
    with pytest.raises(SlebError, match=r"round 3.*not a finite number.*--dtype float32"):
        search(model, windows, num_remove=3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e308])
def test_a_candidate_is_disqualified_when_one_window_in_many_is_not_finite(bad: float) -> None:
    class OneBadWindow(NumericModel):
        def token_losses(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
            without_two = not int(hidden[0, 0, 3]) >> 4 & 1
            value = bad if without_two and int(token_ids[0, 0]) >= 8 else 0.1 - 0.05 * without_two
            return torch.full((len(hidden), hidden.shape[1] - 1), value, dtype=torch.float64)

    windows = torch.zeros(6, 4, dtype=torch.int64)
    windows[3:, 0] = 8
    result = search(OneBadWindow(5, 0), windows, num_remove=1, settings=SearchSettings(batch_windows=1))
    assert result.removed == (Unit(1),)
    assert result.candidate_losses[0].get(Unit(2), math.inf) == math.inf


def test_a_dense_model_without_a_finite_loss_is_an_error() -> None:
    class Broken(NumericModel):
        def token_losses(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
            whole = int(hidden[0, 0, 3]) == 4**self.num_blocks - 1
            return torch.full((len(hidden), hidden.shape[1] - 1), math.nan if whole else 1.0)

    with pytest.raises(SlebError, match="whole model"):
        search(Broken(5, 0), token_windows(2, 4), num_remove=1)


class Rising(NumericModel):
    """Every token loses 1, and the number of each block that is gone: nothing is unclear."""

    def token_losses(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        ran = int(hidden[0, 0, 3])
        missing = [block for block in range(self.num_blocks) if not ran >> 2 * block & 1]
        return torch.full((len(hidden), hidden.shape[1] - 1), 1.0 + sum(missing))


@pytest.mark.parametrize(("num_blocks", "num_remove", "num_windows"), [(3, 1, 1), (6, 4, 5), (12, 5, 3)])
def test_block_passes_are_those_of_the_formula(num_blocks: int, num_remove: int, num_windows: int) -> None:
    """Where nothing can be abandoned: all windows at once. The trunk of later rounds begins where a block went."""
    model, windows = NumericModel(num_blocks, 1), token_windows(num_windows, 4)
    result = search(model, windows, num_remove=num_remove, settings=SearchSettings(batch_windows=num_windows))
    expected = 0
    alive, kept = list(range(num_blocks)), 0
    for unit in result.removed:
        a = len(alive)
        needed = a if not kept else a - 2  # to the end in the first round, for the dense loss
        expected += (a - 1) * (a - 2) // 2 + max(0, needed - kept)
        kept = alive.index(unit.block)
        alive.remove(unit.block)
    assert model.num_passes == expected * num_windows
    assert result.cost.num_passes == expected
    sizes = range(num_blocks, num_blocks - num_remove, -1)
    assert result.cost.reference_passes == sum((a - 2) * (a - 1) for a in sizes)
    assert result.cost.reference_evaluations == sum(a - 2 for a in sizes) == result.cost.num_evaluations - 1


def test_a_candidate_that_cannot_win_any_more_is_abandoned() -> None:
    """1 + 9 a token: past the best sum of 8 windows of 1 + 1 a token, that is 16, after two windows."""
    model, windows = Rising(11, 0), token_windows(8, 4)
    result = search(model, windows, num_remove=1, settings=SearchSettings(batch_windows=1))
    assert result.removed == (Unit(1),)
    assert set(result.candidate_losses[0]) == {Unit(1)}
    windows_seen = sum(math.floor(8 * 2 / (1 + block)) + 1 for block in range(2, 10))
    assert result.cost.num_evaluations == pytest.approx(8 / 8 + 8 / 8 + windows_seen / 8)
    assert result.margins[0].at_least and result.margins[0].runner_up == Unit(2)
    assert 0 < result.margins[0].difference <= 8 * 4


@pytest.mark.parametrize("mode", ["race", "gradient"])
def test_a_fast_search_agrees_where_it_is_clear_and_its_winner_is_exact(mode: str) -> None:
    model = Rising(21, 0) if mode == "race" else Gated(21)
    windows = token_windows(8, 200, seed=2)
    result = search(model, windows, num_remove=3, settings=SearchSettings(mode=mode))
    exact = search(model, windows, num_remove=3)
    assert result.removed == exact.removed
    assert result.losses == pytest.approx(exact.losses)
    assert result.cost.num_evaluations < 0.5 * exact.cost.reference_evaluations
    for margin in result.margins:
        assert margin.num_exact < margin.num_candidates and margin.difference > 0
        assert mode == "gradient" or (margin.num_exact >= 2 and not margin.at_least)


class Gated(NumericModel):
    """Each unit adds a small vector; the loss is smooth, so that a first-order estimate is nearly right."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks, 0)

    def run(self, unit: Unit, hidden: Tensor) -> Tensor:
        added = torch.zeros_like(hidden)
        added[..., :3] = 0.01 * (unit.block * 8 % self.num_blocks + 1)
        return hidden + added

    def token_losses(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        return (1 - hidden[:, :-1, :3]).square().mean(-1)


def test_gate_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=2, vocab_size=50,
        initializer_range=0.3,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).double().eval()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    scorer, windows = LlamaScorer(model), token_windows(2, 9, vocabulary=50)
    alive = [Unit(block, part) for block in range(5) for part in PARTS]
    state = SearchState(scorer, windows, alive, 1, 1, 10**9, 10**9)
    candidates = alive[2:-2]
    with torch.no_grad():
        found = gate_gradients(state, candidates)

        def loss(gates: dict[Unit, float]) -> float:
            hidden = scorer.embed(windows)
            for unit in alive:
                hidden = hidden + gates.get(unit, 1.0) * (scorer.run(unit, hidden) - hidden)
            return float(scorer.token_losses(hidden, windows).mean(1).sum() * 9)

        for unit in candidates:
            slope = (loss({unit: 1.01}) - loss({unit: 0.99})) / 0.02
            assert found[unit] == pytest.approx(-slope, rel=0.01, abs=0.01)


def test_race_never_drops_what_a_standard_error_cannot_tell_apart() -> None:
    """Two candidates that differ by noise go to the end together, and the exact sums decide."""

    class Noisy(NumericModel):
        def token_losses(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
            ran = int(hidden[0, 0, 3])
            missing = {block for block in range(self.num_blocks) if not ran >> 2 * block & 1}
            generator = torch.Generator().manual_seed(int(token_ids.sum()) + 31 * sum(missing))
            noise = torch.rand(len(hidden), hidden.shape[1] - 1, generator=generator)
            return 2 + noise + (5 if missing - {2, 5} else 0)

    windows = token_windows(8, 200)
    result = search(Noisy(9, 0), windows, num_remove=1, settings=SearchSettings(mode="race"))
    exact = search(Noisy(9, 0), windows, num_remove=1)
    assert set(result.candidate_losses[0]) == {Unit(2), Unit(5)}
    assert result.removed == exact.removed
    assert result.margins[0].z is not None and abs(result.margins[0].z) < 3


def test_progress_rises_to_one_and_names_the_best_so_far() -> None:
    seen: list[SearchProgress] = []
    result = search(
        NumericModel(7, 5),
        token_windows(5, 4),
        num_remove=3,
        progress=seen.append,
        settings=SearchSettings(batch_windows=2),
    )
    shares = [each.share for each in seen]
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1, abs=0.1)
    assert {each.num_rounds for each in seen} == {3}
    for number in (1, 2, 3):
        of_round = [each for each in seen if each.round == number]
        assert {each.num_candidates for each in of_round} == {6 - number}
        assert (number - 1) / 3 < of_round[0].share and of_round[-1].share <= number / 3
        assert of_round[-1].best == result.removed[number - 1]
        assert of_round[-1].best_loss == pytest.approx(result.losses[number] / 20)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["blocks", "sublayers"]))
def test_a_search_interrupted_anywhere_and_resumed_equals_an_uninterrupted_one(seed: int, units: str) -> None:
    windows = token_windows(4, 5, seed=seed)
    options = SearchSettings(units=units, batch_windows=3)
    told: list[SearchProgress] = []  # how often depends on how many candidates are abandoned
    whole = search(NumericModel(7, seed), windows, num_remove=4, settings=options, progress=told.append)
    stop_after = random.Random(seed).randrange(len(told))
    calls, decided = 0, SearchResult()

    def stop(at: SearchProgress) -> None:
        nonlocal calls
        calls += 1
        if calls > stop_after:
            raise KeyboardInterrupt

    def keep(result: SearchResult) -> None:
        nonlocal decided
        decided = result

    with pytest.raises(KeyboardInterrupt):
        search(NumericModel(7, seed), windows, num_remove=4, settings=options, progress=stop, on_round=keep)
    rest = search(NumericModel(7, seed), windows, num_remove=4, settings=options, resume=decided)
    assert (rest.removed, rest.losses) == (whole.removed, whole.losses)
    assert len(rest.margins) == 4 - len(decided.removed)


def test_until_ends_a_search_early() -> None:
    result = search(
        NumericModel(7, 5), token_windows(2, 4), num_remove=5, until=lambda found: len(found.removed) == 2
    )
    assert len(result.removed) == 2


def test_nothing_is_run_when_a_resumed_search_is_already_there() -> None:
    model, windows = NumericModel(6, 0), token_windows(2, 4)
    done = search(model, windows, num_remove=2)
    model.num_passes = 0
    again = search(model, windows, num_remove=2, resume=done)
    assert (again.removed, again.losses, again.cost.num_passes, model.num_passes) == (
        done.removed, done.losses, 0, 0,
    )  # fmt: skip


@pytest.mark.parametrize("num_remove", [0, -1, 5, 99])
def test_the_first_and_last_block_stay(num_remove: int) -> None:
    with pytest.raises(ConfigError, match=r"of 6 blocks.*1 to 4"):
        search(NumericModel(6, 0), token_windows(1, 4), num_remove=num_remove)
    with pytest.raises(ConfigError, match=r"of 12 sublayers.*first and the last block.*1 to 8"):
        search(
            NumericModel(6, 0),
            token_windows(1, 4),
            num_remove=max(num_remove, 9) if num_remove > 0 else num_remove,
            settings=SearchSettings(units="sublayers"),
        )


@pytest.mark.parametrize(
    "windows", [torch.zeros(3, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64),
                torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 4)],
)  # fmt: skip
def test_windows_of_another_shape_or_type_are_an_error(windows: Tensor) -> None:
    with pytest.raises(ConfigError, match="must be int64 of shape"):
        search(NumericModel(6, 0), windows, num_remove=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SearchSettings(units="heads"), "'heads'.*blocks, sublayers, attention"),
        (SearchSettings(mode="lazy"), "'lazy'.*exact, race, gradient"),
        (SearchSettings(savings={Unit(1): 0.0}), "unit 1 saves 0.0.*positive"),
    ],
)
def test_settings_that_are_no_use(options: SearchSettings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(NumericModel(6, 0), token_windows(1, 4), num_remove=1, settings=options)


def test_an_order_of_parts_of_blocks_cannot_be_continued_with_whole_blocks() -> None:
    earlier = SearchResult((Unit(2, "mlp"),), (1.0, 2.0), ({Unit(2, "mlp"): 2.0},))
    with pytest.raises(ConfigError, match="whole blocks"):
        search(NumericModel(6, 0), token_windows(1, 4), num_remove=2, resume=earlier)
