"""Tables of rotary angles for every scaling rule that a checkpoint's config can name."""

from __future__ import annotations

import torch
from torch import Tensor

from sleb.engine.model.architecture import DecoderSpec
from sleb.errors import ModelError


def rotary_tables(spec: DecoderSpec, max_model_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each [max_model_len, rotary_dim / 2] float32, scaled as the checkpoint asks.

    The frequencies are transformers' own (`ROPE_INIT_FUNCTIONS`): linear, llama3, yarn and longrope. longrope has
    two sets; one server uses one of them, the long set if max_model_len goes past the original context, because
    keys in the cache cannot change their angles. Raises ModelError for rules whose angles depend on the length
    reached so far.
    """
    inverse_frequencies, scaling = _inverse_frequencies(spec, max_model_len)
    positions = torch.arange(max_model_len, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies.float())
    return (angles.cos() * scaling).to(device), (angles.sin() * scaling).to(device)


def _inverse_frequencies(spec: DecoderSpec, max_model_len: int) -> tuple[Tensor, float]:
    parameters = spec.config.rope_parameters
    rule = parameters.get("rope_type", "default")
    if rule == "default":
        rotary_dim = int(spec.head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0
    if rule not in ("linear", "llama3", "yarn", "longrope"):
        raise ModelError(
            f"rope scaling '{rule}' is not supported; sleb knows default, linear, llama3, yarn and longrope"
        )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scaling = ROPE_INIT_FUNCTIONS[rule](spec.config, torch.device("cpu"), seq_len=max_model_len)
    return frequencies, float(scaling)
