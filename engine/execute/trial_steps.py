"""Steps that belong to no request: to measure what steps take, and to compile kernels before anybody waits for them.

All their pages are the executor's padding page, so any cache will do and nothing in it is lost.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from sleb.engine.execute.gpu import GpuExecutor
from sleb.engine.requests.detokenizer import Detokenizer
from sleb.engine.requests.request import Request
from sleb.engine.requests.sampling_params import SamplingParams
from sleb.engine.requests.tier import Tier
from sleb.engine.schedule.step import ScheduledRow, Step


def prompt_step(executor: GpuExecutor, page_size: int, num_tokens: int, max_len: int) -> Step:
    """As many prompts of max_len tokens as num_tokens and the executor allow, and a shorter one for the rest."""
    lengths: list[int] = []
    left = num_tokens
    while left > 0 and len(lengths) < executor.max_num_seqs:
        lengths.append(min(left, max_len))
        left -= lengths[-1]
    return trial_step(executor, page_size, [(length, length) for length in lengths])


def trial_step(executor: GpuExecutor, page_size: int, rows: Sequence[tuple[int, int]]) -> Step:
    """A row for each (new tokens, context they end), of the fullest depth."""
    return Step(
        [
            ScheduledRow(_request(executor, context, page_size), context - num_new, num_new)
            for num_new, context in rows
        ]
    )


def _request(executor: GpuExecutor, length: int, page_size: int) -> Request:
    tokens = [0] * length
    return Request(
        request_id="trial",
        tokens=tokens,
        num_prompt_tokens=length,
        params=SamplingParams(temperature=0.0),
        max_tokens=1,
        tier=Tier("trial", executor.depths[0], "", 0, ()),
        rng=random.Random(0),
        detokenizer=Detokenizer(None, tokens, ()),
        pages=[executor.padding_page] * -(-length // page_size),
    )
