"""Activation-aware weight quantisation (Lin et al. 2023, arXiv 2306.00978) of a Llama, as its tools write one.

Inputs of large activations get finer steps: W is multiplied by s = mean|x|^a and the module before divided by it, with
the a of [0, 1) for which the rounded product is nearest. Then each group's range is cut where that brings its outputs
nearer; of queries and keys it is not. Four bits, asymmetric, by groups; embedding, head and norms stay as they are.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_STEPS, _ROWS = 20, 1024  # of either search; activations that it sees
_SHARES = torch.linspace(1, 0.5, _STEPS + 1)[:-1]


def codes(weight: Tensor, size: int, share: Tensor | float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, G, size], scale and zero point [N, G, 1] of a weight [N, K] whose ranges are cut to `share` of them."""
    groups = weight.view(len(weight), -1, size)
    low, high = (groups.amin(2, True) * share).clamp(max=0), (groups.amax(2, True) * share).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-5).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    return ((groups / scale).round() + zero).clamp(0, 15), scale, zero


def rounded(weight: Tensor, size: int, share: Tensor | float = 1.0) -> Tensor:
    """What the codes of a weight stand for, [N, G, size]."""
    q, scale, zero = codes(weight, size, share)
    return (q - zero) * scale


def best_scales(weight: Tensor, x: Tensor, size: int) -> Tensor:
    """s [K] for inputs x [T, K] of a weight [N, K]."""
    wanted, magnitude, found = x @ weight.t(), x.abs().mean(0).clamp(min=1e-4), []
    for step in range(_STEPS):
        scales = magnitude ** (step / _STEPS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = ((x / scales) @ rounded(weight * scales, size).flatten(1).t() - wanted).square().mean()
        found.append((float(error), step, scales))
    return min(found)[2]


def best_shares(weight: Tensor, x: Tensor, size: int) -> Tensor:
    """The share of each group's range [N, G, 1], from a half to all, that brings its outputs nearest."""
    x, groups = (
        x[::8].reshape(-1, x.shape[1] // size, size).transpose(0, 1),
        weight.view(len(weight), -1, size),
    )
    gaps = ((rounded(weight, size, float(share)) - groups).transpose(0, 1) for share in _SHARES)
    errors = [torch.bmm(gap, x.transpose(1, 2)).square().mean(2).t() for gap in gaps]
    return _SHARES[torch.stack(errors).argmin(0)][..., None]


@torch.inference_mode()
def quantise(source: Path, windows: Tensor, target: Path, size: int) -> None:
    """Writes the model of `source`, quantised on windows [W, L] of tokens, to the folder `target`."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    linears = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
    seen, stride = defaultdict[Any, list[Tensor]](list), max(1, windows.numel() // _ROWS)
    for linear in linears.values():
        linear.register_forward_pre_hook(
            lambda module, x: seen[module].append(x[0].flatten(0, 1)[::stride].clone())
        )
    for window in windows:
        model.model(window[None])
    inputs = {module: torch.cat(parts) for module, parts in seen.items()}

    def scale(modules: Sequence[Any], before: Tensor) -> None:
        scales = best_scales(torch.cat([module.weight for module in modules]), inputs[modules[0]], size)
        before.div_(scales if before.dim() == 1 else scales[:, None])
        for module in modules:
            module.weight.mul_(scales)
            inputs[module] = inputs[module] / scales

    def words(q: Tensor) -> Tensor:  # [N, K] to [K, N / 8], the columns of a word in AWQ's order
        nibbles = q.t().long().reshape(q.shape[1], -1, 8)[..., (0, 2, 4, 6, 1, 3, 5, 7)]
        packed: Tensor = (nibbles << torch.arange(0, 32, 4)).sum(-1)
        return packed.to(torch.int32)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        scale([attention.q_proj, attention.k_proj, attention.v_proj], layer.input_layernorm.weight)
        scale([mlp.gate_proj, mlp.up_proj], layer.post_attention_layernorm.weight)
        scale([mlp.down_proj], mlp.up_proj.weight)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    for name, linear in linears.items():
        whole = name.endswith(("q_proj", "k_proj"))
        q, step, zero = codes(
            linear.weight, size, 1.0 if whole else best_shares(linear.weight, inputs[linear], size)
        )
        del tensors[f"{name}.weight"]
        tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"] = words(q.flatten(1)), words(zero[..., 0])
        tensors[f"{name}.scales"] = step[..., 0].t().half().contiguous()
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*", ".*"))
    save_file(tensors, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
