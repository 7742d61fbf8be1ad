"""Quality by depth: what a model loses with every unit that its layer map removes.

Up to three parts, one after the other, so that one copy of the weights is in memory at a time:

text        perplexity of texts that took no part in the search, agreement of the next token and KL divergence, with
            intervals (`scores`, `interval`), computed by torch's operators without a KV cache;
generation  greedy answers by the engine as it serves (`answers`), and those to questions (`questions`);
tasks       lm-eval over HTTP, on the same engine (`tasks`).

Perplexity is exp of the mean negative log-likelihood of the predicted tokens, those of all texts together. What is
compared with the dense model is so on the same tokens.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sleb.benchmarks.environment import describe_environment, describe_machine, shown_command
from sleb.benchmarks.quality.answers import generate_answers, read_prompts
from sleb.benchmarks.quality.interval import Estimate, choose_num_batches, estimate
from sleb.benchmarks.quality.options import QUESTION_SAMPLES, EvalOptions
from sleb.benchmarks.quality.questions import QUESTIONS, ask_questions
from sleb.benchmarks.quality.scores import Chain, TextScores, TokenScores, score_texts
from sleb.benchmarks.quality.tasks import find_lm_eval, max_length, run_tasks
from sleb.benchmarks.quality.texts import WindowedText, cut_text, default_seqlen, read_text
from sleb.benchmarks.record import Measurement, Ratio, Result
from sleb.engine.chain import load_layer_map
from sleb.engine.generation import SAMPLING
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
    "same token, KL (dense ‖ depth, in nats), perplexity × (depth 0's over this depth's: below 1 is worse): against "
    "depth 0 on the same tokens. Intervals of 95 % by batch means over stretches of the text, paired where depths are "
    "compared; they speak for text like this one."
)
_OF_ANSWERS = (
    "looped: the end is one piece said thrice or more. early: below a quarter of the dense tokens, or empty"
)
_OF_QUESTIONS = (
    f"right: of {len(QUESTIONS)} questions with known answers, by the first sentence of the greedy answer; sampled: "
    "the mean of samples with the defaults of `sampling`. Intervals of 95 % (Wilson), for questions like these."
)


def run_eval(
    options: EvalOptions,
    command: Sequence[str] = (),
    on_progress: OnProgress = lambda what, done, total: None,
) -> Result:
    """Measures what `options` asks. An interrupt, or the failure of a later part, ends it with what is complete.

    command: the command line to record. The settings have a "problem" where a later part failed. Raises SlebError
    subclasses while nothing is measured yet.
    """
    evaluation = _Evaluation(options, shown_command(command, options.model), on_progress)
    result = evaluation.result
    try:
        if evaluation.texts:
            evaluation.measure_texts()
        if options.generate or options.questions or options.tasks:
            evaluation.measure_served(
                _load_engine(options, evaluation.layer_map, evaluation.depths, on_progress)
            )
    except KeyboardInterrupt:
        result.complete = False
    except SlebError as error:
        if not result.measurements:
            raise
        result.complete, result.settings["problem"] = False, str(error)
    return result


class _Evaluation:
    """What is read and resolved before a model is loaded, and the result as far as it is there.

    Raises SlebError subclasses.
    """

    def __init__(self, options: EvalOptions, command: Sequence[str], on_progress: OnProgress) -> None:
        options.check()
        self.options, self.command, self.on_progress = options, command, on_progress
        texts = [read_text(source) for source in options.text]
        self.prompts = read_prompts(options.prompts)
        if options.tasks:
            find_lm_eval(options.lm_eval)
        resolve_device(options.device)
        resolved = resolve_model(options.model)
        spec = resolve_spec(resolved.path)
        self.layer_map, shipped = load_layer_map(options.layer_map, resolved, spec)
        self.depths = options.chosen_depths(self.layer_map, resolved.name)
        model = {
            "name": resolved.name.lower(),
            "architecture": spec.architecture,
            "num_blocks": spec.num_blocks,
            "layer_map": "shipped" if shipped else "given" if self.layer_map.max_depth else "none",
            "fingerprint": spec.fingerprint,
            "removed": [str(unit) for unit in self.layer_map.removed[: self.depths[-1]]],
        }
        settings: dict[str, Any] = {"model": model, "dtype": options.dtype, "weights": options.weights}
        self.texts: list[WindowedText] = []
        if texts:
            scheme, most = options.windows_like, spec.max_positions
            seqlen = options.seqlen or default_seqlen(scheme, most)
            if seqlen > most:
                raise ConfigError(
                    f"--seqlen {seqlen} is longer than the context of {resolved.name}: {most} at most"
                )
            processor = TextProcessor(resolved.path, spec.vocab_size)
            self.texts = [cut_text(text, processor, scheme, seqlen, options.windows) for text in texts]
            settings |= {"windows_like": scheme, "seqlen": seqlen}
        self.result = Result("eval", {}, settings)

    def measure_texts(self) -> None:
        """Adds the figures of the texts' windows, as far as they are complete."""
        options, result = self.options, self.result
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.on_progress("loading the model", 0, 0)
        scorer = DecoderScorer.load(options.model, options.dtype, options.device, options.weights)
        result.environment = describe_machine(scorer.device, scorer.dtype, "torch", self.command)
        found: list[TextScores] = []
        chain = Chain.of(self.layer_map, self.depths, scorer.hidden_size)
        told = partial(self.on_progress, "scoring the text")
        try:
            score_texts(scorer, chain, self.texts, found, told)
        finally:  # an interrupt loses the windows under way alone
            found = [scores for scores in found if scores.batches]
            if found:
                result.measurements += measure_scores(found, self.depths)
                result.settings["dataset"] = "+".join(scores.text.text.name for scores in found)
                result.settings["windows"] = [scores.num_windows for scores in found]
                result.notes.append(_OF_TEXTS)
                if any(each.value is None for each in result.measurements):
                    result.notes.append("A figure that is no finite number is left out; try --dtype float32.")

    def _tell(self, what: str, depth: int, done: int, total: int) -> None:
        self.on_progress(f"{what} at depth {depth}", done, total)

    def measure_served(self, llm: LLM) -> None:
        """Adds the figures of answers, and of lm-eval's tasks, depth by depth."""
        options, result = self.options, self.result
        environment = describe_environment(llm.engine, self.command)
        result.environment = result.environment or environment
        result.settings["engine_kernels"] = environment["kernels"]
        if options.generate:
            result.settings |= {"prompts": len(self.prompts), "output_tokens": options.output_tokens}
            result.settings["chat_template"] = llm.engine.text.chat_template is not None
            result.notes.append(_OF_ANSWERS)
            told = partial(self._tell, "answering")
            answers = generate_answers(llm, self.prompts, self.depths, options.output_tokens, told)
            for depth, (figures, example) in zip(self.depths, answers, strict=True):
                for metric, value in figures.items():
                    facts: dict[str, Any] = {"depth": depth}
                    facts |= {"example": example} if metric == "mean tokens" else {}
                    case, subject = f"{len(self.prompts)} answers", f"depth {depth}"
                    result.measurements.append(Measurement(case, subject, metric, value, facts=facts))
        if options.questions:
            samples = QUESTION_SAMPLES if options.question_samples is None else options.question_samples
            result.settings |= {"questions": len(QUESTIONS), "question_samples": samples}
            result.settings["sampling"] = {name: getattr(llm.engine.defaults, name) for name in SAMPLING}
            result.notes.append(_OF_QUESTIONS)
            result.measurements += ask_questions(llm, self.depths, samples, partial(self._tell, "asking"))
        if not options.tasks:
            return
        result.settings |= {"limit": options.limit, "lm_eval_max_length": max_length(options, llm)}

        def asking(depth: int) -> None:
            self.on_progress(f"lm-eval at depth {depth}", self.depths.index(depth), len(self.depths))

        for depth, scores in zip(self.depths, run_tasks(llm, self.depths, options, asking), strict=True):
            for task, metrics in scores.items():
                for metric, (value, error) in metrics.items():
                    spread = None if error is None else (value - 1.96 * error, value + 1.96 * error)
                    facts = {"depth": depth, "standard_error": error}
                    names = (task, f"depth {depth}", metric.replace("_", " "))
                    result.measurements.append(Measurement(*names, value, spread, facts=facts))


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


def _load_engine(
    options: EvalOptions, layer_map: LayerMap, depths: Sequence[int], on_progress: OnProgress
) -> LLM:
    gc.collect()  # the scorer's weights
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what it held would be missing from the KV cache's share
    on_progress("loading the engine", 0, 0)
    asked: dict[str, Any] = {
        name: getattr(options, name) for name in ("dtype", "weights", "device", "threads")
    }
    told = partial(on_progress, "loading the engine")
    return LLM(options.model, layer_map, depths, on_progress=told, **asked)
