"""This engine and others installed here, in turns, on the same prompts, threads and dtype.

    python -m sleb.benchmarks.peers MODEL --peer vllm=PYTHON --peer openvino=PYTHON:FOLDER \\
        --peer transformers=PYTHON --peer llamacpp=FOLDER:bf16=FILE,q8_0=FILE,q4_1=FILE --json FILE

Every Python engine, ours included, is a process of its own that stays loaded; llama.cpp's own benchmarks are a process
a run. In a repetition each peer runs once, right before or after those formats of ours that it is compared with, so a
ratio is of two runs that are neighbours in time; the next repetition goes backwards. A run begins when the machine is
idle and is made anew if others took more than 3 % of the processors meanwhile.

decode-1: tokens/s of one stream after 64 tokens, its first token left out. decode-N: new tokens of N streams, 64 → 128,
over the whole time, prompts included. prompt-N: tokens of a prompt over the time to the first new one. All greedy, the
end of a sequence ignored, no prefix cache. Ctrl-C keeps the repetitions that are complete.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from sleb.benchmarks.command import run_command, write_result
from sleb.benchmarks.harness import Progress
from sleb.benchmarks.idle import QuietPolicy
from sleb.benchmarks.peer_measure import Contest, PeerOptions
from sleb.benchmarks.peer_options import FORMATS, TARGETS, PeerSpec, PeerTest, shown_arguments
from sleb.benchmarks.peer_process import PeerError
from sleb.benchmarks.peer_results import (
    Comparison,
    Verdict,
    compare,
    floor_shares,
    judge,
    judge_floor,
    judge_memory,
    ours,
    print_results,
)
from sleb.benchmarks.report import check_writable
from sleb.errors import ConfigError

_TESTS = "decode-1,decode-8,decode-32,prompt-512,prompt-1024"


def describe(contest: Contest, complete: bool) -> tuple[dict[str, Any], list[Comparison], list[Verdict]]:
    """The result file, and the rows and verdicts that are in it."""
    options = contest.options
    rows = compare(contest.samples)
    facts = contest.facts
    shares = {
        weight_format: floor_shares(
            contest.samples, weight_format, facts[ours(weight_format)]["decode_bytes_per_token"]
        )
        for weight_format in options.formats
    }
    verdicts = [judge(target, rows) for target in TARGETS]
    verdicts += [judge_floor(shares.get("bf16", [])), judge_memory(contest.memory)]
    first = facts[ours(options.formats[0])]
    bandwidth = [
        value
        for repetitions in contest.samples.values()
        for repetition in repetitions
        for value in repetition.bandwidth
    ]
    engines = {
        name: {key: value for key, value in each.items() if key != "environment"}
        for name, each in facts.items()
    }
    result = {
        "environment": first["environment"],
        "model": options.model.name,
        "settings": {
            "threads": options.threads,
            "dtype": "bfloat16",
            "formats": list(options.formats),
            "repetitions": options.repetitions,
            "seed": options.seed,
            "kv_cache_gib": options.kv_gib,
            "idle": asdict(options.policy),
        },
        "engines": engines,
        "rows": [asdict(row) for row in rows],
        "targets": [asdict(verdict) for verdict in verdicts],
        "memory": contest.memory,
        "bandwidth_gb_per_second": {"median": median(bandwidth) if bandwidth else None, "samples": bandwidth},
        "floor_shares": shares,
        "first_tokens": contest.first_tokens,
        "repetitions": {
            str(test): [asdict(repetition) for repetition in repetitions]
            for test, repetitions in contest.samples.items()
        },
        # Their logs may hold this machine's paths: the first line says what happened.
        "failures": {name: text.splitlines()[0] for name, text in contest.failures.items()},
        "complete": complete,
    }
    return result, rows, verdicts


def run_peers(options: PeerOptions, console: Console, json_path: Path | None) -> bool:
    """Starts all, measures, reports on `console`, ends all. Whether it was not interrupted. Raises SlebError."""
    complete = False
    with _RunsBar(console) as bar:
        contest = Contest(options, bar.update)

        def save() -> None:
            if json_path is not None and any(contest.samples.values()):
                write_result(json_path, describe(contest, complete)[0])

        grace = 10.0
        problem: PeerError | None = None
        try:
            contest.start()
            contest.run(on_test=save)
            complete = True
        except KeyboardInterrupt:
            grace = 1.0
        except PeerError as error:
            problem = error
        finally:
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must leave no process
            try:
                contest.read_memory()
            finally:
                contest.close(grace)
                signal.signal(signal.SIGINT, before)
    if any(contest.samples.values()):
        _, rows, verdicts = describe(contest, complete)
        print_results(rows, verdicts, contest.memory, console)
        save()
    for name, text in contest.failures.items():
        console.print(f"{name} takes part no longer: {text}", markup=False, highlight=False)
    if problem is not None:
        raise problem
    return complete


class _RunsBar:
    """Runs done of all. It is drawn between runs only: a thread that redraws it would take time from them."""

    def __init__(self, console: Console) -> None:
        self._bar = Bar(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> _RunsBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, progress: Progress) -> None:
        """Shows what has been done and what runs next."""
        self._bar.update(
            self._task,
            total=progress.num_runs or None,
            completed=progress.num_done,
            description=progress.next_run,
            refresh=True,
        )


def parse_names(option: str, text: str, allowed: tuple[str, ...] = ()) -> list[str]:
    """Names with commas between, each once. Raises ConfigError naming `option`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if allowed and name not in allowed]
    if unknown or not names or len(set(names)) < len(names):
        listed = f" of {', '.join(allowed)}" if allowed else ""
        raise ConfigError(f"{option} is '{text}'; name some{listed}, each once, with commas between")
    return names


def parse_versions(texts: list[str]) -> dict[str, str]:
    """{"llamacpp": "b1"} from ["llamacpp=b1"]. Raises ConfigError."""
    pairs = [text.partition("=") for text in texts]
    for name, _, value in pairs:
        if name != "llamacpp" or not value:
            raise ConfigError(
                "--peer-version is for llamacpp, whose build may not know its own; write llamacpp=b1234"
            )
    return {name: value for name, _, value in pairs}


def main(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder with bf16 weights.")],
    peer: Annotated[
        list[str],
        typer.Option(
            help="NAME=PYTHON[:MODEL], or llamacpp=FOLDER:bf16=FILE,q8_0=FILE,q4_1=FILE; once a peer."
        ),
    ],
    tests: Annotated[str, typer.Option(help="decode-STREAMS and prompt-TOKENS.")] = _TESTS,
    formats: Annotated[str, typer.Option(help="Our weights.")] = ",".join(FORMATS),
    threads: Annotated[
        int | None, typer.Option(help="Of every engine.", show_default="all processors", min=1)
    ] = None,
    repetitions: Annotated[int, typer.Option(help="Times that each peer runs a test.", min=1)] = 5,
    seed: Annotated[int, typer.Option(help="Of the random prompts and the order.")] = 0,
    kv_gib: Annotated[float, typer.Option(help="GiB of KV cache for engines that want to know.", min=1)] = 4,
    wait: Annotated[float, typer.Option(help="Seconds to wait for an idle machine.", min=0)] = 60,
    retries: Annotated[int, typer.Option(help="Times that a disturbed run is made anew.", min=0)] = 3,
    peer_version: Annotated[
        list[str] | None, typer.Option(help="llamacpp=VERSION, where the build does not know.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure this engine against others on this machine, in turns."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the engines too
    peers = [PeerSpec.parse(text) for text in peer]
    if len({spec.name for spec in peers}) < len(peers):
        raise ConfigError("a peer is named twice; name each once, llamacpp with all its files")
    options = PeerOptions(
        model=model.expanduser().absolute(),
        peers=peers,
        tests=[PeerTest.parse(name) for name in parse_names("--tests", tests)],
        formats=parse_names("--formats", formats, FORMATS),
        threads=threads or len(os.sched_getaffinity(0)),
        repetitions=repetitions,
        seed=seed,
        kv_gib=kv_gib,
        versions=parse_versions(peer_version or []),
        policy=QuietPolicy(wait_seconds=wait, retries=retries),
        command=shown_arguments(["python", "-m", "sleb.benchmarks.peers", *sys.argv[1:]]),
    )
    if json_path is not None:
        check_writable(json_path)
    if not run_peers(options, Console(stderr=True), json_path):
        raise typer.Exit(130)


if __name__ == "__main__":
    run_command(main)
