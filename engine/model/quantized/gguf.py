"""Matrices of a GGUF file that its conversion has kept in their blocks; see `sleb.models.gguf.blocks`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sleb.engine.model.quantized.formats import Decoded, Format, Module, Parts, Plan
from sleb.kernels.quantization import GroupedWeight, Groups
from sleb.models.gguf.blocks import BLOCKS, Block, kept_end


def _plan(end: str, block: Block) -> Callable[[Module], Plan]:
    groups = Groups(block.bits, block.group, "minimum" if block.has_minimum else "middle")

    def plan(module: Module) -> Plan:
        num_rows, num_bytes = module.shape(end, None, None, dtypes=("U8",))
        if num_bytes % block.num_bytes:
            raise module.wrong(end, f"of rows of whole blocks of {block.num_bytes} bytes")

        def decode(parts: Parts) -> Decoded:
            q, scale, minimum = block.decode(parts[end].numpy().reshape(num_rows, -1, block.num_bytes))
            tensors = [
                None if each is None else torch.from_numpy(each.reshape(num_rows, -1))
                for each in (scale, minimum)
            ]
            assert tensors[0] is not None
            return GroupedWeight.of(torch.from_numpy(q.reshape(num_rows, -1)), tensors[0], tensors[1], groups)

        return Plan((num_rows, num_bytes // block.num_bytes * block.inputs), groups, decode)

    return plan


GGUF = tuple(
    Format(f"GGUF {name}", kept_end(name), (), _plan(kept_end(name), block)) for name, block in BLOCKS.items()
)
