"""An engine without a model: it answers with the prompt's own tokens, one a step, and misbehaves on request.

Run as a script it serves itself: `python fake_engine.py PORT [--delay S] [--fail-after N] [--drain-timeout S]
[--fronts N]`.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sleb.engine.generation import GenerationDefaults
from sleb.engine.outputs import EngineStats, StepOutput, Timings, TokenLogprobs
from sleb.engine.pace import Pace, Work
from sleb.engine.requests.detokenizer import Detokenizer
from sleb.engine.requests.tier import Tier
from sleb.errors import RequestError
from sleb.layer_map.layer_map import CalibrationRecord, LayerMap, TextLosses, Unit

NUM_BLOCKS = 6


def make_tokenizer():
    """Every byte is a token; one special token."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


def make_layer_map():
    return LayerMap(
        model="fake",
        fingerprint=None,
        num_blocks=NUM_BLOCKS,
        removed=(Unit(3), Unit(1)),
        losses=(200.0, 210.0, 230.0),
        calibration=CalibrationRecord(source="some text", seqlen=50, windows=2),
        held_out=(
            TextLosses(CalibrationRecord(source="another text", seqlen=50, windows=2), (210.0, 220.0, 250.0)),
        ),
        depth=1,
    )


class FakeEngine:
    """The interface of sleb.engine.engine.Engine as far as the server uses it.

    Switches: `delay` seconds a step; `hold` (an event: a cleared one stops all steps); `error` is raised by the
    next step, `add_error` by the next add_request; `max_running` requests advance, the others wait; `answer`: the ids
    that answer later requests.
    """

    def __init__(self, max_model_len=256):
        self.layer_map = make_layer_map()
        self.tiers = tuple(self._make_tier(depth) for depth in (0, 1, 2))
        self.default_tier = self.tiers[1]
        self.model_name = "fake"
        self.shipped_results = ()
        self.defaults = GenerationDefaults()
        self.max_model_len = max_model_len
        self.tokenizer = make_tokenizer()
        self.text = SimpleNamespace(named_tokens={}, chat_template=None)
        self.chat_template = self.response_template = None
        self.spec = SimpleNamespace(
            vocab_size=self.tokenizer.get_vocab_size(),
            architecture="FakeForCausalLM",
            hidden_size=8,
            num_heads=2,
            num_kv_heads=1,
        )
        self.weights_name = "bfloat16"
        self.page_size, self.num_pages = 16, 1000
        self.eos_token_ids = frozenset()
        self.defaults = GenerationDefaults()
        self.max_running = 4
        self.delay = 0.0
        # A second for each request that waits, at any depth.
        self.pace = Pace(dict.fromkeys((0, 1, 2), 1.0), 10**6, 1)
        self.pace.seat_seconds = 1.0
        self.hold = threading.Event()
        self.hold.set()
        self.error = self.add_error = None
        self.fail_after = None
        self.answer = None  # token ids; None: the prompt's own
        self.num_steps = 0
        self.threads = set()
        self.seen = []  # (prompt, params, depth) of every request
        self._requests = {}

    @property
    def served(self):
        return self

    def __reduce__(self):
        """As a front process gets it: what is told of the model, and nothing that computes."""
        told = (
            *("model_name", "layer_map", "tiers", "default_tier", "shipped_results", "defaults", "spec"),
            *("text", "tokenizer", "chat_template", "response_template", "weights_name", "eos_token_ids"),
        )
        return FakeEngine, (self.max_model_len,), {name: getattr(self, name) for name in told}

    def _make_tier(self, depth):
        return Tier(
            id=f"fake:sleb-{depth}" if depth else "fake",
            depth=depth,
            digest=self.layer_map.digest(depth),
            num_blocks_kept=NUM_BLOCKS - depth,
            removed=self.layer_map.removed[:depth],
        )

    def tier(self, name):
        for tier in self.tiers:
            if name in (tier.id, tier.depth):
                return tier
        if name is None:
            return self.default_tier
        served = ", ".join(tier.id for tier in self.tiers)
        raise RequestError(f"no {name}; served: {served}", param="model", code="model_not_found")

    def encode(self, text, add_special_tokens=True):
        return self.tokenizer.encode(text).ids

    def encode_prompt(self, text, add_special_tokens=True):
        return self.encode(text)

    def chat_template_for(self, with_tools):
        return self.chat_template

    def render_chat(
        self,
        messages,
        *,
        tools=None,
        add_generation_prompt=True,
        continue_final_message=False,
        variables=None,
    ):
        if any(message["content"] == "forbidden" for message in messages):
            raise RequestError("the chat template refuses the messages: no such role", param="messages")
        return self.encode(
            "".join(str(message["content"]) for message in messages) + (variables or {}).get("suffix", "")
        )

    @property
    def description(self):
        return "nothing at all"

    def weight_bytes(self, depth):
        return 1000 * (NUM_BLOCKS - depth)

    def num_parameters(self, depth):
        return 500 * (NUM_BLOCKS - depth)

    def kv_bytes_per_token(self, depth):
        return 10 * (NUM_BLOCKS - depth)

    def add_request(self, request_id, prompt_token_ids, params, depth=None, fork_of=None):
        self.threads.add(threading.get_ident())
        if self.add_error is not None:
            raise self.add_error
        tokens = list(prompt_token_ids)
        if not tokens:
            raise RequestError("the prompt is empty", param="prompt")
        if len(tokens) + (params.max_tokens != 0) > self.max_model_len:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, but the context holds {self.max_model_len}",
                param="prompt",
                code="context_length_exceeded",
            )
        for name, ids in (
            ("prompt", tokens),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias or ()),
        ):
            for token_id in ids:
                if not 0 <= token_id < self.spec.vocab_size:
                    raise RequestError(f"{token_id} in {name} is not a token id", param=name)
        assert params.n == 1
        self.seen.append((tokens, params, depth))
        room = self.max_model_len - len(tokens)
        self._requests[request_id] = SimpleNamespace(
            tokens=tokens,
            answer=tokens if self.answer is None else self.answer,
            depth=self.tier(depth).depth,
            params=params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            num_output=0,
            detokenizer=Detokenizer(self.tokenizer, tokens, params.stop_strings),
            timings=Timings(arrival=time.monotonic()),
        )

    def abort(self, request_id):
        self._requests.pop(request_id, None)

    def has_unfinished(self):
        return bool(self._requests)

    @property
    def num_running(self):
        return self.stats().num_running

    @property
    def num_waiting(self):
        return self.stats().num_waiting

    def stats(self):
        depths = [request.depth for request in self._requests.values()]
        return EngineStats(
            running=Counter(depths[: self.max_running]),
            waiting=Counter(depths[self.max_running :]),
            kv_cache_usage=0.0,
            num_prompt_tokens=0,
            num_cached_tokens=0,
            num_output_tokens=self.num_steps,
            num_preemptions=0,
        )

    def follow_pace(self):
        return self.pace

    def work(self):
        depths = Counter(request.depth for request in list(self._requests.values())[self.max_running :])
        return Work(depths, depths.total(), self.max_running - min(len(self._requests), self.max_running))

    def check_integrity(self):
        pass

    def step(self):
        self.threads.add(threading.get_ident())
        self.hold.wait()
        time.sleep(self.delay)
        self.num_steps += 1
        if self.error is not None or self.num_steps == self.fail_after:
            raise self.error or RuntimeError("the fake engine breaks")
        return [self._advance(request_id) for request_id in list(self._requests)[: self.max_running]]

    def _advance(self, request_id):
        request = self._requests[request_id]
        params, now = request.params, time.monotonic()
        request.timings.first_scheduled = request.timings.first_scheduled or now
        new_ids, text, reason, stop = [], "", None, None
        first = request.num_output == 0
        if request.max_tokens > 0:
            token = request.answer[request.num_output % len(request.answer)]
            request.timings.first_token = request.timings.first_token or now
            request.num_output += 1
            new_ids, text = [token], request.detokenizer.push(token)
            if request.detokenizer.stopped_by is not None:
                reason, stop = "stop", request.detokenizer.stopped_by
            elif request.num_output == len(request.answer) and not params.ignore_eos:
                reason = "stop"
        if reason is None and request.num_output >= request.max_tokens:
            reason = "length"
        if reason is not None:
            text += request.detokenizer.flush()
            request.timings.finished = now
            del self._requests[request_id]
        logprobs, prompt_logprobs = None, None
        if params.logprobs is not None:
            logprobs = [_fake_logprobs(token, params.logprobs) for token in new_ids]
        if params.prompt_logprobs is not None and first:
            rest = [_fake_logprobs(token, params.prompt_logprobs) for token in request.tokens[1:]]
            prompt_logprobs = [None, *rest]
        return StepOutput(
            request_id=request_id,
            new_token_ids=new_ids,
            new_text=text,
            new_logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop,
            num_prompt_tokens=len(request.tokens),
            num_output_tokens=request.num_output,
            num_cached_tokens=0,
            timings=request.timings,
        )


def _fake_logprobs(token, num_top):
    """The token itself is the third most probable: two others come first."""
    return TokenLogprobs(token, -1.5, [(each, -1.0 - each / 100) for each in range(num_top)])


def main():
    from sleb.server.options import ServeOptions
    from sleb.server.run import listen, serve

    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--fail-after", type=int)
    parser.add_argument("--drain-timeout", type=float, default=10.0)
    parser.add_argument("--uds", type=Path)
    parser.add_argument("--fronts", type=int, default=0)
    arguments = parser.parse_args()

    def make_engine(config):
        from fake_engine import FakeEngine  # by a name that front processes know it by

        engine = FakeEngine(max_model_len=100_000)
        engine.delay, engine.fail_after = arguments.delay, arguments.fail_after
        return engine

    options = ServeOptions(
        port=arguments.port,
        uds=arguments.uds,
        warm_up=False,
        drain_timeout=arguments.drain_timeout,
        fronts=arguments.fronts,
    )
    config = SimpleNamespace(model="fake", max_num_seqs=4)
    sys.exit(serve(listen(options), config, options, make_engine=make_engine))


if __name__ == "__main__":
    main()
