"""Patches in the terms of a decoder's own sublayers, for formats that know nothing else.

A normed patch h + W φ(h) + b is an attention that a linear layer replaces, or an MLP: for SiLU, GELU and ReLU
a(x) − a(−x) = x, so two neurons, whose rows differ in the sign, pass a feature on as it is. With W = U D:

    gate = [D; −D], bias 0      up = 0, bias 1 (where the MLP is gated)      down = [U, −U], bias b

The norm before either has the weight 1. Nothing is approximated; what rounds is written in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sleb.engine.model.architecture import DecoderSpec
from sleb.errors import ConfigError
from sleb.formats.safetensors_copy import LocatedTensor
from sleb.layer_map.patches import Patch
from sleb.models.families import FAMILIES

Array = np.ndarray[Any, np.dtype[Any]]
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def check_exact(spec: DecoderSpec, patches: Iterable[Patch], notation: str) -> None:
    """Raises ConfigError for patches that no sublayer of the model computes, and where MLPs have no biases."""
    patches = tuple(patches)
    lack = "the activation is relu2" if spec.activation == "relu2" else no_room(spec)  # a(x) − a(−x) is not x
    if patches and lack:
        raise ConfigError(f"{lack} in {spec.architecture}, which computes no patch: use --patches drop")
    if patches and notation != "decilm" and not (spec.mlp_bias or biases_field(spec)):
        raise ConfigError(
            f"the MLPs of {spec.architecture} have no biases here, which format {notation} needs to hold patches: "
            "use --format hf with --patches merge, or --patches drop"
        )
    for patch in patches:
        if not patch.normed:
            what = "a scale" if patch.form == "scale" else "a map"
            raise ConfigError(
                f"{patch.where} is {what} of the residual stream as it is, but all that format {notation} computes "
                "comes after a norm: fit with `sleb patch --patch full` or low-rank, or use "
                "--format hf with --patches merge"
            )


def no_room(spec: DecoderSpec, *, plain: bool = True) -> str | None:
    """Why no sublayer of the model computes what a patch does, or None. Not `plain`: it may be one whose update is
    scaled, or whose matrices are transposed."""
    odd = {
        "norms stand after the residual add": not spec.norm_first,
        "no norms stand before attention and MLP": not spec.pre_norm,
        "what attention and MLP add is normed": spec.post_norm,
        "what attention and MLP add is scaled": plain and spec.residual_scale != 1.0,
        "attention and MLP read the same residual": spec.parallel,
        "matrices are transposed": plain and spec.transposed,
        "MLPs are mixtures of experts": spec.experts is not None,
    }
    return next((reason for reason, is_so in odd.items() if is_so), None)


def factors(patch: Patch) -> tuple[Array, Array]:
    """D [r, E] and U [E, r] of a patch that is no scale, W = U D, float32; a full patch's D is the identity."""
    if patch.form == "full":
        weight = patch.tensors["weight"].astype(np.float32)
        return np.eye(len(weight), dtype=np.float32), weight
    return patch.tensors["down"].astype(np.float32), patch.tensors["up"].astype(np.float32)


def as_mlp(spec: DecoderSpec, down: Array, up: Array, bias: Array, num_neurons: int) -> dict[str, Array]:
    """By names in the block, an MLP of `num_neurons`, 2 r or more, that adds up · down · φ(h) + bias."""
    names, rank = spec.names, len(down)
    gate = np.zeros((num_neurons, spec.hidden_size), np.float32)
    gate[:rank], gate[rank : 2 * rank] = down, -down
    out = np.zeros((spec.hidden_size, num_neurons), np.float32)
    out[:, :rank], out[:, rank : 2 * rank] = up, -up
    first, *second = names.up
    tensors = {f"{first}.weight": gate, f"{first}.bias": np.zeros(num_neurons, np.float32)}
    for name in second:
        tensors |= {f"{name}.weight": np.zeros_like(gate), f"{name}.bias": np.ones(num_neurons, np.float32)}
    tensors |= {f"{names.down}.weight": out, f"{names.down}.bias": bias.astype(np.float32)}
    return tensors | plain_norm(spec, names.mlp_norm)


def plain_norm(spec: DecoderSpec, name: str | None) -> dict[str, Array]:
    """The tensors of a norm that only divides, if there is one of that name."""
    if name is None or not spec.norm_affine:
        return {}
    tensors = {f"{name}.weight": np.full(spec.hidden_size, 1.0 - spec.norm_shift, np.float32)}
    if spec.norm_bias:
        tensors[f"{name}.bias"] = np.zeros(spec.hidden_size, np.float32)
    return tensors


def biases_field(spec: DecoderSpec) -> dict[str, bool]:
    """What the config.json says so that MLPs, and nothing else, have biases; nothing where it cannot say that."""
    return {"mlp_bias": True} if FAMILIES[spec.architecture].mlp_bias == "mlp_bias" else {}


def zero_biases(spec: DecoderSpec, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the biases, all zero, of an MLP that has none."""
    sizes = {**dict.fromkeys(spec.names.up, spec.intermediate_size), spec.names.down: spec.hidden_size}
    return {f"{prefix}.{name}.bias": (size,) for name, size in sizes.items()}


def made_tensors(tensors: Mapping[str, Array], dtype: str, *, rounded: bool) -> list[LocatedTensor]:
    """Tensors of our own in the checkpoint's `dtype`, or, unless `rounded`, in float32 where that changes a value."""
    made = []
    for name, array in tensors.items():
        value = torch.from_numpy(np.ascontiguousarray(array, np.float32))
        small = value.to(_DTYPES.get(dtype, torch.float32))
        exact = dtype in _DTYPES and (rounded or torch.equal(small.float(), value))
        data = (small if exact else value).view(torch.uint8).numpy().tobytes()
        chosen = dtype if exact else "F32"
        made.append(LocatedTensor(name, chosen, array.shape, Path(), 0, len(data), data=data))
    return made


def zero_tensors(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> list[LocatedTensor]:
    """Zeros in `dtype`."""
    size = _DTYPES.get(dtype, torch.float32).itemsize
    chosen = dtype if dtype in _DTYPES else "F32"
    return [
        LocatedTensor(name, chosen, shape, Path(), 0, size * int(np.prod(shape)), zero=True)
        for name, shape in shapes.items()
    ]
