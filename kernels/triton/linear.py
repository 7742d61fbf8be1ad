"""Linear layers with the norm before them and what follows them in one launch (Triton).

    plain      y = x̂ Wᵀ + bias
    activate   y = activation(x̂ Wᵀ + bias), or activation(gate) · up of the halves of its outputs
    add        residual += scale · (x Wᵀ + bias), and the residual's sums of squares with it

x̂ is x, or the RMSNorm of its rows. The tile is that of `sleb.kernels.triton.product`; what follows is done on its sums,
which are rounded where they would be if each step were a launch of its own. A gate and its up are neighbours in a tile:
which row of the weight a column of the tile is, is free. Ranges of rows are read on the device, and a program that has
none of its range ends: what no row needs is a launch and the first tiles of the weight, which are on their way to L2 by
then, so that they are not waited for.

For many rows, and where measuring says so, the same is composed: the vendor's product, for weights that are not
quantised, between launches of the norm and of what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.quantization import Weight
from sleb.kernels.reference.device import MOMENT_CHUNK, RowNorm
from sleb.kernels.triton.activation import ACTIVATION_NUMBERS, activate, apply, apply_gated, gated_activate
from sleb.kernels.triton.add_norm import add_norm, norm_rows, row_factors
from sleb.kernels.triton.product import (
    arrive,
    choose_num_parts,
    fitting,
    form_of,
    joined,
    num_chunks,
    operands,
    part_length,
    prefetch_weight,
    product,
)
from sleb.kernels.triton.runtime import (
    ceil_div,
    check_contiguous,
    counters,
    launch_next,
    pdl_launch,
    power_of_two,
    wait_for_previous,
)
from sleb.kernels.triton.tuning import Config, Launch, bucket, tuned

FEW_ROWS = 64  # with more, what stands before and after costs little beside the product
_PLAIN, _ACTIVATE, _GATED, _ADD = range(4)

# outputs × inputs of a tile. The first is what runs untuned: it fits 99 KiB of shared memory, as every GPU from
# compute capability 8.0 on has it, with 16-bit x and any weight, and each of its programs makes whole moments.
CONFIGS = tuple(
    Config(outputs=outputs, inputs=inputs, num_warps=warps, num_stages=stages)
    for outputs, inputs, warps, stages in (
        (64, 128, 4, 3),
        (64, 128, 4, 4),
        (32, 128, 4, 4),
        (32, 256, 4, 3),
        (16, 256, 4, 4),
        (64, 64, 4, 5),
        (64, 64, 4, 3),
        (128, 64, 4, 4),
        (128, 128, 8, 3),
    )
)
COMPOSED = Config(
    library=1
)  # the norm, the product and what follows by themselves, the product by the library


@triton.jit(
    do_not_specialize=["num_rows", "num_parts"],
    do_not_specialize_on_alignment=["first_row", "end_row", "moments", "out_moments"],
)
def _linear(
    x,
    norm_weight,
    values,
    scale,
    minimum,
    bias,
    moments,
    out,
    out_moments,
    parts,
    counters,
    first_row,
    end_row,
    eps,
    delta_scale,
    num_rows,
    num_outputs,
    num_inputs,
    num_bytes,
    num_groups,
    length,
    num_parts,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_END: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    NORMED: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    BASE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """num_outputs: columns of `out`; where gates and ups are made, half the weight's rows."""
    width: tl.constexpr = OUTPUTS // 2 if EPILOGUE == 2 else OUTPUTS
    of_tile = tl.arange(0, OUTPUTS)
    output = tl.program_id(0) * OUTPUTS + of_tile
    present = output < num_outputs
    if EPILOGUE == 2:
        output = tl.program_id(0) * width + of_tile // 2
        present = output < num_outputs
        output += of_tile % 2 * num_outputs
    part = tl.program_id(2)
    start = part * length
    if PRECISION != "widened" and tl.program_id(1) == 0:  # the interpreter has nothing to prefetch
        own = tl.where(present, output, 0).to(tl.int64)[:, None]
        prefetch_weight(values, own, start, num_bytes, KIND, INPUTS)
    wait_for_previous()
    first, end = 0, num_rows
    if HAS_START:
        first = tl.load(first_row)
    if HAS_END:
        end = tl.minimum(tl.load(end_row), num_rows)
    if tl.maximum(first, tl.program_id(1) * ROWS) >= tl.minimum(end, (tl.program_id(1) + 1) * ROWS):
        return
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    in_rows = row < num_rows
    stop = tl.minimum(start + length, num_inputs)
    factors = 1.0
    if NORMED:
        factors = row_factors(moments, row, in_rows, num_inputs, eps, CHUNKS)
    launch_next()
    total = product(
        x, factors, norm_weight, values, scale, minimum, row, in_rows, output.to(tl.int64)[:, None],
        present[:, None], start, stop, num_inputs, num_bytes, num_groups, NORMED, HAS_NORM_WEIGHT, KIND, ROWS,
        OUTPUTS, INPUTS, UNIT, SIZE, BASE, PRECISION,
    )  # fmt: skip
    if SPLIT:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if arrive(parts, counters, tile, part, num_parts, total, ROWS, OUTPUTS) != num_parts - 1:
            return
        total = joined(parts, counters, tile, num_parts, ROWS, OUTPUTS)
    if HAS_BIAS:
        total += tl.load(bias + output, mask=present, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    column = tl.program_id(0) * width + tl.arange(0, width)[None, :]
    inside = in_rows & (row >= first) & (row < end) & (column < num_outputs)
    at = out + row * num_outputs + column
    if EPILOGUE == 0:
        tl.store(at, total.to(dtype), mask=inside)
    elif EPILOGUE == 1:
        tl.store(at, apply(total.to(dtype).to(tl.float32), ACTIVATION).to(dtype), mask=inside)
    elif EPILOGUE == 2:
        gate, up = tl.split(tl.reshape(total.to(dtype).to(tl.float32), (ROWS, width, 2)))
        tl.store(at, apply_gated(gate, up, ACTIVATION).to(dtype), mask=inside)
    else:
        delta = total.to(dtype).to(tl.float32)
        if HAS_SCALE:
            delta = (delta * delta_scale).to(dtype).to(tl.float32)
        summed = (tl.load(at, mask=inside, other=0.0).to(tl.float32) + delta).to(dtype)
        tl.store(at, summed, mask=inside)
        if HAS_MOMENTS:
            kept = tl.where(inside, summed.to(tl.float32), 0.0)
            sums = tl.sum(tl.reshape(kept * kept, (ROWS, OUTPUTS // CHUNK, CHUNK)), axis=2)
            chunk = tl.program_id(0) * (OUTPUTS // CHUNK) + tl.arange(0, OUTPUTS // CHUNK)[None, :]
            number = tl.cdiv(num_outputs, CHUNK)
            in_range = in_rows & (row >= first) & (row < end)
            tl.store(out_moments + row * number + chunk, sums, mask=in_range & (chunk < number))


def _fused(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    out: Tensor,
    rows: tuple[Tensor | None, Tensor | None],
    norm: RowNorm | None,
    config: Config,
    *,
    epilogue: int = _PLAIN,
    activation: int = 0,
    moments: Tensor | None = None,
    delta_scale: float = 1.0,
) -> None:
    """One launch into `out`; rows: from which to before which, None: all."""
    (num_rows, num_inputs), num_outputs = x.shape, out.shape[1]
    check_contiguous(bias=bias, out=out, moments=moments, norm_moments=None if norm is None else norm.moments)
    assert num_outputs * (2 if epilogue == _GATED else 1) == weight.shape[0]
    block = block_rows(x)
    blocks, row_blocks = ceil_div(weight.shape[0], config["outputs"]), ceil_div(num_rows, block)
    tensors, sizes, constants = operands(x, norm, weight, config)
    num_parts = choose_num_parts(blocks * row_blocks, num_inputs, config["inputs"], x.device)
    parts = x
    if num_parts > 1:
        shape = (row_blocks * blocks * num_parts, block, config["outputs"])
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    first, end = rows
    _linear[(blocks, row_blocks, num_parts)](
        *tensors,
        bias if bias is not None else x,
        x if norm is None else norm.moments,
        out,
        moments if moments is not None else x,
        parts,
        counters(x.device),
        first if first is not None else x,
        end if end is not None else x,
        0.0 if norm is None else norm.eps,
        delta_scale,
        num_rows,
        num_outputs,
        *sizes,
        part_length(num_inputs, num_parts, config["inputs"]),
        num_parts,
        EPILOGUE=epilogue,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_START=first is not None,
        HAS_END=end is not None,
        HAS_SCALE=delta_scale != 1.0,
        HAS_MOMENTS=moments is not None,
        SPLIT=num_parts > 1,
        CHUNK=MOMENT_CHUNK,
        CHUNKS=num_chunks(norm),
        ROWS=block,
        **constants,
        **pdl_launch(x.device),
    )


def block_rows(x: Tensor) -> int:
    """Rows of a program's tile. More would not fit a GPU's shared memory in float32."""
    return min(128 if x.element_size() == 2 else 64, power_of_two(x.shape[0], 16))


def configs_for(x: Tensor, weight: Weight, least_outputs: int = 1) -> tuple[Config, ...]:
    """Those of CONFIGS that are likely to fit the GPU of x. With more than 16 rows those of few inputs come first: a
    tile of x has as many values as one of the weight then, and four warps too few registers for both."""
    rows = block_rows(x)
    wide = [config for config in CONFIGS if config["outputs"] >= least_outputs]
    if rows > 16:
        wide.sort(key=lambda config: config["inputs"])
    return fitting(tuple(wide), x, weight, rows)


def choose(
    key: tuple[object, ...],
    configs: Sequence[Config],
    run: Callable[[Config], Tensor],
    changes: tuple[Tensor, ...] = (),
) -> Tensor:
    """What `run` gives with the configuration that is best for the key; see `tuned`."""
    results: list[Tensor] = []

    def keep(chosen: Config) -> None:
        results[:] = (run(chosen),)

    tuned(key, configs, Launch(keep, changes))
    return results[0]


def key_of(name: str, x: Tensor, weight: Weight, *rest: object) -> tuple[object, ...]:
    """What the choice of a configuration depends on."""
    return (name, form_of(weight), str(x.dtype), *weight.shape, bucket(x.shape[0]), *rest)


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    rows: tuple[Tensor, Tensor] | None = None,
    *,
    norm: RowNorm | None = None,
    config: Config | None = None,
) -> Tensor:
    """See `sleb.kernels.reference.device.linear`.

    config: one of CONFIGS, or COMPOSED; None: the one tuned for the shape. The product of a quantised weight, or of a
    range of rows, which the library does not know, has no other form.
    """
    x = x.contiguous()
    num_rows, num_outputs = x.shape[0], weight.shape[0]
    by_library = isinstance(weight, Tensor) and rows is None
    if not num_rows or not num_outputs:
        return x.new_empty(num_rows, num_outputs)

    def run(chosen: Config) -> Tensor:
        if chosen != COMPOSED:
            out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
            _fused(x, weight, bias, out, rows or (None, None), norm, chosen)
            return out
        if norm is not None:
            return linear(norm_rows(x, norm), weight, bias, rows)
        assert isinstance(weight, Tensor)
        return F.linear(x, weight, bias)

    composes = by_library or norm is not None
    if config is not None or (composes and num_rows > FEW_ROWS):
        return run(config or COMPOSED)
    configs = configs_for(x, weight)
    key = key_of("linear", x, weight, norm is not None, rows is not None)
    return choose(key, (*configs, COMPOSED) if composes else configs, run)


def linear_activate(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    num_rows: Tensor,
    *,
    norm: RowNorm | None = None,
    config: Config | None = None,
) -> Tensor:
    """See `sleb.kernels.reference.device.linear_activate`; config: as in `linear`."""
    tokens, size = x.shape[0], weight.shape[0] // (2 if gated else 1)
    if not tokens:
        return x.new_empty(0, size)

    def run(chosen: Config) -> Tensor:
        if chosen == COMPOSED:
            of_all = linear(x, weight, bias, norm=norm)
            return (gated_activate if gated else activate)(of_all, activation, num_rows)
        out = torch.empty(tokens, size, dtype=x.dtype, device=x.device)
        rows, kind, number = (None, num_rows), _GATED if gated else _ACTIVATE, ACTIVATION_NUMBERS[activation]
        _fused(x, weight, bias, out, rows, norm, chosen, epilogue=kind, activation=number)
        return out

    if config is not None or tokens > FEW_ROWS:
        return run(config or COMPOSED)
    key = key_of("linear_activate", x, weight, norm is not None, gated)
    return choose(key, (*configs_for(x, weight), COMPOSED), run)


def linear_add(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    residual: Tensor,
    moments: Tensor | None,
    num_rows: Tensor,
    *,
    start: Tensor | None = None,
    scale: float = 1.0,
    config: Config | None = None,
) -> None:
    """See `sleb.kernels.reference.device.linear_add`; config: as in `linear`."""
    if not x.shape[0]:
        return

    def run(chosen: Config) -> Tensor:
        if chosen == COMPOSED:
            return add_norm(
                *(residual, linear(x, weight, bias), None, None, 0.0, "none", num_rows, num_rows),
                delta_start=start,
                norm_start=start,
                post=True,
                delta_scale=scale,
                moments=moments,
            )
        rows = (start, num_rows)
        _fused(
            x, weight, bias, residual, rows, None, chosen, epilogue=_ADD, moments=moments, delta_scale=scale
        )
        return residual

    if config is not None or x.shape[0] > FEW_ROWS:
        run(config or COMPOSED)
        return
    configs = configs_for(x, weight, 1 if moments is None else MOMENT_CHUNK)
    key = key_of("linear_add", x, weight, moments is not None, start is not None)
    changes = (residual,) if moments is None else (residual, moments)
    choose(key, (*configs, COMPOSED), run, changes)
