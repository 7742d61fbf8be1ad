"""A batch by a pool of Ray Data's actors, an engine each: the same files as by one process.

Ray starts an actor that died anew and gives its blocks out again. A block is answered into a file by whoever has it:
what is done twice is written twice, alike, and what is done already is passed over.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from sleb.batch.folder import write_block
from sleb.batch.lines import LineReader, read_asks
from sleb.batch.options import BatchOptions
from sleb.batch.progress import NUM_UNDER_WAY, SIGNALS, OnProgress, Progress, Stopped
from sleb.batch.sources import Block, Source, open_source
from sleb.errors import ConfigError, SlebError

if TYPE_CHECKING:
    from sleb.batch.answering import Answerer
    from sleb.engine.config import EngineConfig

_ADDRESS = "RAY_ADDRESS"  # Ray's own variable
_STORE_BYTES = 128 << 20  # of a local cluster: nothing but the places of blocks passes through it
_MAX_TASKS = 5000  # in which blocks are given out


@dataclass(frozen=True)
class PoolJob:
    """What a worker is told, on whichever machine: every one of them sees the files at these paths."""

    config: EngineConfig
    options: BatchOptions
    source: Path
    folder: Path


class Worker:
    """One engine of the pool. Ray Data calls it with blocks, several at a time, on an event loop that stays."""

    def __init__(self, job: PoolJob) -> None:
        self._job = job
        self._reader = LineReader(job.options)
        self._source: Source | None = None
        self._opened: AbstractAsyncContextManager[Answerer] | None = None
        self._answerer: Answerer | None = None
        self._lock = asyncio.Lock()
        self._room = asyncio.Semaphore(NUM_UNDER_WAY)

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Answers the block of `row`. What this worker did so far, and of the error that ends the job its words."""
        block = Block(**row)
        told = {
            "worker": f"{os.uname().nodename} {os.getpid()}",
            "num_errors": 0,
            "num_tokens": 0,
            "error": "",
        }
        try:
            async with self._room:
                answerer = await self._open()
                if not (self._job.folder / block.name).is_file():
                    assert self._source is not None
                    async with self._lock:
                        asks = await asyncio.to_thread(read_asks, self._source, self._reader, block)
                    rows = await answerer.answer(block, asks)
                    await asyncio.to_thread(write_block, self._job.folder, block, rows)
        except SlebError as error:
            return told | {"num_lines": 0, "error": str(error)}
        tokens = answerer.num_output_tokens
        return told | {
            "num_lines": block.num_lines,
            "num_errors": answerer.num_errors,
            "num_tokens": tokens,
        }

    async def _open(self) -> Answerer:
        """The engine, loaded when it is first needed: an error of that is told as any other."""
        async with self._lock:
            if self._answerer is None:
                from sleb.batch.answering import open_answerer
                from sleb.engine.engine import Engine

                self._source = open_source(self._job.source, self._job.options)
                engine = await asyncio.to_thread(Engine, self._job.config)
                self._opened = open_answerer(engine, self._job.config.max_num_seqs, self._job.options)
                self._answerer = await self._opened.__aenter__()  # until Ray ends the process
            return self._answerer


def import_ray() -> Any:
    """Ray with Ray Data. Raises ConfigError where it is not installed.

    A cluster that is started here takes orders from those alone who have a token that nobody else knows: Ray listens on
    every address of the machine, whatever it is told. It reads these variables when it is imported.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not os.environ.get(_ADDRESS) and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
    try:
        importlib.import_module("ray.data")
        return importlib.import_module("ray")
    except ImportError:
        raise ConfigError("--workers needs Ray: pip install 'sleb[ray]', or leave it out") from None


def answer_in_pool(job: PoolJob, num_workers: int, blocks: Sequence[Block], on_progress: OnProgress) -> None:
    """Answers `blocks` by `num_workers` engines, on the cluster that RAY_ADDRESS names or on this machine.

    Raises ConfigError for more workers than the cluster has room for, Stopped on SIGINT or SIGTERM, and SlebError for
    whatever ended a worker's part.
    """
    ray = import_ray()
    with _signals(), _cluster(ray, num_workers) as resources:
        share, config = _share(job.config, num_workers, resources)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        data = ray.data.from_items(
            list(map(asdict, blocks)), override_num_blocks=min(len(blocks), _MAX_TASKS)
        )
        answered = data.map(
            Worker,
            fn_constructor_args=(replace(job, config=_absolute(config)),),
            compute=ray.data.ActorPoolStrategy(
                size=min(num_workers, len(blocks)), max_concurrent_calls_per_actor=NUM_UNDER_WAY
            ),
            **share,
        )
        num_lines, workers = 0, dict[str, tuple[int, int]]()
        for row in answered.iter_rows():
            if row["error"]:
                raise SlebError(row["error"])
            num_lines += row["num_lines"]
            workers[row["worker"]] = row["num_errors"], row["num_tokens"]
            errors, tokens = (sum(each) for each in zip(*workers.values(), strict=True))
            on_progress(Progress(num_lines, errors, tokens))


@contextmanager
def _cluster(ray: Any, num_workers: int) -> Iterator[dict[str, float]]:
    """A cluster's resources by name; one that is started here ends with the job."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address := os.environ.get(_ADDRESS):
        ray.init(address=address, **quiet)
    else:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, num_workers),
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            **quiet,
        )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _share(
    config: EngineConfig, num_workers: int, resources: dict[str, float]
) -> tuple[dict[str, float], EngineConfig]:
    """What Ray keeps for each worker, and the engine that fits into it. Raises ConfigError."""
    num_cpus, num_gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if num_gpus and config.device != "cpu":
        if num_workers > num_gpus:
            raise ConfigError(f"--workers is {num_workers}, but there are {num_gpus} GPUs; take one a worker")
        return {"num_cpus": 1, "num_gpus": 1}, config
    if num_workers * (config.threads or 1) > num_cpus:
        raise ConfigError(
            f"--workers {num_workers} with {config.threads or 1} threads each need more than the {num_cpus} "
            "processors that there are; take fewer"
        )
    threads = config.threads or num_cpus // num_workers
    return {"num_cpus": threads}, replace(config, threads=threads)


def _absolute(config: EngineConfig) -> EngineConfig:
    """Files and folders by paths that do not depend on where a worker is started; other names as they are."""
    given = {
        name: getattr(config, name) for name in ("model", "layer_map", "chat_template", "generation_config")
    }
    paths: dict[str, Any] = {
        name: os.path.abspath(value)
        for name, value in given.items()
        if isinstance(value, str | Path) and os.path.exists(value)
    }
    return replace(config, **paths)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise Stopped, the first time; a second one is the system's."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
