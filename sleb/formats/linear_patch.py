"""LinearPatch's matrix (arXiv 2505.24680, github.com/chenxinrui-tsinghua/LinearPatch): what stands for a run of blocks.

    {"scale_params": [E], "symmetric_weight": [E, E], "start_l": 21, "end_l": 28, "rotate": True}

Blocks start_l to end_l − 1 are left out, and the residual stream behind block start_l − 1 is multiplied by the matrix,
with tokens as rows (block_scaling.py). main_distill.py writes it as a pickle, scales.pt; what is read is a safetensors
file with the same names, as `CONVERT` makes it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sleb.errors import LayerMapError
from sleb.fields import Fields
from sleb.formats.removal import Imported
from sleb.layer_map.patches import Patch
from sleb.layer_map.units import MAX_BLOCKS, Unit
from sleb.models.weight_files import opened

CONVERT = (
    'python -c "import torch; from safetensors.torch import save_file; '
    "save_file({name: torch.as_tensor(value).contiguous() for name, value in torch.load('scales.pt').items()}, "
    "'scales.safetensors')\""
)
_MAX_WIDTH = 1 << 15  # twice that of the widest published models
_FLOATS = ("F16", "BF16", "F32", "F64")


def read_linear_patch(path: Path) -> Imported:
    """The run of blocks, in their order, and the patch that stands for it once all are gone.

    Raises LayerMapError, and ModelError for a file that is not readable.
    """
    with opened(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        names = {"symmetric_weight", "start_l", "end_l"}
        if not names <= parts.keys():
            raise LayerMapError(
                f"it holds no {', '.join(sorted(names - parts.keys()))}, which LinearPatch writes"
            )
        shape = tuple(parts["symmetric_weight"].get_shape())
        square = len(shape) == 2 and shape[0] == shape[1] and 1 <= shape[0] <= _MAX_WIDTH
        if not square or parts["symmetric_weight"].get_dtype() not in _FLOATS:
            raise LayerMapError(
                f"symmetric_weight has the shape {shape} and the type {parts['symmetric_weight'].get_dtype()}; it must "
                f"be a square matrix of floats, of up to {_MAX_WIDTH:,} rows"
            )
        numbers = {
            name: file.get_tensor(name).item()
            for name in ("start_l", "end_l")
            if parts[name].get_shape() in ([], [1])
        }
        weight = file.get_tensor("symmetric_weight").to(torch.float32).numpy()
    fields = Fields(numbers, path.name, LayerMapError)
    start = fields.integer("start_l", 1, MAX_BLOCKS)
    end = fields.integer("end_l", start + 1, MAX_BLOCKS)
    tensors = {
        "weight": weight.T - np.eye(len(weight), dtype=np.float32),
        "bias": np.zeros(len(weight), np.float32),
    }
    patch = Patch((start, "attention"), (end - 1, "mlp"), end - start, None, "full", False, tensors)
    return Imported(
        tuple(map(Unit, range(start, end))),
        source="LinearPatch (arXiv 2505.24680)",
        patches=(patch,),
        notes=("the patch stands where all of these blocks are gone: depths between have none",)
        if end - start > 1
        else (),
    )
