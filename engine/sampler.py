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
        greedy = self._kernels.greedy(logits)
        drawn = [row for row, request in enumerate(requests) if request.params.temperature != 0.0]
        if drawn:
            greedy[drawn] = _draw(logits[drawn], [requests[row] for row in drawn])
        token_ids: list[int] = greedy.tolist()
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


def _draw(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """One token a row by inverting the cumulative distribution at the request's own random number: [B] int64."""
    device = logits.device
    temperatures = [float(request.params.temperature or 1.0) for request in requests]
    divisors = torch.tensor(temperatures, dtype=torch.float64, device=device)
    # Relative to the highest, so that the smallest temperature divides 0 and no overflow meets another.
    relative = logits.double() - logits.amax(dim=-1, keepdim=True)
    probabilities = _filter(relative / divisors[:, None], requests).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    points = torch.tensor([request.rng.random() for request in requests], dtype=torch.float64, device=device)
    # Strictly greater, so that a token of probability 0 is never met; the rounded end is caught by the clamp.
    chosen = torch.searchsorted(cumulative, points[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    last = cumulative.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(chosen, last)


def _filter(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """min-p, then top-k, then top-p on logits [B, V] already divided by the temperature; removed ones are −inf."""
    min_p = torch.tensor(
        [request.params.min_p for request in requests], dtype=logits.dtype, device=logits.device
    )
    if bool((min_p > 0).any()):  # a probability ratio is a difference of logits (arXiv 2407.01082)
        floor = logits.amax(dim=-1, keepdim=True) + min_p.log()[:, None]
        logits = logits.masked_fill(logits < floor, NEVER)
    rows = [row for row, request in enumerate(requests) if _cuts(request)]
    if not rows:
        return logits
    ordered, order = logits[rows].sort(dim=-1, descending=True)
    top_k = torch.tensor([_top_k(requests[row], logits.shape[-1]) for row in rows], device=logits.device)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    ordered = ordered.masked_fill(ranks >= top_k[:, None], NEVER)
    top_p = torch.tensor([float(requests[row].params.top_p or 1.0) for row in rows], device=logits.device)
    shares = ordered.softmax(dim=-1)
    before = shares.cumsum(dim=-1) - shares  # the token that crosses top_p stays, and always the first
    ordered = ordered.masked_fill((before >= top_p[:, None]) & (ranks > 0), NEVER)
    logits = logits.clone()
    logits[rows] = torch.full_like(ordered, NEVER).scatter(-1, order, ordered)
    return logits


def _cuts(request: Request) -> bool:
    return (request.params.top_k or 0) > 0 or (request.params.top_p or 1.0) < 1.0


def _top_k(request: Request, vocab_size: int) -> int:
    top_k = request.params.top_k or 0
    return top_k if top_k > 0 else vocab_size
