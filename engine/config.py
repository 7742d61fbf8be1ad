"""Options of an engine, checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sleb.engine.requests.sampling_params import is_integer
from sleb.errors import ConfigError
from sleb.kernels.attention.select import ATTENTION_BACKENDS
from sleb.kernels.quantization import WEIGHT_FORMATS, WeightFormat
from sleb.layer_map.layer_map import LayerMap

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Short names of dtypes that `dtype` and `weights` take as well.
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_STEP_TOKENS_CPU, _STEP_TOKENS_CARD = 256, 2048
_LOAD_FORMATS = ("auto", "safetensors", "dummy")


@dataclass
class EngineConfig:
    """Options of an engine.

    Attributes:
        model: a Hugging Face folder, a hub id, a .gguf file or the alias smollm2.
        layer_map: a LayerMap or the path of one; "none" refuses the map that an alias brings.
        tiers: depths to serve; None: the map's recommended depth alone (0 without a map; 0, 3, 6 for smollm2).
        dtype: of activations and KV cache: auto (the checkpoint's) | float32 | bfloat16 | float16, also called
            fp32, bf16, fp16.
        weights: auto (as dtype) | int8 | int4 (quantised as they are loaded) | a dtype, which is then that of all.
        device: auto | cpu | cuda | cuda:N.
        load_format: auto | safetensors | dummy (random weights; only a config is needed).
        max_model_len: tokens of prompt and answer together; None: what the model allows and the KV cache holds.
        max_num_seqs: requests computed at once.
        max_num_batched_tokens: tokens of one step, so how long a prompt makes other answers wait; None: 256 on a CPU,
            where more is not faster, 2048 on a card.
        page_size: tokens in a KV page; None: 16, or what the attention backend asks for.
        kv_cache_memory: GiB for KV pages; None: chosen from the free memory.
        gpu_memory_utilization: share of the card's memory that weights and KV may take.
        kernels: auto, or a backend of sleb.kernels.registry.
        attention: auto, or a backend of sleb.kernels.attention.select; of the Triton kernels.
        cuda_graphs: whether decode steps on a card are captured once and replayed.
        overlap: whether a step is launched before the tokens of the one before are read; None: where the device
            computes by itself.
        num_threads: CPU threads; None: one a physical core for the C kernels, torch's own choice for torch.
        cpu_affinity: the processor that each thread of the C kernels is tied to, the engine's own thread first; None:
            the system moves them as it likes.
        seed: of random weights and of requests without a seed; None: different in every run.
        on_progress: called while weights are loaded, in the loading thread: weights that have come in, and of all.
        on_tuning: called at a card's first start, with the name of each operator that is about to be measured.
        on_capture: called while graphs are captured: how many are, and of how many.

    Raises ConfigError from `check()` for a value out of range.
    """

    model: str
    layer_map: LayerMap | str | Path | None = None
    tiers: Sequence[int] | None = None
    dtype: str = "auto"
    weights: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    page_size: int | None = None
    kv_cache_memory: float | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    kernels: str = "auto"
    attention: str = "auto"
    cuda_graphs: bool = True
    overlap: bool | None = None
    num_threads: int | None = None
    cpu_affinity: Sequence[int] | None = None
    seed: int | None = None
    on_progress: Callable[[int, int], None] | None = field(default=None, repr=False, compare=False)
    on_tuning: Callable[[str], None] | None = field(default=None, repr=False, compare=False)
    on_capture: Callable[[int, int], None] | None = field(default=None, repr=False, compare=False)

    @property
    def step_tokens(self) -> int:
        """`max_num_batched_tokens`, or what stands for it. Raises ConfigError for a device that is not there."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return _STEP_TOKENS_CPU if resolve_device(self.device).type == "cpu" else _STEP_TOKENS_CARD

    def check(self) -> None:
        """Raises ConfigError for the first option out of its range."""
        self._check_choice("dtype", ("auto", *DTYPES), DTYPE_ALIASES)
        self._check_choice("weights", ("auto", *WEIGHT_FORMATS, *DTYPES), DTYPE_ALIASES)
        self._check_choice("load_format", _LOAD_FORMATS)
        self._check_choice("attention", ("auto", *ATTENTION_BACKENDS))
        for name in ("max_num_seqs", "max_num_batched_tokens", "page_size", "max_model_len", "num_threads"):
            value = getattr(self, name)
            optional = name != "max_num_seqs"
            if value is None and optional:
                continue
            if not is_integer(value) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be an integer of at least 1")
        if self.kv_cache_memory is not None and not self.kv_cache_memory > 0:
            raise ConfigError(f"kv_cache_memory is {self.kv_cache_memory} GiB; it must be above 0")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be above 0, at most 1"
            )
        if self.tiers is not None:
            self._check_tiers(self.tiers)
        if self.cpu_affinity is not None:
            self._check_affinity(self.cpu_affinity)

    def _check_choice(self, name: str, allowed: tuple[str, ...], aliases: Collection[str] = ()) -> None:
        value = getattr(self, name)
        if value not in (*allowed, *aliases):
            shown = ", ".join(allowed) + (f" (or {', '.join(aliases)})" if aliases else "")
            raise ConfigError(f"{name} '{value}' is not known; choose one of: {shown}")

    @staticmethod
    def _check_tiers(tiers: object) -> None:
        if isinstance(tiers, str) or not isinstance(tiers, Sequence):
            raise ConfigError(f"tiers is {tiers!r}; it must be a list of depths, such as [0, 3, 6]")
        if not tiers:
            raise ConfigError("tiers is empty; name at least one depth, 0 for the full model")
        for depth in tiers:
            if not is_integer(depth) or depth < 0:
                raise ConfigError(f"tier {depth!r} is not a depth; depths are integers of at least 0")
        if len(set(tiers)) != len(tiers):
            raise ConfigError(f"tiers {list(tiers)} names a depth twice; name each once")

    def _check_affinity(self, cpus: Sequence[int]) -> None:
        if not hasattr(os, "sched_getaffinity"):
            raise ConfigError("cpu_affinity needs Linux; leave it out")
        allowed = sorted(os.sched_getaffinity(0))
        for cpu in cpus:
            if not is_integer(cpu) or cpu not in allowed:
                raise ConfigError(f"cpu_affinity names processor {cpu!r}; this process may use {allowed}")
        if len(cpus) < (self.num_threads or 1):
            raise ConfigError(
                f"cpu_affinity names {len(cpus)} processors for {self.num_threads} threads; name one each"
            )


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first CUDA card, else the CPU. Raises ConfigError if it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device("cuda:0" if name == "cuda" else name)
    except RuntimeError:
        raise ConfigError(f"device '{name}' is not known; choose one of: auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device '{name}' is not supported; choose one of: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or device.index >= torch.cuda.device_count()):
        raise ConfigError(
            f"device '{name}' is not on this machine ({torch.cuda.device_count()} CUDA cards); try cpu"
        )
    return device


def resolve_dtype(name: str, weights: str, checkpoint: str | None) -> torch.dtype:
    """The dtype of activations, and of weights that are not quantised.

    `weights` if it names a dtype, else `name`, else the checkpoint's.
    """
    for choice in (weights, name):
        choice = DTYPE_ALIASES.get(choice, choice)
        if choice in DTYPES:
            return DTYPES[choice]
    return DTYPES.get(checkpoint or "float32", torch.float32)


def resolve_weight_format(weights: str) -> WeightFormat | None:
    """How `weights` says that matrices are quantised; None: they are not."""
    return WEIGHT_FORMATS.get(weights)
