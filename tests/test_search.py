"""The search against a brute-force one that copies the model, deletes blocks and recomputes everything."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sleb.errors import ConfigError, SlebError
from sleb.search import SearchProgress, SearchResult, reference_round_passes, round_passes, search
from sleb.units import Unit


class NumericModel:
    """Blocks are invented functions of the hidden state; counts the block passes that it is asked for."""

    def __init__(self, num_blocks: int, seed: int, nan_without: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_blocks = num_blocks
        self.scale = torch.randn(num_blocks, 3, generator=generator, dtype=torch.float64)
        self.nan_without = nan_without
        self.num_window_passes = 0

    def embed(self, token_ids: Tensor) -> Tensor:
        table = torch.linspace(-1, 1, 30, dtype=torch.float64).view(10, 3)
        return torch.cat(
            [table[token_ids], torch.zeros_like(token_ids, dtype=torch.float64)[..., None]], dim=-1
        )

    def run(self, unit: Unit, hidden: Tensor) -> Tensor:
        self.num_window_passes += len(hidden)
        after = hidden.clone()
        after[..., :3] += torch.sin(hidden[..., :3] * (unit.block + 1) + self.scale[unit.block])
        after[..., 3] += 2.0**unit.block
        return after

    def loss(self, hidden: Tensor, token_ids: Tensor) -> float:
        blocks_run = int(hidden[0, 0, 3])
        if self.nan_without is not None and not blocks_run >> self.nan_without & 1:
            return math.nan
        return float(hidden[..., :3].cos().mean(dim=(1, 2)).sum() * token_ids.shape[1]) + 10 * len(token_ids)


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
        after = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        return cast(Tensor, after)

    def loss(self, hidden: Tensor, token_ids: Tensor) -> float:
        logits = self.model.lm_head(self.model.model.norm(hidden))
        return sum(
            float(torch.nn.functional.cross_entropy(each[:-1].float(), ids[1:])) * len(ids)
            for each, ids in zip(logits, token_ids, strict=True)
        )


def brute_force(
    loss_without: Callable[[list[int]], float], num_blocks: int, num_remove: int
) -> tuple[list[int], list[float], list[dict[int, float]]]:
    """The paper's algorithm word by word: one whole evaluation for each candidate of each round."""
    removed: list[int] = []
    losses, rounds = [loss_without([])], []
    for _ in range(num_remove):
        alive = [block for block in range(num_blocks) if block not in removed]
        tried = {block: loss_without([*removed, block]) for block in alive[1:-1]}
        best = min(
            (block for block in tried if math.isfinite(tried[block])), key=lambda block: (tried[block], block)
        )
        removed.append(best)
        losses.append(tried[best])
        rounds.append({block: loss if math.isfinite(loss) else math.inf for block, loss in tried.items()})
    return removed, losses, rounds


def numeric_loss_without(model: NumericModel, windows: Tensor) -> Callable[[list[int]], float]:
    def loss(removed: list[int]) -> float:
        total = 0.0
        for window in windows:
            hidden = model.embed(window[None])
            for block in range(model.num_blocks):
                if block not in removed:
                    hidden = model.run(Unit(block), hidden)
            total += model.loss(hidden, window[None])
        return total

    return loss


def assert_equals(
    result: SearchResult, expected: tuple[list[int], list[float], list[dict[int, float]]]
) -> None:
    removed, losses, rounds = expected
    assert [unit.block for unit in result.removed] == removed
    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert len(result.candidate_losses) == len(rounds)
    for found, wanted in zip(result.candidate_losses, rounds, strict=True):
        assert {unit.block: loss for unit, loss in found.items()} == pytest.approx(wanted, rel=1e-5)


def token_windows(num_windows: int, length: int, vocabulary: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(0, vocabulary, (num_windows, length), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 9), st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 4), st.data())
def test_equals_brute_force_on_invented_blocks(
    num_blocks: int, seed: int, num_windows: int, batch_windows: int, data: st.DataObject
) -> None:
    num_remove = data.draw(st.integers(1, num_blocks - 2))
    model, windows = NumericModel(num_blocks, seed), token_windows(num_windows, 5, seed=seed)
    result = search(model, windows, num_remove=num_remove, batch_windows=batch_windows)
    assert_equals(result, brute_force(numeric_loss_without(model, windows), num_blocks, num_remove))


@pytest.mark.parametrize("memory_bound", [1, 10**9])
def test_equals_brute_force_on_a_transformer(memory_bound: int) -> None:
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

    def loss_without(removed: list[int]) -> float:
        pruned = copy.deepcopy(model)
        pruned.model.layers = torch.nn.ModuleList(
            layer for block, layer in enumerate(pruned.model.layers) if block not in removed
        )
        with torch.no_grad():
            logits = pruned(windows, use_cache=False).logits
        each = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, 50), windows[:, 1:].reshape(-1), reduction="none"
        )
        return float(each.view(3, 11).mean(1).sum() * 12)

    result = search(LlamaScorer(model), windows, num_remove=4, memory_bound=memory_bound)
    assert_equals(result, brute_force(loss_without, 6, 4))


def test_ties_go_to_the_shallower_block() -> None:
    class Indifferent(NumericModel):
        def loss(self, hidden: Tensor, token_ids: Tensor) -> float:
            return 1.0 * len(token_ids)

    result = search(Indifferent(6, 0), token_windows(2, 4), num_remove=4)
    assert [unit.block for unit in result.removed] == [1, 2, 3, 4]


@pytest.mark.parametrize("nan_without", [1, 2, 3])
def test_a_candidate_whose_loss_is_not_finite_is_disqualified(nan_without: int) -> None:
    model, windows = NumericModel(5, 3, nan_without=nan_without), token_windows(3, 4)
    result = search(model, windows, num_remove=2, batch_windows=2)
    assert nan_without not in [unit.block for unit in result.removed]
    assert result.candidate_losses[0][Unit(nan_without)] == math.inf
    assert_equals(result, brute_force(numeric_loss_without(model, windows), 5, 2))
    with pytest.raises(SlebError, match=r"round 3.*not a finite number.*--dtype float32"):
        search(model, windows, num_remove=3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e308])
def test_a_candidate_is_disqualified_when_one_window_in_many_is_not_finite(bad: float) -> None:
    class OneBadWindow(NumericModel):
        def loss(self, hidden: Tensor, token_ids: Tensor) -> float:
            without_two = not int(hidden[0, 0, 3]) >> 2 & 1
            return bad if without_two and int(token_ids[0, 0]) >= 8 else float(without_two) - 1

    windows = torch.zeros(6, 4, dtype=torch.int64)
    windows[3:, 0] = 8
    result = search(OneBadWindow(5, 0), windows, num_remove=1, batch_windows=1)
    assert result.candidate_losses[0][Unit(2)] == math.inf
    assert result.removed == (Unit(1),)


def test_a_dense_model_without_a_finite_loss_is_an_error() -> None:
    class Broken(NumericModel):
        def loss(self, hidden: Tensor, token_ids: Tensor) -> float:
            return math.nan if int(hidden[0, 0, 3]) == 2**self.num_blocks - 1 else 1.0

    with pytest.raises(SlebError, match="whole model"):
        search(Broken(5, 0), token_windows(2, 4), num_remove=1)


@pytest.mark.parametrize(("num_blocks", "num_remove", "num_windows"), [(3, 1, 1), (6, 4, 5), (12, 5, 3)])
def test_block_passes_are_those_of_the_formula(num_blocks: int, num_remove: int, num_windows: int) -> None:
    model, windows = NumericModel(num_blocks, 1), token_windows(num_windows, 4)
    result = search(model, windows, num_remove=num_remove, batch_windows=2)
    sizes = range(num_blocks, num_blocks - num_remove, -1)
    # The dense loss, and with it the last two passes of the trunk, is needed in the first round only.
    expected = sum((a - 1) * (a - 2) // 2 + a for a in sizes) - 2 * (num_remove - 1)
    assert model.num_window_passes == expected * num_windows
    assert result.num_passes == expected
    assert result.reference_passes == sum((a - 2) * (a - 1) for a in sizes)
    assert round_passes(num_blocks, dense=True) <= reference_round_passes(num_blocks) + num_blocks


def test_progress_counts_to_the_total_and_names_the_best_so_far() -> None:
    seen: list[SearchProgress] = []
    result = search(
        NumericModel(7, 5), token_windows(5, 4), num_remove=3, progress=seen.append, batch_windows=2
    )
    assert [each.passes_done for each in seen] == sorted(each.passes_done for each in seen)
    assert seen[-1].passes_total == result.num_passes
    assert {each.num_rounds for each in seen} == {3}
    for number in (1, 2, 3):
        of_round = [each for each in seen if each.round == number]
        assert [each.candidate_index for each in of_round] == 3 * list(range(1, 7 - number))
        assert len(of_round) == 3 * of_round[0].num_candidates == 3 * (6 - number)
        assert [each.windows_done for each in of_round if each.candidate == of_round[-1].candidate] == [
            2,
            4,
            5,
        ]
        assert of_round[-1].best == result.removed[number - 1]
        assert of_round[-1].best_loss == pytest.approx(result.losses[number])
        assert (of_round[-1].best_windows, of_round[0].best_windows) == (5, 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_a_search_interrupted_anywhere_and_resumed_equals_an_uninterrupted_one(seed: int) -> None:
    windows = token_windows(4, 5, seed=seed)
    whole = search(NumericModel(7, seed), windows, num_remove=4, batch_windows=3)
    stop_after = random.Random(seed).randrange(25)
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
        search(NumericModel(7, seed), windows, num_remove=4, batch_windows=3, progress=stop, on_round=keep)
    rest = search(NumericModel(7, seed), windows, num_remove=4, batch_windows=3, resume=decided)
    assert (rest.removed, rest.losses, rest.candidate_losses) == (
        whole.removed,
        whole.losses,
        whole.candidate_losses,
    )
    sizes = range(7 - len(decided.removed), 3, -1)
    assert rest.reference_passes == sum(map(reference_round_passes, sizes))
    assert rest.num_passes == sum(round_passes(a, dense=a == 7) for a in sizes)


def test_nothing_is_run_when_a_resumed_search_is_already_there() -> None:
    model, windows = NumericModel(6, 0), token_windows(2, 4)
    done = search(model, windows, num_remove=2)
    model.num_window_passes = 0
    again = search(model, windows, num_remove=2, resume=done)
    assert (again.removed, again.losses, again.num_passes, model.num_window_passes) == (
        done.removed, done.losses, 0, 0,
    )  # fmt: skip


@pytest.mark.parametrize("num_remove", [0, -1, 5, 99])
def test_the_first_and_last_block_stay(num_remove: int) -> None:
    with pytest.raises(ConfigError, match=r"of 6 blocks.*1 to 4"):
        search(NumericModel(6, 0), token_windows(1, 4), num_remove=num_remove)


@pytest.mark.parametrize(
    "windows", [torch.zeros(3, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64),
                torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 4)],
)  # fmt: skip
def test_windows_of_another_shape_or_type_are_an_error(windows: Tensor) -> None:
    with pytest.raises(ConfigError, match="must be int64 of shape"):
        search(NumericModel(6, 0), windows, num_remove=1)


def test_an_order_of_parts_of_blocks_cannot_be_continued() -> None:
    earlier = SearchResult((Unit(2, "mlp"),), (1.0, 2.0), ({Unit(2, "mlp"): 2.0},))
    with pytest.raises(ConfigError, match="whole blocks"):
        search(NumericModel(6, 0), token_windows(1, 4), num_remove=2, resume=earlier)
