"""The engine: schedule, run, sample, commit; from requests to increments of their answers."""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, partial

import torch

from sleb.engine.chain import load_layer_map
from sleb.engine.config import EngineConfig
from sleb.engine.encoding import MAX_TOKENS
from sleb.engine.execute.grammar_masks import advance
from sleb.engine.execute.sampler import SampledToken
from sleb.engine.generation import load_defaults
from sleb.engine.model.architecture import resolve_spec
from sleb.engine.outputs import EngineStats, StepOutput, TokenLogprobs
from sleb.engine.pace import Pace, Work
from sleb.engine.requests.detokenizer import Detokenizer, special_texts
from sleb.engine.requests.grammar import Grammar
from sleb.engine.requests.request import Request
from sleb.engine.requests.sampling_params import SamplingParams, is_integer
from sleb.engine.requests.stopping import append_token
from sleb.engine.requests.tier import Tier, choose_default, find_tier, make_tiers
from sleb.engine.runner import Runner, SampledStep
from sleb.engine.schedule.block_manager import BlockManager
from sleb.engine.schedule.scheduler import Scheduler
from sleb.engine.schedule.step import Step
from sleb.engine.served_model import DecoderShape, DepthSize, PromptMaker, ServedModel
from sleb.engine.text import TextProcessor
from sleb.errors import ConfigError, InvalidOutputError, RequestError
from sleb.kernels.names import FILE
from sleb.kernels.reference.ops import NO_TOKEN
from sleb.models.resolve import resolve_model

logger = logging.getLogger("sleb.engine")


class Engine(PromptMaker):
    """Serves several depths of one model from one copy of its weights. Not thread-safe: one thread owns it.

    Raises ConfigError, ModelError or LayerMapError when it cannot be built from `config`.
    """

    def __init__(self, config: EngineConfig) -> None:
        config.check()
        self.config = config
        resolved = resolve_model(str(config.model), keep_bits=config.weights == FILE)
        self.spec = resolve_spec(resolved.path)
        self.model_name = resolved.name.lower()
        self.layer_map, shipped = load_layer_map(config.layer_map, resolved, self.spec)
        self.shipped_results = resolved.results if shipped else ()
        self.tiers = make_tiers(self.layer_map, self.model_name, config.tiers, shipped)
        self.default_tier = choose_default(self.tiers, self.layer_map)
        self.text = TextProcessor(resolved.path, self.spec.vocab_size, config.chat_template)
        self.defaults = load_defaults(resolved.path, config, self.spec, self.text, resolved.sampling)
        self.eos_token_ids = self.defaults.end_token_ids
        depths = [tier.depth for tier in self.tiers]
        self.runner = Runner(config, resolved.path, self.spec, self.layer_map, depths, self.eos_token_ids)
        self.spec = self.runner.spec
        self.max_model_len = self.runner.max_model_len
        self.text.max_tokens = max(MAX_TOKENS, 2 * self.max_model_len)
        self._load_text = partial(
            TextProcessor, resolved.path, self.spec.vocab_size, config.chat_template, self.text.max_tokens
        )
        executor = self.runner.executor
        if config.overlap and not executor.asynchronous:
            raise ConfigError(
                f"overlap is on, but the {executor.name} executor computes when it is called; leave overlap out"
            )
        self.overlap = executor.asynchronous if config.overlap is None else config.overlap
        self._in_flight: SampledStep | None = None
        block_manager = BlockManager(self.runner.num_pages, executor.page_size, config.prefix_caching)
        self.scheduler = Scheduler(
            block_manager, config.max_num_seqs, config.step_tokens, self.spec.short_context
        )
        self._requests: dict[str, Request] = {}
        self._num_open: Counter[int] = Counter()  # by depth
        self._seeds = random.Random(config.seed)
        self._num_prompt_tokens = self._num_cached_tokens = self._num_output_tokens = 0
        self.pace: Pace | None = None
        self._told_no_numbers = False
        self._special_texts = special_texts(self.tokenizer)
        self._token_texts: tuple[dict[int, str], dict[int, str]] = (
            {},
            {},
        )  # with special tokens' text, and without

    def step(self) -> list[StepOutput]:
        """One forward pass; the increments that are known by now. Empty when there is nothing to do.

        With `overlap` a step is launched before the tokens of the one before are read, so that the host works on the
        next while the device computes: increments come one call later, and a stop is seen when one more token has been
        computed, which is dropped. Where a request's next token depends on the last one's value (penalties, grammars),
        the step waits for it.
        """
        outputs: list[StepOutput] = []
        if self._in_flight is not None and any(request.must_wait for request in self.scheduler.running):
            outputs += self._commit()
        step = self.scheduler.schedule()
        sampled = None
        begin = time.perf_counter()
        if step.rows:
            self._mark_scheduled(step)
            prompts = None if self.pace is None else _prompt_tokens(step)
            forward = self.runner.run(step)
            sampled = self.runner.sample(step, forward)
            self.scheduler.launched(step.rows)
        outputs += self._commit()
        self._in_flight = sampled if self._requests else None  # else it is of requests that have ended
        if not self.overlap:
            outputs += self._commit()
        if self.pace is not None and step.rows:
            assert prompts is not None
            fullest = step.rows[0].request.tier.depth
            self.pace.observe_step(time.perf_counter() - begin, fullest, prompts)
        return outputs

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        depth: int | None = None,
        fork_of: str | None = None,
    ) -> None:
        """Queues a request; `step` computes it.

        fork_of: the id of a request with the same prompt and depth, whose prompt is then computed once for both; one
        that has ended is no help and no error.

        Raises RequestError for a prompt that is empty, holds an unknown id or does not fit the context (code
        context_length_exceeded), for a depth that is not served, for a grammar that cannot be begun and for a
        request id in use.
        """
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use", param="request_id")
        if params.n != 1:
            raise RequestError(f"n is {params.n}; the engine takes each choice as a request", param="n")
        tier = self.tier(depth)
        tokens = list(prompt_token_ids)
        params = self.defaults.resolve(params)
        self._check_prompt(tokens, params)
        for ids, name in ((params.stop_token_ids, "stop_token_ids"), (params.logit_bias or (), "logit_bias")):
            self._check_token_ids([max(ids, default=0)], name)
        room = self.max_model_len - len(tokens)
        most = self.defaults.max_tokens if params.max_tokens is None else params.max_tokens
        request = Request(
            request_id=request_id,
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            params=params,
            max_tokens=room if most is None else min(room, most),
            tier=tier,
            # As text, because random.Random takes the absolute value of a number.
            rng=random.Random(str(self._seeds.getrandbits(64) if params.seed is None else params.seed)),
            detokenizer=Detokenizer(
                self.tokenizer,
                tokens,
                params.stop_strings,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                special=self._special_texts,
                texts=self._token_texts[params.skip_special_tokens],
                shown=params.shown_special_ids,
            ),
            grammar=_begin_grammar(params),
            repetition=None if params.repetition_detection is None else params.repetition_detection.start(),
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )
        parent = self._requests.get(fork_of) if fork_of is not None else None
        if parent is not None and parent.tier is tier and parent.tokens[: len(tokens)] == tokens:
            request.parent = parent
        self._requests[request_id] = request
        self._num_open[tier.depth] += 1
        self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Drops a request and frees its pages at once; an id that is not (or no longer) there is no error."""
        request = self._requests.get(request_id)
        if request is not None:
            request.finish_reason = "abort"
            self._forget(request)

    def tier(self, name: str | int | None) -> Tier:
        """The tier with that id or depth; None is the default one. Raises RequestError listing those served."""
        return self.default_tier if name is None else find_tier(self.tiers, name)

    @cached_property
    def served(self) -> ServedModel:
        """What a server's front needs to know."""
        sizes = {
            tier.depth: DepthSize(
                self.num_parameters(tier.depth),
                self.weight_bytes(tier.depth),
                self.kv_bytes_per_token(tier.depth),
            )
            for tier in self.tiers
        }
        spec = self.spec
        served = ServedModel(
            model_name=self.model_name,
            layer_map=self.layer_map,
            shipped_results=self.shipped_results,
            tiers=self.tiers,
            default_tier=self.default_tier,
            defaults=self.defaults,
            eos_token_ids=self.eos_token_ids,
            max_model_len=self.max_model_len,
            page_size=self.runner.executor.page_size,
            num_pages=self.runner.num_pages,
            description=self.description,
            weights_name=self.weights_name,
            spec=DecoderShape(
                spec.architecture, spec.vocab_size, spec.hidden_size, spec.num_heads, spec.num_kv_heads
            ),
            sizes=sizes,
            load_text=self._load_text,
        )
        vars(served)["text"] = self.text  # once in this process
        return served

    def follow_pace(self) -> Pace:
        """Begins to learn how fast steps are; what has been learnt."""
        whole = self.weight_bytes(min(tier.depth for tier in self.tiers))
        shares = {tier.depth: self.weight_bytes(tier.depth) / whole for tier in self.tiers}
        self.pace = Pace(shares, self.config.step_tokens, self.config.max_num_seqs)
        return self.pace

    def work(self) -> Work:
        """What is to be done before a new request's first token."""
        prompts: Counter[int] = Counter()
        for request in self.scheduler.requests:
            prompts[request.tier.depth] += max(request.num_prompt_tokens - request.num_computed, 0)
        return Work(+prompts, self.num_waiting, self.config.max_num_seqs - self.num_running)

    def has_unfinished(self) -> bool:
        """Whether any request is queued or running."""
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    def stats(self) -> EngineStats:
        """Counters and present state; cheap enough to call after every step, however long the queue."""
        running = Counter(request.tier.depth for request in self.scheduler.running)
        prefilling = [each for each in self.scheduler.running if each.num_computed < each.num_prompt_tokens]
        return EngineStats(
            running=running,
            waiting=self._num_open - running,
            kv_cache_usage=self.scheduler.block_manager.usage,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_output_tokens=self._num_output_tokens,
            num_preemptions=self.scheduler.num_preemptions,
            num_prefilled=sum(request.num_computed for request in prefilling),
            num_to_prefill=sum(request.num_prompt_tokens for request in prefilling),
        )

    @property
    def description(self) -> str:
        """What computes, with which weights, in one line."""
        return self.runner.description

    @property
    def weights_name(self) -> str:
        """The formats of the weights, in words."""
        return self.runner.weights_name

    def num_parameters(self, depth: int) -> int:
        """Of all weights that a request at `depth` uses, whatever their format; patches left out."""
        return self.runner.num_parameters(depth)

    def weight_bytes(self, depth: int) -> int:
        """Bytes of the weights that a request at `depth` uses."""
        return self.runner.weight_bytes(depth)

    def kv_bytes_per_token(self, depth: int) -> int:
        """Bytes of K and V that a token of a request at `depth` needs."""
        return self.runner.kv_bytes_per_token(depth)

    def check_integrity(self) -> None:
        """Asserts that pages, queues and the table of requests agree."""
        self.scheduler.check_integrity()
        assert {id(request) for request in self._requests.values()} == {
            id(request) for request in self.scheduler.requests
        }, "the table of requests and the queues differ"
        depths = Counter(request.tier.depth for request in self._requests.values())
        assert depths == +self._num_open, "the count of open requests is wrong"

    def _forget(self, request: Request) -> None:
        """Takes out a request that has ended, and frees its pages."""
        del self._requests[request.request_id]
        self._num_open[request.tier.depth] -= 1
        self.scheduler.remove(request)

    def _check_prompt(self, tokens: list[int], params: SamplingParams) -> None:
        if not tokens:
            raise RequestError("the prompt is empty; send at least one token", param="prompt")
        needed = len(tokens) + (params.max_tokens != 0)  # scoring alone may fill the context
        if needed > self.max_model_len:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, but the context holds {self.max_model_len} tokens of "
                "prompt and answer together; shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )
        self._check_token_ids(tokens, "prompt")

    def _check_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        for token_id in token_ids:
            if not is_integer(token_id) or not 0 <= token_id < self.spec.vocab_size:
                raise RequestError(
                    f"{token_id!r} in {param} is not a token id; ids go from 0 to {self.spec.vocab_size - 1}",
                    param=param,
                )

    def _mark_scheduled(self, step: Step) -> None:
        now = time.monotonic()
        for row in step.rows:
            request = row.request
            if request.timings.first_scheduled is None:
                request.timings.first_scheduled = now
                self._num_prompt_tokens += request.num_prompt_tokens
                self._num_cached_tokens += request.num_cached_tokens

    def _commit(self) -> list[StepOutput]:
        """Reads what the step in flight has sampled, if there is one, and adds it to the requests."""
        if self._in_flight is None:
            return []
        step, result = self._in_flight.step, self._in_flight.read()
        self._in_flight = None
        self.scheduler.commit(step.rows)
        outputs = []
        now = time.monotonic()
        for row in step.rows:
            request = row.request
            request.num_pending -= row.chooses
            if request.finish_reason is not None:  # it ended, or was dropped, while this step was computed
                continue
            if request.prompt_logprobs is not None and request in result.prompt_logprobs:
                request.prompt_logprobs.extend(result.prompt_logprobs[request])
            if row.samples:
                outputs.append(self._advance(request, result.sampled.get(request), now))
        if not self._requests:  # a leaked page would never come back, so say so while the cause is near
            pages = self.scheduler.block_manager
            assert pages.num_free == pages.num_pages, "pages are owned, but no request is left"
        return outputs

    def _advance(self, request: Request, sampled: SampledToken | None, now: float) -> StepOutput:
        """Adds the sampled token to its request, which may end it, and reports."""
        text = ""
        if request.prompt_logprobs is not None or sampled is None or sampled.token_id == NO_TOKEN:
            self._check_numbers(request, sampled)
        grammar_ended = False
        if request.grammar is not None and request.failure is None and sampled is not None:
            grammar_ended = advance(request, sampled.token_id)
        if request.failure is not None:  # then the token means nothing
            request.finish_reason, sampled = "error", None
        elif sampled is None:  # max_tokens is 0: the prompt was all there was to compute
            request.finish_reason = "length"
        else:
            if request.timings.first_token is None:
                request.timings.first_token = now
            self._num_output_tokens += 1
            text = append_token(request, sampled.token_id, grammar_ended, self.eos_token_ids)
        if request.finish_reason is not None:
            request.timings.finished = now
            if self.pace is not None and request.timings.first_scheduled is not None:
                self.pace.observe_seat(now - request.timings.first_scheduled)
            self._forget(request)
        return StepOutput(  # in order: keywords would take as long again, for every token
            request.request_id,
            [] if sampled is None else [sampled.token_id],
            text,
            None if sampled is None or sampled.logprobs is None else [sampled.logprobs],
            None if request.prompt_logprobs is None else _take_prompt_logprobs(request),
            request.finish_reason,
            request.stop_reason,
            request.num_prompt_tokens,
            len(request.tokens) - request.num_prompt_tokens,
            request.num_cached_tokens,
            request.timings,
            request.failure,
        )

    def _check_numbers(self, request: Request, sampled: SampledToken | None) -> None:
        """Notes a failure where the model's logits, of the next token or of the prompt, were not numbers."""
        gathered = () if request.prompt_logprobs_sent else request.prompt_logprobs or ()
        in_prompt = any(entry is not None and math.isnan(entry.logprob) for entry in gathered)
        if not in_prompt and (sampled is None or sampled.token_id != NO_TOKEN):
            return
        failure = InvalidOutputError(f"the model's logits are not numbers; {self._why_no_numbers()}")
        request.failure = request.failure or failure
        if not self._told_no_numbers:  # every request may meet it
            self._told_no_numbers = True
            logger.error("request %s: %s (said once)", request.request_id, failure)

    def _why_no_numbers(self) -> str:
        dtype = self.runner.dtype
        if dtype == torch.float16:
            most = torch.finfo(dtype).max
            return f"in float16 a value above {most:g} is infinite: use dtype bfloat16 or float32"
        return (
            f"in {str(dtype)[6:]} that is a fault of the checkpoint: its weights are damaged or not numbers"
        )


def _prompt_tokens(step: Step) -> Counter[int]:
    """Tokens of prompts that a step computes, by depth."""
    found: Counter[int] = Counter()
    for row in step.rows:
        if row.start < row.request.num_prompt_tokens and row.num_tokens > 1:
            found[row.request.tier.depth] += row.num_tokens
    return found


def _begin_grammar(params: SamplingParams) -> Grammar | None:
    if params.grammar is None:
        return None
    try:
        return params.grammar.start()
    except Exception as error:
        raise RequestError(f"the grammar cannot be begun: {str(error)[:500]}", param="grammar") from error


def _take_prompt_logprobs(request: Request) -> list[TokenLogprobs | None] | None:
    """The prompt's log-probabilities, the first time that they are whole."""
    if request.prompt_logprobs is None or request.prompt_logprobs_sent:
        return None
    request.prompt_logprobs_sent = True
    return request.prompt_logprobs
