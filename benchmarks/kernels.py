"""Every operator, backend against backend, as a share of what the device can do, checked against the reference.

The backends take turns on inputs of the same shape. On a GPU a sample is launches that go through enough sets of inputs
and outputs to exceed the second cache, captured in a graph where the operator can be, by the GPU's own clock. The share
is the roofline's, at the ceilings measured in the same run (`sleb.benchmarks.ceilings`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sleb.benchmarks.ceilings import Ceilings, measure_ceilings, seconds_of_calls
from sleb.benchmarks.environment import describe_machine, shown_command
from sleb.benchmarks.kernel_cases import (
    ATTENTION_OPS,
    TORCH_NOT_CAPTURABLE,
    Backend,
    Inputs,
    KernelCase,
    Maker,
    make_cases,
)
from sleb.benchmarks.kernel_options import BACKENDS, OPS, KernelsOptions
from sleb.benchmarks.record import Measurement, Result
from sleb.benchmarks.turns import Case, Progress, Run, Sample, measure
from sleb.engine.model.resolve import make_current, resolve_device, resolve_dtype
from sleb.errors import ConfigError
from sleb.kernels.registry import torch_gpu_kernels, triton_gpu_kernels

METRIC = "µs"
_ATTENTION_ONLY = ("flash", "varlen")
_PAGE_SIZE = 16
_SAMPLE_SECONDS = 0.002  # that a sample takes at least, so that a launch's own cost is a small part
_MIN_LAUNCHES, _MAX_LAUNCHES = 20, 1000
_GRAPH_SECONDS = 0.001  # a launch that takes longer gains nothing from a graph
_MAX_SETS = 256
_CACHES = 3  # so many times the second cache are the sets together
# What an output may differ from the reference by, as a share of the largest value in it.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_LEGEND = (
    "of roofline: the least time that every input read once, every output written once or the operations take at the "
    "ceilings measured here, over the median time. error: to the reference, over its largest value. interpreted: in "
    "Python, where times mean nothing. On a CPU small shapes stay in its caches."
)


def _interpreted() -> bool:
    """Whether Triton is there and interprets its kernels."""
    try:
        from sleb.kernels.triton.runtime import INTERPRETED
    except ImportError:
        return False
    return INTERPRETED


def select_backend(name: str, case: KernelCase, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called `name` for a case. Raises ConfigError, with the reason, where it cannot run."""
    if name in _ATTENTION_ONLY:
        from sleb.kernels.attention.select import select_attention

        kernels, chosen = torch_gpu_kernels(), "flash" if name == "flash" else "torch"
        found = select_attention(chosen, kernels, device, dtype, case.head_dim)
        if name == "varlen" and "varlen" not in found.name:
            raise ConfigError("torch has no varlen attention over pages here")
        return Backend(name, kernels, found.function, found.page_multiple, found.capturable)
    if name == "torch":
        kernels = torch_gpu_kernels()
        return Backend(name, kernels, kernels.attention, capturable=case.op not in TORCH_NOT_CAPTURABLE)
    kernels = triton_gpu_kernels()
    if device.type != "cuda" and not _interpreted():
        raise ConfigError("it needs a CUDA GPU, or TRITON_INTERPRET=1 in the environment")
    return Backend(name, kernels, kernels.attention)


class _Subject:
    """A backend on a case, called once and ready to be timed."""

    def __init__(
        self, case: KernelCase, backend: Backend, sets: Sequence[Inputs], device: torch.device
    ) -> None:
        self._device = device
        # Outputs are kept, so that each set has memory of its own for them.
        self._outputs: list[Tensor | None] = [None] * len(sets)
        once = [partial(self._call, case, backend, index, inputs) for index, inputs in enumerate(sets)]
        with backend.kernels.tuning(None):
            once[0]()
        seconds = min(seconds_of_calls(once, device) for _ in range(2))
        self._calls = once * _num_passes(len(once), seconds)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.timing = "interpreted" if backend.name == "triton" and _interpreted() else "clock"
        if device.type == "cuda" and self.timing == "clock":
            if backend.capturable and seconds < _GRAPH_SECONDS:
                graph = torch.cuda.CUDAGraph()
                with suppress(RuntimeError):  # an operator may turn out to need the host
                    with torch.cuda.graph(graph):
                        for call in self._calls:
                            call()
                    self._graph = graph
            self.timing = "launches" if self._graph is None else "graph"
            if self._graph is not None:
                self._graph.replay()
                torch.cuda.synchronize()

    def _call(self, case: KernelCase, backend: Backend, index: int, inputs: Inputs) -> None:
        self._outputs[index] = case.call(backend, inputs)

    def sample(self, turn: int) -> Sample:
        """Microseconds of one call."""
        if self._graph is None:
            return {METRIC: 1e6 * seconds_of_calls(self._calls, self._device)}
        return {METRIC: 1e6 * seconds_of_calls([self._graph.replay], self._device) / len(self._calls)}


def _num_passes(num_sets: int, seconds: float) -> int:
    """Times that a sample goes through all sets."""
    least = _MIN_LAUNCHES if seconds < _GRAPH_SECONDS else 1
    return max(1, round(min(max(_SAMPLE_SECONDS / seconds, least), _MAX_LAUNCHES) / num_sets))


def num_sets(case: KernelCase, device: torch.device) -> int:
    """Sets of inputs and outputs that exceed the GPU's second cache; one on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return 1 if case.num_bytes >= 8 * cache else min(_MAX_SETS, 1 + -(-_CACHES * cache // case.num_bytes))


class KernelsBench:
    """The options with nothing left open. Raises ConfigError for one that cannot be."""

    def __init__(self, options: KernelsOptions) -> None:
        options.check()
        self.options = options
        self.device = resolve_device(options.device)
        make_current(self.device)
        on_gpu = self.device.type == "cuda"
        default = "bfloat16" if on_gpu else "float32"
        self.dtype = resolve_dtype(options.dtype, "auto", default, self.device)
        self.cases = make_cases("full" if on_gpu else "small", self.dtype, options.ops or OPS)
        runnable = BACKENDS if on_gpu else ("torch", "triton") if _interpreted() else ("torch",)
        self.backends = tuple(options.backends or runnable)

    def measure(
        self, case: KernelCase, ceilings: Ceilings, seconds: float = 0.0
    ) -> tuple[list[Measurement], str]:
        """The backends in turns, in at most so many seconds; those that cannot run have the reason. And a line of it.

        Raises KeyboardInterrupt.
        """
        runs: dict[str, Run] = {}
        facts: dict[str, dict[str, Any]] = {}
        failed: list[Measurement] = []
        sets: dict[int, list[Inputs]] = {}
        known = {"num_bytes": case.num_bytes, "num_operations": case.flops}
        operations = case.flops / ceilings.matrix_flops_per_second
        bound = "operations" if operations > case.num_bytes / ceilings.copy_bytes_per_second else "bytes"
        for name in self.backends:
            if name in _ATTENTION_ONLY and case.op not in ATTENTION_OPS:
                continue
            try:
                backend = select_backend(name, case, self.device, self.dtype)
                page_size = max(_PAGE_SIZE, backend.page_multiple)
                error = self._error(case, backend, page_size)
                if page_size not in sets:
                    maker = Maker(self.device, self.dtype, self.options.seed)
                    count = num_sets(case, self.device)
                    sets[page_size] = [case.build(maker, page_size) for _ in range(count)]
                subject = _Subject(case, backend, sets[page_size], self.device)
                runs[name] = subject.sample
                facts[name] = {"bound": bound, "timing": subject.timing, "error": error, **known}
            except Exception as problem:  # whatever it is that a backend lacks here, the others go on
                kind = "" if isinstance(problem, ConfigError) else f"{type(problem).__name__}: "
                reason = kind + " ".join(str(problem).split())
                failed.append(Measurement(str(case), name, METRIC, None, facts={"failed": reason[:300]}))
        in_turns = Case(str(case), runs, "torch" if "torch" in runs else None, facts=facts)
        turns = measure([in_turns], replace(self.options, time_budget=seconds))
        if not turns.complete:
            raise KeyboardInterrupt
        found = [with_rates(each, ceilings) for each in turns.measurements()]
        return found + failed, turns.line(in_turns) if turns.samples else ""

    def _error(self, case: KernelCase, backend: Backend, page_size: int) -> float | None:
        """What the output differs from the reference's by, over its largest value; of token ids, the share of rows.

        Both get inputs of their own, for some operators write into them; None for the reference itself.
        """
        if backend.name == "torch":
            return None
        kernels, maker = torch_gpu_kernels(), partial(Maker, self.device, self.dtype, self.options.seed)
        wanted = case.call(Backend("torch", kernels, kernels.attention), case.build(maker(), page_size))
        with backend.kernels.tuning(None):
            found = case.call(backend, case.build(maker(), page_size))
        if not wanted.is_floating_point():
            return float((wanted != found).double().mean())
        scale = wanted.double().abs().max().clamp(min=1e-12)
        return float((wanted.double() - found.double()).abs().max() / scale)

    def notes(self, measurements: Sequence[Measurement]) -> list[str]:
        """What the columns are, and outputs that differ from the reference by more than their dtype accounts for."""
        off = [
            f"{each.case}, {each.subject}: {each.facts['error']:.2g}"
            for each in measurements
            if (each.facts.get("error") or 0) > _TOLERANCE[self.dtype]
        ]
        return [_LEGEND, *([f"WRONG beside the reference: {'; '.join(off)}."] if off else [])]


def with_rates(each: Measurement, ceilings: Ceilings) -> Measurement:
    """The measurement with its rates and its share of the ceilings, unless its time means nothing."""
    if each.value is None or each.facts["timing"] == "interpreted":
        return replace(each, ratio=None)
    seconds, num_bytes, flops = each.value / 1e6, each.facts["num_bytes"], each.facts["num_operations"]
    rates = {
        "GB/s": num_bytes / seconds / 1e9,
        "TFLOP/s": flops / seconds / 1e12 if flops else None,
        "roofline_share": ceilings.floor_seconds(num_bytes, flops) / seconds,
    }
    return replace(each, facts={**each.facts, **rates})


def run_kernels(
    options: KernelsOptions,
    command: Sequence[str] = (),
    *,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_case: Callable[[str], None] = lambda line: None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Measures every case; interrupted, the result holds the cases that are complete.

    command: to record. on_progress: cases done, of how many, and the next one; on_case: what was found, in a line;
    on_result: after every case, with what there is so far.
    """
    bench = KernelsBench(options)
    shown, backends = shown_command(command), ", ".join(bench.backends)
    ceilings = measure_ceilings(bench.device, bench.dtype)
    environment = describe_machine(bench.device, bench.dtype, backends, shown) | {
        "ceilings": asdict(ceilings)
    }
    settings = {"repetitions": options.repetitions, "seed": options.seed, "backends": list(bench.backends)}
    result, ends = Result("kernels", environment, settings), time.monotonic() + options.time_budget
    try:
        with torch.inference_mode():
            for place, case in enumerate(bench.cases):
                on_progress(Progress(place, len(bench.cases), str(case)))
                left = max(1e-3, (ends - time.monotonic()) / (len(bench.cases) - place))
                found, line = bench.measure(case, ceilings, left if options.time_budget else 0.0)
                result.measurements += found
                result.notes, result.complete = (
                    bench.notes(result.measurements),
                    place + 1 == len(bench.cases),
                )
                if line:
                    on_case(line)
                on_result(result)
    except KeyboardInterrupt:
        result.complete = False
    return result
