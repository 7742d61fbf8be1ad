"""Rows of a result of `sleb bench serve`, what a reader must know of them, and files as vLLM writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sleb.benchmarks.command import write_result
from sleb.benchmarks.load.events import Outcome
from sleb.benchmarks.serving_metrics import VLLM_KEYS, failures, measure, raw_samples
from sleb.benchmarks.serving_options import Level
from sleb.benchmarks.serving_target import Target, describe_level
from sleb.errors import ConfigError

# vLLM's names of what sends such requests.
_BACKENDS = {"chat": "openai-chat", "completions": "openai"}
# Above this share of one processor the client, a single thread, may be what limits.
_BUSY_CLIENT = 0.7
# A wait for a turn that is longer than this share of the latency is told.
_LONG_QUEUE = 0.1

Row = dict[str, Any]


def make_row(
    target: Target,
    level: Level,
    outcomes: Sequence[Outcome],
    duration: float,
    cpu_seconds: float,
    label: str | None = None,
) -> Row:
    """One level: vLLM's keys, then ours.

    Ours are: level, in words; failures, by reason; cached_tokens, of prompts, by the server; client_cpu_share, of one
    processor; models, a request; tiers, of each of several models its part of the counts, rates and latencies.
    """
    options, models = target.options, target.models
    row: Row = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": _BACKENDS[options.endpoint],
        "backend": _BACKENDS[options.endpoint],
        "label": label,
        "model_id": ",".join(models),
        "tokenizer_id": None,
        "num_prompts": len(outcomes),
        **describe_level(level),
        **measure(outcomes, duration, options.goodput),
        **raw_samples(outcomes),
        "models": [outcome.model for outcome in outcomes],
        "failures": failures(outcomes),
        "cached_tokens": sum(outcome.num_cached_tokens for outcome in outcomes),
        "client_cpu_share": cpu_seconds / duration,
        "tiers": [],
    }
    if len(models) > 1:
        for model in models:
            own = [outcome for outcome in outcomes if outcome.model == model]
            row["tiers"].append({"model_id": model, **measure(own, duration, options.goodput)})
    return row


def row_notices(row: Mapping[str, Any], outcomes: Sequence[Outcome], num_unsent: int = 0) -> list[str]:
    """What a reader must know of one level. num_unsent: requests that had no turn before the end of --duration."""
    where = ", ".join(filter(None, (row["label"], row["level"])))
    notices = []
    for reason, number in row["failures"].items():
        notices.append(f"{where}: {number} of {len(outcomes)} requests failed: {reason}.")
    whole = [outcome for outcome in outcomes if not outcome.error]
    long = sum(0 < outcome.asked_tokens != outcome.num_prompt_tokens for outcome in whole)
    if long:
        notices.append(f"{where}: {long} of {len(whole)} prompts had not the length that was asked for.")
    short = sum(outcome.num_output_tokens != outcome.asked_output for outcome in whole)
    if short and all(outcome.usage for outcome in whole):
        notices.append(f"{where}: {short} of {len(whole)} answers had not the length that was asked for.")
    if row["cached_tokens"]:
        share = row["cached_tokens"] / max(1, sum(row["input_lens"]))
        notices.append(f"{where}: {share:.0%} of the prompts' tokens were in the server's prefix cache.")
    if row["client_cpu_share"] > _BUSY_CLIENT:
        notices.append(
            f"{where}: the client took {row['client_cpu_share']:.0%} of a processor; it may be what limits."
        )
    if num_unsent:
        notices.append(
            f"{where}: {num_unsent} requests were not sent, as --max-concurrency were open until --duration was over."
        )
    waits, latencies = sum(row["queue_times"]), sum(row["latencies"])
    if row["request_rate"] != "inf" and waits > _LONG_QUEUE * latencies:
        late = f"{waits / len(outcomes):.2g} s"
        if row["max_concurrency"] is None:
            why = f"were sent {late} late, as the client itself could not keep up"
        else:
            why = f"waited {late} for their turn, as --max-concurrency were open"
        notices.append(f"{where}: requests {why}; no latency includes it.")
    return notices


def nothing_due(duration: float) -> str:
    """What to do about a level of a low rate in which nothing was sent."""
    return f"no request came due in {duration:g} s; give a longer --duration or a higher --rate"


def check_folder(folder: Path) -> None:
    """Makes the folder of `write_vllm_files`. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--vllm-json {folder} cannot be made ({error.strerror}); name another folder"
        ) from None


def write_vllm_files(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A file a row, named and made as by `vllm bench serve --save-result --save-detailed`. Raises ConfigError."""
    for row in rows:
        bound = f"-concurrency{row['max_concurrency']}" if row["max_concurrency"] else ""
        name = f"{row['label'] or row['backend']}-{row['request_rate']}qps{bound}-{row['model_id'].split('/')[-1]}"
        name = re.sub(r"[^\w.,-]", "_", f"{name}-{row['date']}.json")
        write_result(folder / name, {key: row[key] for key in VLLM_KEYS})
