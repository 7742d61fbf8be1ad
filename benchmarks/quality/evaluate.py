"""Quality by depth: what a model loses with every unit that its layer map removes.

Up to three parts, one after the other, so that one copy of the weights is in memory at a time:

text        perplexity of texts that took no part in the search, agreement of the next token and KL divergence, with
            intervals (`quality_scores`, `quality_interval`), computed by torch's operators without a KV cache;
generation  greedy answers by the engine as it serves (`quality_generation`);
tasks       lm-eval over HTTP, on the same engine (`quality_tasks`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sleb.benchmarks.environment import describe_environment, describe_machine, shown_command
from sleb.benchmarks.quality.answers import generate_answers, read_prompts
from sleb.benchmarks.quality.options import QualityOptions, ascending_depths
from sleb.benchmarks.quality.rows import QualityReport, QualityRow, fill_rows
from sleb.benchmarks.quality.scores import Chain, TextScores, score_texts
from sleb.benchmarks.quality.tasks import DEFAULT_MAX_LENGTH, TaskOptions, find_lm_eval, run_tasks
from sleb.benchmarks.quality.texts import (
    LM_EVAL_SPARE,
    Text,
    WindowedText,
    cut_text,
    default_seqlen,
    read_text,
)
from sleb.engine.chain import load_layer_map
from sleb.engine.llm import LLM
from sleb.engine.model.architecture import resolve_spec
from sleb.engine.model.resolve import resolve_device
from sleb.engine.model.scoring import DecoderScorer
from sleb.engine.text import TextProcessor
from sleb.errors import ConfigError, SlebError
from sleb.layer_map.layer_map import LayerMap
from sleb.models.resolve import ResolvedModel, resolve_model

OnProgress = Callable[[str, int, int], None]
"""What is being done, how much of it is, of how much; of 0 where that is not known."""


@dataclass(frozen=True)
class _Plan:
    """What is read and resolved before a model is loaded. executable: lm_eval's, where there are tasks."""

    layer_map: LayerMap
    depths: tuple[int, ...]
    texts: list[WindowedText]
    prompts: tuple[str, ...]
    executable: Path | None


def run_quality(
    options: QualityOptions,
    command: Sequence[str] = (),
    on_progress: OnProgress = lambda what, done, total: None,
) -> QualityReport:
    """Measures what `options` asks. An interrupt, or the failure of a later part, ends it with what is complete.

    command: the command line to record. Raises SlebError subclasses while nothing is measured yet.
    """
    plan, report = _prepare(options)
    shown = shown_command(command, options.model)
    with _keeping_results(report):
        if plan.texts:
            _measure_texts(report, options, plan, shown, on_progress)
        if options.generate or options.tasks:
            llm = _load_engine(options, plan, on_progress)
            if not report.environment:
                report.environment = describe_environment(llm.engine, shown)
            report.settings["engine_kernels"] = llm.engine.runner.executor.kernels
            if options.generate:
                _measure_answers(report, llm, plan.prompts, options.output_tokens, on_progress)
            if plan.executable is not None:
                _measure_tasks(report, llm, options, plan.executable, on_progress)
    return report


def _prepare(options: QualityOptions) -> tuple[_Plan, QualityReport]:
    """The plan, and a report whose rows are still empty. Raises SlebError subclasses."""
    options.check()
    texts = [read_text(source) for source in options.texts]
    prompts = read_prompts(options.prompts)
    executable = find_lm_eval(options.lm_eval) if options.tasks else None
    resolve_device(options.device)
    resolved = resolve_model(options.model)
    spec = resolve_spec(resolved.path)
    layer_map, shipped = load_layer_map(options.layer_map, resolved, spec)
    depths = ascending_depths(options.depths, layer_map, resolved.name)
    removed = [str(unit) for unit in layer_map.removed[: depths[-1]]]
    model = {
        "name": resolved.name.lower(),
        "architecture": spec.architecture,
        "num_blocks": spec.num_blocks,
        "layer_map": "shipped" if shipped else "given" if layer_map.max_depth else "none",
        "fingerprint": spec.fingerprint,
        "removed": removed,
    }
    settings: dict[str, Any] = {"dtype": options.dtype, "weights": options.weights}
    windowed: list[WindowedText] = []
    if texts:
        windowed, recorded = _cut_texts(options, resolved, spec.max_positions, texts)
        settings |= recorded
    rows = [QualityRow(depth, removed[:depth]) for depth in depths]
    return _Plan(layer_map, depths, windowed, prompts, executable), QualityReport({}, model, settings, rows)


@contextmanager
def _keeping_results(report: QualityReport) -> Iterator[None]:
    """What ends the run early ends it with what there is; a failure before there is anything is an error."""
    try:
        yield
    except KeyboardInterrupt:
        report.complete = False
    except SlebError as error:
        if report.is_empty:
            raise
        report.complete, report.problem = False, str(error)


def _cut_texts(
    options: QualityOptions, resolved: ResolvedModel, max_length: int, texts: Sequence[Text]
) -> tuple[list[WindowedText], dict[str, Any]]:
    """The texts in windows, and what to record of them. Raises ConfigError for windows that cannot be."""
    scheme, seqlen = options.windows_like, options.seqlen
    if seqlen is None:
        seqlen = default_seqlen(scheme, max_length)
    elif seqlen > max_length:
        raise ConfigError(
            f"--seqlen {seqlen} is longer than the context of {resolved.name}: {max_length} at most"
        )
    processor = TextProcessor(resolved.path)
    cut = [cut_text(text, processor, scheme, seqlen, options.windows) for text in texts]
    name = "+".join(text.name for text in texts)
    return cut, {"dataset": name, "windows_like": scheme, "seqlen": seqlen}


def _measure_texts(
    report: QualityReport,
    options: QualityOptions,
    plan: _Plan,
    command: Sequence[str],
    on_progress: OnProgress,
) -> None:
    """Fills the rows' numbers about texts."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    on_progress("loading the model", 0, 0)
    scorer = DecoderScorer.load(options.model, options.dtype, options.device, options.weights)
    report.environment = describe_machine(scorer.device, scorer.dtype, "torch", command)
    found: list[TextScores] = []
    chain = Chain.of(plan.layer_map, plan.depths)
    try:
        score_texts(
            scorer, chain, plan.texts, found, lambda done, total: on_progress("scoring the text", done, total)
        )
    finally:
        found = [scores for scores in found if scores.batches]
        report.settings["windows"] = [scores.num_windows for scores in found]
        if found:
            report.settings["interval_stretches"] = fill_rows(report.rows, found)


def _load_engine(options: QualityOptions, plan: _Plan, on_progress: OnProgress) -> LLM:
    gc.collect()  # the scorer's weights
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what it held would be missing from the KV cache's share
    on_progress("loading the engine", 0, 0)
    return LLM(
        options.model,
        plan.layer_map,
        plan.depths,
        dtype=options.dtype,
        weights=options.weights,
        device=options.device,
        threads=options.threads,
        on_progress=lambda done, total: on_progress("loading the engine", done, total),
    )


def _measure_answers(
    report: QualityReport, llm: LLM, prompts: Sequence[str], num_tokens: int, on_progress: OnProgress
) -> None:
    report.settings |= {"prompts": len(prompts), "output_tokens": num_tokens}
    report.settings["chat_template"] = llm.engine.chat_template is not None
    depths = [row.depth for row in report.rows]
    answers = generate_answers(
        llm,
        prompts,
        depths,
        num_tokens,
        lambda depth, done, total: on_progress(f"answering at depth {depth}", done, total),
    )
    for row, quality in zip(report.rows, answers, strict=True):
        row.generation = quality


def _measure_tasks(
    report: QualityReport, llm: LLM, options: QualityOptions, executable: Path, on_progress: OnProgress
) -> None:
    asked = TaskOptions(
        executable,
        options.tasks,
        options.limit,
        options.include_path,
        min(llm.engine.max_model_len, _max_length(options)),
    )
    report.settings |= {"limit": asked.limit, "lm_eval_max_length": asked.max_length}
    depths = [row.depth for row in report.rows]
    found = run_tasks(
        llm,
        depths,
        asked,
        lambda depth: on_progress(f"lm-eval at depth {depth}", depths.index(depth), len(depths)),
    )
    for row, scores in zip(report.rows, found, strict=True):
        row.tasks = scores


def _max_length(options: QualityOptions) -> int:
    """lm-eval's max_length: with windows like its own, that of the same windows."""
    if options.windows_like == "lm-eval" and options.seqlen is not None:
        return options.seqlen + LM_EVAL_SPARE
    return DEFAULT_MAX_LENGTH
