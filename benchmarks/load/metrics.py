"""What outcomes amount to, under the names of `vllm bench serve --save-result` (vllm/benchmarks/serve.py).

TTFT: from the sending of a request to its first chunk with text. ITL: between chunks with text. E2EL: from the sending
to the end of the answer. TPOT: (E2EL − TTFT) / (tokens − 1), of answers of two tokens or more. Rates are of the whole
duration, the last answers' included, in which the load is no longer whole. Standard deviations are of the population;
percentiles are interpolated as numpy does it. What has no value, as the latency of no answer, is null.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sleb.benchmarks.load.events import Outcome

PERCENTILES = (90, 99)


def measure(
    outcomes: Sequence[Outcome], duration: float, goodput: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Counts, rates and latencies of all requests together. goodput: limits in milliseconds; none: null."""
    whole = [outcome for outcome in outcomes if not outcome.error]
    num_input = sum(outcome.num_prompt_tokens for outcome in whole)
    num_output = sum(outcome.num_output_tokens for outcome in whole)
    return {
        "duration": duration,
        "completed": len(whole),
        "failed": len(outcomes) - len(whole),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(whole) / duration,
        "request_goodput": sum(is_good(each, goodput) for each in whole) / duration if goodput else None,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        **describe("ttft", [outcome.first_seconds for outcome in whole]),
        **describe("tpot", [each.token_seconds for each in whole if each.token_seconds is not None]),
        **describe("itl", [gap for outcome in whole for gap in outcome.gaps]),
        **describe("e2el", [outcome.seconds for outcome in whole]),
    }


def raw_samples(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A value a request, in seconds to the nanosecond; of a failed one 0 or an empty list, as in vLLM's files."""
    pairs = [(outcome, not outcome.error) for outcome in outcomes]
    return {
        "input_lens": [outcome.num_prompt_tokens for outcome in outcomes],
        "output_lens": [outcome.num_output_tokens if is_whole else 0 for outcome, is_whole in pairs],
        "ttfts": _rounded(outcome.first_seconds if is_whole else 0.0 for outcome, is_whole in pairs),
        "itls": [_rounded(outcome.gaps) if is_whole else [] for outcome, is_whole in pairs],
        "latencies": _rounded(outcome.seconds if is_whole else 0.0 for outcome, is_whole in pairs),
        "start_times": _rounded(outcome.start for outcome in outcomes),
        "errors": [outcome.error for outcome in outcomes],
    }


def _rounded(seconds: Iterable[float]) -> list[float]:
    return [round(value, 9) for value in seconds]


def failures(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many requests failed by reason, the most frequent first."""
    return dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common())


def is_good(outcome: Outcome, goodput: Mapping[str, float]) -> bool:
    """Whether an answer that came whole keeps to all limits, in milliseconds."""
    tpot = outcome.token_seconds or 0.0
    seconds = {"ttft": outcome.first_seconds, "tpot": tpot, "e2el": outcome.seconds}
    return all(seconds[name] * 1000 <= limit for name, limit in goodput.items())


def describe(metric: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, standard deviation and percentiles in milliseconds, by vLLM's names."""
    names = ["mean", "median", "std", *(f"p{percentile}" for percentile in PERCENTILES)]
    values: list[float | None] = [None] * len(names)
    if seconds:
        found = np.asarray(seconds, dtype=np.float64) * 1000
        numbers = (found.mean(), np.median(found), found.std(), *np.percentile(found, PERCENTILES))
        values = [float(value) for value in numbers]
    return {f"{name}_{metric}_ms": value for name, value in zip(names, values, strict=True)}
