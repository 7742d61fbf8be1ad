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
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import TextOptions, run, say, scoring_result, text_windows
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
from sleb.options import option
from sleb.pruning.search import ScoringModel, candidate_units, check_num_remove, search, total_loss

Choice = Callable[[int], list[Unit]]  # how many blocks -> which


@dataclass(frozen=True, kw_only=True)
class Options(TextOptions):
    """What to compare."""

    held_out: str = option(MISSING, "A second text, that no rule sees.", group="Calibration")
    counts: Sequence[int] = option((3, 6), "Blocks to remove.", minimum=1)
    random_seeds: int = option(3, "Draws of the random rule.", minimum=1)
    answer_tokens: int = option(64, "Tokens of an answer; 0: compare no answers.", minimum=0)

    def check(self) -> None:
        """ConfigError for what can be seen before the model is loaded."""
        self.pruning(held_out=self.held_out).check()
        if not self.counts or len(set(self.counts)) != len(self.counts):
            raise ConfigError(f"--counts is {list(self.counts)}; give different numbers of blocks")


def _states(model: ScoringModel, window: Tensor) -> Iterator[Tensor]:
    """Hidden states [1, L, H] in float32 before each block of the whole model, and at the end."""
    hidden = model.embed(window)
    yield hidden.float()
    for block in range(model.num_blocks):
        hidden = model.run(Unit(block), hidden)
        yield hidden.float()


@torch.no_grad()
def block_influence(model: ScoringModel, windows: Tensor) -> list[float]:
    """One less the mean cosine of a block's input and output at each token (ShortGPT, Men et al., arXiv:2403.03853)."""
    totals = torch.zeros(model.num_blocks, dtype=torch.float64)
    for window in torch.split(windows, 1):
        states = list(_states(model, window))
        for block in range(model.num_blocks):
            cosine = F.cosine_similarity(states[block], states[block + 1], dim=-1)
            totals[block] += 1 - cosine.double().mean().item()
    return (totals / len(windows)).tolist()


def shortgpt(model: ScoringModel, windows: Tensor) -> Choice:
    """The blocks of the least influence, all measured once on the whole model; any block may go."""
    influence = block_influence(model, windows)
    order = sorted(range(model.num_blocks), key=lambda block: (influence[block], block))
    return lambda count: [Unit(block) for block in order[:count]]


@torch.no_grad()
def angular_distances(model: ScoringModel, windows: Tensor) -> Tensor:
    """[B + 1, B + 1] float64: mean angle / π between the last token's states before block i and before block j.

    (Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv:2403.17887, equation 8.)
    """
    total = torch.zeros(model.num_blocks + 1, model.num_blocks + 1, dtype=torch.float64)
    for window in torch.split(windows, 1):
        last = torch.cat([state[0, -1:].double() for state in _states(model, window)])
        unit = F.normalize(last, dim=-1)
        total += torch.arccos((unit @ unit.T).clamp(-1, 1)) / math.pi
    return total / len(windows)


def contiguous_run(model: ScoringModel, windows: Tensor) -> Choice:
    """The run of blocks that turns the last token's state the least (arXiv:2403.17887)."""
    distances = angular_distances(model, windows)

    def choose(count: int) -> list[Unit]:
        starts = range(model.num_blocks - count + 1)
        first = min(starts, key=lambda start: (float(distances[start, start + count]), start))
        return [Unit(block) for block in range(first, first + count)]

    return choose


def last_blocks(model: ScoringModel) -> Choice:
    """The deepest blocks but the very last (the simple rule of arXiv:2403.17887, section 4.4)."""
    end = model.num_blocks - 1
    return lambda count: [Unit(block) for block in range(end - count, end)]


def evenly_spaced(model: ScoringModel) -> Choice:
    """Blocks at equal distances between the first and the last."""
    middle = candidate_units("blocks", model.num_blocks)
    return lambda count: [middle[(2 * place + 1) * len(middle) // (2 * count)] for place in range(count)]


def random_blocks(model: ScoringModel, seed: int) -> Choice:
    """Blocks drawn without the first and the last; a longer draw begins with the shorter one."""
    middle = candidate_units("blocks", model.num_blocks)
    order = random.Random(seed).sample(middle, len(middle))
    return lambda count: order[:count]


def one_shot(model: ScoringModel, windows: Tensor) -> Choice:
    """The blocks whose removal *alone* costs the least loss: SLEB's criterion without its iteration."""
    units = candidate_units("blocks", model.num_blocks)
    found = {unit: total_loss(model, windows, "blocks", [unit]) for unit in units}
    order = sorted(found, key=lambda unit: (found[unit], unit))
    return lambda count: order[:count]


def choose(scorer: DecoderScorer, options: Options, windows: Tensor) -> list[tuple[str, list[Unit]]]:
    """Every rule's blocks at every count; the whole model first."""
    say(f"searching for {max(options.counts)} blocks")
    result = search(scorer, windows, num_remove=max(options.counts))
    rules: dict[str, Choice] = {
        "sleb": lambda count: list(result.removed[:count]),
        "one-shot": one_shot(scorer, windows),
        "shortgpt": shortgpt(scorer, windows),
        "run": contiguous_run(scorer, windows),
        "last": last_blocks(scorer),
        "even": evenly_spaced(scorer),
        **{f"random {seed}": random_blocks(scorer, seed) for seed in range(options.random_seeds)},
    }
    return [("dense", []), *((rule, rules[rule](count)) for count in options.counts for rule in rules)]


def measure(
    model: str, scorer: DecoderScorer, options: Options, texts: Sequence[Tensor], rule: str, units: list[Unit]
) -> Measurement:
    """What one choice gives; a perplexity that is no number fails."""
    say(f"{rule}, {len(units)} blocks")
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
    return Measurement(f"{len(units)} blocks", rule, "held-out perplexity", perplexity, facts=facts)


def main(model: Model, options: Options, output: OutputOptions) -> None:
    """Compare rules for which blocks to remove. Ctrl-C keeps what is complete."""
    scorer = DecoderScorer.load(model, dtype=options.dtype, device=options.device)
    for count in options.counts:
        check_num_remove(count, scorer.num_blocks)
    texts = text_windows(model, scorer, options.pruning(held_out=options.held_out))
    found: list[Measurement] = []
    complete = True
    try:
        for rule, units in choose(scorer, options, texts[0]):
            found += [measure(model, scorer, options, texts, rule, sorted(units))]
    except KeyboardInterrupt:
        complete = False
    output.show(scoring_result("methods", model, scorer, options, found, complete))


if __name__ == "__main__":
    run(main)
