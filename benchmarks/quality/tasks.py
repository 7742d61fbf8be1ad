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
from pathlib import Path
from typing import Any

from sleb.benchmarks.quality.options import EvalOptions
from sleb.benchmarks.quality.texts import LM_EVAL_SPARE
from sleb.engine.llm import LLM
from sleb.errors import ConfigError, SlebError

_MAX_LENGTH = 2048  # lm-eval's own, for models behind an API

Scores = dict[str, dict[str, tuple[float, float | None]]]
"""By task, then by metric: the value, and its standard error where lm-eval computes one.

A filter's name follows the metric's where there is one, as in "exact_match,strict".
"""


def find_lm_eval(given: str | None) -> Path:
    """The executable: the one given, else that beside this Python or on the PATH. Raises ConfigError."""
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    found = shutil.which("lm_eval", path=places) if given is None else shutil.which(os.path.expanduser(given))
    if found is None:
        raise ConfigError(
            "--tasks needs lm-eval, which is not installed: pip install 'lm_eval[api]', or name the executable of "
            "another environment with --lm-eval"
            if given is None
            else f"--lm-eval {given} is no executable; name the lm_eval of the environment it is in"
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
                time.sleep(0.1)
            yield base_url(sock)
        finally:
            server.should_exit = True
            thread.join(10)


def run_tasks(
    llm: LLM,
    depths: Sequence[int],
    options: EvalOptions,
    on_progress: Callable[[int], None] = lambda depth: None,
) -> Iterator[Scores]:
    """The scores of each depth, in the order of the depths. Raises SlebError when lm_eval fails."""
    with served(llm) as url:
        for depth in depths:
            on_progress(depth)
            try:
                yield run_lm_eval(options, url, llm.engine.tier(depth).id, max_length(options, llm))
            except SlebError as error:
                raise SlebError(f"lm-eval at depth {depth}: {error}") from None


def max_length(options: EvalOptions, llm: LLM) -> int:
    """Tokens of prompt and answer: lm-eval's own limit, or that with which its windows are those of our texts."""
    same = options.windows_like == "lm-eval" and options.seqlen is not None
    return min(llm.engine.max_model_len, (options.seqlen or 0) + LM_EVAL_SPARE if same else _MAX_LENGTH)


def run_lm_eval(options: EvalOptions, url: str, model: str, max_length: int) -> Scores:
    """The scores of one model behind `url`. Raises SlebError with lm_eval's own last words when it fails.

    The command line is understood since lm-eval 0.4.9, the first with a remote tokenizer.
    """
    arguments = {
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer_backend": "remote",
        "max_length": max_length,
        "num_concurrent": 8,
        "max_retries": 1,  # an answer that comes only when asked again would be a fault worth seeing
        "timeout": 3600,  # seconds of one request: a queue of long ones on a CPU takes its time
    }
    command = [str(find_lm_eval(options.lm_eval)), "--model", "local-completions", "--model_args"]
    command += [",".join(f"{name}={value}" for name, value in arguments.items())]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--tasks", ",".join(options.tasks), "--output_path", folder]
        for flag, value in (("--limit", options.limit), ("--include_path", options.include_path)):
            command += [] if value is None else [flag, str(value)]
        # A session of its own: Ctrl-C in a terminal is for us, and `run` kills what then still runs.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            check=False,
        )
        last = (done.stdout.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"])[-1]
        if done.returncode:
            raise SlebError(f"it ended with status {done.returncode}: {last}")
        files = sorted(Path(folder).rglob("results*.json"))
        if not files:
            raise SlebError(f"it wrote no results: {last}")
        return read_results(json.loads(files[-1].read_text(encoding="utf-8")))


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
