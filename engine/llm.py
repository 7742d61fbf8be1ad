"""Offline use: prompts in, answers out, in one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine
from sleb.engine.outputs import Choice, Output, StepOutput
from sleb.engine.requests.sampling_params import SamplingParams
from sleb.errors import RequestError
from sleb.options import takes_options

Prompt = str | Sequence[int]
_RENAMED = {"num_threads": "threads", "enable_prefix_caching": "prefix_caching"}


class LLM:
    """A model, its layer map and the depths to serve, ready to generate and to score.

    Args:
        model: a Hugging Face folder, a hub id, a .gguf file or an alias: smollm2, gemma3-270m.
        layer_map: a LayerMap, the path of one, "none", or None for the alias's own.
        tiers: depths to serve; None: the map's recommended one (0 without a map; 0, 3, 6 of a shipped one).
        others: the fields of EngineConfig, which every engine flag of `sleb serve` is.

    Raises ConfigError, ModelError or LayerMapError.
    """

    @takes_options(EngineConfig, first="self", renamed=_RENAMED)
    def __init__(self, config: EngineConfig) -> None:
        self.engine = Engine(config)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        depth: int | Sequence[int | None] | None = None,
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Output]:
        """Answers to `prompts` (strings, or token ids in lists, arrays or tensors), in their order.

        sampling_params and depth: one for all, or one a prompt; depth None is the default tier. on_progress is
        called with the number of new tokens after every step. Raises RequestError; nothing is then left queued.
        """
        batch = _as_batch(prompts)
        params = _one_each(sampling_params or SamplingParams(), len(batch), "sampling_params")
        depths = _one_each(depth, len(batch), "depth")
        run = next(self._ids)
        outputs: list[Output] = []
        owners: dict[str, tuple[Output, Choice]] = {}
        try:
            for index, (prompt, each, prompt_depth) in enumerate(zip(batch, params, depths, strict=True)):
                self._queue(f"{run}-{index}", prompt, each, prompt_depth, outputs, owners)
            while owners:
                step = self.engine.step()
                for increment in step:
                    _collect(increment, owners)
                if on_progress is not None:
                    on_progress(sum(len(increment.new_token_ids) for increment in step))
        finally:
            for request_id in owners:
                self.engine.abort(request_id)
        return outputs

    def score(self, token_ids: Sequence[int], depth: int | None = None) -> Tensor:
        """float32 log-probabilities of token_ids[1:] given what stands before each: shape [len − 1].

        Raises InvalidOutputError where the model's logits are not numbers.
        """
        params = SamplingParams(max_tokens=0, prompt_logprobs=0, temperature=0.0)
        output = self.generate([token_ids], params, depth)[0].check()
        gathered = output.prompt_logprobs or []
        return torch.tensor([entry.logprob for entry in gathered if entry is not None], dtype=torch.float32)

    def _queue(
        self,
        name: str,
        prompt: Prompt,
        params: SamplingParams,
        depth: int | None,
        outputs: list[Output],
        owners: dict[str, tuple[Output, Choice]],
    ) -> None:
        token_ids = list(self.engine.encode_prompt(prompt) if isinstance(prompt, str) else prompt)
        tier = self.engine.tier(depth)
        output = Output(token_ids, tier.depth, [], None, 0, None)
        outputs.append(output)
        for number in range(params.n):
            choice = Choice(logprobs=None if params.logprobs is None else [])
            output.choices.append(choice)
            request_id = f"{name}-{number}"
            own = params.for_choice(number)
            if number:  # a prompt's log-probabilities are the same for all its choices
                own = replace(own, prompt_logprobs=None)
            first = f"{name}-0" if number else None
            self.engine.add_request(request_id, token_ids, own, tier.depth, fork_of=first)
            owners[request_id] = (output, choice)


def _collect(increment: StepOutput, owners: dict[str, tuple[Output, Choice]]) -> None:
    found = owners.get(increment.request_id)
    if found is None:  # of a request queued by other hands
        return
    output, choice = found
    choice.text += increment.new_text
    choice.token_ids.extend(increment.new_token_ids)
    if choice.logprobs is not None:
        choice.logprobs.extend(increment.new_logprobs or [])
    if increment.prompt_logprobs is not None:
        output.prompt_logprobs = increment.prompt_logprobs
    if increment.finish_reason is not None:
        choice.finish_reason = increment.finish_reason
        choice.stop_reason, choice.failure = increment.stop_reason, increment.failure
        if choice is output.choices[0]:
            output.num_cached_tokens = increment.num_cached_tokens
            output.timings = increment.timings
        del owners[increment.request_id]


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    batch: list[Any] = [prompts] if isinstance(prompts, str) else _plain(prompts)
    if batch and all(isinstance(prompt, int) for prompt in batch):
        return [batch]
    return [prompt if isinstance(prompt, str) else _plain(prompt) for prompt in batch]


def _plain(values: Any) -> list[Any]:
    """A list; of Python numbers if `values` is an array or a tensor of them."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _one_each(value: Any, count: int, name: str) -> list[Any]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != count:
            raise RequestError(
                f"{name} has {len(value)} entries for {count} prompts; give one, or one a prompt"
            )
        return list(value)
    return [value] * count
