"""Cross-entropy of a linear head over a piece of the vocabulary at a time: the logits are never there as a whole.

loss[t] = log Σ_v exp(x[t] · w[v]) − x[t] · w[target[t]], with the sum joined over pieces as in the online softmax
(Milakov & Gimelshein 2018, arXiv:1805.02867). Backwards, the pieces are computed again: dx = (softmax − onehot) w.

The divergence of softmax(x · w) from a distribution p is as cheap, since a logit is linear in x:
KL(p ‖ softmax) = Σ_v p_v log p_v − x · (Σ_v p_v w_v) + log Σ_v exp(x · w_v), and of p that needs one row a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits at once: 512 rows of 4,096 entries in float32 are 8 MiB, which a processor's caches hold.
_ROWS = 512
_ENTRIES = 4096


def linear_cross_entropy(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Losses [T] in nats, float32, of states [T, E] under weight [V, E] for targets [T] int64.

    Differentiable with respect to the states alone.
    """
    losses: Tensor = _LinearCrossEntropy.apply(states, weight, targets)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        normalizers, chosen = [], []
        for rows, wanted in zip(states.split(_ROWS), targets.split(_ROWS), strict=True):
            normalizer = torch.full(wanted.shape, -torch.inf, device=states.device)
            logit = torch.zeros_like(normalizer)
            for start in range(0, len(weight), _ENTRIES):
                logits = F.linear(rows, weight[start : start + _ENTRIES]).float()
                normalizer = torch.logaddexp(normalizer, logits.logsumexp(-1))
                index = (wanted - start).clamp(0, logits.shape[1] - 1)
                here = (wanted >= start) & (wanted < start + logits.shape[1])
                logit = torch.where(here, logits.gather(1, index[:, None])[:, 0], logit)
            normalizers.append(normalizer)
            chosen.append(logit)
        normalizer = torch.cat(normalizers)
        ctx.save_for_backward(states, weight, targets, normalizer)
        return normalizer - torch.cat(chosen)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        states, weight, targets, normalizer = ctx.saved_tensors
        pieces = [each.split(_ROWS) for each in (states, targets, normalizer, gradient)]
        result = []
        for rows, wanted, norm, factor in zip(*pieces, strict=True):
            total = torch.zeros(rows.shape, device=rows.device)
            for start in range(0, len(weight), _ENTRIES):
                part = weight[start : start + _ENTRIES]
                softmax = (F.linear(rows, part).float() - norm[:, None]).exp()
                total += (softmax.to(part.dtype) @ part).float()
            result.append((total - weight[wanted].float()) * factor[:, None])
        return torch.cat(result).to(states.dtype), None, None


@torch.no_grad()
def expected_rows(states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of p = softmax(states @ weight.T), states [T, E] and weight [V, E]: Σ_v p_v w_v [T, E] and Σ_v p_v log p_v [T],
    both float32: what `linear_divergence` needs of p."""
    rows, negentropies = [], []
    for some in states.float().split(_ROWS):
        normalizer = _logsumexp(some, weight)
        row = torch.zeros_like(some)
        for start in range(0, len(weight), _ENTRIES):
            part = weight[start : start + _ENTRIES].float()
            row += (some @ part.T - normalizer[:, None]).exp() @ part
        rows.append(row)
        negentropies.append((row * some).sum(-1) - normalizer)
    return torch.cat(rows), torch.cat(negentropies)


@torch.no_grad()
def linear_divergence(
    states: Tensor, weight: Tensor, rows: Tensor, negentropies: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) [T] in nats of q = softmax(states @ weight.T) from the p of `expected_rows`, and q's cross-entropy [T]
    for `targets` [T] int64; float32, whatever the inputs: a divergence is a small difference of large numbers."""
    states = states.float()
    normalizer = torch.cat([_logsumexp(some, weight) for some in states.split(_ROWS)])
    divergences = negentropies - (states * rows).sum(-1) + normalizer
    losses = normalizer - (states * weight[targets].float()).sum(-1)
    return divergences.clamp_min(0), losses  # a NaN stays one


def _logsumexp(states: Tensor, weight: Tensor) -> Tensor:
    """log Σ_v exp(x · w_v) [T] of states [T, E] float32."""
    normalizer = torch.full(states.shape[:1], -torch.inf, device=states.device)
    for start in range(0, len(weight), _ENTRIES):
        logits = states @ weight[start : start + _ENTRIES].float().T
        normalizer = torch.logaddexp(normalizer, logits.logsumexp(-1))
    return normalizer
