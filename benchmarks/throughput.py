"""Throughput of one model at several depths, measured so that the depths can be compared.

The tests are those of the SLEB paper's section on speed (arXiv 2402.09025): processing one long prompt, and
generating 128 tokens after 64-token prompts, where tokens/s counts the new tokens over the whole run, prompts
included. A third, "decode", times the steps of the second in which all requests decode. One engine holds all depths
and they take turns (`sleb.benchmarks.turns`) on the same random prompts.

The baseline takes part twice: what the second, the control, seems faster or slower by is what the run's own errors
are. A batch of all depths takes part too where batches generate; it is compared with its depths alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from sleb.benchmarks.ceilings import Ceilings, measure_ceilings
from sleb.benchmarks.environment import Conditions, describe_environment, shown_command
from sleb.benchmarks.ideal import DepthCost, floor_seconds, ideal_speedup
from sleb.benchmarks.record import Measurement, Result
from sleb.benchmarks.turns import Case, Progress, Run, Sample, Turns, measure
from sleb.benchmarks.workloads import (
    ThroughputOptions,
    Workload,
    check_overlap,
    choose_depths,
    choose_map,
    paper_depths,
    paper_measurements,
    plan_workloads,
    steps_apart,
)
from sleb.engine.chain import load_layer_map
from sleb.engine.engine import Engine
from sleb.engine.execute.kv_cache import bytes_per_token
from sleb.engine.llm import LLM
from sleb.engine.memory import GIB
from sleb.engine.model.architecture import DecoderSpec, resolve_spec
from sleb.engine.model.resolve import resolve_device, resolve_dtype
from sleb.engine.requests.sampling_params import SamplingParams
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.models import shapes
from sleb.models.resolve import resolve_model

METRIC = "tokens/s"
_SETTINGS = (
    *("repetitions", "max_repetitions", "interval", "time_budget", "seed", "control", "mixed", "paper"),
    *("load_format", "weights", "config"),
)
CONTROL, MIXED = "control", "mixed"
_PAGE_SIZE = 16
# Prompts of a batch are computed in one step up to this many tokens; more would cost memory and gain nothing.
MAX_STEP_TOKENS = 8192
# Decode steps of a warm-up on a CPU, where nothing depends on how far a context has grown.
_WARM_UP_TOKENS = 4
_LEGEND = (
    "tokens/s: median of the turns (least–greatest); prompt counts the prompt's tokens, generate new tokens over the "
    "whole run, decode those after each request's first. ×: over the baseline, estimate and 95 % interval of the "
    "ratios within a turn (Hodges–Lehmann, Wilcoxon); of mixed, over its depths alone. ideal ×: by operations for "
    "prompts, else by bytes of weights and KV. of roofline: the least time at the measured ceilings over the time, "
    "above 1 where torch's matrix product, the ceiling, is slower than these kernels."
)
_PAPER = "paper: LLaMA-2-70B on two A100, as printed in arXiv 2402.09025; nothing of it was measured here."


class ThroughputBench:
    """A model loaded at several depths, and the workloads to run on it.

    Attributes:
        depths: in the order asked. baseline: depth 0, else the first. map_source: see `workloads.choose_map`.

    on_load: as EngineConfig's on_progress. Raises SlebError subclasses for a model, map, depth or option that does
    not work.
    """

    def __init__(self, options: ThroughputOptions, on_load: Callable[[int, int], None] | None = None) -> None:
        options.check()
        self.options = options
        model, load_format = options.model, options.load_format
        if options.config is not None:
            model, load_format = str(shapes.shape_folder(options.config)), "dummy"
        resolved = resolve_model(model)
        spec = resolve_spec(resolved.path)
        chosen, self.map_source = choose_map(options, spec.num_blocks, spec.fingerprint)
        layer_map, shipped = load_layer_map(chosen, resolved, spec)
        if self.map_source == "alias":
            self.map_source = "shipped" if shipped else "none"
        from_paper, self.missing_shares = paper_depths(layer_map)
        asked_depths = from_paper if options.paper else options.depths
        self.depths = choose_depths(asked_depths, layer_map, resolved.name)
        if options.fail_below is not None and len(self.depths) < 2:
            raise ConfigError(
                f"--fail-below has no speedup to judge: depth {self.depths[0]} alone is measured; name another in "
                "--depths, or give a longer --layer-map"
            )
        self.baseline = 0 if 0 in self.depths else self.depths[0]
        on_gpu = resolve_device(options.device).type == "cuda"
        self.workloads = plan_workloads(options, spec.max_positions, on_gpu)
        engine_options = self._engine_options(spec, layer_map) | {"load_format": load_format}
        self._step_tokens = engine_options["max_num_batched_tokens"]
        check_overlap(self.workloads, self._step_tokens)
        self.llm = LLM(
            model, layer_map, self.depths, on_progress=on_load, on_capture=on_load, **engine_options
        )
        self.engine = self.llm.engine
        self._token_ids = plain_token_ids(self.engine)

    def _engine_options(self, spec: DecoderSpec, layer_map: LayerMap) -> dict[str, Any]:
        """Room for the largest workload and no more; no prefix cache, which would skip what is to be measured."""
        options, workloads = self.options, self.workloads
        num_pages = max(each.batch * -(-each.context // _PAGE_SIZE) for each in workloads)
        blocks = range(spec.num_blocks)
        num_attention = sum(layer_map.active((block, "attention"), min(self.depths)) for block in blocks)
        asked = options.dtype, options.weights, spec.checkpoint_dtype, resolve_device(options.device)
        dtype = resolve_dtype(*asked, wide_range=spec.wide_range)
        page_bytes = _PAGE_SIZE * bytes_per_token(spec, num_attention, dtype, "auto")
        batch = max(each.batch for each in workloads)
        longest_prompt = max(each.prompt_tokens for each in workloads)
        all_prompts = max(each.batch * each.prompt_tokens for each in workloads)
        return {
            name: getattr(options, name)
            for name in ("dtype", "weights", "device", "kernels", "threads", "seed")
        } | {
            "max_model_len": max(each.context for each in workloads),
            "max_num_seqs": batch,
            "max_num_batched_tokens": max(longest_prompt, batch, min(all_prompts, MAX_STEP_TOKENS)),
            "page_size": _PAGE_SIZE,
            # Half a page more, so that rounding to GiB and back does not lose the last one.
            "kv_cache_memory": (num_pages + 0.5) * page_bytes / GIB if page_bytes else None,
            "prefix_caching": False,
        }

    def cases(self, ceilings: Ceilings | None = None) -> list[Case]:
        """A case a workload: its depths, the control, a mixed batch."""
        return [self._case(workload, ceilings) for workload in self.workloads]

    def _case(self, workload: Workload, ceilings: Ceilings | None) -> Case:
        batch = workload.batch
        depths = {f"depth {depth}": [depth] * batch for depth in self.depths}
        if self.options.control:
            depths[CONTROL] = [self.baseline] * batch
        against = {}
        if self.mixes(workload) and batch >= len(self.depths):
            depths[MIXED] = [self.depths[place % len(self.depths)] for place in range(batch)]
            against[MIXED] = [f"depth {depth}" for depth in depths[MIXED]]
        costs = {depth: DepthCost.of(self.engine, depth) for depth in self.depths}
        runs = {name: self._run(workload, each) for name, each in depths.items()}
        facts = {name: self._facts(name, workload, each, costs, ceilings) for name, each in depths.items()}
        return Case(str(workload), runs, f"depth {self.baseline}", against, facts)

    def mixes(self, workload: Workload) -> bool:
        """Whether a mixed batch is asked for, whether or not the batch is large enough for it."""
        return self.options.mixed and workload.test == "generate" and len(self.depths) > 1

    def _facts(
        self,
        subject: str,
        workload: Workload,
        depths: Sequence[int],
        costs: Mapping[int, DepthCost],
        ceilings: Ceilings | None,
    ) -> dict[str, Any]:
        """What is known before it runs. Of a mixed batch, weights and blocks are its fullest depth's, KV the mean."""
        mixed, fullest = subject == MIXED, min(depths)
        cost, kv_bytes = costs[fullest], [costs[depth].kv_bytes_per_token for depth in depths]
        return {
            **asdict(workload),
            "depth": None if mixed else depths[0],
            "variant": subject,
            "depths": list(self.depths) if mixed else None,
            "baseline_depth": self.baseline,
            "ideal_speedup": 1.0 if mixed else ideal_speedup(workload, costs[self.baseline], cost),
            "num_blocks_kept": self.engine.tier(fullest).num_blocks_kept,
            "weight_bytes": cost.weight_bytes,
            "kv_bytes_per_token": round(sum(kv_bytes) / len(depths)),
            # The last new token is never fed back, so its K and V are never there.
            "kv_bytes": (workload.context - 1) * sum(kv_bytes),
            "floor_seconds": None if mixed or ceilings is None else floor_seconds(workload, cost, ceilings),
        }

    def prompts(self, workload: Workload, turn: int) -> list[list[int]]:
        """The turn's prompts: random ordinary tokens."""
        rng = random.Random(f"{self.options.seed} {workload} {turn}")
        return [rng.choices(self._token_ids, k=workload.prompt_tokens) for _ in range(workload.batch)]

    def _run(self, workload: Workload, depths: Sequence[int]) -> Run:
        # One depth for all where it is one, as anyone would ask for it.
        depth = list(depths) if len(set(depths)) > 1 else depths[0]

        def run(turn: int) -> Sample:
            now = workload
            if not turn and self.engine.runner.device.type == "cpu":
                least = max(_WARM_UP_TOKENS, steps_apart(workload, self._step_tokens) + 2)
                now = replace(workload, output_tokens=min(workload.output_tokens, least))
            prompts = self.prompts(workload, turn)
            params = greedy_params(now.output_tokens)
            if now.test == "decode":
                seconds = decode_seconds(self.engine, prompts, params, depths[0])
            else:
                started = time.perf_counter()
                outputs = self.llm.generate(prompts, params, depth)
                seconds = time.perf_counter() - started
                num_tokens = sum(len(output.check().token_ids) for output in outputs)
                assert num_tokens == now.batch * now.output_tokens, f"{num_tokens} new tokens for {now}"
            return {METRIC: now.counted_tokens / seconds}

        return run

    def measurements(self, turns: Turns) -> list[Measurement]:
        """Those of the turns, with the facts that scripts read."""
        cases = {case.name: case for case in turns.cases}
        counted = {str(workload): workload.counted_tokens for workload in self.workloads}
        found = []
        for each in turns.measurements():
            assert each.value is not None
            facts, ratio = dict(each.facts), each.ratio
            ratios = turns.ratios(cases[each.case], each.subject, METRIC) or [1.0]
            seconds, floor = counted[each.case] / each.value, facts.pop("floor_seconds")
            known = ratio is not None and ratio.low is not None
            facts |= {
                "tokens_per_second": each.value,
                "seconds": seconds,
                "speedup": 1.0 if ratio is None else ratio.estimate,
                # Below six turns, the least and the greatest ratio.
                "speedup_low": ratio.low if ratio and known else min(ratios),
                "speedup_high": ratio.high if ratio and known else max(ratios),
                "speedup_level": 0.95 if known else None,
                "verdict": "baseline" if ratio is None else ratio.verdict,
                "roofline_share": None if floor is None else floor / seconds,
            }
            found.append(replace(each, facts=facts))
        return found

    def notes(self, measurements: Sequence[Measurement]) -> list[str]:
        """What a reader of the figures must know."""
        notes = [_LEGEND]
        if self.map_source == "stand-in":
            notes.append(
                "The layer map is a stand-in, blocks evenly spaced over the middle: no map of this shape comes with "
                "sleb. Speed does not depend on which blocks are gone; quality does."
            )
        subjects = {(each.case, each.subject) for each in measurements}
        mixed = {str(each) for each in self.workloads if self.mixes(each)}
        measured = dict.fromkeys(each.case for each in measurements)
        if small := [name for name in measured if name in mixed and (name, MIXED) not in subjects]:
            notes.append(f"Not mixed, for the batch has fewer requests than depths: {', '.join(small)}.")
        if any(each.facts["repetitions"] < 6 for each in measurements):
            notes.append("An interval takes 6 turns: give --time-budget or --repetitions more.")
        notes += [
            f"{each.case}: the control, depth {self.baseline} again, came out {abs(each.ratio.estimate - 1):.1%} "
            f"{each.ratio.verdict} than itself: differences of that size mean nothing here."
            for each in measurements
            if each.subject == CONTROL and each.ratio and each.ratio.verdict != "no difference"
        ]
        return notes


def greedy_params(num_tokens: int) -> SamplingParams:
    """Exactly num_tokens tokens, the most probable ones; nothing of the model's generation config, as penalties."""
    return SamplingParams(
        max_tokens=num_tokens, ignore_eos=True, temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0
    )


def decode_seconds(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, depth: int
) -> float:
    """Seconds that `engine` takes for all tokens but the first of each request, at the pace of full steps.

    Timed from when every request has its first token to when the first of them is done, so that no prompt and no
    request that has ended lies in between, and scaled from the tokens of that window to all but the first. Where the
    prompts took several steps, it misses as many steps of an average request at its beginning as at its end: the mean
    context is still prompt + output / 2 tokens, to first order, as `sleb.benchmarks.ideal` has it.

    Raises ConfigError where there is no such window; `workloads.check_overlap` knows before.
    """
    made = {f"decode-{index}": 0 for index in range(len(prompts))}
    unfinished = set(made)
    started = seconds = 0.0
    num_before = num_timed = 0
    try:
        for request_id, prompt in zip(made, prompts, strict=True):
            engine.add_request(request_id, prompt, params, depth)
        while unfinished:
            for increment in engine.step():
                made[increment.request_id] += len(increment.new_token_ids)
                if increment.failure is not None:
                    raise increment.failure
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
    special.update(*spec.special_token_ids.values())
    if tokenizer is not None:
        special |= set(tokenizer.get_added_tokens_decoder())
        num_ids = min(num_ids, tokenizer.get_vocab_size())
    return [token_id for token_id in range(num_ids) if token_id not in special]


def run_throughput(
    options: ThroughputOptions,
    command: Sequence[str] = (),
    *,
    on_load: Callable[[int, int], None] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_turn: Callable[[Turns, Case], None] = lambda turns, case: None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Loads the model and measures; interrupted while measuring, the result holds what is complete.

    command: the command line to record. on_load: called while weights are loaded; on_result: after every turn, with
    what there is so far; the others as for `turns.measure`. Raises SlebError subclasses before anything is measured.
    """
    bench = ThroughputBench(options, on_load)
    engine, runner = bench.engine, bench.engine.runner
    environment = describe_environment(engine, shown_command(command, options.model or ""))
    threads = torch.get_num_threads() if runner.device.type == "cpu" else 0
    ceilings = measure_ceilings(runner.device, runner.dtype, threads)
    environment["ceilings"], conditions = asdict(ceilings), Conditions()
    settings: dict[str, Any] = {name: getattr(options, name) for name in _SETTINGS}
    settings["model"] = {
        "name": engine.model_name,
        **{name: getattr(engine.spec, name) for name in ("architecture", "num_blocks", "fingerprint")},
        "layer_map": bench.map_source,
        "removed": [str(unit) for unit in engine.layer_map.removed[: max(bench.depths)]],
        "patches": engine.layer_map.patches and engine.layer_map.patches.sha256,
    }

    def found(turns: Turns, complete: bool) -> Result:
        measurements = bench.measurements(turns)
        notes = [*bench.notes(measurements), *conditions.notes()]
        if options.paper:
            measurements += paper_measurements()
            notes += [_PAPER, *bench.missing_shares]
        machine = environment | {"conditions": conditions.summary()}
        return Result("throughput", machine, settings, measurements, notes, complete)

    def after_turn(turns: Turns, case: Case) -> None:
        on_turn(turns, case)
        on_result(found(turns, False))

    cases = bench.cases(ceilings)
    turns = measure(cases, options, watch=conditions, on_progress=on_progress, on_turn=after_turn)
    return found(turns, turns.complete)


def too_slow(result: Result, bound: float) -> list[str]:
    """The depths whose speedup over the baseline is below `bound`, in words."""
    return [
        f"{each.case}, {each.subject}: {each.ratio.estimate:.3f}"
        for each in result.measurements
        if each.ratio is not None and each.ratio.estimate < bound and each.subject.startswith("depth ")
    ]
