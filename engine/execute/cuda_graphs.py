"""Capturing CUDA graphs, trial steps, and how much memory steps and graphs will take besides weights and KV."""

from __future__ import annotations

import gc
import itertools
from array import array
from collections.abc import Callable, Sequence

import torch

from sleb.engine.execute.gpu import MAX_CAPTURED_TOKENS, GpuExecutor
from sleb.engine.execute.step_arrays import StepArrays, unit_rows
from sleb.errors import ConfigError

_MARGIN = 1.1  # of what was measured: the allocator's blocks are larger than what is asked for


class CudaCapture:
    """`sleb.engine.execute.gpu.Capture` for a GPU: all graphs share one pool of memory and one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            return self._capture(function)

    def _capture(self, function: Callable[[], None]) -> Callable[[], None]:
        # Run once outside, on the same stream: kernels are compiled and libraries set up their workspaces.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # By default a call to CUDA of any other thread, such as a watchdog's, would end the capture.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                function()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"CUDA graphs cannot be captured here ({reason}); leave them out (--no-cuda-graphs)"
            ) from error
        return graph.replay


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Rows that graphs are captured for: close together where rows are few, and always max_num_seqs itself."""
    sizes = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1025, 32))
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


def prompt_buckets(max_num_tokens: int) -> tuple[int, ...]:
    """Tokens of steps with prompts that graphs are captured for, at most MAX_CAPTURED_TOKENS.

    Up to about 200 tokens (H200, bfloat16) a step takes as long as its weights are read, so those may be far apart;
    from there on every padding token costs its computation.
    """
    most = min(max_num_tokens, MAX_CAPTURED_TOKENS)
    sizes = (16, 32, 64, *range(128, MAX_CAPTURED_TOKENS, 64))
    return (*(size for size in sizes if size < most), most)


def prompt_step(executor: GpuExecutor, num_tokens: int, max_len: int, depth: int | None = None) -> StepArrays:
    """As many prompts of max_len tokens as num_tokens and the executor allow, and a shorter one for the rest."""
    lengths: list[int] = []
    left = num_tokens
    while left > 0 and len(lengths) < executor.max_num_seqs:
        lengths.append(min(left, max_len))
        left -= lengths[-1]
    depths = None if depth is None else [depth] * len(lengths)
    return trial_step(executor, [(length, length) for length in lengths], depths)


def trial_step(
    executor: GpuExecutor, rows: Sequence[tuple[int, int]], of_depths: Sequence[int] | None = None
) -> StepArrays:
    """A row of no request for each (new tokens, context they end), of ascending depths; None: all of the fullest.

    All pages are the executor's padding page, so any cache will do and nothing in it is lost.
    """
    depths = (executor.depths[0],) * len(rows) if of_depths is None else tuple(of_depths)
    pages = [array("i", [executor.padding_page]) * -(-context // executor.page_size) for _, context in rows]
    positions = array("i")
    for num_new, context in rows:
        positions.extend(range(context - num_new, context))
    unit_starts, ends = unit_rows(depths, executor.unit_depths)
    return StepArrays(
        page_size=executor.page_size,
        depths=depths,
        token_ids=array("i", [0]) * len(positions),
        positions=positions,
        sources=None,
        query_starts=array("i", itertools.accumulate((num_new for num_new, _ in rows), initial=0)),
        context_lens=array("i", [context for _, context in rows]),
        page_ids=pages,
        table_rows=array("i", range(len(rows))),
        new_pages=[(row, 0, ids) for row, ids in enumerate(pages)],
        unit_starts=unit_starts,
        unit_rows=ends,
    )


def measure_reserve(
    executor: GpuExecutor,
    max_num_tokens: int,
    max_len: int,
    buckets: Sequence[int],
    prompts: Sequence[int] = (),
    tuning_bytes: int = 0,
) -> int:
    """Bytes that steps of max_num_tokens tokens, and graphs for `buckets` of rows and of tokens of prompts (none: no
    graphs), of an executor like this take; tuning_bytes: what measuring kernels takes, before graphs are captured.

    The executor's cache may be as small as its padding page: the trial writes and reads nothing else. It is of no use
    afterwards.
    """
    device = executor.device
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step = prompt_step(executor, max_num_tokens, max_len)
    samples = list(range(min(executor.max_num_seqs, step.num_tokens)))
    forward = executor.run(step, samples, greedy=False)
    assert forward.logits is not None
    forward.logits.softmax(dim=-1)  # the sampler's copies
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - before
    del forward
    torch.cuda.empty_cache()
    graphs = _measure_graphs(executor, buckets, prompts) if buckets else 0
    return int(_MARGIN * (activations + max(graphs, tuning_bytes)))


def _measure_graphs(executor: GpuExecutor, buckets: Sequence[int], prompts: Sequence[int]) -> int:
    """The largest graphs size the pool; every further one takes what second ones of a depth do."""
    device, depths = executor.device, executor.depths
    capture = CudaCapture(device)
    sizes = [(size, True) for size in sorted(prompts, reverse=True)]
    sizes += [(size, False) for size in sorted(buckets, reverse=True)]
    free, counts = [torch.cuda.mem_get_info(device)[0]], []
    for (size, of_tokens), some_depths in ((sizes[0], depths), (sizes[min(1, len(sizes) - 1)], depths[:1])):
        rows, tokens = ([], [size]) if of_tokens else ([size], [])
        counts.append(executor.capture(rows, capture, some_depths, prompts=tokens))
        torch.cuda.synchronize(device)
        free.append(torch.cuda.mem_get_info(device)[0])
    num_further = (len(sizes) - 1) * counts[0]
    return max(0, free[0] - free[1]) + num_further * max(0, free[1] - free[2]) // counts[1]
