"""Steps over operators for a GPU, queued on the device: replayed from captured graphs, or eager where there is none.

A graph is captured for each served depth and each bucket: of rows that have one new token each, and of tokens where
some have more, as prompts do. It runs the units that its depth keeps, and the
patches of its own and all deeper depths, over the whole bucket; every operator reads on the device which rows its unit
has in this step. So a step of mixed depths is the replay of its fullest depth's graph: deeper rows are left alone by
the units that they skip, and what is read is the fullest depth's weights once, and of the KV each row's own. The same
goes for what the step leaves of a bucket. A patch that no row of a step gets is launches that end at
once: its weight is not read. Where deeper depths have patches, steps of one depth alone have graphs without them.

The page table stays on the device. A sequence keeps its row of it, and a step brings the pages that are new; see
`StepArrays`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from sleb.engine.execute.executor import LOGPROB_ROWS, Forward, PlannedUnit
from sleb.engine.execute.gpu_decoder import GpuDecoder, PatchRows, Stream, UnitRows
from sleb.engine.execute.step_arrays import StepArrays, StepLayout, StepTensors
from sleb.engine.execute.transfer import send
from sleb.kernels.attention.select import AttentionBackend
from sleb.kernels.batch import BatchTensors
from sleb.kernels.registry import GpuKernels

MAX_CAPTURED_TOKENS = 512  # of a step with prompts: larger ones keep the device busy while they are launched
_TUNED_CONTEXT = 1024  # tokens of each sequence while kernels are tuned
# What eager steps say of their longest context: operators are tuned for each, so there are few.
_CONTEXT_BOUNDS = (1024, 4096, 16384)

# Runs a function once, and returns what repeats its work on the same tensors.
Capture = Callable[[Callable[[], None]], Callable[[], None]]


class GpuExecutor:
    """Implements `sleb.engine.execute.executor.Executor`. Not thread-safe; what a step returns is
    valid until the next one.

    Args:
        depths: those served. padding_page: a page of the cache that no request gets.
        max_num_seqs, max_pages: sequences of a step, and pages of a sequence, at most.
    """

    name = "gpu"
    instruction_set: str | None = None
    asynchronous = True

    def __init__(
        self,
        decoder: GpuDecoder,
        kernels: GpuKernels,
        attention: AttentionBackend,
        plan: Sequence[PlannedUnit],
        *,
        depths: Sequence[int],
        page_size: int,
        padding_page: int,
        max_num_seqs: int,
        max_pages: int,
    ) -> None:
        self.kernels = kernels.name
        self.attention: str | None = attention.name
        self.depths = tuple(sorted(depths))
        self.device = decoder.decoder.device
        self.max_num_seqs = max_num_seqs
        self._decoder = decoder
        self._operators = kernels
        self.page_size = page_size
        self.padding_page = padding_page
        self.unit_depths = tuple(planned.depths for planned in plan)
        self._units = tuple(planned.unit for planned in plan)
        self._max_pages = max_pages
        longest = max_pages * page_size
        self._context_bounds = (*(bound for bound in _CONTEXT_BOUNDS if bound < longest), longest)
        self._graphs: dict[tuple[bool, int, int, int], Callable[[], None]] = {}  # see `capture`
        # By whether they are of tokens, of steps with prompts.
        self._buckets: dict[bool, tuple[int, ...]] = {False: (), True: ()}
        # One layout for all captured steps, so that graphs find every section where it was when they were captured.
        most = max(max_num_seqs, MAX_CAPTURED_TOKENS)
        self._layout = StepLayout(most, max_num_seqs, len(plan))
        size = self._layout.size + 2 * max_num_seqs * max_pages  # at most every page is new
        self._static = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._inputs = self._layout.split(self._static)
        self._page_table = torch.full(
            (max_num_seqs, max_pages), padding_page, dtype=torch.int32, device=self.device
        )
        spec, dtype = decoder.decoder.spec, decoder.decoder.weights.dtype
        self._patches = decoder.decoder.weights.patches
        self._hidden = torch.zeros(most, spec.hidden_size, dtype=dtype, device=self.device)
        self._logits = torch.zeros(max_num_seqs, spec.vocab_size, dtype=dtype, device=self.device)
        # What was sampled last, where graphs look for pending tokens and leave the most probable ones.
        self._sampled = torch.zeros(max_num_seqs, dtype=torch.int64, device=self.device)
        most_logits = max(max_num_seqs, LOGPROB_ROWS)
        self._numbers = torch.arange(most_logits + 1, dtype=torch.int32, device=self.device)

    @property
    def num_threads(self) -> int:
        """CPU threads that compute what the GPU does not."""
        return torch.get_num_threads()

    @property
    def description(self) -> str:
        """What computes, in words."""
        graphs = f", {len(self._graphs)} captured graphs" if self._graphs else ""
        kv_cache = ", KV cache in fp8" if self._decoder.kv_cache.dtype == torch.uint8 else ""
        return f"{self.kernels} kernels on {self.device}, attention {self.attention}{graphs}{kv_cache}"

    @property
    def trial_contexts(self) -> list[int]:
        """Tokens of context, one number for each bound that steps give their operators."""
        return [min(bound, _CONTEXT_BOUNDS[-1] + 1) for bound in self._context_bounds]

    @torch.inference_mode()
    def run(
        self, step: StepArrays, samples: Sequence[int], greedy: bool, last: Tensor | None = None
    ) -> Forward:
        """One step; see `sleb.engine.execute.executor.Executor`."""
        self._decoder.decoder.select_context(step.long_context)
        graph = self._find_graph(step)
        if graph is not None:
            return self._replay(graph, step, samples, greedy, last)
        return self._run_eagerly(step, samples, greedy, last)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `sleb.engine.execute.executor.Executor`."""
        return self._head(Stream(hidden.contiguous())).float()

    @torch.inference_mode()
    def capture(
        self,
        buckets: Sequence[int],
        capture: Capture,
        depths: Sequence[int] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        prompts: Sequence[int] = (),
    ) -> int:
        """Captures the graphs of each of `depths` (None: all) and buckets, the largest first.

        buckets: rows of steps of one new token each. prompts: tokens of other steps, at most MAX_CAPTURED_TOKENS.
        The graphs share one pool of memory, which the largest has sized before the others ask. on_progress: graphs
        captured, of all. Returns how many there are.
        """
        spans = [span for depth in depths or self.depths for span in self._spans(depth)]
        sizes = [
            (of_tokens, size)
            for of_tokens, some in ((True, prompts), (False, buckets))
            for size in sorted(some, reverse=True)
        ]
        wanted = [(of_tokens, *span, size) for of_tokens, size in sizes for span in spans]
        for of_tokens, size in sizes:
            self._buckets[of_tokens] = tuple(sorted({*self._buckets[of_tokens], size}))
        for done, (of_tokens, fullest, deepest, bucket) in enumerate(wanted):
            if on_progress is not None:
                on_progress(done, len(wanted))
            units = self._decode_units(fullest, deepest, bucket, of_tokens)
            compute = partial(self._prompts if of_tokens else self._decode, units, bucket)
            self._graphs[of_tokens, fullest, deepest, bucket] = capture(compute)
        if on_progress is not None:
            on_progress(len(wanted), len(wanted))
        return len(wanted)

    @torch.inference_mode()
    def warm_up(
        self,
        num_pages: int,
        report: Callable[[str], None] | None = None,
        prompts: Sequence[int] = (),
    ) -> None:
        """Compiles what decode steps run, and tunes it at full buckets over `num_pages` pages of the cache; of steps
        with prompts, where there are `prompts`, which are as those of `capture`.

        Contents do not matter: what is read is whatever lies in the pages, and written is the padding page alone.
        """
        inputs = self._inputs
        context = min(_TUNED_CONTEXT, self._max_pages * self.page_size)
        used = -(-context // self.page_size)
        pages = torch.arange(self.max_num_seqs * used, dtype=torch.int32, device=self.device) % num_pages
        self._page_table[:, :used] = pages.view(self.max_num_seqs, used)
        torch.arange(self.max_num_seqs, dtype=torch.int32, out=inputs.table_rows)
        inputs.sources.fill_(-1)
        inputs.context_lens.fill_(context)
        inputs.positions.fill_(context - 1)
        inputs.slots.fill_(self.padding_page * self.page_size)
        torch.arange(inputs.query_starts.shape[0], dtype=torch.int32, out=inputs.query_starts)
        compute = self._prompts if prompts else self._decode
        with self._operators.tuning(report):
            # The largest first: operators are tuned at the first rows of a key, and those fill its bucket.
            for bucket in reversed(prompts or numbers_of_rows(self.max_num_seqs)):
                inputs.row_counts.fill_(min(bucket, self.max_num_seqs))
                inputs.token_counts.fill_(bucket)
                for depth in self.depths:  # a patch is for all rows of one, and for some of another
                    compute(self._decode_units(depth, self.depths[-1], bucket, bool(prompts)), bucket)
        inputs.row_counts.zero_()
        inputs.token_counts.zero_()
        self._page_table.fill_(self.padding_page)

    def _decode(self, units: Sequence[UnitRows | PatchRows], bucket: int) -> None:
        """What a graph of rows holds: a token of each row of the bucket, from static inputs to static results."""
        stream = self._through(units, bucket)
        self._logits[:bucket] = self._head(stream)
        self._sampled[:bucket] = self._operators.greedy(self._logits[:bucket])

    def _prompts(self, units: Sequence[UnitRows | PatchRows], bucket: int) -> None:
        """What a graph of tokens holds, likewise; logits are of the tokens to sample from."""
        residual = self._decoder.add(self._through(units, bucket)).residual
        samples = self._inputs.samples[:bucket]
        self._logits[: samples.shape[0]] = self._head(Stream(residual.index_select(0, samples)))
        self._sampled[: samples.shape[0]] = self._operators.greedy(self._logits[: samples.shape[0]])

    def _through(self, units: Sequence[UnitRows | PatchRows], bucket: int) -> Stream:
        inputs = self._inputs
        return self._decoder.run(
            inputs.token_ids[:bucket],
            inputs.positions[:bucket],
            inputs.slots[:bucket],
            units,
            pending=(inputs.sources[:bucket], self._sampled),
            out=self._hidden[:bucket],
        )

    def _spans(self, depth: int) -> list[tuple[int, int]]:
        """Fullest and deepest depth of the steps that graphs of `depth` are for: any, and where those run patches that
        rows of `depth` do not get, `depth` alone."""
        deepest = self.depths[-1]
        alone = self._running(depth, depth) != self._running(depth, deepest)
        return [(depth, deepest), *([(depth, depth)] if alone else [])]

    def _running(self, fullest: int, deepest: int) -> list[int]:
        """The places in the plan of what some served depth from `fullest` to `deepest` runs."""
        served = [depth for depth in self.depths if fullest <= depth <= deepest]
        return [
            index
            for index, (first, end) in enumerate(self.unit_depths)
            if any(first <= depth < end for depth in served)
        ]

    def _decode_units(
        self, fullest: int, deepest: int, bucket: int, of_tokens: bool = False
    ) -> list[UnitRows | PatchRows]:
        """The units that rows of these depths run, each reading its rows from the static inputs."""
        inputs = self._inputs
        units: list[UnitRows | PatchRows] = []
        for index in self._running(fullest, deepest):
            unit, first = self._units[index], self.unit_depths[index][0]
            count = inputs.token_counts[index : index + 1]
            if isinstance(unit, int):
                start = None if first <= fullest else inputs.token_starts[index : index + 1]
                units.append(PatchRows(self._patches[unit], 0, bucket, start, count))
                continue
            batch = BatchTensors(
                inputs.query_starts[: bucket + 1],
                inputs.context_lens[:bucket],
                self._page_table,
                inputs.table_rows[:bucket],
                inputs.row_counts[index : index + 1],
                self.page_size,
                max_query_len=bucket if of_tokens else 1,
                max_context_len=self._max_pages * self.page_size,
            )
            units.append(UnitRows(unit, bucket, count, batch))
        return units

    def _find_graph(self, step: StepArrays) -> Callable[[], None] | None:
        """The graph of the step's fullest depth and of the smallest bucket that holds it; None if there is none."""
        of_tokens = step.num_tokens > step.num_sequences
        buckets = self._buckets[of_tokens]
        at = bisect_left(buckets, step.num_tokens)
        if not self._graphs or at == len(buckets):
            return None
        fullest, bucket = step.depths[0], buckets[at]
        exact = self._graphs.get((of_tokens, fullest, step.depths[-1], bucket))
        return exact or self._graphs.get((of_tokens, fullest, self.depths[-1], bucket))

    def _replay(
        self,
        replay: Callable[[], None],
        step: StepArrays,
        samples: Sequence[int],
        greedy: bool,
        last: Tensor | None,
    ) -> Forward:
        inputs = self._send(step, self._layout, samples)
        if last is not None and last.data_ptr() != self._sampled.data_ptr():
            self._sampled[: last.shape[0]] = last
        replay()
        hidden, num_samples = self._hidden[: step.num_tokens], len(samples)
        if not samples:
            return Forward(hidden, None, None)
        results = self._sampled if greedy else self._logits
        if step.num_tokens > step.num_sequences or num_samples == step.num_sequences:
            results = results[:num_samples]
        else:  # a graph of rows has them of all rows
            results = results.index_select(0, inputs.samples[:num_samples])
        if greedy:
            return Forward(hidden, None, results)
        # A copy in any case: the sampler changes what it is given.
        return Forward(hidden, results.to(torch.float32, copy=True), None)

    def _send(self, step: StepArrays, layout: StepLayout, samples: Sequence[int]) -> StepTensors:
        """The step on the device, by one copy; the page table has its new pages."""
        flat = step.pack(layout, self.padding_page, samples, self._max_pages)
        if layout is self._layout:
            on_device, inputs = self._static[: flat.size], self._inputs
        else:
            on_device = torch.empty(flat.size, dtype=torch.int32, device=self.device)
            inputs = layout.split(on_device)
        send(flat, on_device)
        if flat.size > layout.size:
            places, pages = on_device[layout.size :].chunk(2)
            self._page_table.view(-1).index_put_((places,), pages)
        return inputs

    def _run_eagerly(
        self, step: StepArrays, samples: Sequence[int], greedy: bool, last: Tensor | None
    ) -> Forward:
        layout = StepLayout(step.num_tokens, max(step.num_sequences, len(samples)), len(self._units))
        inputs = self._send(step, layout, samples)
        sampled = self._sampled if step.sources is None else last
        assert sampled is not None, "a pending token, and nothing was sampled"
        pending = (inputs.sources, sampled)
        units = self._eager_units(step, inputs)
        stream = self._decoder.run(inputs.token_ids, inputs.positions, inputs.slots, units, pending)
        residual = self._decoder.add(stream).residual
        if not samples:
            return Forward(residual, None, None)
        logits = self._head(Stream(residual.index_select(0, inputs.samples[: len(samples)])))
        if greedy:
            return Forward(residual, None, self._operators.greedy(logits))
        return Forward(residual, logits.float(), None)

    def _eager_units(self, step: StepArrays, inputs: StepTensors) -> list[UnitRows | PatchRows]:
        """The units that some row runs, over exactly their rows."""
        units: list[UnitRows | PatchRows] = []
        prefixes: dict[int, tuple[Tensor, BatchTensors]] = {}  # by their number of rows: most units share one
        for index, unit in enumerate(self._units):
            first, num_tokens = step.unit_first_tokens[index], step.unit_tokens[index]
            if first == num_tokens:
                continue
            if isinstance(unit, int):
                start = inputs.token_starts[index : index + 1] if first else None
                count = inputs.token_counts[index : index + 1]
                units.append(PatchRows(self._patches[unit], first, num_tokens, start, count))
                continue
            num_rows = step.unit_rows[index]
            if num_rows not in prefixes:
                lens = step.query_lens[:num_rows]
                batch = BatchTensors(
                    inputs.query_starts[: num_rows + 1],
                    inputs.context_lens[:num_rows],
                    self._page_table,
                    inputs.table_rows[:num_rows],
                    inputs.row_counts[index : index + 1],
                    self.page_size,
                    max_query_len=max(lens),
                    max_context_len=self._context_bound(max(step.context_lens[:num_rows])),
                    has_decodes=min(lens) == 1,
                )
                prefixes[num_rows] = (inputs.token_counts[index : index + 1], batch)
            units.append(UnitRows(unit, num_tokens, *prefixes[num_rows]))
        return units

    def _context_bound(self, longest: int) -> int:
        return next(bound for bound in self._context_bounds if bound >= longest)

    def _head(self, stream: Stream) -> Tensor:
        """Final norm and head of all rows of a stream; what was not added is, in place."""
        num_rows = stream.residual.shape[0]
        return self._decoder.head(stream, self._numbers[num_rows : num_rows + 1])


def numbers_of_rows(most: int, base: int = 2) -> list[int]:
    """Powers of two, and `most`: what operators are compiled for changes at these numbers of rows, and what they are
    tuned for at powers of four."""
    numbers = [1]
    while numbers[-1] * base < most:
        numbers.append(numbers[-1] * base)
    return numbers if most == 1 else [*numbers, most]
