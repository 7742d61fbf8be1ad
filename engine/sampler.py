"""From logits to tokens: penalties, bias, temperature, filters, one random number per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sleb.engine.outputs import TokenLogprobs
from sleb.engine.request import Request
from sleb.kernels.registry import Kernels

NEVER = float("-inf")


@dataclass(frozen=True)
class SampledToken:
    """A chosen token and, if the request asked, its log-probability with alternatives."""

    token_id: int
    logprobs: TokenLogprobs | None


class Sampler:
    """Chooses one token a request. `eos_token_ids` are kept back until min_tokens are there."""

    def __init__(self, kernels: Kernels, eos_token_ids: frozenset[int]) -> None:
        self._kernels = kernels
        self._eos = eos_token_ids

    @torch.inference_mode()
    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[SampledToken]:
        """logits [B, V] float32, one row a request, changed in place; returns one token a row."""
        reported = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
        raw = logits[reported] if reported else logits
        for row, request in enumerate(requests):
            if _adjusts(request):
                self._adjust(logits[row], request)
        token_ids = self._choose(logits, requests)
        logprobs: dict[int, TokenLogprobs] = {}
        if reported:
            chosen = [token_ids[row] for row in reported]
            tops = [requests[row].params.logprobs or 0 for row in reported]
            logprobs = dict(zip(reported, self.logprobs(raw, chosen, tops), strict=True))
        return [SampledToken(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)]

    @torch.inference_mode()
    def logprobs(self, logits: Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
        """Log-probability of token_ids [B] under logits [B, V], each with its `tops` most probable alternatives."""
        wanted = torch.tensor(token_ids, device=logits.device)
        chosen = self._kernels.log_softmax_gather(logits, wanted).tolist()
        most = max(tops)
        top_ids: list[list[int]] = [[]] * len(token_ids)
        top_values: list[list[float]] = [[]] * len(token_ids)
        if most:
            values, ids = logits.topk(most, dim=-1)
            # By the same operator as the chosen token's, so that one token never shows two values.
            rows = torch.arange(len(token_ids), device=logits.device).repeat_interleave(most)
            flat = self._kernels.log_softmax_gather(logits[rows], ids.reshape(-1))
            top_ids, top_values = ids.tolist(), flat.view_as(values).tolist()
        return [
            TokenLogprobs(token_id, logprob, list(zip(ids[:top], values[:top], strict=True)))
            for token_id, logprob, ids, values, top in zip(
                token_ids, chosen, top_ids, top_values, tops, strict=True
            )
        ]

    def _choose(self, logits: Tensor, requests: Sequence[Request]) -> list[int]:
        """The most probable token of a row [V] at temperature 0, else one by the request's next random number."""
        drawn = [row for row, request in enumerate(requests) if request.params.temperature != 0.0]
        if not drawn:
            return self._kernels.greedy(logits).tolist()
        all_drawn = len(drawn) == len(requests)
        params = [requests[row].params for row in drawn]
        tokens = self._kernels.draw(
            logits if all_drawn else logits[drawn],
            [each.temperature or 1.0 for each in params],
            [each.top_k or 0 for each in params],
            [each.top_p or 1.0 for each in params],
            [each.min_p for each in params],
            [requests[row].rng.random() for row in drawn],
        )
        if all_drawn:
            return tokens.tolist()
        chosen = self._kernels.greedy(logits)
        chosen[drawn] = tokens
        return chosen.tolist()

    def _adjust(self, logits: Tensor, request: Request) -> None:
        """Applies to one row [V], in place, what changes logits before temperature."""
        params = request.params
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(request.tokens)), device=logits.device)
            scores = logits[seen]
            penalty = float(params.repetition_penalty or 1.0)
            logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
        if (params.presence_penalty or params.frequency_penalty) and request.num_output_tokens:
            output = torch.tensor(request.output_token_ids, device=logits.device)
            ids, counts = output.unique(return_counts=True)
            logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        if request.num_output_tokens < params.min_tokens:
            stops = (set() if params.ignore_eos else self._eos) | set(params.stop_token_ids)
            if stops:
                logits[torch.tensor(sorted(stops), device=logits.device)] = NEVER


def takes_most_probable(request: Request) -> bool:
    """Whether the request wants the token of the highest logit and nothing else."""
    params = request.params
    return params.temperature == 0.0 and params.logprobs is None and not _adjusts(request)


def _adjusts(request: Request) -> bool:
    params = request.params
    return bool(
        params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or request.num_output_tokens < params.min_tokens
    )
