"""Cross-entropy of a head over a piece of the vocabulary at a time: the logits are never there as a whole.

loss[t] = log Σ_v exp(l[t, v]) − l[t, target[t]] of logits l[t, v] = x[t] · w[v] + b[v], soft-capped where there is a
cap, with the sum joined over pieces as in the online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867). Backwards,
the pieces are computed again: dx = ((softmax − onehot) · l') w, with l' = 1 − (l / cap)² or 1.

The divergence of q = softmax(x · w + b) from a distribution p is as cheap, since a logit is linear in x:
KL(p ‖ q) = Σ_v p_v log p_v − Σ_v p_v b_v − x · (Σ_v p_v w_v) + log Σ_v exp(x · w_v + b_v), and of p that needs one row
a token. Capped logits are not linear: there the states that gave p are kept instead, and p is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits at once: 512 rows of 4,096 entries in float32 are 8 MiB, which a processor's caches hold.
_ROWS = 512
_ENTRIES = 4096


def linear_cross_entropy(
    states: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Losses [T] in nats, float32, of states [T, E] under weight [V, E] and bias [V] for targets [T] int64.

    softcap: logits l become softcap · tanh(l / softcap). Differentiable with respect to the states alone.
    """
    losses: Tensor = _LinearCrossEntropy.apply(states, weight, targets, bias, softcap)
    return losses


def _pieces(
    states: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """First entry, rows of the weight and logits [T, at most _ENTRIES] in float32, computed in `dtype`."""
    for start in range(0, len(weight), _ENTRIES):
        part = weight[start : start + _ENTRIES].to(dtype)
        logits = F.linear(states, part).float()
        if bias is not None:
            logits += bias[start : start + _ENTRIES].float()
        yield start, part, logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None
    ) -> Tensor:
        normalizers, chosen = [], []
        for rows, wanted in zip(states.split(_ROWS), targets.split(_ROWS), strict=True):
            normalizer = torch.full(wanted.shape, -torch.inf, device=states.device)
            logit = torch.zeros_like(normalizer)
            for start, _, logits in _pieces(rows, weight, bias, softcap, weight.dtype):
                normalizer = torch.logaddexp(normalizer, logits.logsumexp(-1))
                index = (wanted - start).clamp(0, logits.shape[1] - 1)
                here = (wanted >= start) & (wanted < start + logits.shape[1])
                logit = torch.where(here, logits.gather(1, index[:, None])[:, 0], logit)
            normalizers.append(normalizer)
            chosen.append(logit)
        normalizer, logit = torch.cat(normalizers), torch.cat(chosen)
        ctx.save_for_backward(states, weight, targets, bias, normalizer, logit)
        ctx.softcap = softcap
        return normalizer - logit

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, targets, bias, *rest = ctx.saved_tensors
        cap = ctx.softcap
        pieces = [each.split(_ROWS) for each in (states, targets, *rest, gradient)]
        result = []
        for rows, wanted, norm, logit, factor in zip(*pieces, strict=True):
            total = torch.zeros(rows.shape, device=rows.device)
            for _, part, logits in _pieces(rows, weight, bias, cap, weight.dtype):
                softmax = (logits - norm[:, None]).exp()
                if cap is not None:
                    softmax *= 1 - (logits / cap).square()
                total += (softmax.to(part.dtype) @ part).float()
            slope = 1.0 if cap is None else 1 - (logit / cap).square()[:, None]
            result.append((total - slope * weight[wanted].float()) * factor[:, None])
        return torch.cat(result).to(states.dtype), None, None, None, None


@torch.no_grad()
def expected_rows(
    states: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Of p = softmax of the logits of states [T, E] under weight [V, E] what `linear_divergence` needs, both float32.

    Σ_v p_v w_v [T, E] and Σ_v p_v (log p_v − b_v) [T]; with a soft cap the states and their log-normalisers.
    """
    first, second = [], []
    for some in states.float().split(_ROWS):
        normalizer = _logsumexp(some, weight, bias, softcap)
        if softcap is not None:
            first.append(some)
            second.append(normalizer)
            continue
        row = torch.zeros_like(some)
        for _, part, logits in _pieces(some, weight, bias, None, torch.float32):
            row += (logits - normalizer[:, None]).exp() @ part
        first.append(row)
        second.append((row * some).sum(-1) - normalizer)
    return torch.cat(first), torch.cat(second)


@torch.no_grad()
def linear_divergence(
    states: Tensor,
    weight: Tensor,
    rows: Tensor,
    constants: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) [T] in nats of q = softmax of the logits of `states` from the p of `expected_rows`, and q's
    cross-entropy [T] for `targets` [T] int64; float32, whatever the inputs: a divergence is a small difference of large
    numbers."""
    states = states.float()
    normalizer = torch.cat([_logsumexp(some, weight, bias, softcap) for some in states.split(_ROWS)])
    chosen = (states * weight[targets].float()).sum(-1)
    if bias is not None:
        chosen += bias[targets].float()
    if softcap is None:
        divergences = constants - (states * rows).sum(-1) + normalizer
    else:
        chosen = softcap * torch.tanh(chosen / softcap)
        shares = [each.split(_ROWS) for each in (states, rows, constants)]
        kept = [
            _shared(own, dense, norm, weight, bias, softcap) for own, dense, norm in zip(*shares, strict=True)
        ]
        divergences = torch.cat(kept) - constants + normalizer
    return divergences.clamp_min(0), normalizer - chosen  # a NaN stays one


def _shared(
    states: Tensor, others: Tensor, normalizer: Tensor, weight: Tensor, bias: Tensor | None, softcap: float
) -> Tensor:
    """Σ_v p_v (l_v − k_v) [T], with p and l of `others` and k of `states`."""
    total = torch.zeros_like(normalizer)
    both = (_pieces(each, weight, bias, softcap, torch.float32) for each in (states, others))
    for (_, _, own), (_, _, dense) in zip(*both, strict=True):
        total += torch.linalg.vecdot((dense - normalizer[:, None]).exp(), dense - own)
    return total


def _logsumexp(states: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """log Σ_v exp(l_v) [T] of states [T, E] float32."""
    normalizer = torch.full(states.shape[:1], -torch.inf, device=states.device)
    for _, _, logits in _pieces(states, weight, bias, softcap, torch.float32):
        normalizer = torch.logaddexp(normalizer, logits.logsumexp(-1))
    return normalizer
