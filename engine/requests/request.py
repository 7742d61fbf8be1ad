"""One request on its way through the engine."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from sleb.engine.outputs import FinishReason, Timings, TokenLogprobs
from sleb.engine.requests.detokenizer import Detokenizer
from sleb.engine.requests.grammar import Grammar
from sleb.engine.requests.repetition import RepetitionCounter
from sleb.engine.requests.sampling_params import SamplingParams
from sleb.engine.requests.tier import Tier


@dataclass(eq=False)
class Request:
    """Tokens, progress and pages of one sequence.

    `num_computed` tokens have their K and V in `pages`; the request tries to catch up with `len(tokens)`. There
    is no prefill and no decode phase: preemption sets num_computed to 0, a prefix hit sets it ahead.

    num_pending counts tokens that have been sampled on the device and that the host has not read: at most one when a
    step is planned. `num_computed` may run ahead of `tokens` by it.
    page_ids are the first of `pages` as 32-bit integers, those that earlier steps had, kept for the arrays of the next;
    table_row is the row of an executor's page table that holds them, the request's own from admission until it ends or
    is preempted.

    grammar is the state of the one that the output must follow; preemption leaves it as it is. failure, if set, says
    why the request cannot go on.

    parent is a request with the same prompt and tier whose pages this one takes over once they are computed: a fork.

    long_context: whether its K are rotated for more than the original context; see `Scheduler`.

    params is resolved (`GenerationDefaults.resolve`) and max_tokens is an integer that fits the context.
    """

    request_id: str
    tokens: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    max_tokens: int
    tier: Tier
    rng: random.Random
    detokenizer: Detokenizer
    grammar: Grammar | None = None
    repetition: RepetitionCounter | None = None
    num_computed: int = 0
    num_pending: int = 0
    pages: list[int] = field(default_factory=list)
    parent: Request | None = None
    long_context: bool = False
    page_ids: array[int] = field(default_factory=lambda: array("i"))
    table_row: int | None = None
    num_cached_tokens: int = 0
    num_registered_pages: int = 0
    last_content: Hashable = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    prompt_logprobs_sent: bool = False
    failure: Exception | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    timings: Timings = field(default_factory=lambda: Timings(arrival=time.monotonic()))

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_sampled(self) -> int:
        """Output tokens, one that is not read yet included."""
        return self.num_output_tokens + self.num_pending

    @property
    def output_token_ids(self) -> Sequence[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_missing(self) -> int:
        """Tokens still to compute before the next one can be sampled; none if no next one is wanted."""
        num_tokens = len(self.tokens) + self.num_pending
        if self.num_pending and num_tokens - self.num_prompt_tokens >= self.max_tokens:
            return 0
        return num_tokens - self.num_computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None

    @property
    def is_greedy(self) -> bool:
        """Whether it wants the token of the highest logit and nothing else."""
        if self.grammar is not None or not self._is_plain:
            return False
        return self.params.min_tokens == 0 or self.num_sampled >= self.params.min_tokens

    @property
    def adjusts_logits(self) -> bool:
        """Whether its logits change before a token is sampled."""
        params = self.params
        return self.needs_last_token or bool(params.logit_bias) or self.num_sampled < params.min_tokens

    @property
    def needs_last_token(self) -> bool:
        """Whether the next token cannot be sampled before the host knows the last one."""
        return self.grammar is not None or self._is_penalised

    @property
    def must_wait(self) -> bool:
        """Whether its next row cannot be made before its last one is read."""
        if self.prompt_logprobs is not None and not self.prompt_logprobs_sent:
            return True
        return self.grammar is not None or self._is_penalised

    # What the parameters settle, asked for every row of every step.
    @cached_property
    def _is_penalised(self) -> bool:
        params = self.params
        penalties = params.presence_penalty or params.frequency_penalty
        return bool(params.repetition_penalty != 1.0 or penalties)

    @cached_property
    def _is_plain(self) -> bool:
        params = self.params
        alters = self._is_penalised or params.logit_bias or params.logprobs is not None
        return params.temperature == 0.0 and not alters

    def reset(self) -> None:
        """Forgets what was computed; its pages must be freed already. Gathered prompt logprobs stay."""
        self.num_computed = 0
        self.page_ids = array("i")
        self.num_registered_pages = 0
        self.last_content = None
