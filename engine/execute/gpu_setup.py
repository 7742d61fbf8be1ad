"""From loaded weights to an executor on a GPU: what steps will take, warm-up, tuning and captured graphs."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sleb.engine.config import EngineConfig
from sleb.engine.execute.cuda_graphs import (
    CudaCapture,
    decode_buckets,
    measure_reserve,
    prompt_buckets,
    prompt_step,
    trial_step,
)
from sleb.engine.execute.executor import LOGPROB_ROWS, PlannedUnit, attention_blocks
from sleb.engine.execute.gpu import GpuExecutor, numbers_of_rows
from sleb.engine.execute.gpu_decoder import GpuDecoder
from sleb.engine.execute.kv_cache import PagedKVCache
from sleb.engine.model.architecture import DecoderSpec
from sleb.engine.model.decoder import Decoder
from sleb.engine.model.weights import DecoderWeights
from sleb.kernels.attention.select import AttentionBackend
from sleb.kernels.registry import GpuKernels, Kernels


def is_gpu(device: torch.device) -> bool:
    """Whether there is memory to be measured, and graphs can be captured."""
    return device.type == "cuda"


def lacks_feature(spec: DecoderSpec) -> str | None:
    """What this model needs and steps on a GPU lack, or None."""
    if spec.qk_norm == "whole" and spec.qk_norm_after_rotation:
        return "norms of all queries together after their rotation"
    if spec.parallel and (spec.post_norm or not spec.norm_first):
        return "norms of the updates of parallel blocks"
    return None


@dataclass(frozen=True)
class GpuSetup:
    """Makes executors for `depths` over `operators`, which are those of `kernels`."""

    config: EngineConfig
    spec: DecoderSpec
    weights: DecoderWeights
    kernels: Kernels
    operators: GpuKernels
    attention: AttentionBackend
    plan: tuple[PlannedUnit, ...]
    depths: Sequence[int]
    page_size: int
    device: torch.device

    @property
    def _buckets(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Rows, and tokens of steps with prompts, that graphs are captured for; none where there are no graphs."""
        if not (is_gpu(self.device) and self.config.cuda_graphs and self.attention.capturable):
            return (), ()
        return decode_buckets(self.config.max_num_seqs), prompt_buckets(self.config.step_tokens)

    def reserve(self) -> int:
        """Bytes of the GPU's memory that steps and graphs will take, measured on a trial executor."""
        if not is_gpu(self.device) or self.config.kv_cache_memory is not None:
            return 0
        longest = min(self.config.max_model_len or self.spec.max_positions, self.spec.longest_context)
        before = torch.cuda.memory_allocated(self.device)
        trial = self._executor(longest, 0)
        # What stays between steps: rotary tables, the page table, graphs' inputs and outputs, the padding page.
        reserve = torch.cuda.memory_allocated(self.device) - before
        tuning = self.operators.tuning_bytes
        reserve += measure_reserve(trial, self.config.step_tokens, longest, *self._buckets, tuning)
        del trial
        gc.collect()
        torch.cuda.empty_cache()
        return reserve

    def build(self, max_model_len: int, num_pages: int) -> GpuExecutor:
        """The executor; on a GPU tuned, and its graphs captured. num_pages leaves out the padding page."""
        executor = self._executor(max_model_len, num_pages)
        if is_gpu(self.device):
            self._warm_up(executor, max_model_len, num_pages)
        rows, tokens = self._buckets
        if rows:
            capture = CudaCapture(self.device)
            executor.capture(rows, capture, on_progress=self.config.on_capture, prompts=tokens)
        return executor

    def _warm_up(self, executor: GpuExecutor, max_model_len: int, num_pages: int) -> None:
        """Compiles, and where need be tunes, every kernel that serving runs: a request must not wait for that."""
        executor.warm_up(num_pages, self.config.on_tuning)
        step_tokens, fullest = self.config.step_tokens, self.depths[0]
        longest = min(step_tokens, max_model_len)
        ranges = [planned.depths for planned in self.plan if isinstance(planned.unit, int)]
        patched = [each for each in self.depths if any(first <= each < end for first, end in ranges)]
        steps = [
            prompt_step(executor, count, max_model_len, depth)
            for depth in sorted({fullest, *patched})
            for count in reversed(numbers_of_rows(step_tokens))  # operators are tuned at the first of a key
        ]
        for few in (
            numbers_of_rows(min(self.operators.fused_rows, longest)) if executor.max_num_seqs > 1 else ()
        ):
            # Units of few rows in a step of many, which then do without the fusions; of a patch, and of what it skips.
            many = min(self.operators.fused_rows + 1, longest)
            steps.append(trial_step(executor, [(few, few), (many, many)], (fullest, self.depths[-1])))
            less = min(few, max(1, self.operators.fused_rows - 1))  # beside one row of no patch, few in all
            for depth in patched:
                steps.append(trial_step(executor, [(many, many), (few, few)], (fullest, depth)))
                steps.append(trial_step(executor, [(1, 1), (less, less)], (fullest, depth)))
        for context in executor.trial_contexts:
            context = min(context, max_model_len)
            chunks, decodes = numbers_of_rows(longest, 4), numbers_of_rows(executor.max_num_seqs, 4)
            steps += [trial_step(executor, [(min(count, context), context)]) for count in chunks]
            steps += [trial_step(executor, [(1, context)] * count) for count in decodes]
            steps += [  # what walks the rows of a batch is compiled for how many there may be
                trial_step(
                    executor, [(count - rows + 1, max(context, count - rows + 1)), *[(1, 1)] * (rows - 1)]
                )
                for count in chunks
                for rows in decodes
                if 16 < rows < count
            ]
        with self.operators.tuning(self.config.on_tuning):
            for step in steps:
                samples = range(min(step.num_sequences, executor.max_num_seqs))
                logits = executor.run(step, samples, greedy=False).logits
                assert logits is not None
            for count in numbers_of_rows(max(LOGPROB_ROWS, executor.max_num_seqs)):
                hidden = torch.zeros(
                    count, self.spec.hidden_size, dtype=self.weights.dtype, device=self.device
                )
                self._warm_up_sampling(executor.logits(hidden))
        if patched:  # ranges of rows, of which eager steps of prompts have none
            executor.warm_up(num_pages, self.config.on_tuning, prompt_buckets(step_tokens))

    def _warm_up_sampling(self, logits: Tensor) -> None:
        chosen, count = self.kernels.greedy(logits), logits.shape[0]
        for filters in ((0, 1.0, 0.0), (40, 0.9, 0.05)):
            self.kernels.sample(logits, *([value] * count for value in (0.7, *filters, 0.5)))
        self.kernels.log_softmax_gather(logits, chosen[:, None])

    def _executor(self, max_model_len: int, num_pages: int) -> GpuExecutor:
        """An executor whose cache has the padding page after num_pages others."""
        spec = self.spec
        decoder = Decoder(spec, self.weights, self.kernels, max_model_len, self.device)
        blocks = attention_blocks(self.plan)
        dtype = torch.uint8 if self.config.kv_dtype == "fp8" else self.weights.dtype
        cache = PagedKVCache(spec, blocks, num_pages + 1, self.page_size, dtype, self.device)
        return GpuExecutor(
            GpuDecoder(decoder, self.operators, self.attention.function, cache),
            self.operators,
            self.attention,
            self.plan,
            depths=self.depths,
            page_size=self.page_size,
            padding_page=num_pages,
            max_num_seqs=self.config.max_num_seqs,
            max_pages=-(-max_model_len // self.page_size),
        )
