"""Which of an operator's configurations runs: measured once on a GPU, kept on disk, never measured while serving.

A kernel asks `tuned` with a key that names the operator and the shape that the choice depends on. Inside `tuning()`,
which a warm-up opens, an unknown key times every configuration and keeps the fastest; outside of it, and always under
the interpreter, an unknown key runs the first configuration. triton.autotune would time at the first call of every new
key, which in a server is somebody's request, and needs a driver even where it is interpreted.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.errors import TritonError

from sleb.files import cache_dir, make_folder, replacement
from sleb.kernels.triton.runtime import INTERPRETED

logger = logging.getLogger("sleb.kernels")

Key = tuple[object, ...]
_VERSION = 1  # raise it when configurations mean something else
_WARM_UP_MS, _MEASURE_MS = 5, 25


class Config(dict[str, int]):
    """Block sizes, warps and stages of a launch, by name."""

    def __init__(self, **numbers: int) -> None:
        super().__init__(numbers)


@dataclass(frozen=True)
class Launch:
    """`run` computes the operator with a configuration; it may be called many times with the same result."""

    run: Callable[[Config], None]


class _State:
    """The table of this process; `report` is there while tuning is on."""

    def __init__(self) -> None:
        self.report: Callable[[str], None] | None = None
        self.table: dict[str, Config] = {}
        self.loaded_for: str | None = None


_state = _State()


def tuned(key: Key, configs: Sequence[Config], launch: Launch) -> None:
    """Runs `launch` with the configuration chosen for `key`."""
    launch.run(_choose(key, configs, launch))


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


def _choose(key: Key, configs: Sequence[Config], launch: Launch) -> Config:
    if INTERPRETED:
        return configs[0]
    _load()
    name = json.dumps(key)
    known = _state.table.get(name)
    if known is not None and known in configs:
        return known
    if _state.report is None:
        return configs[0]
    _state.report(str(key[0]))
    _state.table[name] = _measure(key, configs, launch)
    _save()
    return _state.table[name]


def _measure(key: Key, configs: Sequence[Config], launch: Launch) -> Config:
    """The fastest of `configs`; those that do not fit the GPU are left out."""
    times: list[tuple[float, int]] = []
    for index, config in enumerate(configs):
        try:
            time = triton.testing.do_bench(
                lambda config=config: launch.run(config),
                warmup=_WARM_UP_MS,
                rep=_MEASURE_MS,
                return_mode="median",
            )
        except TritonError as error:
            logger.debug("%s with %s does not run: %s", key, config, error)
            continue
        times.append((float(time), index))
    if not times:
        raise RuntimeError(f"no configuration of {key[0]} runs on this GPU")
    return configs[min(times)[1]]


def _load() -> None:
    """Reads the GPU's table, once."""
    identity = _identity()
    if _state.loaded_for == identity:
        return
    _state.loaded_for, _state.table = identity, {}
    try:
        stored: Any = json.loads(_file(identity).read_text(encoding="utf-8"))
        _state.table = {name: Config(**config) for name, config in stored["configs"].items()}
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("the tuning table %s is not readable and is made anew (%s)", _file(identity), error)


def _save() -> None:
    """Writes the table atomically; a folder that cannot be written only costs the next start its time."""
    identity = _identity()
    path = _file(identity)
    stored = {"gpu": identity, "configs": dict(sorted(_state.table.items()))}
    try:
        make_folder(path.parent)
        with replacement(path, durable=False) as temporary:
            temporary.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("the tuning table %s cannot be written (%s)", path, error.strerror)


def _identity() -> str:
    """What a choice depends on besides its key."""
    return f"{torch.cuda.get_device_name()}, triton {triton.__version__}, table {_VERSION}"


def _file(identity: str) -> Path:
    return cache_dir() / "tuning" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
