"""Which of an operator's configurations runs: measured once on a GPU, kept on disk, never measured while serving.

A kernel asks `tuned` with a key that names the operator and the shape that the choice depends on, numbers of rows and
lengths by their `bucket`. Inside `tuning()`, which a warm-up opens, an unknown key times every configuration and keeps
the fastest. Outside of it an unknown key runs the first configuration that this GPU takes, and stays with it: shared
memory differs, 99 KiB on one card and 227 on another, and the compiler may refuse what it took on another. Under the
interpreter the first always runs. triton.autotune would time at the first call of every new key, which in a server is
somebody's request, and needs a driver even where it is interpreted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from sleb.errors import ConfigError
from sleb.files import cache_dir, make_folder, replacement
from sleb.kernels.triton.runtime import INTERPRETED

logger = logging.getLogger("sleb.kernels")

Key = tuple[object, ...]
_VERSION = 1  # raise it when configurations mean something else
_LEAST_RUNS, _MOST_RUNS, _MEASURE_MS = 5, 30, 25
MEASURE_BYTES = 256 << 20  # of the GPU's memory: what is written to clear the caches
_AHEAD_CYCLES = 1 << 20  # half a millisecond: longer than the host takes for an operator's launches


class Config(dict[str, int]):
    """Block sizes, warps and stages of a launch, by name."""

    def __init__(self, **numbers: int) -> None:
        super().__init__(numbers)


@dataclass(frozen=True)
class Launch:
    """`run` computes the operator with a configuration.

    It may be called many times with the same result, but for `changes`, tensors that it changes in place: measuring
    puts them back. A run that is refused has changed none of them: what does is the last kernel of a run.
    """

    run: Callable[[Config], None]
    changes: tuple[Tensor, ...] = ()


class _Table:
    """The choices of one GPU: `stored` as on disk, by the key's JSON; `chosen` what this process runs."""

    def __init__(self, device: int) -> None:
        self.identity = _identity(device)
        self.chosen: dict[Key, Config] = {}
        self.stored: dict[str, Config] = _load(self.identity)

    def known(self, key: Key, configs: Sequence[Config], measured: bool) -> Config | None:
        """What was chosen for `key`, or None; measured: by its time, not because it was the first to run."""
        known = (None if measured else self.chosen.get(key)) or self.stored.get(json.dumps(key))
        return known if known in configs else None


class _State:
    """The tables of this process by device; `report` is there while tuning is on."""

    def __init__(self) -> None:
        self.report: Callable[[str], None] | None = None
        self.tables: dict[int, _Table] = {}


_state = _State()


def bucket(number: int) -> int:
    """The smallest of 1, 4, 16, 64, 256, ... that is at least `number`: what a key says of rows and of lengths."""
    return 1 << ((number - 1).bit_length() + 1) // 2 * 2


def tuned(key: Key, configs: Sequence[Config], launch: Launch) -> None:
    """Runs `launch` with the configuration chosen for `key`, on the current device, which is where Triton launches.

    Raises ConfigError where the GPU takes none of `configs`.
    """
    if INTERPRETED:
        launch.run(configs[0])
        return
    device = torch.cuda.current_device()
    if device not in _state.tables:
        _state.tables[device] = _Table(device)
    table = _state.tables[device]
    known = table.known(key, configs, measured=_state.report is not None)
    if known is None and _state.report is not None:
        _state.report(str(key[0]))
        known = table.stored[json.dumps(key)] = _measure(key, configs, launch)
        _save(table)
    order = configs if known is None else chain((known,), (other for other in configs if other != known))
    table.chosen[key] = _run_first(key, order, launch)


@contextmanager
def tuning(report: Callable[[str], None] | None = None) -> Iterator[None]:
    """Inside, unknown keys are measured and kept; report is called with each operator's name before."""
    if INTERPRETED or not torch.cuda.is_available():
        yield
        return
    before = _state.report
    _state.report = report or (lambda name: None)
    try:
        yield
    finally:
        _state.report = before


def _run_first(key: Key, configs: Iterable[Config], launch: Launch) -> Config:
    """Runs `launch` with the first of `configs` that the GPU takes, and returns that."""
    refusal = ""
    for config in configs:
        try:
            launch.run(config)
        except Exception as error:
            refusal = _refusal(error, key, config)
            continue
        return config
    raise _none_runs(key, refusal)


def _measure(key: Key, configs: Sequence[Config], launch: Launch) -> Config:
    """The fastest of `configs`; those that the GPU does not take are left out."""
    times: list[tuple[float, int]] = []
    refusal = ""
    before = [tensor.clone() for tensor in launch.changes]
    for index, config in enumerate(configs):
        try:
            time = _device_time(partial(launch.run, config))
        except Exception as error:
            refusal = _refusal(error, key, config)
            continue
        times.append((time, index))
    for tensor, values in zip(launch.changes, before, strict=True):
        tensor.copy_(values)
    if not times:
        raise _none_runs(key, refusal)
    return configs[min(times)[1]]


def _device_time(run: Callable[[], None]) -> float:
    """Median milliseconds that the GPU takes for `run`, its caches cold and its launches queued when it begins.

    triton.testing.do_bench only clears the caches ahead of a run: where that takes a GPU less time than the host needs
    for the launches, as those of a composition, it times the host, which a captured step never waits for.
    """
    run()  # what is to be compiled is compiled
    caches = torch.empty(MEASURE_BYTES, dtype=torch.int8, device=torch.cuda.current_device())
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    while len(times) < _LEAST_RUNS or (len(times) < _MOST_RUNS and sum(times) < _MEASURE_MS):
        caches.zero_()
        torch.cuda._sleep(_AHEAD_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def _refusal(error: Exception, key: Key, config: Config) -> str:
    """What the error says, where it says that a configuration cannot run here and nothing of it ran; else it is raised.

    A TritonError says so: too little shared memory, ptxas, a kernel that the front end refuses. A compiler pass that
    fails raises a bare RuntimeError or AssertionError, as do faults of the GPU, an illegal access or memory that is
    out: what is raised inside triton.compile is the former, for nothing is loaded or launched there.
    """
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    compiling = triton.compile.__code__ in frames and not isinstance(error, (OSError, MemoryError))
    if not compiling and not isinstance(error, TritonError):
        raise error
    logger.debug("%s with %s does not run: %s", key, config, error)
    return (str(error).strip() or type(error).__name__).splitlines()[
        -1
    ]  # without its frames, which hold tensors


def _none_runs(key: Key, refusal: str) -> ConfigError:
    gpu = torch.cuda.get_device_name(torch.cuda.current_device())
    return ConfigError(
        f"no configuration of {key[0]} for {key[1:]} runs on this GPU ({gpu}, Triton {triton.__version__}); the last "
        f"one: {refusal}. Another Triton or --dtype may do, --device cpu does"
    )


def _load(identity: str) -> dict[str, Config]:
    """The table that an earlier process stored."""
    try:
        stored: Any = json.loads(_file(identity).read_text(encoding="utf-8"))
        return {name: Config(**config) for name, config in stored["configs"].items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("the tuning table %s is not readable and is made anew (%s)", _file(identity), error)
        return {}


def _save(table: _Table) -> None:
    """Writes the table atomically; a folder that cannot be written only costs the next start its time."""
    path = _file(table.identity)
    stored = {"gpu": table.identity, "configs": dict(sorted(table.stored.items()))}
    try:
        make_folder(path.parent)
        with replacement(path, durable=False) as temporary:
            temporary.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("the tuning table %s cannot be written (%s)", path, error.strerror)


def _identity(device: int) -> str:
    """What a choice depends on besides its key."""
    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, table {_VERSION}"


def _file(identity: str) -> Path:
    return cache_dir() / "tuning" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
