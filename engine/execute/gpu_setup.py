"""From loaded weights to an executor for a GPU: attention backend, KV cache, warm-up and captured graphs."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sleb.engine.config import EngineConfig
from sleb.engine.execute.cuda_graphs import CudaCapture, decode_buckets, measure_reserve
from sleb.engine.execute.executor import PlannedSublayer
from sleb.engine.execute.gpu import GpuExecutor
from sleb.engine.execute.gpu_decoder import GpuDecoder
from sleb.engine.execute.kv_cache import PagedKVCache, size_cache
from sleb.engine.execute.trial_steps import prompt_step, trial_step
from sleb.engine.model.architecture import DecoderSpec
from sleb.engine.model.decoder import Decoder
from sleb.engine.model.weights import DecoderWeights
from sleb.kernels.attention.select import AttentionBackend, choose_page_size
from sleb.kernels.registry import GpuKernels, Kernels


@dataclass(frozen=True)
class GpuSetup:
    """An executor, and how its cache was sized; num_pages leaves out the padding page."""

    executor: GpuExecutor
    page_size: int
    max_model_len: int
    num_pages: int


def build_gpu(
    config: EngineConfig,
    spec: DecoderSpec,
    weights: DecoderWeights,
    kernels: Kernels,
    attention: AttentionBackend,
    plan: tuple[PlannedSublayer, ...],
    depths: Sequence[int],
) -> GpuSetup:
    """The executor for `depths` on the weights' device; on a GPU tuned, and its graphs captured.

    What steps and graphs take is measured on a trial executor before the rest of the memory goes to KV pages. Raises
    ConfigError for a page size that does not suit the attention, and for too little memory.
    """
    assert kernels.gpu is not None
    device = weights.embed.device if isinstance(weights.embed, torch.Tensor) else weights.embed.values.device
    page_size = choose_page_size(config.page_size, attention)
    builder = _Builder(config, spec, weights, kernels, kernels.gpu, plan, depths, attention, page_size)
    return builder.build(device)


def is_gpu(device: torch.device) -> bool:
    """Whether there is memory to be measured, and graphs can be captured."""
    return device.type == "cuda"


@dataclass(frozen=True)
class _Builder:
    config: EngineConfig
    spec: DecoderSpec
    weights: DecoderWeights
    kernels: Kernels
    gpu: GpuKernels
    plan: tuple[PlannedSublayer, ...]
    depths: Sequence[int]
    backend: AttentionBackend
    page_size: int

    def build(self, device: torch.device) -> GpuSetup:
        config, page_size = self.config, self.page_size
        on_gpu = is_gpu(device)
        buckets = decode_buckets(config.max_num_seqs)
        captured = on_gpu and config.cuda_graphs and self.backend.capturable
        reserve = 0
        if on_gpu and config.kv_cache_memory is None:
            wanted = min(config.max_model_len or self.spec.max_positions, self.spec.max_positions)
            trial = self._executor(device, wanted, 0)
            reserve = measure_reserve(
                trial, page_size, config.step_tokens, wanted, buckets if captured else ()
            )
            del trial
            gc.collect()
            torch.cuda.empty_cache()
        max_model_len, num_pages = size_cache(
            config, self.spec, len(self._blocks), page_size, self.weights.dtype, device, reserve
        )
        executor = self._executor(device, max_model_len, num_pages)
        if on_gpu:
            self._warm_up(executor, max_model_len, num_pages)
        if captured:
            executor.capture(buckets, CudaCapture(device), on_progress=config.on_capture)
        return GpuSetup(executor, page_size, max_model_len, num_pages)

    def _warm_up(self, executor: GpuExecutor, max_model_len: int, num_pages: int) -> None:
        """Compiles, and where need be tunes, every kernel that serving runs: a request must not wait for that."""
        executor.warm_up(num_pages, self.config.on_tuning)
        longest = min(self.config.step_tokens, max_model_len)
        steps = [
            prompt_step(executor, self.page_size, self.config.step_tokens, max_model_len),
            trial_step(executor, self.page_size, [(min(2, longest), longest), (1, 1)]),
            trial_step(executor, self.page_size, [(1, longest)]),
        ]
        with self.gpu.tuning(self.config.on_tuning):
            for step in steps:
                samples = range(min(len(step.rows), executor.max_num_seqs))
                logits = executor.run(step, samples, greedy=False).logits
                assert logits is not None
                chosen = self.kernels.greedy(logits)
                count = logits.shape[0]
                self.kernels.sample(logits, *([value] * count for value in (0.7, 40, 0.9, 0.05, 0.5)))
                self.kernels.log_softmax_gather(logits, chosen[:, None])

    @property
    def _blocks(self) -> list[int]:
        return [planned.sublayer[0] for planned in self.plan if planned.sublayer[1] == "attention"]

    def _executor(self, device: torch.device, max_model_len: int, num_pages: int) -> GpuExecutor:
        """An executor whose cache has the padding page after num_pages others."""
        spec = self.spec
        decoder = Decoder(spec, self.weights, self.kernels, max_model_len, device)
        cache = PagedKVCache(spec, self._blocks, num_pages + 1, self.page_size, self.weights.dtype, device)
        return GpuExecutor(
            GpuDecoder(decoder, self.gpu, self.backend.function, cache),
            self.gpu,
            self.backend,
            self.plan,
            depths=self.depths,
            page_size=self.page_size,
            padding_page=num_pages,
            max_num_seqs=self.config.max_num_seqs,
            max_pages=-(-max_model_len // self.page_size),
        )
