"""What removing a share of the weights gives in *speed*, by how they are removed: the SLEB paper's own comparison.

    blocks   `count` blocks left out
    width    every block's MLP narrowed until as many parameters are gone (channel pruning)
    2:4      the two smallest of every four weights of each block's matrices set to zero

Speed does not depend on which weights go, so blocks are evenly spaced and the narrow model has random weights. 2:4
needs hardware and kernels for it: NVIDIA's tensor cores from Ampere on, which this engine does not use; CPUs have none.
So dense kernels multiply the zeros; what that row measures is how equal two equal models come out.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from sleb.benchmarks.environment import describe_environment, shown_command
from sleb.benchmarks.harness import Progress, Samples, measure
from sleb.benchmarks.report import widen
from sleb.benchmarks.selection import spread_units
from sleb.benchmarks.throughput import greedy_params, plain_token_ids
from sleb.engine.llm import LLM
from sleb.engine.model.architecture import resolve_spec
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.models.resolve import resolve_model

VARIANTS = ("dense", "blocks", "width", "2:4")
_ROUND_TO = 32  # of the narrow MLP's width: what kernels are made for


@dataclass(frozen=True)
class Load:
    """`batch` requests of `prompt_tokens`, `output_tokens` new ones each."""

    batch: int
    prompt_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        if self.output_tokens == 1:
            return f"prompt {self.batch} × {self.prompt_tokens}"
        return f"generate {self.batch} × {self.output_tokens} after {self.prompt_tokens}"


@dataclass(frozen=True)
class MethodSpeedOptions:
    """What to measure: `count` blocks, or as many parameters by width; the rest as in EngineConfig."""

    model: str
    count: int = 6
    batches: Sequence[int] = (1, 8)
    prompt_tokens: int = 512
    output_tokens: int = 64
    repetitions: int = 5
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0


def run_method_speed(
    options: MethodSpeedOptions,
    command: Sequence[str] = (),
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Measures the variants in turns; Ctrl-C keeps complete repetitions. Raises SlebError."""
    resolved = resolve_model(options.model)
    spec = resolve_spec(resolved.path)
    if not spec.gated or not 1 <= options.count <= spec.num_blocks - 2:
        raise ConfigError(
            f"{options.count} blocks of {resolved.name} cannot be compared with a narrower MLP: "
            f"ask for 1 to {spec.num_blocks - 2} blocks of a model with a gated MLP"
        )
    with tempfile.TemporaryDirectory() as folder:
        narrow, share = _narrow_folder(resolved.path, Path(folder) / "narrow", options.count, spec.num_blocks)
        sparse = _sparse_folder(resolved.path, Path(folder) / "sparse")
        engines = _engines(options, narrow, sparse, spec.num_blocks)
        token_ids = plain_token_ids(engines["dense"][0].engine)
        loads = [Load(1, options.prompt_tokens, 1)]
        loads += [Load(batch, 64, options.output_tokens) for batch in options.batches]
        samples: Samples[Load] = {}

        def prepare(workload: Load, repetition: int) -> Callable[[int], float | None]:
            rng = random.Random(f"{options.seed} {workload} {repetition}")
            prompts = [rng.choices(token_ids, k=workload.prompt_tokens) for _ in range(workload.batch)]
            params = greedy_params(workload.output_tokens)

            def run(variant: int) -> None:
                llm, depth = engines[VARIANTS[variant]]
                llm.generate(prompts, params, depth)

            return run

        complete = True
        try:
            measure(
                prepare, loads, range(len(VARIANTS)), options.repetitions, options.seed, samples,
                on_progress=on_progress,
            )  # fmt: skip
        except KeyboardInterrupt:
            complete = False
        engine = engines["dense"][0].engine
        return {
            "kind": "method-speed",
            "environment": describe_environment(engine, shown_command(command, options.model)),
            "model": engine.model_name,
            "settings": {key: value for key, value in asdict(options).items() if key != "model"},
            "parameters_removed": {
                "blocks": options.count / spec.num_blocks,
                "width": share,
                "2:4": 0.5,
            },
            "note_2:4": "no 2:4 kernels: dense ones multiply the zeros",
            "rows": [_row(load, variant, repetitions)
                     for load, repetitions in samples.items() for variant in range(len(VARIANTS))],
            "complete": complete,
        }  # fmt: skip


def _row(load: Load, variant: int, repetitions: Sequence[dict[int, float]]) -> dict[str, Any]:
    speedups = [times[0] / times[variant] for times in repetitions]
    return {
        "load": str(load),
        "variant": VARIANTS[variant],
        "seconds": median(times[variant] for times in repetitions),
        "speedup": median(speedups),
        "speedup_low": min(speedups),
        "speedup_high": max(speedups),
        "speedup_samples": speedups,
    }


def _engines(
    options: MethodSpeedOptions, narrow: Path, sparse: Path, num_blocks: int
) -> dict[str, tuple[LLM, int]]:
    """An engine and a depth for each variant, with room for the largest load."""
    batch = max(options.batches)
    context = max(options.prompt_tokens + 1, 64 + options.output_tokens)
    shared: dict[str, Any] = {
        "dtype": options.dtype, "device": options.device, "max_model_len": context, "max_num_seqs": batch,
        "max_num_batched_tokens": max(context, 64 * batch), "prefix_caching": False,
    }  # fmt: skip

    removed = tuple(spread_units(num_blocks, options.count))
    layer_map = LayerMap("compared", None, num_blocks, removed)
    ours = LLM(options.model, layer_map, (0, options.count), **shared)
    return {
        "dense": (ours, 0),
        "blocks": (ours, options.count),
        "width": (LLM(narrow, load_format="dummy", **shared), 0),
        "2:4": (LLM(sparse, **shared), 0),
    }


def _narrow_folder(source: Path, folder: Path, count: int, num_blocks: int) -> tuple[Path, float]:
    """A config whose MLPs are narrower, so that as many parameters of the blocks are gone; and their share."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    width, hidden = config["intermediate_size"], config["hidden_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    block = attention + 3 * hidden * width
    wanted = (block * (1 - count / num_blocks) - attention) / (3 * hidden)
    narrow = round(wanted / _ROUND_TO) * _ROUND_TO
    if narrow < _ROUND_TO:
        raise ConfigError(
            f"{count} of {num_blocks} blocks are more parameters than the MLPs have; ask for fewer"
        )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": narrow}), encoding="utf-8")
    return folder, 1 - (attention + 3 * hidden * narrow) / block


def _sparse_folder(source: Path, folder: Path) -> Path:
    """The checkpoint with 2:4 sparse matrices in every block."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            save_file(
                {
                    name: two_of_four(tensor) if ".layers." in name and tensor.dim() == 2 else tensor
                    for name, tensor in tensors.items()
                },
                folder / path.name,
                {"format": "pt"},
            )
        elif path.is_file():
            shutil.copy(path, folder)
    return folder


def two_of_four(weight: Tensor) -> Tensor:
    """weight [out, in] with the two smallest of every four neighbours of a row set to zero (arXiv:2104.08378)."""
    rows, columns = weight.shape
    padded = math.ceil(columns / 4) * 4
    groups = torch.nn.functional.pad(weight.float(), (0, padded - columns)).view(rows, -1, 4)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.abs().topk(2, dim=-1).indices, True)
    return weight * kept.view(rows, padded)[:, :columns]


def print_method_speed(result: Mapping[str, Any], console: Console) -> None:
    """A table, and what its columns mean."""
    widen(console)
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("load")
    table.add_column("removed by")
    for heading in ("parameters of blocks", "seconds", "speedup", "low–high"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        removed = result["parameters_removed"].get(row["variant"])
        table.add_row(
            row["load"],
            row["variant"],
            "" if removed is None else f"−{removed:.0%}",
            f"{row['seconds']:.3g}",
            f"{row['speedup']:.3f}",
            f"{row['speedup_low']:.3f}–{row['speedup_high']:.3f}",
        )
    console.print(table)
    console.print(
        f"speedup: over dense, median of ratios within a repetition. 2:4: {result['note_2:4']}.",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
