"""From logits to tokens: penalties, bias, grammars, temperature, filters, one random number per request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sleb.engine.execute.grammar_masks import TokenMasks
from sleb.engine.execute.transfer import HostCopy, to_device
from sleb.engine.outputs import TokenLogprobs
from sleb.engine.requests.request import Request
from sleb.kernels.registry import Kernels

NEVER = float("-inf")


class SampledToken(NamedTuple):
    """A chosen token, or NO_TOKEN, and if the request asked, its log-probability with alternatives."""

    token_id: int
    logprobs: TokenLogprobs | None


class PendingLogprobs:
    """Log-probabilities of tokens [B] with their most probable alternatives, on their way from the device."""

    def __init__(
        self, token_ids: Tensor, chosen: Tensor, top_ids: Tensor, top_values: Tensor, tops: Sequence[int]
    ) -> None:
        self._tops = tops
        self._copy = HostCopy(token_ids, chosen, top_ids, top_values)

    def read(self) -> list[TokenLogprobs]:
        """One entry a token; waits for the device."""
        return [
            TokenLogprobs(token_id, logprob, list(zip(ids[:top], values[:top], strict=True)))
            for token_id, logprob, ids, values, top in zip(*self._copy.read(), self._tops, strict=True)
        ]


class SampledBatch:
    """One token a request, on its way from the device.

    Attributes:
        token_ids: [B] int64 on the device, what the next step computes.
    """

    def __init__(
        self, token_ids: Tensor, reported: Sequence[int] = (), logprobs: PendingLogprobs | None = None
    ) -> None:
        self.token_ids = token_ids
        self._copy = HostCopy(token_ids)
        self._reported = reported
        self._logprobs = logprobs

    def read(self) -> list[SampledToken]:
        """The tokens, with log-probabilities where they were asked for; waits for the device."""
        [token_ids] = self._copy.read()
        entries: dict[int, TokenLogprobs] = {}
        if self._logprobs is not None:
            entries = dict(zip(self._reported, self._logprobs.read(), strict=True))
        if not entries:
            return [SampledToken(token_id, None) for token_id in token_ids]
        return [SampledToken(token_id, entries.get(row)) for row, token_id in enumerate(token_ids)]


@dataclass(frozen=True)
class _Bias:
    """A `logit_bias` on the device; `given` is kept, so that no other mapping gets its identity."""

    given: Mapping[int, float]
    token_ids: Tensor
    values: Tensor

    @classmethod
    def of(cls, given: Mapping[int, float], beside: Tensor) -> _Bias:
        ids = to_device(list(given), torch.int64, beside.device)
        return cls(given, ids, to_device(list(given.values()), torch.float32, beside.device))


class Sampler:
    """Chooses one token a request. `eos_token_ids` are kept back until min_tokens are there."""

    def __init__(self, kernels: Kernels, eos_token_ids: frozenset[int]) -> None:
        self._kernels = kernels
        self._eos = eos_token_ids
        self._biases: dict[int, _Bias] = {}  # of the last batch, by the mapping's identity: choices share one

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, requests: Sequence[Request], masks: TokenMasks | None = None
    ) -> SampledBatch:
        """logits [B, V] float32, one row a request, changed in place; one token a row.

        masks: of the requests that follow a grammar (`sleb.engine.execute.grammar_masks.fill_masks`).
        """
        reported = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
        adjusted = [row for row, request in enumerate(requests) if request.adjusts_logits]
        raw = logits
        if len(reported) < len(requests):
            raw = logits[self._rows(reported, logits)] if reported else logits
        elif adjusted:
            raw = logits.clone()
        self._keep_biases([requests[row] for row in adjusted], logits)
        for row in adjusted:
            self._adjust(logits[row], requests[row])
        if masks is not None:
            masks.apply(logits)
        token_ids = self._choose(logits, requests)
        if not reported:
            return SampledBatch(token_ids)
        chosen = token_ids if len(reported) == len(requests) else token_ids[self._rows(reported, logits)]
        tops = [requests[row].params.logprobs or 0 for row in reported]
        return SampledBatch(token_ids, reported, self.logprobs(raw, chosen, tops))

    @torch.inference_mode()
    def logprobs(self, logits: Tensor, token_ids: Tensor, tops: Sequence[int]) -> PendingLogprobs:
        """Log-probability of token_ids [B] under logits [B, V], each with its `tops` most probable alternatives."""
        token_ids = token_ids.clamp(min=0)  # NO_TOKEN has none, and is not reported
        top_ids = logits.topk(max(tops), dim=-1).indices
        # All by one call, so that one token never shows two values.
        gathered = self._kernels.log_softmax_gather(logits, torch.cat((token_ids[:, None], top_ids), dim=1))
        return PendingLogprobs(token_ids, gathered[:, 0], top_ids, gathered[:, 1:], tops)

    def _choose(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        """The most probable token of a row [V] at temperature 0, else one by the request's next random number: [B]."""
        sampled = [row for row, request in enumerate(requests) if request.params.temperature != 0.0]
        if not sampled:
            return self._kernels.greedy(logits)
        all_sampled = len(sampled) == len(requests)
        params = [requests[row].params for row in sampled]
        rows = None if all_sampled else self._rows(sampled, logits)
        tokens = self._kernels.sample(
            logits if rows is None else logits[rows],
            [each.temperature or 1.0 for each in params],
            [each.top_k or 0 for each in params],
            [each.top_p or 1.0 for each in params],
            [each.min_p or 0.0 for each in params],
            [requests[row].rng.random() for row in sampled],
        )
        if rows is None:
            return tokens
        return self._kernels.greedy(logits).index_copy(0, rows, tokens)

    def _keep_biases(self, requests: Sequence[Request], beside: Tensor) -> None:
        given = {id(bias): bias for request in requests if (bias := request.params.logit_bias)}
        self._biases = {key: self._biases.get(key) or _Bias.of(bias, beside) for key, bias in given.items()}

    @staticmethod
    def _rows(rows: Sequence[int], beside: Tensor) -> Tensor:
        return to_device(rows, torch.int64, beside.device)

    def _adjust(self, logits: Tensor, request: Request) -> None:
        """Applies to one row [V], in place, what changes logits before temperature."""
        params = request.params
        if params.repetition_penalty != 1.0:
            seen = to_device(sorted(set(request.tokens)), torch.int64, logits.device)
            scores = logits[seen]
            penalty = float(params.repetition_penalty or 1.0)
            logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
        if (params.presence_penalty or params.frequency_penalty) and request.num_output_tokens:
            counts = Counter(request.output_token_ids)
            ids = to_device(list(counts), torch.int64, logits.device)
            times = to_device(list(counts.values()), torch.float32, logits.device)
            logits[ids] -= params.presence_penalty + params.frequency_penalty * times
        if params.logit_bias:
            bias = self._biases[id(params.logit_bias)]
            logits.index_add_(0, bias.token_ids, bias.values)
        if request.grammar is None and request.num_sampled < params.min_tokens:
            stops = (set() if params.ignore_eos else self._eos) | set(params.stop_token_ids)
            if stops:
                logits.index_fill_(0, to_device(sorted(stops), torch.int64, logits.device), NEVER)
