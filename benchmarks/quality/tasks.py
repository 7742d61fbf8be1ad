"""Tasks of lm-evaluation-harness at every depth, over HTTP: sleb's own server on a free port, `lm_eval` once a tier.

The requests are those of lm-eval's `local-completions` with the server's tokenizer: token ids that are to be scored,
and prompts to go on from. lm_eval runs in a process of its own, and may be that of another environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sleb.engine.llm import LLM
from sleb.errors import ConfigError, SlebError

DEFAULT_MAX_LENGTH = 2048  # lm-eval's own, for models behind an API
_POLL_SECONDS = 0.1
_GRACE_SECONDS = 5.0


Scores = dict[str, dict[str, tuple[float, float | None]]]
"""By task, then by metric: the value, and its standard error where lm-eval computes one.

A filter's name follows the metric's where there is one, as in "exact_match,strict".
"""


@dataclass(frozen=True)
class TaskOptions:
    """What lm_eval is asked. limit: documents of each task; None: all. max_length: tokens of prompt and answer."""

    executable: Path
    tasks: Sequence[str]
    limit: int | None = None
    include_path: Path | None = None
    max_length: int = DEFAULT_MAX_LENGTH


def find_lm_eval(given: str | None) -> Path:
    """The executable: the one given, else that beside this Python or on the PATH. Raises ConfigError."""
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    found = shutil.which("lm_eval", path=places) if given is None else shutil.which(os.path.expanduser(given))
    if found is None and given is not None:
        raise ConfigError(f"--lm-eval {given} is no executable; name the lm_eval of the environment it is in")
    if found is None:
        raise ConfigError(
            "--tasks needs lm-eval, which is not installed: pip install 'lm_eval[api]', or name the executable of "
            "another environment with --lm-eval"
        )
    return Path(found)


@contextmanager
def served(llm: LLM) -> Iterator[str]:
    """The address (http://host:port) of a server for `llm`'s engine, which is its own until the end."""
    from sleb.server.context import ServerContext
    from sleb.server.options import ServeOptions
    from sleb.server.run import base_url, bind_socket, make_server

    context = ServerContext.create(
        llm.engine, ServeOptions(port=0, warm_up=False), llm.engine.config.max_num_seqs
    )
    with bind_socket("127.0.0.1", 0) as sock:
        server = make_server(context)
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise SlebError("the server for lm-eval did not start")
                time.sleep(_POLL_SECONDS)
            yield base_url(sock)
        finally:
            server.should_exit = True
            thread.join(2 * _GRACE_SECONDS)


def run_tasks(
    llm: LLM,
    depths: Sequence[int],
    options: TaskOptions,
    on_progress: Callable[[int], None] = lambda depth: None,
) -> Iterator[Scores]:
    """The scores of each depth, in the order of the depths. Raises SlebError when lm_eval fails."""
    with served(llm) as url:
        for depth in depths:
            on_progress(depth)
            try:
                yield run_lm_eval(options, url, llm.engine.tier(depth).id)
            except SlebError as error:
                raise SlebError(f"lm-eval at depth {depth}: {error}") from None


def run_lm_eval(options: TaskOptions, url: str, model: str) -> Scores:
    """The scores of one model behind `url`. Raises SlebError with lm_eval's own last words when it fails."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            lm_eval_command(options, url, model, folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal is for us, and we end it
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
        finally:
            _end(process)
        if process.returncode:
            raise SlebError(f"it ended with status {process.returncode}: {_last_line(log)}")
        files = sorted(Path(folder).rglob("results*.json"))
        if not files:
            raise SlebError(f"it wrote no results: {_last_line(log)}")
        return read_results(json.loads(files[-1].read_text(encoding="utf-8")))


def lm_eval_command(options: TaskOptions, url: str, model: str, folder: str) -> list[str]:
    """The command line, which lm-eval has understood since 0.4.9, the first with a remote tokenizer."""
    arguments = {
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "remote",
        "max_length": options.max_length,
        "num_concurrent": 8,
        "max_retries": 1,  # an answer that comes only when asked again would be a fault worth seeing
        "timeout": 3600,  # seconds of one request: a queue of long ones on a CPU takes its time
    }
    command = [str(options.executable), "--model", "local-completions", "--model_args"]
    command += [",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--tasks", ",".join(options.tasks), "--output_path", folder]
    for flag, value in (("--limit", options.limit), ("--include_path", options.include_path)):
        command += [] if value is None else [flag, str(value)]
    return command


def read_results(content: Mapping[str, Any]) -> Scores:
    """The numbers in a results file of lm-eval: "acc,none" and "acc_stderr,none" become acc."""
    scores: Scores = {}
    for task, found in content["results"].items():
        numbers = {
            key: float(value) for key, value in found.items() if isinstance(value, int | float) and "," in key
        }
        scores[task] = {
            key.removesuffix(",none"): (value, numbers.get(key.replace(",", "_stderr,", 1)))
            for key, value in numbers.items()
            if "_stderr," not in key
        }
    return scores


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that still runs, by force if it does not go, or if we are interrupted once more."""
    process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()
