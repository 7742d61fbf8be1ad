"""Every operator, backend against backend, as a share of what the device can do.

The backends take turns on inputs of the same shape. On a card a sample is a number of launches that go through enough
sets of inputs and outputs to exceed the second cache, captured in a graph where the operator can be, and timed by the
card's own clock. Configurations are chosen before, in a call of each operator that is not counted.

The share is the roofline's: the least time that the bytes or the operations take, whichever is more, at the ceilings
measured in the same run (`sleb.benchmarks.ceilings`), over the median time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sleb.benchmarks.ceilings import Ceilings, measure_ceilings, seconds_of_calls
from sleb.benchmarks.environment import describe_machine
from sleb.benchmarks.harness import MOST_REPETITIONS, alternated_orders
from sleb.benchmarks.kernel_cases import (
    ATTENTION_OPS,
    OPS,
    SIZES,
    TORCH_NOT_CAPTURABLE,
    Backend,
    Case,
    Inputs,
    Maker,
    Scale,
    make_cases,
)
from sleb.engine.model.resolve import resolve_device, resolve_dtype
from sleb.errors import ConfigError
from sleb.kernels.names import DTYPE_ALIASES, DTYPES
from sleb.kernels.registry import torch_gpu_kernels, triton_gpu_kernels

BACKENDS = ("torch", "triton", "flash", "varlen")
_ATTENTION_ONLY = ("flash", "varlen")
_PAGE_SIZE = 16
_SAMPLE_SECONDS = 0.002  # that a sample takes at least, so that a launch's own cost is a small part
_MIN_LAUNCHES, _MAX_LAUNCHES = 20, 1000
_GRAPH_SECONDS = 0.001  # a launch that takes longer gains nothing from a graph
_MAX_SETS = 256
_CACHES = 3  # so many times the second cache are the sets together


@dataclass(frozen=True)
class KernelOptions:
    """What to measure. None: every operator, every backend that may run on the device; "auto": bfloat16 on a card and
    float32 on a CPU, full shapes on a card and small ones on a CPU."""

    ops: Sequence[str] | None = None
    backends: Sequence[str] | None = None
    dtype: str = "auto"
    device: str = "auto"
    repetitions: int = 7
    scale: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class KernelRow:
    """One backend on one operator and shape.

    Attributes:
        num_bytes, flops: the least that the operator moves and computes.
        reason: why the backend did not run; the figures are then None.
        timing: "graph" (replayed on a card), "launches" (on a card, one by one), "clock" (on a CPU) or "interpreted",
            of which the times mean nothing.
        microseconds: of one call, median over samples, fastest and slowest beside it.
        gb_per_second, tflops: num_bytes (10⁹) and flops (10¹²) over that time; None for no operations to speak of.
        bound: "bytes" or "operations", whichever takes longer at the ceilings. roofline_share: of that limit.
    """

    op: str
    shape: str
    backend: str
    num_bytes: int
    flops: int
    bound: str
    reason: str | None = None
    timing: str | None = None
    microseconds: float | None = None
    microseconds_low: float | None = None
    microseconds_high: float | None = None
    microseconds_samples: Sequence[float] = ()
    gb_per_second: float | None = None
    tflops: float | None = None
    roofline_share: float | None = None


@dataclass(frozen=True)
class KernelReport:
    """All that a run found. complete: whether it was not interrupted."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: list[KernelRow]
    complete: bool

    def to_json(self) -> str:
        """One object with the keys kind, environment, settings, rows, complete; ends with a newline."""
        return (
            json.dumps({"kind": "kernels"} | asdict(self), indent=1, allow_nan=False, ensure_ascii=False)
            + "\n"
        )


@dataclass(frozen=True)
class _Plan:
    """The options with nothing left open."""

    ops: tuple[str, ...]
    backends: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    repetitions: int
    scale: Scale
    seed: int


def plan(options: KernelOptions) -> _Plan:
    """Raises ConfigError for the first option that cannot be."""
    _check_names("op", options.ops, OPS)
    _check_names("backend", options.backends, BACKENDS)
    if not 1 <= options.repetitions <= MOST_REPETITIONS:
        raise ConfigError(
            f"--repetitions is {options.repetitions}; it must be an integer from 1 to {MOST_REPETITIONS:,}"
        )
    device = resolve_device(options.device)
    on_card = device.type == "cuda"
    name = DTYPE_ALIASES.get(options.dtype, options.dtype)
    name = ("bfloat16" if on_card else "float32") if name == "auto" else name
    if name not in DTYPES:
        raise ConfigError(f"--dtype is '{options.dtype}'; choose one of: auto, {', '.join(DTYPES)}")
    scale = ("full" if on_card else "small") if options.scale == "auto" else options.scale
    if scale not in SIZES:
        raise ConfigError(f"--scale is '{options.scale}'; choose one of: auto, {', '.join(SIZES)}")
    default = BACKENDS if on_card else ("torch", "triton") if _interpreted() else ("torch",)
    return _Plan(
        tuple(options.ops or OPS),
        tuple(options.backends or default),
        resolve_dtype(name, "auto", None),
        device,
        options.repetitions,
        scale,
        options.seed,
    )


def _check_names(what: str, names: Sequence[str] | None, known: Sequence[str]) -> None:
    if names is None:
        return
    for name in names:
        if name not in known:
            raise ConfigError(f"{what} '{name}' is not known; choose from: {', '.join(known)}")
        if list(names).count(name) > 1:
            raise ConfigError(f"{what} '{name}' is named twice; name each once")
    if not names:
        raise ConfigError(f"no {what} is named; choose from: {', '.join(known)}")


def _interpreted() -> bool:
    """Whether Triton is there and interprets its kernels."""
    try:
        from sleb.kernels.triton.runtime import INTERPRETED
    except ImportError:
        return False
    return INTERPRETED


def select_backend(name: str, case: Case, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called `name` for a case. Raises ConfigError, with the reason, where it cannot run."""
    if name in _ATTENTION_ONLY:
        if case.op not in ATTENTION_OPS:
            raise ConfigError("it has attention alone")
        return _select_attention(name, case, device, dtype)
    if name == "torch":
        kernels = torch_gpu_kernels()
        return Backend(name, kernels, kernels.attention, capturable=case.op not in TORCH_NOT_CAPTURABLE)
    kernels = triton_gpu_kernels()
    if device.type != "cuda" and not _interpreted():
        raise ConfigError("it needs a CUDA card, or TRITON_INTERPRET=1 in the environment")
    return Backend(name, kernels, kernels.attention)


def _select_attention(name: str, case: Case, device: torch.device, dtype: torch.dtype) -> Backend:
    from sleb.kernels.attention.select import select_attention

    kernels = torch_gpu_kernels()
    found = select_attention("flash" if name == "flash" else "torch", kernels, device, dtype, case.head_dim)
    if name == "varlen" and "varlen" not in found.name:
        raise ConfigError("torch has no varlen attention over pages here")
    return Backend(name, kernels, found.function, found.page_multiple, found.capturable)


class _Subject:
    """A backend on a case, called once and ready to be timed."""

    def __init__(self, case: Case, backend: Backend, sets: Sequence[Inputs], device: torch.device) -> None:
        self._device = device
        # Outputs are kept, so that each set has memory of its own for them.
        self._outputs: list[Tensor | None] = [None] * len(sets)
        once = [partial(self._call, case, backend, index, inputs) for index, inputs in enumerate(sets)]
        with _tuning(backend):
            once[0]()
        seconds = seconds_of_calls(once, device)
        seconds = min(seconds, seconds_of_calls(once, device))
        self._calls = once * _num_passes(len(once), seconds)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.timing = "interpreted" if backend.name == "triton" and _interpreted() else "clock"
        if device.type == "cuda" and self.timing == "clock":
            self.timing = "launches"
            if backend.capturable and seconds < _GRAPH_SECONDS:
                self._graph = _captured(self._calls)
                self.timing = "launches" if self._graph is None else "graph"

    def _call(self, case: Case, backend: Backend, index: int, inputs: Inputs) -> None:
        self._outputs[index] = case.call(backend, inputs)

    def seconds(self) -> float:
        """Of one call."""
        if self._graph is None:
            return seconds_of_calls(self._calls, self._device)
        return seconds_of_calls([self._graph.replay], self._device) / len(self._calls)


def _tuning(backend: Backend) -> AbstractContextManager[None]:
    if backend.name != "triton":
        return nullcontext()
    from sleb.kernels.triton.tuning import tuning

    return tuning()


def _num_passes(num_sets: int, seconds: float) -> int:
    """Times that a sample goes through all sets."""
    launches = min(
        max(_SAMPLE_SECONDS / seconds, _MIN_LAUNCHES if seconds < _GRAPH_SECONDS else 1), _MAX_LAUNCHES
    )
    return max(1, round(launches / num_sets))


def _captured(calls: Sequence[Callable[[], None]]) -> torch.cuda.CUDAGraph | None:
    """None where an operator turns out to need the host."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph


def num_sets(case: Case, device: torch.device) -> int:
    """Sets of inputs and outputs that exceed the card's second cache; one on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    if case.num_bytes >= 8 * cache:
        return 1
    return min(_MAX_SETS, 1 + -(-_CACHES * cache // case.num_bytes))


def run_kernels(
    options: KernelOptions,
    command: Sequence[str] = (),
    *,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> KernelReport:
    """Measures, and reports; interrupted, it reports the cases that are complete.

    command: to record, without paths. on_progress: called with cases done, of how many, and the next one. Raises
    ConfigError before anything is measured.
    """
    planned = plan(options)
    environment = describe_machine(planned.device, planned.dtype, ", ".join(planned.backends), command)
    ceilings = measure_ceilings(planned.device, planned.dtype)
    environment["ceilings"] = asdict(ceilings)
    settings = {
        "repetitions": planned.repetitions,
        "scale": planned.scale,
        "seed": planned.seed,
        "ops": list(planned.ops),
        "backends": list(planned.backends),
    }
    cases = make_cases(planned.scale, planned.dtype, planned.ops)
    rows: list[KernelRow] = []
    complete = True
    try:
        with torch.inference_mode():
            for index, case in enumerate(cases):
                if on_progress is not None:
                    on_progress(index, len(cases), f"{case.op}, {case.shape}")
                rows += measure_case(case, planned, ceilings)
    except KeyboardInterrupt:
        complete = False
    return KernelReport(environment, settings, rows, complete)


def measure_case(case: Case, planned: _Plan, ceilings: Ceilings) -> list[KernelRow]:
    """A row a backend, in turns; those that cannot run have the reason."""
    subjects: dict[str, _Subject] = {}
    reasons: dict[str, str] = {}
    sets: dict[int, list[Inputs]] = {}
    for name in planned.backends:
        if name in _ATTENTION_ONLY and case.op not in ATTENTION_OPS:
            continue
        try:
            backend = select_backend(name, case, planned.device, planned.dtype)
            page_size = max(_PAGE_SIZE, backend.page_multiple)
            if page_size not in sets:
                maker = Maker(planned.device, planned.dtype, planned.seed)
                sets[page_size] = [
                    case.build(maker, page_size) for _ in range(num_sets(case, planned.device))
                ]
            subjects[name] = _Subject(case, backend, sets[page_size], planned.device)
        except Exception as error:  # whatever it is that a backend lacks here, the others go on
            reasons[name] = _reason(error)
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    names = list(subjects)
    for order in alternated_orders(range(len(names)), planned.repetitions, random.Random(planned.seed)):
        for index in order:
            samples[names[index]].append(subjects[names[index]].seconds())
    return list(_rows(case, planned.backends, subjects, samples, reasons, ceilings))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text[:200]}"


def _rows(
    case: Case,
    backends: Sequence[str],
    subjects: dict[str, _Subject],
    samples: dict[str, list[float]],
    reasons: dict[str, str],
    ceilings: Ceilings,
) -> Iterator[KernelRow]:
    for name in backends:
        if name in reasons:
            yield KernelRow(**_facts(case, ceilings), backend=name, reason=reasons[name])
        elif name in subjects:
            yield make_kernel_row(case, name, subjects[name].timing, samples[name], ceilings)


def _facts(case: Case, ceilings: Ceilings) -> dict[str, Any]:
    floors = (case.num_bytes / ceilings.copy_bytes_per_second, case.flops / ceilings.matrix_flops_per_second)
    bound = "operations" if floors[1] > floors[0] else "bytes"
    return {
        "op": case.op,
        "shape": case.shape,
        "num_bytes": case.num_bytes,
        "flops": case.flops,
        "bound": bound,
    }


def make_kernel_row(
    case: Case, backend: str, timing: str, seconds: Sequence[float], ceilings: Ceilings
) -> KernelRow:
    """The statistics of samples of seconds a call."""
    middle = median(seconds)
    floor = ceilings.floor_seconds(case.num_bytes, case.flops)
    return KernelRow(
        **_facts(case, ceilings),
        backend=backend,
        timing=timing,
        microseconds=middle * 1e6,
        microseconds_low=min(seconds) * 1e6,
        microseconds_high=max(seconds) * 1e6,
        microseconds_samples=[each * 1e6 for each in seconds],
        gb_per_second=None if timing == "interpreted" else case.num_bytes / middle / 1e9,
        tflops=None if timing == "interpreted" or not case.flops else case.flops / middle / 1e12,
        roofline_share=None if timing == "interpreted" else floor / middle,
    )
