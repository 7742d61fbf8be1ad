"""Which blocks to remove: SLEB against simpler rules, at equal counts, on two texts and on answers.

    python research/which_blocks.py MODEL --calibration FILE --held-out FILE

    sleb         Algorithm 1, exact: one block at a time by the loss of the model without it
    one-shot     the same losses, of single removals, without iterating
    shortgpt     Block Influence (arXiv:2403.03853)
    run          the contiguous run of least angular distance (arXiv:2403.17887)
    last         the deepest blocks but the very last
    even         evenly spaced
    random       drawn, with several seeds

All rules see the same calibration windows; perplexity is told on them and on a text that took no part. Answers are
the engine's greedy ones to a few prompts (`sleb.benchmarks.quality.answers`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from common import run, say, scoring_result, text_windows
from selection import (
    Choice,
    contiguous_run,
    evenly_spaced,
    last_blocks,
    one_shot,
    random_blocks,
    shortgpt,
)
from torch import Tensor

from sleb.benchmarks.quality.answers import PROMPTS, generate_answers
from sleb.benchmarks.record import Measurement
from sleb.cli.bench.shared import OutputOptions
from sleb.cli.options import Model
from sleb.engine.llm import LLM
from sleb.engine.model.scoring import DecoderScorer
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.layer_map.units import Unit
from sleb.options import option, option_of
from sleb.pruning.options import PruneOptions
from sleb.pruning.search import check_num_remove, search, total_loss


@dataclass(frozen=True)
class Options:
    """What to compare."""

    held_out: str = option(MISSING, "A second text, that no rule sees.", group="Calibration")
    calibration: str = option_of(PruneOptions, "calibration")
    counts: Sequence[int] = option((3, 6), "Blocks to remove.", minimum=1)
    layer_map: Path | None = option(None, "SLEB's order.", unset="searched for on the calibration text")
    seqlen: int = option_of(PruneOptions, "seqlen", 1024)
    windows: int = option_of(PruneOptions, "windows", 8)
    random_seeds: int = option(3, "Draws of the random rule.", minimum=1)
    answer_tokens: int = option(64, "Tokens of an answer; 0: compare no answers.", minimum=0)
    dtype: str = option_of(PruneOptions, "dtype")
    device: str = option_of(PruneOptions, "device")

    def pruning(self) -> PruneOptions:
        """The search as `sleb prune` would be asked for it."""
        names = ("calibration", "held_out", "seqlen", "windows", "dtype", "device")
        return PruneOptions(**{name: getattr(self, name) for name in names})

    def check(self) -> None:
        """ConfigError for what can be seen before the model is loaded."""
        self.pruning().check()
        if not self.counts or len(set(self.counts)) != len(self.counts):
            raise ConfigError(f"--counts is {list(self.counts)}; give different numbers of blocks")


@dataclass(frozen=True)
class Chosen:
    """The blocks that a rule removes."""

    rule: str
    units: Sequence[Unit]


def choose(scorer: DecoderScorer, options: Options, windows: Tensor) -> list[Chosen]:
    """Every rule's blocks at every count; the whole model first. Raises ConfigError for a map that is too short."""
    most, losses = max(options.counts), dict[Unit, float]()
    if options.layer_map is None:
        say(f"searching for {most} blocks")
        result = search(scorer, windows, num_remove=most)
        order, losses = list(result.removed), dict(result.candidate_losses[0])
    else:
        layer_map = LayerMap.load(options.layer_map)
        layer_map.check_model(num_blocks=scorer.num_blocks, fingerprint=scorer.fingerprint)
        order = [unit for unit in layer_map.removed if unit.part == "block"]
        if len(order) < most:
            raise ConfigError(
                f"the layer map removes {len(order)} blocks, fewer than {most}: take a longer one, or leave it out"
            )
    rules: dict[str, Choice] = {
        "sleb": lambda count: order[:count],
        "one-shot": one_shot(scorer, windows, losses),
        "shortgpt": shortgpt(scorer, windows),
        "run": contiguous_run(scorer, windows),
        "last": last_blocks(scorer),
        "even": evenly_spaced(scorer),
        **{f"random {seed}": random_blocks(scorer, seed) for seed in range(options.random_seeds)},
    }
    pruned = [Chosen(rule, rules[rule](count)) for count in options.counts for rule in rules]
    return [Chosen("dense", ()), *pruned]


def measure(
    model: str, scorer: DecoderScorer, options: Options, texts: Sequence[Tensor], chosen: Chosen
) -> Measurement:
    """What one choice gives; a perplexity that is no number fails."""
    units = sorted(chosen.units)
    say(f"{chosen.rule}, {len(units)} blocks")
    seen, unseen = (total_loss(scorer, each, "blocks", units) / each.numel() for each in texts)
    perplexity = math.exp(unseen) if unseen < 700 else None
    facts: dict[str, Any] = {
        "calibration text": math.exp(seen) if seen < 700 else None,
        "blocks": ", ".join(map(str, units)),
    }
    if options.answer_tokens:
        depths = (0, len(units)) if units else (0,)
        layer_map = LayerMap("compared", None, scorer.num_blocks, tuple(units))
        # Choices are not nested, so each has an engine of its own, with the dense model to compare with.
        llm = LLM(model, layer_map, depths, dtype=options.dtype, device=options.device)
        *_, (answers, _) = generate_answers(llm, PROMPTS, depths, options.answer_tokens)
        facts |= {"answers looped": answers["looped"], "early": answers.get("early")}
        facts["identical"] = answers.get("identical")
    if perplexity is None:
        facts["failed"] = "its loss is no finite number"
    return Measurement(f"{len(units)} blocks", chosen.rule, "held-out perplexity", perplexity, facts=facts)


def main(model: Model, options: Options, output: OutputOptions) -> None:
    """Compare rules for which blocks to remove. Ctrl-C keeps what is complete."""
    scorer = DecoderScorer.load(model, dtype=options.dtype, device=options.device)
    for count in options.counts:
        check_num_remove(count, scorer.num_blocks)
    texts = text_windows(model, scorer, options.pruning())
    found: list[Measurement] = []
    complete = True
    try:
        for chosen in choose(scorer, options, texts[0]):
            found += [measure(model, scorer, options, texts, chosen)]
    except KeyboardInterrupt:
        complete = False
    output.show(scoring_result("methods", model, scorer, options, found, complete))


if __name__ == "__main__":
    run(main)
