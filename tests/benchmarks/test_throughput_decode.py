"""What "decode" times: the steps in which all requests decode, and how it is refused where there are none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sleb.benchmarks import ceilings as ceilings_module
from sleb.benchmarks.throughput import decode_seconds, greedy_params, run_throughput
from sleb.benchmarks.workloads import ThroughputOptions, Workload, steps_apart
from sleb.engine.llm import LLM
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap


class ScriptedEngine:
    """Gives the tokens of a script: for every step, the requests that get one. A step takes a second."""

    def __init__(self, script: list[list[int]], clock: Any) -> None:
        self.script, self.clock = iter(script), clock
        self.ids: list[str] = []
        self.left: dict[str, int] = {}
        self.aborted: list[str] = []

    def add_request(self, request_id: str, prompt: list[int], params: Any, depth: int) -> None:
        self.ids.append(request_id)
        self.left[request_id] = params.max_tokens

    def step(self) -> list[Any]:
        self.clock.now += 1.0
        outputs = []
        for index in next(self.script):
            self.left[self.ids[index]] -= 1
            reason = "length" if not self.left[self.ids[index]] else None
            outputs.append(
                SimpleNamespace(
                    request_id=self.ids[index], new_token_ids=[7], finish_reason=reason, failure=None
                )
            )
        return outputs

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


@pytest.mark.parametrize(
    ("script", "seconds"),
    [
        # All prompts in the first step, then two steps.
        ([[0, 1], [0, 1], [0, 1]], 2.0),
        # Outputs a step late.
        ([[], [0, 1], [0, 1], [0, 1]], 2.0),
        # A prompt a step: one step decodes both, which makes two tokens of four.
        ([[0], [0, 1], [0, 1], [1]], 2.0),
    ],
)
def test_decode_time_is_that_of_all_tokens_but_the_first(
    script: list[list[int]], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("sleb.benchmarks.throughput.time.perf_counter", lambda: clock.now)
    engine: Any = ScriptedEngine(script, clock)
    assert decode_seconds(engine, [[1], [2]], greedy_params(3), 0) == pytest.approx(seconds)
    assert engine.aborted == []


def test_neither_prompts_nor_the_ends_of_answers_are_decode_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds a prompt and a tenth a row: four steps of both rows, whatever lies before and after."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("sleb.benchmarks.throughput.time.perf_counter", lambda: clock.now)

    class Slow(ScriptedEngine):
        def step(self) -> list[Any]:
            before = dict(self.left)
            outputs = super().step()
            prompts = sum(before[each.request_id] == 5 for each in outputs)
            clock.now += 10.0 * prompts + 0.1 * len(outputs) - 1.0
            return outputs

    script = [[0], [0], [0, 1], [0, 1], [0, 1], [1], [1]]
    engine: Any = Slow(script, clock)
    assert decode_seconds(engine, [[1], [2]], greedy_params(5), 0) == pytest.approx(4 * 0.2)


@pytest.mark.parametrize("script", [[[0], [0], [1], [1]], [[0], [0, 1], [1]]])
def test_a_decode_run_whose_answers_never_overlap_says_so(script: list[list[int]]) -> None:
    engine: Any = ScriptedEngine(script, SimpleNamespace(now=0.0))
    with pytest.raises(ConfigError, match="give more --output-tokens, or fewer requests at once"):
        decode_seconds(engine, [[1], [2]], greedy_params(2), 0)
    assert engine.aborted == engine.ids[1:]


@pytest.mark.parametrize(
    ("batch", "prompt_tokens", "step_tokens"),
    [(1, 7, 7), (3, 20, 60), (7, 20, 50), (6, 20, 20), (5, 3, 5), (4, 33, 10)],
)
def test_how_far_apart_first_tokens_come(
    tiny_model_dir: Path, batch: int, prompt_tokens: int, step_tokens: int
) -> None:
    """Against the engine itself; and what the timed steps read is what a decode reads, to first order."""
    engine = LLM(
        tiny_model_dir, kv_cache_memory=0.01, max_num_seqs=batch, max_num_batched_tokens=step_tokens,
        prefix_caching=False,
    ).engine  # fmt: skip
    workload = Workload("decode", batch, prompt_tokens, 2)
    apart = steps_apart(workload, step_tokens)
    prompts = [[number + 1] * prompt_tokens for number in range(batch)]
    steps: list[list[str]] = []
    step = engine.step

    def recorded() -> list[Any]:
        outputs = step()
        steps.append([each.request_id for each in outputs])
        return outputs

    engine.step = recorded  # type: ignore[method-assign]
    if apart:
        with pytest.raises(ConfigError, match="--output-tokens"):
            decode_seconds(engine, prompts, greedy_params(apart + 1), 0)
    steps.clear()
    num_tokens = apart + 9
    assert decode_seconds(engine, prompts, greedy_params(num_tokens), 0) > 0
    ids = {each for made in steps for each in made}
    first = {each: next(place for place, made in enumerate(steps) if each in made) for each in ids}
    assert max(first.values()) - min(first.values()) == apart
    window = range(max(first.values()) + 1, min(first.values()) + num_tokens)
    assert all(len(steps[place]) == batch for place in window)
    contexts = [place - first[each] for place in window for each in ids]
    assert sum(contexts) / len(contexts) == pytest.approx(num_tokens / 2, abs=0.1 * num_tokens)


def test_a_decode_without_a_full_step_is_refused_before_the_model_is_loaded(
    tiny_model_dir: Path, tiny_chain: LayerMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 20 tokens: a prompt of 20 in the first, and the last of three in the fourth."""
    monkeypatch.setattr(ceilings_module, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(ceilings_module, "_READ_BYTES", 1 << 16)
    monkeypatch.setattr(ceilings_module, "_MATRIX_SIZE", {"cpu": 16})
    monkeypatch.setattr("sleb.benchmarks.throughput.MAX_STEP_TOKENS", 8)
    options = ThroughputOptions(
        model=str(tiny_model_dir), layer_map=tiny_chain, depths=(0, 3), tests=("decode",), batches=(3,),
        prompt_tokens=(20,), output_tokens=(5,), repetitions=1, max_repetitions=1, control=False,
    )  # fmt: skip
    assert [each.subject for each in run_throughput(options).measurements] == ["depth 0", "depth 3"]
    monkeypatch.setattr("sleb.benchmarks.throughput.LLM", None)
    with pytest.raises(
        ConfigError, match=r"--output-tokens is 4, .* 3 requests after 20 tokens.* least 5, or fewer"
    ):
        run_throughput(replace(options, output_tokens=(4,)))
