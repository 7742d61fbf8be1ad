"""What a depth saves on this machine: seconds of a step as base + attentions + MLPs, fitted to measured steps.

A step that decodes reads every weight once, so its time is a sum over the sublayers that run and a rest (embedding,
head, sampling, the host). The three unknowns are solved from three variants of the model, served as tiers of one engine
and measured in turns: all of it, half of its attentions removed, and half of its MLPs removed as well.

A patch is weights that a step reads as it reads an MLP's: it takes the MLP's seconds in proportion to its parameters. A
fourth variant would not tell: one patch is less of a step than the measurements vary.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap, Unit

if TYPE_CHECKING:
    from sleb.engine.llm import LLM

_PROMPT_TOKENS = 64
_OUTPUT_TOKENS = 24
_LEAST_SHARE = 1e-3  # of a step: noise must not make a sublayer free, or worse


@dataclass(frozen=True)
class CostModel:
    """Seconds of one decoding step of `batch` requests.

    Attributes:
        base: what does not depend on the depth. attention, mlp: of one sublayer.
        num_blocks: of the whole model. mlp_parameters: of one MLP, of experts those that a token gets.
        samples: seconds of a step, by repetition, of the variants that it was fitted to.
    """

    base: float
    attention: float
    mlp: float
    num_blocks: int
    batch: int
    samples: tuple[tuple[float, ...], ...] = ()
    mlp_parameters: int = 0

    def seconds(self, removed: Iterable[Unit], patch_parameters: int = 0) -> float:
        """A step without the units in `removed`, with so many parameters in patches."""
        gone = [part for unit in removed for _, part in unit.sublayers]
        num_attention = self.num_blocks - gone.count("attention")
        num_mlp = self.num_blocks - gone.count("mlp")
        patches = patch_parameters / self.mlp_parameters if patch_parameters else 0.0
        return self.base + num_attention * self.attention + (num_mlp + patches) * self.mlp

    def speedup(self, removed: Iterable[Unit], patch_parameters: int = 0) -> float:
        """How many times as fast as the whole model."""
        return self.seconds(()) / self.seconds(removed, patch_parameters)

    def saving(self, unit: Unit) -> float:
        """Seconds that a unit takes."""
        return sum(self.attention if part == "attention" else self.mlp for _, part in unit.sublayers)


def fit_cost_model(
    model: str,
    *,
    dtype: str = "auto",
    weights: str = "auto",
    device: str = "auto",
    batch: int = 1,
    repetitions: int = 7,
    on_progress: Callable[[float], None] = lambda share: None,
) -> CostModel:
    """Measures `model` on this machine. Raises ConfigError for a model of fewer than 3 blocks or a bad batch."""
    from sleb.engine.llm import LLM
    from sleb.engine.model.allocation import num_parameters

    if batch < 1:
        raise ConfigError(f"a batch of {batch} requests cannot be measured; ask for 1 or more")
    num_blocks, parallel = _blocks(model)
    order = _probe_order(num_blocks, parallel)
    half = len(order) // 2
    depths = (0, len(order)) if parallel else (0, half, len(order))
    layer_map = LayerMap(model="probe", fingerprint=None, num_blocks=num_blocks, removed=tuple(order))
    llm = LLM(
        model, layer_map, depths, dtype=dtype, weights=weights, device=device,
        max_model_len=_PROMPT_TOKENS + _OUTPUT_TOKENS, max_num_seqs=batch, prefix_caching=False,
    )  # fmt: skip
    rng = random.Random(0)
    samples: dict[int, list[float]] = {depth: [] for depth in depths}
    for repetition in range(repetitions + 1):
        for done, depth in enumerate(rng.sample(list(samples), len(samples))):
            seconds = _seconds_a_step(llm, depth, batch, rng)
            if repetition:  # the first warms up
                samples[depth].append(seconds)
            on_progress((repetition * len(samples) + done + 1) / ((repetitions + 1) * len(samples)))
    spec = llm.engine.spec
    neurons = statistics.mean(map(spec.neurons_of_token, range(spec.num_blocks)))
    mlp_parameters = round((3 if spec.gated else 2) * spec.hidden_size * neurons)
    measured = [tuple(values) for values in samples.values()]
    if parallel:  # only the whole block can be measured: its attention takes its share of the weights
        share = num_parameters(spec, Unit(0, "attention")) / num_parameters(spec, Unit(0))
        whole, without = (statistics.median(values) for values in measured)
        measured.insert(1, (whole - share * (whole - without),))
        half = len(order)
    found = solve(layer_map.num_blocks, half, batch, tuple(measured))
    return replace(found, mlp_parameters=mlp_parameters)


def solve(num_blocks: int, num_removed: int, batch: int, samples: tuple[tuple[float, ...], ...]) -> CostModel:
    """The model through the medians of three variants: whole, without `num_removed` attentions, and MLPs as well."""
    whole, without_attention, without_both = (statistics.median(each) for each in samples)
    least = _LEAST_SHARE * whole / num_blocks
    attention = max((whole - without_attention) / num_removed, least)
    mlp = max((without_attention - without_both) / num_removed, least)
    base = max(whole - num_blocks * (attention + mlp), 0.0)
    return CostModel(base, attention, mlp, num_blocks, batch, samples)


def _blocks(model: str) -> tuple[int, bool]:
    """How many, and whether they are parallel."""
    from sleb.engine.model.architecture import resolve_spec
    from sleb.models.resolve import resolve_model

    spec = resolve_spec(resolve_model(model).path)
    num_blocks = spec.num_blocks
    if num_blocks < 3:
        raise ConfigError(
            f"{model} has {num_blocks} blocks; a model needs at least 3 blocks to leave one out"
        )
    return num_blocks, spec.parallel


def _probe_order(num_blocks: int, parallel: bool) -> list[Unit]:
    """The attentions of half the middle blocks, at least one, then their MLPs; or both at once."""
    middle = range(1, num_blocks - 1)
    chosen = list(middle)[: max(1, len(middle) // 2)]
    if parallel:
        return [Unit(block) for block in chosen]
    return [Unit(block, "attention") for block in chosen] + [Unit(block, "mlp") for block in chosen]


def _seconds_a_step(llm: LLM, depth: int, batch: int, rng: random.Random) -> float:
    """Mean seconds of a step after the first token, `batch` requests at once."""
    from sleb.engine.requests.sampling_params import SamplingParams

    size = llm.engine.spec.vocab_size
    prompts = [[rng.randrange(size) for _ in range(_PROMPT_TOKENS)] for _ in range(batch)]
    params = SamplingParams(temperature=0.0, max_tokens=_OUTPUT_TOKENS, ignore_eos=True)
    first: list[float] = []

    def note(num_new: int) -> None:
        if num_new and not first:
            first.append(time.perf_counter())

    for output in llm.generate(prompts, params, depth=depth, on_progress=note):
        output.check()
    return (time.perf_counter() - first[0]) / (_OUTPUT_TOKENS - 1)
