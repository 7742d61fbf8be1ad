"""What is done beside requests: every tier's first answer, and lines about throughput."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from sleb.engine.requests.sampling_params import SamplingParams
from sleb.errors import EngineDeadError
from sleb.server.engine_thread.answers import Job
from sleb.server.errors import ApiError, OverloadedError, ShuttingDownError
from sleb.server.grammar.grammars import compiler_for

if TYPE_CHECKING:
    from sleb.server.engine_thread.async_engine import AsyncEngine

logger = logging.getLogger("sleb.server")

_WARM_UP_PROMPT = 16  # tokens
_WARM_UP_TOKENS = 4
_SECONDS_BETWEEN_TRIES = 0.1


async def warm_up(engine: AsyncEngine) -> None:
    """Lets every tier answer once, so that no client pays for what is done at the first time; then /ready is 200.

    Should that fail, requests are taken all the same, but /ready says why they, too, may fail.
    """
    length = max(min(_WARM_UP_PROMPT, engine.model.max_model_len - _WARM_UP_TOKENS), 1)
    params = SamplingParams(max_tokens=_WARM_UP_TOKENS, temperature=0, ignore_eos=True)
    try:
        for tier in engine.model.tiers:
            await _answer_once(engine, Job([0] * length, params, tier.depth))
    except (EngineDeadError, ShuttingDownError):
        return  # /ready says so itself
    except Exception as error:
        engine.warm_up_failure = str(error) or type(error).__name__
        logger.error("warming up failed: %s", engine.warm_up_failure)
    try:
        await asyncio.to_thread(compiler_for(engine.model).prepare)
    except Exception as error:  # requests without a grammar do not mind
        logger.warning("structured output cannot be had: %s", error)
    engine.become_warm()


async def _answer_once(engine: AsyncEngine, job: Job) -> None:
    """Lets the engine do a job, when clients leave room for it. Raises what it raises, ApiError for a failed answer."""
    while True:
        try:
            answers = await engine.submit([job])
            break
        except OverloadedError:
            await asyncio.sleep(_SECONDS_BETWEEN_TRIES)
    try:
        while batch := await answers.next():
            for _, output in batch:
                if output.finish_reason == "error":
                    why = str(output.failure) if output.failure is not None else "the log has the details"
                    raise ApiError(500, f"an answer at depth {job.depth} failed; {why}")
    finally:
        answers.close()


async def log_throughput(engine: AsyncEngine, interval: float) -> None:
    """A line every `interval` seconds in which something was computed, but for the tokens of warming up."""
    while not engine.warm:
        await asyncio.sleep(min(interval, 0.2))
    before = engine.stats
    while True:
        await asyncio.sleep(interval)
        now = engine.stats
        num_prompt = now.num_prompt_tokens - before.num_prompt_tokens
        num_cached = now.num_cached_tokens - before.num_cached_tokens
        num_output = now.num_output_tokens - before.num_output_tokens
        before = now
        if num_prompt or num_output or now.num_running:
            facts = {
                "prompt_tokens_per_second": (num_prompt - num_cached) / interval,
                "generated_tokens_per_second": num_output / interval,
                "running": now.num_running,
                "waiting": now.num_waiting,
                "kv_cache_percent": now.kv_cache_usage * 100,
                "prefix_hit_percent": num_cached / num_prompt * 100 if num_prompt else 0.0,
            }
            progress = ""
            if now.num_to_prefill:  # a long prompt may take longer than a line
                progress = f", {now.num_prefilled} of {now.num_to_prefill} prompt tokens computed"
            logger.info(
                "prompt %.1f tokens/s, generation %.1f tokens/s, running %d, waiting %d, KV cache %.1f %%, "
                "prefix hits %.1f %%%s",
                *facts.values(),
                progress,
                extra={"facts": facts | {"prefilled": now.num_prefilled, "to_prefill": now.num_to_prefill}},
            )
