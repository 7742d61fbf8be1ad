"""What `sleb bench throughput` is asked to measure: its options, and as workloads and depths for one model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from sleb.benchmarks.record import Measurement, Ratio
from sleb.benchmarks.turns import TurnOptions
from sleb.engine.config import EngineConfig
from sleb.errors import ConfigError
from sleb.kernels.names import check_device
from sleb.layer_map.layer_map import LayerMap, shipped_maps
from sleb.layer_map.units import Unit
from sleb.options import option, option_of

Test = Literal["prompt", "generate", "decode"]
TESTS: tuple[Test, ...] = ("prompt", "generate", "decode")
_MAX_WORKLOADS = 64
# Which part of the blocks a stand-in for a layer map recommends to remove: what the SLEB paper removes at most.
_STAND_IN_SHARE = 0.2


@dataclass(frozen=True)
class ThroughputOptions(TurnOptions):
    """What to measure: a model, or with `config` a shape of `sleb.models.shapes` with random weights.

    Of several lengths and batches every combination is measured. In Python, layer_map may be a LayerMap.
    """

    time_budget: float = option_of(TurnOptions, "time_budget", 150.0)
    model: str = ""
    config: str | None = option(
        None, "Instead of MODEL: a shape that comes with sleb, as llama-2-7b, with random weights."
    )
    layer_map: LayerMap | str | None = option(
        None,
        "Layer map (JSON), or none.",
        unset="the one shipped with the model; of a --config without one, a stand-in",
    )
    depths: Sequence[int] | None = option(
        None,
        "Depths to compare, as 0,6.",
        unset="0 and the map's recommended one, or half its order",
        minimum=0,
    )
    tests: Sequence[str] = option(
        ("prompt", "generate"), "What to measure; decode is generate without the prompts.", choices=TESTS
    )
    batches: Sequence[int] | None = option(
        None, "Requests at once in generate and decode.", unset="1,8; on a GPU 1,64", minimum=1
    )
    prompt_tokens: Sequence[int] | None = option(
        None, "Tokens of a prompt.", unset="512, on a GPU 2048; of generate and decode 64", minimum=1
    )
    # The first new token comes with the prompt: decoding begins with the second.
    output_tokens: Sequence[int] = option((128,), "New tokens of a request.", minimum=2)
    paper: bool = option(False, "The SLEB paper's settings, depths too, and its own rows beside.")
    control: bool = option(True, "Measure the baseline a second time: how far off do equal ones come out?")
    mixed: bool = option(True, "In generate, measure a batch of all depths against the depths alone.")
    fail_below: float | None = option(None, "Exit with status 1 if a depth's speedup is below this.", above=0)
    dtype: str = option_of(EngineConfig, "dtype", group="Engine")
    weights: str = option_of(EngineConfig, "weights", group="Engine")
    device: str = option_of(EngineConfig, "device", group="Engine")
    kernels: str = option_of(EngineConfig, "kernels", group="Engine")
    load_format: str = option_of(EngineConfig, "load_format", group="Engine")
    threads: int | None = option_of(EngineConfig, "threads", group="Engine")

    def check(self) -> None:
        """Raises ConfigError for the first option that is out of its range or contradicts another."""
        super().check()
        check_device(self.device)
        if bool(self.model) == (self.config is not None):
            given = (
                f"MODEL is '{self.model}' and --config '{self.config}'"
                if self.model
                else "there is no MODEL and no --config"
            )
            raise ConfigError(
                f"{given}; give one of them: MODEL, as smollm2, or --config, a shape to fill with random weights"
            )
        if self.config is not None and self.load_format not in ("auto", "dummy"):
            raise ConfigError(
                f"--load-format is '{self.load_format}', but --config has no weights to read; leave it out"
            )
        for name in ("depths", "tests", "batches", "prompt_tokens", "output_tokens"):
            values: Sequence[Any] | None = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            if self.paper and values != getattr(ThroughputOptions, name):
                raise ConfigError(
                    f"--paper sets {flag} itself, as the paper has it; leave one of the two out"
                )
            if values is not None and not values:
                raise ConfigError(f"{flag} names nothing; give at least one, or leave it out")
            if twice := [each for each in values or () if list(values or ()).count(each) > 1]:
                raise ConfigError(f"{flag} names {twice[0]} twice; name each once")


@dataclass(frozen=True)
class Workload:
    """`batch` equal requests.

    A "prompt" test asks one new token, so that the head runs for one row. "decode" is "generate" without the prompts:
    the clock runs over the steps in which all requests decode, and what they took is scaled up to all steps.
    """

    test: Test
    batch: int
    prompt_tokens: int
    output_tokens: int

    @property
    def counted_tokens(self) -> int:
        """The tokens of tokens/s: those of the prompt, or the new ones, the first of them not for "decode"."""
        if self.test == "prompt":
            return self.batch * self.prompt_tokens
        return self.batch * (self.output_tokens - (self.test == "decode"))

    @property
    def context(self) -> int:
        """Tokens of one request, prompt and answer together."""
        return self.prompt_tokens + self.output_tokens

    def __str__(self) -> str:
        tokens = f"{self.output_tokens} after {self.prompt_tokens}"
        return f"{self.test} {self.batch} × {self.prompt_tokens if self.test == 'prompt' else tokens}"


def plan_workloads(options: ThroughputOptions, max_positions: int, on_gpu: bool) -> list[Workload]:
    """The workloads that `options` asks of a model with `max_positions` positions; ConfigError if it cannot."""
    large = on_gpu or options.paper
    batches = options.batches or ((64,) if options.paper else (1, 64) if on_gpu else (1, 8))
    workloads = []
    for test in (each for each in TESTS if each in options.tests):
        for output_tokens in (1,) if test == "prompt" else options.output_tokens:
            default = min((2048 if large else 512) if test == "prompt" else 64, max_positions - output_tokens)
            for prompt_tokens in options.prompt_tokens or (max(1, default),):
                if prompt_tokens + output_tokens > max_positions:
                    raise ConfigError(
                        f"{prompt_tokens} prompt tokens and {output_tokens} new ones do not fit the model's "
                        f"{max_positions} positions; lower --prompt-tokens or --output-tokens"
                    )
                sizes = (1,) if test == "prompt" else batches
                workloads += [Workload(test, batch, prompt_tokens, output_tokens) for batch in sizes]
    if len(workloads) > _MAX_WORKLOADS:
        raise ConfigError(
            f"the lists make {len(workloads)} workloads; {_MAX_WORKLOADS} are the most: shorten --batches, "
            "--prompt-tokens or --output-tokens"
        )
    return workloads


def steps_apart(workload: Workload, step_tokens: int) -> int:
    """Steps from the first request's first token to the last one's: 0 where a step of `step_tokens` holds all prompts.

    As the scheduler has it: requests with their first token take one token of a step each, prompts the rest in turn.
    """
    num_computed = num_whole = num_steps = first = 0
    while num_whole < workload.batch:
        num_steps += 1
        num_computed += step_tokens - num_whole
        num_whole = min(workload.batch, num_computed // workload.prompt_tokens)
        if num_whole and not first:
            first = num_steps
    return num_steps - first


def check_overlap(workloads: Iterable[Workload], step_tokens: int) -> None:
    """Raises ConfigError for a "decode" in which no step decodes all requests, see `throughput.decode_seconds`."""
    for workload in workloads:
        least = steps_apart(workload, step_tokens) + 2
        if workload.test == "decode" and workload.output_tokens < least:
            raise ConfigError(
                f"--output-tokens is {workload.output_tokens}, too few for a decode of {workload.batch} requests after "
                f"{workload.prompt_tokens} tokens: the first answer would be done before the last prompt is; give at "
                f"least {least}, or fewer requests in --batches"
            )


def choose_depths(depths: Sequence[int] | None, layer_map: LayerMap, model: str) -> tuple[int, ...]:
    """The depths to measure: those asked for, or 0 and `measured_depth`. ConfigError if the map lacks one."""
    if depths is None:
        return tuple(dict.fromkeys((0, layer_map.measured_depth)))
    for depth in depths:
        if depth > layer_map.max_depth:
            has = f"the layer map has depths 0 to {layer_map.max_depth}"
            if not layer_map.max_depth:
                has = f"without a layer map {model} has depth 0 alone"
            raise ConfigError(
                f"depth {depth} is not there: {has}; name another in --depths, or a longer --layer-map"
            )
    return tuple(depths)


def choose_map(
    options: ThroughputOptions, num_blocks: int, fingerprint: str
) -> tuple[LayerMap | str | None, str]:
    """The layer map, and where it is from: "given", "none", "alias", "shipped" or "stand-in".

    A shape of --config has the map that comes with the package under its name, if that fits, else a stand-in.
    """
    if options.layer_map is not None:
        return options.layer_map, "none" if options.layer_map == "none" else "given"
    if options.config is None:
        return None, "alias"
    if (path := shipped_maps().get(options.config)) is not None:
        found = LayerMap.load(path)
        if found.num_blocks == num_blocks and found.fingerprint in (None, fingerprint):
            return found, "shipped"
    return stand_in_map(options.config, num_blocks, fingerprint), "stand-in"


def stand_in_map(model: str, num_blocks: int, fingerprint: str | None = None) -> LayerMap:
    """A chain for measuring speed, which depends on how many blocks are gone and not on which.

    It removes the middle half, and at every depth what is gone lies evenly in it: the order is that of the places'
    binary digits read backwards (van der Corput's sequence).
    """
    places = range(num_blocks // 4, num_blocks // 4 + num_blocks // 2)
    width = max(1, (len(places) - 1).bit_length())
    order = sorted(range(len(places)), key=lambda place: f"{place:0{width}b}"[::-1])
    return LayerMap(
        model=model,
        fingerprint=fingerprint,
        num_blocks=num_blocks,
        removed=tuple(Unit(places[place]) for place in order),
        depth=min(len(places), round(_STAND_IN_SHARE * num_blocks)),
        source="a stand-in, evenly spaced over the middle blocks: found by no search",
    )


# The tables of the SLEB paper (arXiv 2402.09025) on speed: LLaMA-2-70B on two A100, the latency of a prompt of 2,048
# tokens, and the throughput of 64 requests with 128 new tokens each. Here their prompts have 64 tokens, as in every
# "generate". Method, share removed, ms and speedup of the prompt, tokens/s and speedup of generation, as printed.
PAPER_ROWS = (
    ("dense", "0%", 1718.4, 1.00, 299, 1.00),
    ("Wanda", "2:4 (50%)", 1555.5, 1.10, 293, 0.98),
    ("DSnoT", "2:4 (50%)", 1555.5, 1.10, 293, 0.98),
    ("LLM-Pruner", "20%", 1534.3, 1.12, 314, 1.05),
    ("SliceGPT", "20%", 1658.7, 1.04, 314, 1.05),
    ("SliceGPT", "25%", 1440.7, 1.19, 331, 1.11),
    ("SliceGPT", "30%", 1364.2, 1.26, 343, 1.15),
    ("SLEB", "10%", 1529.1, 1.12, 336, 1.12),
    ("SLEB", "20%", 1364.1, 1.26, 381, 1.27),
)


def paper_measurements() -> Iterator[Measurement]:
    """The paper's rows, which nobody measured here."""
    for method, removed, milliseconds, prompt_speedup, rate, speedup in PAPER_ROWS:
        values = (("prompt", 1, 2048 / milliseconds * 1000, prompt_speedup), ("generate", 64, rate, speedup))
        for test, batch, value, ratio in values:
            case = f"paper: {test} {batch} × {2048 if test == 'prompt' else 128}"
            over = None if method == "dense" else Ratio(ratio)
            facts = {"variant": "paper", "depth": None, "test": test, "batch": batch}
            yield Measurement(case, f"{method} {removed}", "tokens/s", value, None, over, facts)


def paper_depths(layer_map: LayerMap) -> tuple[tuple[int, ...], list[str]]:
    """Depth 0 and those that remove 10 % and 20 % of the blocks; and a sentence for each share that has no depth.

    Of a map whose units are parts of blocks, the depth that removes as many attentions and MLPs together.
    """
    depths, missing = [0], []
    for share in (0.1, 0.2):  # of the paper's SLEB rows
        wanted = round(share * layer_map.num_blocks)
        removed = accumulate(len(unit.sublayers) for unit in layer_map.removed)
        depth = next((depth for depth, count in enumerate(removed, 1) if count >= 2 * wanted > 0), None)
        if depth is not None:
            depths.append(depth)
        else:
            missing.append(
                f"The paper's {share:.0%} of the blocks is not measured: it is {wanted} of {layer_map.num_blocks}, and "
                f"the layer map removes {len(layer_map.removed)} units."
            )
    return tuple(dict.fromkeys(depths)), missing
