"""Cross-entropy of a linear head over a piece of the vocabulary at a time: the logits are never there as a whole.

loss[t] = log Σ_v exp(x[t] · w[v]) − x[t] · w[target[t]], with the sum joined over pieces as in the online softmax
(Milakov & Gimelshein 2018, arXiv:1805.02867). Backwards, the pieces are computed again: dx = (softmax − onehot) w.
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
