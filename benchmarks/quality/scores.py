"""What every depth of a chain predicts for the tokens of a text, beside the dense model.

For each scored token: its negative log-likelihood; whether the most probable token is the dense model's; and
KL(dense ‖ pruned) = Σ_v p(v) (log p(v) − log q(v)) in nats, p the dense model's distribution and q the pruned one's.
Logits are there for a few rows at a time, never for a whole window.
Depths are nested: one goes on from the state before the first place at which it does other than the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sleb.benchmarks.quality.texts import WindowedText, batches
from sleb.engine.model.scoring import DecoderScorer
from sleb.layer_map.layer_map import LayerMap, Patch
from sleb.layer_map.units import Unit

_BATCH_TOKENS = 2048  # that run at once; a longer window runs alone. What an interrupt loses at most
_LOGIT_ENTRIES = 1 << 23  # at once: 32 MiB in float32 for each of the two models that are compared


class TokenScores(NamedTuple):
    """Of some tokens at one depth: losses in nats, agreed (0 or 1) and divergences in nats, each [T] float32."""

    losses: Tensor
    agreed: Tensor
    divergences: Tensor

    @classmethod
    def join(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """The tokens of all parts, in their order."""
        return cls(*map(torch.cat, zip(*parts, strict=True)))


@dataclass(frozen=True)
class TextScores:
    """The scores of a text's windows as far as they are complete: of each batch how many, and its tokens' by depth."""

    text: WindowedText
    batches: list[tuple[int, list[TokenScores]]] = field(default_factory=list)

    @property
    def num_windows(self) -> int:
        return sum(number for number, _ in self.batches)

    @property
    def is_whole(self) -> bool:
        """Whether every token of the text is among them."""
        return self.text.is_whole and self.num_windows == len(self.text.windows)

    def at(self, place: int) -> TokenScores:
        """The scores at the depth of that place."""
        return TokenScores.join([scores[place] for _, scores in self.batches])


@dataclass(frozen=True)
class Chain:
    """What runs at each of some depths, 0 first; and from where on a depth has its own states.

    steps: of a depth, at the place of every sublayer: that one, or the patch of the run that ends there, or nothing.
    """

    steps: tuple[tuple[Unit | Patch | None, ...], ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, layer_map: LayerMap, depths: Sequence[int], hidden_size: int) -> Chain:
        """depths: ascending, each once. hidden_size: of the model, whose patches it must fit. Raises LayerMapError."""
        blocks = range(layer_map.num_blocks)
        sublayers = [sublayer for block in blocks for sublayer in Unit(block).sublayers]
        steps = []
        for depth in depths:
            patches = {patch.last: patch for patch in layer_map.patches_at(depth, hidden_size)}
            runs = (layer_map.active(each, depth) for each in sublayers)
            steps.append(
                tuple(
                    Unit(*each) if run else patches.get(each)
                    for each, run in zip(sublayers, runs, strict=True)
                )
            )
        differ = (
            next(at for at, (one, other) in enumerate(zip(*pair, strict=True)) if one != other)
            for pair in pairwise(steps)
        )
        return cls(tuple(steps), (0, *differ))

    def states(self, scorer: DecoderScorer, token_ids: Tensor) -> Iterator[Tensor]:
        """Hidden states [W, L, E] at the end, one depth after the other, each going on from a state that it shares."""
        kept = {0: scorer.embed(token_ids)}
        for steps, start in zip(self.steps, self.starts, strict=True):
            hidden = kept[start]
            for position in range(start, len(steps)):
                if position in self.starts:
                    kept[position] = hidden
                step = steps[position]
                if isinstance(step, Patch):
                    hidden = scorer.apply(step, hidden)
                elif step is not None:
                    hidden = scorer.run(step, hidden)
            yield hidden


def score_texts(
    scorer: DecoderScorer,
    chain: Chain,
    texts: Sequence[WindowedText],
    found: list[TextScores],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Adds to `found` the scores of every text; an interrupt loses the batch under way alone.

    on_progress: windows done, times depths, and of how many.
    """
    total, done = len(chain.steps) * sum(len(text.windows) for text in texts), 0
    for text in texts:
        found.append(TextScores(text))
        for token_ids, num_scored in batches(text.windows, _BATCH_TOKENS):
            finals: list[Tensor] = []
            with torch.inference_mode():
                for hidden in chain.states(scorer, token_ids[:, :-1]):  # nothing follows the last token
                    finals.append(scorer.head_states(hidden[:, -num_scored:]))
                    done += len(token_ids)
                    on_progress(done, total)
                scores = compare(scorer, finals, token_ids[:, -num_scored:].reshape(-1))
            found[-1].batches.append((len(token_ids), scores))


def compare(scorer: DecoderScorer, finals: Sequence[Tensor], targets: Tensor) -> list[TokenScores]:
    """The scores of targets [T] under head states [T, E] of each depth; the first are the dense model's.

    A divergence is right to about 1e-6, by float32 logarithms of the shares.
    """
    num_rows = max(1, _LOGIT_ENTRIES // scorer.vocab_size)
    parts: list[list[TokenScores]] = [[] for _ in finals]
    for start in range(0, len(targets), num_rows):
        rows = slice(start, start + num_rows)
        wanted = targets[rows].to(finals[0].device)[:, None]
        dense = scorer.logits(finals[0][rows]).log_softmax(-1)
        shares, best = dense.exp(), dense.argmax(-1)
        for place, states in enumerate(finals):
            pruned = scorer.logits(states[rows]).log_softmax(-1) if place else dense
            losses = -pruned.gather(1, wanted)[:, 0]
            agreed = (pruned.argmax(-1) == best).float()
            divergences = torch.linalg.vecdot(shares, dense - pruned)
            parts[place].append(TokenScores(losses.cpu(), agreed.cpu(), divergences.cpu()))
    return [TokenScores.join(each) for each in parts]
