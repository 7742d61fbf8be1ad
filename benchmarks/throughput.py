"""Throughput of one model at several depths, measured so that the depths can be compared.

The tests are those of the SLEB paper's section on speed (arXiv 2402.09025): processing one long prompt, and
generating 128 tokens after 64-token prompts, where tokens/s counts the new tokens over the whole run, prompts
included. A third, "decode", times the steps of the second in which all requests decode. One engine holds all depths
and they take turns: every repetition runs each of them once, on the same random prompts, so that whatever slows the
machine down for a while meets them alike, and a speedup comes from the ratios within repetitions. One run of each
depth goes before, uncounted.

The baseline takes part twice: what the second, the control, seems faster or slower by is what the run's own errors
are. A batch of all depths in turns takes part too where batches generate.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from sleb.benchmarks.ceilings import Ceilings, measure_ceilings, with_read_ceiling
from sleb.benchmarks.conditions import ConditionsWatch
from sleb.benchmarks.environment import describe_environment, shown_command
from sleb.benchmarks.harness import Progress, Stopping, StopReason, measure
from sleb.benchmarks.paper import missing_shares, paper_depths, with_paper_settings
from sleb.benchmarks.results import Row
from sleb.benchmarks.throughput_checks import check_options, check_overlap
from sleb.benchmarks.throughput_report import Report
from sleb.benchmarks.throughput_rows import RowMaker, control_notices
from sleb.benchmarks.variants import MIXED, Variant, Variants
from sleb.benchmarks.workloads import (
    ThroughputOptions,
    Workload,
    choose_depths,
    choose_map,
    plan_workloads,
    with_model,
)
from sleb.engine.chain import load_layer_map
from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine
from sleb.engine.execute.kv_cache import GIB, bytes_per_token
from sleb.engine.llm import LLM
from sleb.engine.model.architecture import DecoderSpec, resolve_spec
from sleb.engine.model.resolve import resolve_dtype
from sleb.engine.requests.sampling_params import SamplingParams
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.models.resolve import resolve_model

_PAGE_SIZE = 16
# Prompts of a batch are computed in one step up to this many tokens; more would cost memory and gain nothing.
MAX_STEP_TOKENS = 8192
# For each workload, its complete repetitions: seconds by variant.
ThroughputSamples = dict[Workload, list[dict[Variant, float]]]


class ThroughputBench:
    """A model loaded at several depths, and the workloads to run on it.

    Attributes:
        depths: in the order asked. variants: what takes turns; the baseline is depth 0, else the first.
        map_source: where the layer map is from, see `workloads.choose_map`. notices: what is not measured, and why.

    on_load: as EngineConfig's on_progress. Raises SlebError subclasses for a model, map, depth or option that does
    not work.
    """

    def __init__(self, options: ThroughputOptions, on_load: Callable[[int, int], None] | None = None) -> None:
        check_options(options)
        options = with_model(with_paper_settings(options))
        EngineConfig(
            options.model,
            dtype=options.dtype,
            weights=options.weights,
            load_format=options.load_format,
            threads=options.threads,
        ).check()
        self.options = options
        resolved = resolve_model(options.model)
        spec = resolve_spec(resolved.path)
        chosen, self.map_source = choose_map(options, spec.num_blocks, spec.fingerprint)
        layer_map, shipped = load_layer_map(chosen, resolved, spec)
        if self.map_source == "alias":
            self.map_source = "shipped" if shipped else "none"
        asked = paper_depths(layer_map) if options.paper else options.depths
        self.notices = missing_shares(layer_map) if options.paper else []
        self.depths = choose_depths(asked, layer_map, resolved.name)
        baseline = 0 if 0 in self.depths else self.depths[0]
        self.variants = Variants(self.depths, baseline, options.control, options.mixed)
        self._check_bound()
        self.workloads = plan_workloads(options, spec.max_positions)
        engine_options = self._engine_options(spec, layer_map)
        check_overlap(self.workloads, engine_options["max_num_batched_tokens"])
        self.llm = LLM(
            options.model, layer_map, self.depths, on_progress=on_load, on_capture=on_load, **engine_options
        )
        self._token_ids = plain_token_ids(self.llm.engine)

    def _check_bound(self) -> None:
        if self.options.fail_below is not None and len(self.depths) < 2:
            remedy = "give a longer --layer-map" if self.options.paper else "name another in --depths"
            raise ConfigError(
                f"--fail-below has no speedup to judge: depth {self.depths[0]} alone is measured; {remedy}"
            )

    def _engine_options(self, spec: DecoderSpec, layer_map: LayerMap) -> dict[str, Any]:
        """Room for the largest workload and no more; no prefix cache, which would skip what is to be measured."""
        options, workloads = self.options, self.workloads
        max_model_len = max(workload.context for workload in workloads)
        num_pages = max(workload.batch * -(-workload.context // _PAGE_SIZE) for workload in workloads)
        fullest = min(self.depths)
        num_attention = sum(
            layer_map.active((block, "attention"), fullest) for block in range(spec.num_blocks)
        )
        dtype = resolve_dtype(options.dtype, options.weights, spec.checkpoint_dtype)
        page_bytes = _PAGE_SIZE * bytes_per_token(spec, num_attention, dtype)
        batch = max(workload.batch for workload in workloads)
        longest_prompt = max(workload.prompt_tokens for workload in workloads)
        all_prompts = max(workload.batch * workload.prompt_tokens for workload in workloads)
        return {
            "dtype": options.dtype,
            "weights": options.weights,
            "device": options.device,
            "load_format": options.load_format,
            "threads": options.threads,
            "seed": options.seed,
            "max_model_len": max_model_len,
            "max_num_seqs": batch,
            "max_num_batched_tokens": max(longest_prompt, batch, min(all_prompts, MAX_STEP_TOKENS)),
            "page_size": _PAGE_SIZE,
            # Half a page more, so that rounding to GiB and back does not lose the last one.
            "kv_cache_memory": (num_pages + 0.5) * page_bytes / GIB if page_bytes else None,
            "prefix_caching": False,
        }

    def prompts(self, workload: Workload, repetition: int) -> list[list[int]]:
        """The repetition's prompts: random ordinary tokens."""
        rng = random.Random(f"{self.options.seed} {workload} {repetition}")
        return [rng.choices(self._token_ids, k=workload.prompt_tokens) for _ in range(workload.batch)]

    def prepare(self, workload: Workload, repetition: int) -> Callable[[Variant], float | None]:
        """Draws the repetition's prompts, the same for all variants, and returns what runs them as a variant."""
        prompts = self.prompts(workload, repetition)
        # Greedy, and nothing of the model's generation config, whose penalties would cost time of their own.
        params = greedy_params(workload.output_tokens)

        def run(variant: Variant) -> float | None:
            depths = self.variants.request_depths(variant, workload.batch)
            if workload.test == "decode":
                return decode_seconds(self.llm.engine, prompts, params, depths[0])
            # One depth for all where it is one, as anyone would ask for it.
            outputs = self.llm.generate(prompts, params, depths if len(set(depths)) > 1 else depths[0])
            num_tokens = sum(len(output.token_ids) for output in outputs)
            assert num_tokens == workload.batch * workload.output_tokens, (
                f"{num_tokens} new tokens for {workload}"
            )
            return None

        return run

    def stopping(self) -> Stopping[Workload, Variant]:
        """When the options have a workload repeated enough."""
        options = self.options
        return Stopping(options.most_repetitions, options.interval, self.variants.ratios, options.time_budget)

    def rows(
        self,
        samples: ThroughputSamples,
        ceilings: Ceilings | None = None,
        stops: Mapping[Workload, str] | None = None,
    ) -> list[Row]:
        """One row a workload and variant, workloads without a complete repetition left out."""
        return RowMaker(self.llm.engine, self.variants, ceilings, stops or {}).rows(samples)


def greedy_params(num_tokens: int) -> SamplingParams:
    """Exactly num_tokens tokens, the most probable ones, with nothing that costs time of its own."""
    return SamplingParams(
        max_tokens=num_tokens,
        ignore_eos=True,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
    )


_decode_runs = itertools.count()


def decode_seconds(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, depth: int
) -> float:
    """Seconds that `engine` takes for all tokens but the first of each request, at the pace of full steps.

    Timed from when every request has its first token to when the first of them is done, so that no prompt and no
    request that has ended lies in between, and scaled from the tokens of that window to all but the first. Where the
    prompts took several steps, it misses as many steps of an average request at its beginning as at its end: the mean
    context is still prompt + output / 2 tokens, to first order, as `sleb.benchmarks.ideal` has it.

    Raises ConfigError where there is no such window; `throughput_checks.check_overlap` knows before.
    """
    run = next(_decode_runs)
    made = {f"decode-{run}-{index}": 0 for index in range(len(prompts))}
    unfinished = set(made)
    started = seconds = 0.0
    num_before = num_timed = 0
    try:
        for request_id, prompt in zip(made, prompts, strict=True):
            engine.add_request(request_id, prompt, params, depth)
        while unfinished:
            for increment in engine.step():
                made[increment.request_id] += len(increment.new_token_ids)
                if increment.finish_reason is not None:
                    unfinished.discard(increment.request_id)
            now = time.perf_counter()
            all_go_on = len(unfinished) == len(made)
            if all_go_on and not num_before and all(made.values()):
                started, num_before = now, sum(made.values())
            elif not all_go_on and not num_timed:
                if not num_before:
                    raise ConfigError(
                        "an answer was done before every request had its first token, so no step decodes them all; "
                        "give more --output-tokens, or fewer requests at once"
                    )
                seconds, num_timed = now - started, sum(made.values()) - num_before
    finally:
        for request_id in unfinished:
            engine.abort(request_id)
    num_tokens = sum(made.values())
    assert num_tokens == len(prompts) * (params.max_tokens or 0), f"{num_tokens} tokens for {params}"
    return seconds * (num_tokens - len(prompts)) / num_timed


def plain_token_ids(engine: Engine) -> list[int]:
    """Ids of ordinary tokens: none that the tokenizer or the config calls special, none past the tokenizer's end."""
    spec, tokenizer = engine.spec, engine.tokenizer
    special = set(engine.eos_token_ids)
    num_ids = spec.vocab_size
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(spec.config, name, None)
        special |= {value} if isinstance(value, int) else set(value or ())
    if tokenizer is not None:
        special |= set(tokenizer.get_added_tokens_decoder())
        num_ids = min(num_ids, tokenizer.get_vocab_size())
    return [token_id for token_id in range(num_ids) if token_id not in special]


def run_throughput(
    options: ThroughputOptions,
    command: Sequence[str] = (),
    *,
    on_progress: Callable[[Progress], None] | None = None,
    on_load: Callable[[int, int], None] | None = None,
) -> Report:
    """Loads the model, measures, and reports; interrupted while measuring, it reports what is complete.

    command: the command line to record. on_load: called while weights are loaded. Raises SlebError subclasses
    before anything is measured.
    """
    bench = ThroughputBench(options, on_load)
    engine = bench.llm.engine
    environment = describe_environment(engine, shown_command(command, options.model))
    ceilings = _measure_ceilings(engine)
    environment["ceilings"] = asdict(ceilings)
    samples: ThroughputSamples = {}
    stops: dict[Workload, StopReason] = {}
    watch = ConditionsWatch(engine.runner.device)
    complete = True
    try:
        measure(
            bench.prepare, bench.workloads, bench.variants.of, options.repetitions, options.seed, samples,
            stopping=bench.stopping(), stops=stops, watch=watch, on_progress=on_progress,
        )  # fmt: skip
    except KeyboardInterrupt:
        complete = False
    rows = bench.rows(samples, ceilings, stops)
    conditions = watch.summary()
    repeated = options.most_repetitions > options.repetitions
    told = control_notices(rows, options.interval, until_narrow=repeated)
    conditions["notices"] = bench.notices + told + conditions["notices"]
    return Report(environment, _describe_model(bench), _describe_settings(bench), rows, complete, conditions)


def _measure_ceilings(engine: Engine) -> Ceilings:
    runner = engine.runner
    ceilings = measure_ceilings(runner.device, runner.dtype)
    return with_read_ceiling(ceilings, torch.get_num_threads()) if runner.device.type == "cpu" else ceilings


def _describe_model(bench: ThroughputBench) -> dict[str, Any]:
    engine = bench.llm.engine
    return {
        "name": engine.model_name,
        "architecture": engine.spec.architecture,
        "num_blocks": engine.spec.num_blocks,
        "layer_map": bench.map_source,
        "fingerprint": engine.spec.fingerprint,
        "removed": [str(unit) for unit in engine.layer_map.removed[: max(bench.depths)]],
    }


def _describe_settings(bench: ThroughputBench) -> dict[str, Any]:
    options, variants = bench.options, bench.variants
    skipped = [each for each in bench.workloads if variants.mixes(each) and MIXED not in variants.of(each)]
    return {
        "repetitions": options.repetitions,
        "max_repetitions": options.most_repetitions,
        "interval": options.interval,
        "time_budget": options.time_budget,
        "control": options.control,
        "mixed": options.mixed,
        "not_mixed": [str(workload) for workload in skipped],
        "paper": options.paper,
        "seed": options.seed,
        "load_format": options.load_format,
        "weights": options.weights,
    }
