"""Options of an engine, checked before anything is loaded: importing them takes no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from sleb.engine.requests.repetition import MAX_COUNT
from sleb.engine.requests.sampling_params import COUNT_RANGES, NUMBER_RANGES
from sleb.errors import ConfigError
from sleb.kernels.names import (
    ATTENTION_BACKENDS,
    DTYPE_ALIASES,
    DTYPES,
    FILE,
    KERNELS,
    KV_DTYPES,
    QUANTIZED,
    check_device,
)
from sleb.layer_map.layer_map import LayerMap
from sleb.options import check_values, option

_STEP_TOKENS_CPU, _STEP_TOKENS_GPU = 256, 2048
_MODEL, _MEMORY, _COMPUTE = "Model", "Batch and memory", "Compute"
_ANSWERS = "Answers, where a request does not say"


def _sampling(name: str, help: str) -> Any:
    """The default of a sampling field, in the range that requests have."""
    low, high, above = NUMBER_RANGES.get(name) or (*COUNT_RANGES[name], False)
    return option(
        None,
        help,
        unset="the generation config's, else off",
        minimum=None if above else low,
        maximum=high,
        above=low if above else None,
        group=_ANSWERS,
    )


@dataclass
class EngineConfig:
    """Options of an engine: the arguments of `LLM`, and of `sleb serve`.

    Attributes:
        model: a Hugging Face folder, a hub id, a .gguf file or an alias: smollm2, gemma3-270m.
        on_progress: called while weights are loaded, in the loading thread: weights that have come in, and of all.
        on_tuning: called at a GPU's first start, with the name of each operator that is about to be measured.
        on_capture: called while graphs are captured: how many are, and of how many.

    Raises ConfigError from `check()` for a value that is not allowed.
    """

    model: str | Path
    layer_map: LayerMap | str | Path | None = option(
        None,
        "Layer map: a file (JSON), the name of a shipped one, or none.",
        unset="none; for smollm2 and gemma3-270m the shipped one",
        group=_MODEL,
        metavar="FILE",
    )
    tiers: Sequence[int] | None = option(
        None,
        "Depths to serve, such as 0,3,6.",
        unset="what the map recommends; of a shipped one 0,3,6",
        minimum=0,
        group=_MODEL,
    )
    _: KW_ONLY
    dtype: str = option(
        "auto",
        "Of activations, and of the KV cache but for --kv-dtype; auto: the checkpoint's.",
        choices=("auto", *DTYPES),
        aliases=tuple(DTYPE_ALIASES),
        group=_MODEL,
    )
    weights: str = option(
        "auto",
        "Of weights: as the checkpoint has them, quantised or as --dtype; file: as a GGUF file has them too; quantised "
        "as they are loaded; or a dtype, which is then that of all.",
        choices=("auto", FILE, *QUANTIZED, *DTYPES),
        aliases=tuple(DTYPE_ALIASES),
        group=_MODEL,
    )
    kv_dtype: str = option(
        "auto",
        "Of the KV cache; auto: --dtype's; int8, of the C kernels alone: a byte, and a scale a token and head; "
        "fp8, of Triton's attention alone: a byte, e4m3.",
        choices=KV_DTYPES,
        group=_MODEL,
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N.", group=_MODEL, metavar="NAME")
    chat_template: str | Path | None = option(
        None, "Jinja file to write conversations by.", unset="the model's own", group=_MODEL, metavar="FILE"
    )
    load_format: str = option(
        "auto",
        "Where weights come from; dummy: random ones, and only a config is needed.",
        choices=("auto", "safetensors", "dummy"),
        group=_MODEL,
    )
    max_model_len: int | None = option(
        None,
        "Tokens of prompt and answer together.",
        unset="what the model and the memory allow",
        minimum=1,
        group=_MEMORY,
    )
    max_num_seqs: int = option(64, "Requests computed at once.", minimum=1, group=_MEMORY)
    max_num_batched_tokens: int | None = option(
        None,
        "Tokens of one step: how long a prompt makes other answers wait.",
        unset=f"{_STEP_TOKENS_CPU} on a CPU, {_STEP_TOKENS_GPU} on a GPU",
        minimum=1,
        group=_MEMORY,
    )
    page_size: int | None = option(
        None,
        "Tokens of a page of the KV cache.",
        unset="16, or what the attention needs",
        minimum=1,
        group=_MEMORY,
    )
    kv_cache_memory: float | None = option(
        None, "GiB for the KV cache.", unset="from the free memory", above=0, group=_MEMORY
    )
    gpu_memory_utilization: float = option(
        0.9,
        "Share of the GPU's memory for weights, KV cache and everything else.",
        above=0,
        maximum=1,
        group=_MEMORY,
    )
    prefix_caching: bool = option(True, "Reuse the KV of equal beginnings.", group=_MEMORY)
    kernels: str = option(
        "auto", "triton runs on a GPU, cpu are C kernels.", choices=("auto", *KERNELS), group=_COMPUTE
    )
    attention: str = option(
        "auto",
        "Of the Triton kernels; flash is flash-attn, if it is installed.",
        choices=("auto", *ATTENTION_BACKENDS),
        group=_COMPUTE,
    )
    cuda_graphs: bool = option(
        True, "On a GPU: capture steps of up to 512 tokens once, at start.", group=_COMPUTE
    )
    overlap: bool | None = option(
        None, "Launch a step before the tokens of the one before are read.", unset="on a GPU", group=_COMPUTE
    )
    threads: int | None = option(None, "CPU threads.", unset="one a physical core", minimum=1, group=_COMPUTE)
    cpu_affinity: Sequence[int] | None = option(
        None,
        "Processors that the threads are tied to, such as 0,1 or 0-3, one a thread.",
        unset="none",
        minimum=0,
        group=_COMPUTE,
    )
    seed: int | None = option(
        None,
        "Of requests without one, and of random weights.",
        unset="different in every run",
        group=_COMPUTE,
    )
    generation_config: str | Path = option(
        "auto",
        "JSON file with sampling values; auto: the alias's or the model's own; none: every value off.",
        group=_ANSWERS,
        metavar="FILE",
    )
    temperature: float | None = _sampling("temperature", "0 is greedy.")
    top_p: float | None = _sampling("top_p", "Share of the probability to draw from.")
    top_k: int | None = _sampling("top_k", "Tokens to draw from; 0 or -1: all.")
    min_p: float | None = _sampling("min_p", "Least probability, as a share of the best token's.")
    repetition_penalty: float | None = _sampling("repetition_penalty", "1 is off.")
    default_max_tokens: int | None = option(
        None,
        "Longest answer to a request that sets no limit.",
        unset="what is left of the context",
        minimum=1,
        group=_ANSWERS,
    )
    end_loops: int | None = option(
        None,
        "End an answer whose last tokens, up to 64, come so many times in a row.",
        unset="they go on",
        minimum=2,
        maximum=MAX_COUNT,
        group=_ANSWERS,
    )
    on_progress: Callable[[int, int], None] | None = field(default=None, repr=False, compare=False)
    on_tuning: Callable[[str], None] | None = field(default=None, repr=False, compare=False)
    on_capture: Callable[[int, int], None] | None = field(default=None, repr=False, compare=False)

    @property
    def step_tokens(self) -> int:
        """`max_num_batched_tokens`, or what stands for it. Raises ConfigError for a device that is not there."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        from sleb.engine.model.resolve import resolve_device  # imports torch

        return _STEP_TOKENS_CPU if resolve_device(self.device).type == "cpu" else _STEP_TOKENS_GPU

    def check(self) -> None:
        """Raises ConfigError for the first option with a value that is not allowed."""
        check_values(self)
        check_device(self.device)
        if self.tiers is not None:
            if not self.tiers:
                raise ConfigError("tiers is empty; name at least one depth, 0 for the full model")
            if len(set(self.tiers)) != len(self.tiers):
                raise ConfigError(f"tiers {list(self.tiers)} names a depth twice; name each once")
        if self.cpu_affinity is not None:
            self._check_affinity(self.cpu_affinity)

    def _check_affinity(self, cpus: Sequence[int]) -> None:
        if not hasattr(os, "sched_getaffinity"):
            raise ConfigError("cpu_affinity needs Linux; leave it out")
        allowed = sorted(os.sched_getaffinity(0))
        for cpu in cpus:
            if cpu not in allowed:
                raise ConfigError(f"cpu_affinity names processor {cpu!r}; this process may use {allowed}")
        if len(cpus) < (self.threads or 1):
            raise ConfigError(
                f"cpu_affinity names {len(cpus)} processors for {self.threads} threads; name one each"
            )
