"""Quality by depth: what a model loses with every unit that its layer map removes.

Up to three parts, one after the other, so that one copy of the weights is in memory at a time:

text        perplexity of texts that took no part in the search, agreement of the next token and KL divergence, with
            intervals (`scores`, `interval`), computed by torch's operators without a KV cache;
generation  greedy answers by the engine as it serves (`answers`);
tasks       lm-eval over HTTP, on the same engine (`tasks`).

Perplexity is exp of the mean negative log-likelihood of the predicted tokens, those of all texts together. What is
compared with the dense model is so on the same tokens.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sleb.benchmarks.environment import describe_environment, describe_machine, shown_command
from sleb.benchmarks.quality.answers import generate_answers, read_prompts
from sleb.benchmarks.quality.interval import Estimate, choose_num_batches, estimate
from sleb.benchmarks.quality.options import EvalOptions
from sleb.benchmarks.quality.scores import Chain, TextScores, TokenScores, score_texts
from sleb.benchmarks.quality.tasks import DEFAULT_MAX_LENGTH, TaskOptions, find_lm_eval, run_tasks
from sleb.benchmarks.quality.texts import (
    LM_EVAL_SPARE,
    WindowedText,
    cut_text,
    default_seqlen,
    read_text,
)
from sleb.benchmarks.record import Measurement, Ratio, Result
from sleb.engine.chain import load_layer_map
from sleb.engine.llm import LLM
from sleb.engine.model.architecture import resolve_spec
from sleb.engine.model.resolve import resolve_device
from sleb.engine.model.scoring import DecoderScorer
from sleb.engine.text import TextProcessor
from sleb.errors import ConfigError, SlebError
from sleb.layer_map.layer_map import LayerMap
from sleb.models.resolve import resolve_model

OnProgress = Callable[[str, int, int], None]
"""What is being done, how much of it is, of how much; of 0 where that is not known."""

_OF_TEXTS = (
    "same token, KL (dense ‖ depth, in nats), perplexity ×: against depth 0 on the same tokens. Intervals of 95 % by "
    "batch means over stretches of the text, paired where depths are compared; they speak for text like this one."
)
_OF_ANSWERS = (
    "repeated: four tokens in a row come more than three times. looped: the end is one piece said three times or more. "
    "unfinished: cut at the limit of tokens. early: empty, or below a quarter of the dense answer's tokens. common "
    "prefix: tokens before the first that differs from the dense answer."
)


@dataclass(frozen=True)
class _Plan:
    """What is read and resolved before a model is loaded. executable: lm_eval's, where there are tasks."""

    layer_map: LayerMap
    depths: tuple[int, ...]
    texts: list[WindowedText]
    prompts: tuple[str, ...]
    executable: Path | None


def run_eval(
    options: EvalOptions,
    command: Sequence[str] = (),
    on_progress: OnProgress = lambda what, done, total: None,
) -> Result:
    """Measures what `options` asks. An interrupt, or the failure of a later part, ends it with what is complete.

    command: the command line to record. The settings have a "problem" where a later part failed. Raises SlebError
    subclasses while nothing is measured yet.
    """
    plan, settings = _prepare(options)
    result = Result("eval", {}, settings)
    shown = shown_command(command, options.model)
    try:
        if plan.texts:
            _measure_texts(result, options, plan, shown, on_progress)
        if options.generate or options.tasks:
            llm = _load_engine(options, plan, on_progress)
            environment = describe_environment(llm.engine, shown)
            result.environment = result.environment or environment
            settings["engine_kernels"] = environment["kernels"]
            if options.generate:
                _measure_answers(result, llm, options, plan, on_progress)
            if plan.executable is not None:
                _measure_tasks(result, llm, options, plan, plan.executable, on_progress)
    except KeyboardInterrupt:
        result.complete = False
    except SlebError as error:
        if not result.measurements:
            raise
        result.complete, settings["problem"] = False, str(error)
    return result


def _prepare(options: EvalOptions) -> tuple[_Plan, dict[str, Any]]:
    """The plan, and what to record of it. Raises SlebError subclasses."""
    options.check()
    texts = [read_text(source) for source in options.text]
    prompts = read_prompts(options.prompts)
    executable = find_lm_eval(options.lm_eval) if options.tasks else None
    resolve_device(options.device)
    resolved = resolve_model(options.model)
    spec = resolve_spec(resolved.path)
    layer_map, shipped = load_layer_map(options.layer_map, resolved, spec)
    depths = options.chosen_depths(layer_map, resolved.name)
    model = {
        "name": resolved.name.lower(),
        "architecture": spec.architecture,
        "num_blocks": spec.num_blocks,
        "layer_map": "shipped" if shipped else "given" if layer_map.max_depth else "none",
        "fingerprint": spec.fingerprint,
        "removed": [str(unit) for unit in layer_map.removed[: depths[-1]]],
    }
    settings: dict[str, Any] = {"model": model, "dtype": options.dtype, "weights": options.weights}
    windowed: list[WindowedText] = []
    if texts:
        seqlen = options.seqlen or default_seqlen(options.windows_like, spec.max_positions)
        if seqlen > spec.max_positions:
            raise ConfigError(
                f"--seqlen {seqlen} is longer than the context of {resolved.name}: {spec.max_positions} at most"
            )
        processor = TextProcessor(resolved.path)
        windowed = [
            cut_text(each, processor, options.windows_like, seqlen, options.windows) for each in texts
        ]
        settings |= {"dataset": "+".join(text.name for text in texts), "windows_like": options.windows_like}
        settings["seqlen"] = seqlen
    return _Plan(layer_map, depths, windowed, prompts, executable), settings


def _measure_texts(
    result: Result, options: EvalOptions, plan: _Plan, command: Sequence[str], on_progress: OnProgress
) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    on_progress("loading the model", 0, 0)
    scorer = DecoderScorer.load(options.model, options.dtype, options.device, options.weights)
    result.environment = describe_machine(scorer.device, scorer.dtype, "torch", command)
    found: list[TextScores] = []
    chain, told = Chain.of(plan.layer_map, plan.depths), partial(on_progress, "scoring the text")
    try:
        score_texts(scorer, chain, plan.texts, found, told)
    finally:  # an interrupt loses the windows under way alone
        found = [scores for scores in found if scores.batches]
        if found:
            result.measurements += measure_scores(found, plan.depths)
            result.settings["dataset"] = "+".join(scores.text.text.name for scores in found)
            result.settings["windows"] = [scores.num_windows for scores in found]
            result.notes.append(_OF_TEXTS)
            if any(each.value is None for each in result.measurements):
                result.notes.append("A figure that is not a finite number is left out; try --dtype float32.")


def measure_scores(found: Sequence[TextScores], depths: Sequence[int]) -> list[Measurement]:
    """The figures of all texts together, then of each where there are several; `depths` are the places, 0 first."""
    measured = [
        replace(each, facts={**each.facts, "perplexity": each.value}) if each.metric == "perplexity" else each
        for each in _figures(found, depths)  # what a server tells of a depth
    ]
    for each in found if len(found) > 1 else ():
        measured += _figures([each], depths)
    return measured


def _figures(texts: Sequence[TextScores], depths: Sequence[int]) -> Iterator[Measurement]:
    case = "+".join(each.text.text.name for each in texts)
    by_depth = [TokenScores.join([each.at(place) for each in texts]) for place in range(len(depths))]
    dense = by_depth[0].losses.double()
    stretches = choose_num_batches(dense)
    for depth, scores in zip(depths, by_depth, strict=True):
        losses = scores.losses.double()
        found = {"perplexity": estimate(losses, stretches).exp()}
        if depth:
            found["same token"] = estimate(scores.agreed, stretches).clamped(0.0, 1.0)
            found["KL"] = estimate(scores.divergences, stretches).clamped(0.0, math.inf)
        if all(each.is_whole for each in texts):  # as lm-eval defines them
            nats = float(losses.sum())
            by_byte = nats / sum(each.text.text.num_bytes for each in texts)
            by_word = nats / sum(each.text.text.num_words for each in texts)
            found["word perplexity"] = Estimate(by_word, None).exp()
            found["byte perplexity"] = Estimate(by_byte, None).exp()
            found["bits per byte"] = Estimate(by_byte / math.log(2), None)
        for metric, figure in found.items():
            facts: dict[str, Any] = {"depth": depth}
            ratio: Ratio | None = None
            spread = figure.interval if all(map(math.isfinite, figure.interval or ())) else None
            value = figure.value if math.isfinite(figure.value) else None  # JSON has no other numbers
            if value is None:
                facts["failed"] = "not a finite number"
            if metric == "perplexity":
                facts |= {"tokens": len(dense), "interval_stretches": stretches}
            if metric == "perplexity" and depth and value is not None:
                gain = estimate(dense - losses, stretches).exp()
                ends = gain.interval or ()
                ratio = Ratio(gain.value, *(ends if all(map(math.isfinite, ends)) else ()))
            yield Measurement(case, f"depth {depth}", metric, value, spread, ratio, facts)


def _load_engine(options: EvalOptions, plan: _Plan, on_progress: OnProgress) -> LLM:
    gc.collect()  # the scorer's weights
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what it held would be missing from the KV cache's share
    on_progress("loading the engine", 0, 0)
    names = ("dtype", "weights", "device", "threads")
    asked: dict[str, Any] = {name: getattr(options, name) for name in names}
    told = partial(on_progress, "loading the engine")
    return LLM(options.model, plan.layer_map, plan.depths, on_progress=told, **asked)


def _measure_answers(
    result: Result, llm: LLM, options: EvalOptions, plan: _Plan, on_progress: OnProgress
) -> None:
    result.settings |= {"prompts": len(plan.prompts), "output_tokens": options.output_tokens}
    result.settings["chat_template"] = llm.engine.text.chat_template is not None
    result.notes.append(_OF_ANSWERS)

    def told(depth: int, done: int, total: int) -> None:
        on_progress(f"answering at depth {depth}", done, total)

    answers = generate_answers(llm, plan.prompts, plan.depths, options.output_tokens, told)
    for depth, quality in zip(plan.depths, answers, strict=True):
        facts = {"depth": depth, "example": quality.example}
        for name, value in vars(quality).items():
            if name not in ("answers", "example") and value is not None:
                case, metric = f"{quality.answers} answers", name.replace("_", " ")
                result.measurements.append(Measurement(case, f"depth {depth}", metric, value, facts=facts))
                facts = {"depth": depth}  # the first alone has the example


def _measure_tasks(
    result: Result, llm: LLM, options: EvalOptions, plan: _Plan, executable: Path, on_progress: OnProgress
) -> None:
    most = DEFAULT_MAX_LENGTH
    if options.windows_like == "lm-eval" and options.seqlen is not None:
        most = options.seqlen + LM_EVAL_SPARE  # then its windows are those of the same text
    most = min(llm.engine.max_model_len, most)
    asked = TaskOptions(executable, options.tasks, options.limit, options.include_path, most)
    result.settings |= {"limit": asked.limit, "lm_eval_max_length": asked.max_length}

    def told(depth: int) -> None:
        on_progress(f"lm-eval at depth {depth}", plan.depths.index(depth), len(plan.depths))

    for depth, scores in zip(plan.depths, run_tasks(llm, plan.depths, asked, told), strict=True):
        for task, metrics in scores.items():
            for metric, score in metrics.items():
                error, name = score.stderr, metric.replace("_", " ")
                spread = None if error is None else (score.value - 1.96 * error, score.value + 1.96 * error)
                facts = {"depth": depth, "standard_error": error}
                found = Measurement(task, f"depth {depth}", name, score.value, spread, facts=facts)
                result.measurements.append(found)
