"""A mixture of experts in plain torch (Shazeer et al. 2017, arXiv 1701.06538): which experts a token gets, and what
they make of it.

T tokens, E hidden size, N experts, k of them a token, I features inside one. The matrices of all experts lie under one
another, expert by expert: up [N · G, E], where G is 2I if gated (gate, then up) and I if not, and down [N · E, I].
"""

from __future__ import annotations

import torch
from torch import Tensor

from sleb.kernels.quantization import Weight, rows_of
from sleb.kernels.reference.ops import activate, gated_activate, linear


def route(
    logits: Tensor, top_k: int, normalised: bool, correction: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits [T, N] of the router to each token's experts [T, k] int64 and their shares [T, k] float32.

    The shares are a softmax over all experts; normalised: divided by their sum, which makes it one over the chosen
    alone. correction [N] is added for the choice, and not to the shares (arXiv 2408.15664).
    """
    scores = logits.float().softmax(dim=-1)
    chosen = (scores if correction is None else scores + correction).topk(top_k, dim=-1).indices
    shares = scores.gather(-1, chosen)
    return chosen, shares / shares.sum(dim=-1, keepdim=True) if normalised else shares


def mix_experts(
    x: Tensor,
    up: Weight,
    up_bias: Tensor | None,
    down: Weight,
    down_bias: Tensor | None,
    chosen: Tensor,
    shares: Tensor,
    num_experts: int,
    activation: str,
    gated: bool,
) -> Tensor:
    """Each token's sum, over its experts, of share · down(activation(up(x))): x [T, E] to [T, E].

    chosen, shares: [T, k], as `route` gives them. Sums are in float32. An expert that no token has is not read.
    """
    inner, width = up.shape[0] // num_experts, x.shape[1]
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in chosen.unique().tolist():
        tokens, places = (chosen == expert).nonzero(as_tuple=True)
        hidden = _part(x[tokens], up, up_bias, expert, inner)
        hidden = gated_activate(hidden, activation) if gated else activate(hidden, activation)
        update = _part(hidden, down, down_bias, expert, width)
        total.index_add_(0, tokens, update.float() * shares[tokens, places, None])
    return total.to(x.dtype)


def _part(x: Tensor, weight: Weight, bias: Tensor | None, expert: int, size: int) -> Tensor:
    start, stop = expert * size, (expert + 1) * size
    return linear(x, rows_of(weight, start, stop), None if bias is None else bias[start:stop])
