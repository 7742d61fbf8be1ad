"""What `sleb bench throughput` is asked to measure, and as workloads and variants for one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap, shipped_maps
from sleb.layer_map.units import Unit
from sleb.models.shapes import shape_folder

Test = Literal["prompt", "generate", "decode"]
TESTS: tuple[Test, ...] = get_args(Test)
DEFAULT_TESTS: tuple[Test, ...] = ("prompt", "generate")
DEFAULT_PROMPT_TOKENS: dict[Test, int] = {"prompt": 2048, "generate": 64, "decode": 64}
DEFAULT_MAX_REPETITIONS = 30
_MAX_WORKLOADS = 64
# Which part of the blocks a stand-in for a layer map recommends to remove: what the SLEB paper removes at most.
_STAND_IN_SHARE = 0.2


@dataclass(frozen=True)
class ThroughputOptions:
    """What to measure: a model, or with `config` a shape of `sleb.models.shapes` with random weights.

    None: depths 0 and the map's recommended one; 2,048 prompt tokens for "prompt" (or what the model holds), 64 for the
    others. batches and output_tokens are of "generate" and "decode"; of several lengths and batches every combination
    is measured. contexts, if given, are the prompt tokens of "decode", and ask for that test.

    repetitions to max_repetitions (None: 30, or repetitions where that is more) are made of every workload, until the
    half width of each ratio's interval is at most `interval` of the ratio; time_budget: seconds for all workloads, 0:
    no limit, see `harness.Stopping`. control: the baseline runs a second time, as a variant of its own. mixed:
    "generate" runs a batch of all depths besides. paper: see `sleb.benchmarks.paper`. fail_below: the speedup that
    every depth is to have; checked here for having something to judge. The rest is as in EngineConfig.
    """

    model: str = ""
    layer_map: LayerMap | str | None = None
    depths: Sequence[int] | None = None
    tests: Sequence[str] = DEFAULT_TESTS
    batches: Sequence[int] = (64, 1)
    prompt_tokens: Sequence[int] | int | None = None
    output_tokens: Sequence[int] | int = 128
    contexts: Sequence[int] | None = None
    repetitions: int = 6
    max_repetitions: int | None = None
    interval: float = 0.01
    time_budget: float = 0.0
    control: bool = True
    mixed: bool = True
    paper: bool = False
    fail_below: float | None = None
    dtype: str = "auto"
    weights: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    threads: int | None = None
    seed: int = 0
    config: str | None = None

    @property
    def most_repetitions(self) -> int:
        """max_repetitions, or what stands for it."""
        if self.max_repetitions is None:
            return max(DEFAULT_MAX_REPETITIONS, self.repetitions)
        return self.max_repetitions


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
        return describe_workload(self.test, self.batch, self.prompt_tokens, self.output_tokens)


def describe_workload(test: str, batch: int, prompt_tokens: int, output_tokens: int) -> str:
    """In a few words: batch × tokens."""
    if test == "prompt":
        return f"prompt {batch} × {prompt_tokens}"
    return f"{test} {batch} × {output_tokens - (test == 'decode')} after {prompt_tokens}"


def wanted_tests(options: ThroughputOptions) -> list[Test]:
    """The tests in the order in which they run."""
    return [test for test in TESTS if test in options.tests or (test == "decode" and options.contexts)]


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


def as_numbers(values: Sequence[int] | int) -> Sequence[int]:
    """One number as a sequence of one."""
    return (values,) if isinstance(values, int) else values


def plan_workloads(options: ThroughputOptions, max_positions: int) -> list[Workload]:
    """The workloads that `options` asks of a model with `max_positions` positions; ConfigError if it cannot."""
    workloads: list[Workload] = []
    for test in wanted_tests(options):
        batches = (1,) if test == "prompt" else options.batches
        workloads += [
            Workload(test, batch, prompt_tokens, output_tokens)
            for prompt_tokens, output_tokens in _lengths(options, test, max_positions)
            for batch in batches
        ]
    if len(workloads) > _MAX_WORKLOADS:
        raise ConfigError(
            f"the lists make {len(workloads)} workloads; {_MAX_WORKLOADS} are the most: shorten --batches, "
            "--prompt-tokens, --output-tokens or --context"
        )
    return workloads


def _lengths(options: ThroughputOptions, test: Test, max_positions: int) -> list[tuple[int, int]]:
    """Prompt tokens and output tokens of the workloads of a test."""
    found = []
    option, asked = "--prompt-tokens", options.prompt_tokens
    if test == "decode" and options.contexts is not None:
        # A context of nothing is not to be had: a request has at least one token.
        option, asked = "--context", [max(1, context) for context in options.contexts]
    for output_tokens in (1,) if test == "prompt" else as_numbers(options.output_tokens):
        default = min(DEFAULT_PROMPT_TOKENS[test], max(1, max_positions - output_tokens))
        for prompt_tokens in as_numbers(default if asked is None else asked):
            if prompt_tokens + output_tokens > max_positions:
                raise ConfigError(
                    f"{prompt_tokens} prompt tokens and {output_tokens} new ones do not fit the model's "
                    f"{max_positions} positions; lower {option} or --output-tokens"
                )
            found.append((prompt_tokens, output_tokens))
    return found


def choose_depths(depths: Sequence[int] | None, layer_map: LayerMap, model: str) -> tuple[int, ...]:
    """The depths to measure: those asked for, or 0 and the recommended one. ConfigError if the map lacks one."""
    if depths is None:
        return tuple(dict.fromkeys((0, layer_map.depth)))
    if not depths:
        raise ConfigError("no depth is named; give --depths at least one, 0 for the full model")
    for depth in depths:
        if depth > layer_map.max_depth:
            has = f"the layer map has depths 0 to {layer_map.max_depth}"
            if not layer_map.max_depth:
                has = f"without a layer map {model} has depth 0 alone"
            raise ConfigError(
                f"depth {depth} is not there: {has}; name another in --depths, or a longer --layer-map"
            )
    return tuple(depths)


def with_model(options: ThroughputOptions) -> ThroughputOptions:
    """The options with the folder and load format that --config stands for. Raises ConfigError for an unknown shape."""
    if options.config is None:
        return options
    return replace(options, model=str(shape_folder(options.config)), load_format="dummy")


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
    path = shipped_maps().get(options.config)
    if path is not None:
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
