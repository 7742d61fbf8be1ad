"""What an answer tells of its own speed, in llama.cpp's fields and in vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sleb.engine.outputs import Timings


@dataclass(frozen=True)
class Span:
    """When the first choice was scheduled, the first token came and the last one was finished; equal if unknown."""

    started: float
    first: float
    finished: float

    @classmethod
    def of(cls, timings: Sequence[Timings], default: float = 0.0, until: float | None = None) -> Span:
        """The span of several choices.

        default: its begin if none was scheduled yet. until: the end of a choice that was given up unfinished.
        """
        scheduled = [each.first_scheduled for each in timings if each.first_scheduled is not None]
        firsts = [each.first_token for each in timings if each.first_token is not None]
        ends = [until if each.finished is None else each.finished for each in timings]
        started = min(scheduled, default=default)
        finished = max((end for end in ends if end is not None), default=None)
        first = min(firsts, default=started if finished is None else finished)
        return cls(started, first, first if finished is None else finished)


def llama_timings(usage: dict[str, Any], num_choices: int, span: Span) -> dict[str, float]:
    """llama.cpp's fields, in milliseconds and tokens a second, over all choices together.

    predicted_ms runs from the first token to the last, and predicted_per_second counts the tokens after the
    first, which the prompt's time has paid for. A rate over no time is 0.
    """
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    num_prompt, num_output = usage["prompt_tokens"] - cached, usage["completion_tokens"]
    prompt_ms, predicted_ms = (span.first - span.started) * 1e3, (span.finished - span.first) * 1e3
    num_after_first = max(num_output - num_choices, 0)
    return {
        "cache_n": cached,
        "prompt_n": num_prompt,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / num_prompt if num_prompt else 0.0,
        "prompt_per_second": num_prompt / prompt_ms * 1e3 if prompt_ms else 0.0,
        "predicted_n": num_output,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / num_after_first if num_after_first else 0.0,
        "predicted_per_second": num_after_first / predicted_ms * 1e3 if predicted_ms else 0.0,
    }


def request_metrics(
    usage: dict[str, Any], num_choices: int, span: Span, arrival: float, arrival_time: float
) -> dict[str, float | None]:
    """Seconds, under vLLM's names where it has one, over all choices together.

    time_in_queue ends with the first step; time_to_first_token counts from the arrival, generation_time from the
    first token to the last. A rate over no time is None.

    arrival: on the monotonic clock. arrival_time: the same moment as Unix time.
    """
    seconds = span.finished - span.first
    num_after_first = max(usage["completion_tokens"] - num_choices, 0)
    return {
        "arrival_time": arrival_time,
        "time_in_queue": max(span.started - arrival, 0.0),
        "time_to_first_token": max(span.first - arrival, 0.0),
        "generation_time": seconds,
        "tokens_per_second": num_after_first / seconds if seconds else None,
    }


def phases(span: Span, arrival: float) -> dict[str, float]:
    """Milliseconds in the queue, of the prompt and of the tokens after the first, for the header Server-Timing."""
    spans = {
        "queue": span.started - arrival,
        "prefill": span.first - span.started,
        "decode": span.finished - span.first,
    }
    return {name: max(seconds, 0.0) * 1e3 for name, seconds in spans.items()}
