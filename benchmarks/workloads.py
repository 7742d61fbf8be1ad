"""What `sleb bench throughput` is asked to measure, checked, and as workloads for one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from sleb.errors import ConfigError
from sleb.layer_map import LayerMap, shipped_maps
from sleb.shapes import shape_folder
from sleb.units import Unit

Test = Literal["prompt", "generate", "decode"]
TESTS: tuple[Test, ...] = get_args(Test)
DEFAULT_TESTS: tuple[Test, ...] = ("prompt", "generate")
DEFAULT_PROMPT_TOKENS: dict[Test, int] = {"prompt": 2048, "generate": 64, "decode": 64}
# Which part of the blocks a stand-in for a layer map recommends to remove: what the SLEB paper removes at most.
_STAND_IN_SHARE = 0.2


@dataclass(frozen=True)
class ThroughputOptions:
    """What to measure: a model, or with `config` a shape of `sleb.shapes` with random weights.

    None: depths 0 and the map's recommended one; 2,048 prompt tokens for "prompt" (or what the model holds), 64 for the
    others. batches and output_tokens are of "generate" and "decode"; the rest is as in EngineConfig.
    """

    model: str = ""
    layer_map: LayerMap | str | None = None
    depths: Sequence[int] | None = None
    tests: Sequence[str] = DEFAULT_TESTS
    batches: Sequence[int] = (64, 1)
    prompt_tokens: int | None = None
    output_tokens: int = 128
    repetitions: int = 5
    dtype: str = "auto"
    weights: str = "auto"
    device: str = "auto"
    load_format: str = "auto"
    threads: int | None = None
    seed: int = 0
    config: str | None = None


@dataclass(frozen=True)
class Workload:
    """`batch` equal requests.

    A "prompt" test asks one new token, so that the head runs for one row. "decode" is "generate" without the prompts:
    the clock runs from when every request has its first token.
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
        return f"{self.test}, batch {self.batch}"


def plan_workloads(options: ThroughputOptions, max_positions: int) -> list[Workload]:
    """The workloads that `options` asks of a model with `max_positions` positions; ConfigError if it cannot."""
    workloads: list[Workload] = []
    for test in TESTS:
        if test not in options.tests:
            continue
        output_tokens = 1 if test == "prompt" else options.output_tokens
        default = min(DEFAULT_PROMPT_TOKENS[test], max(1, max_positions - output_tokens))
        prompt_tokens = default if options.prompt_tokens is None else options.prompt_tokens
        if prompt_tokens + output_tokens > max_positions:
            raise ConfigError(
                f"{prompt_tokens} prompt tokens and {output_tokens} new ones do not fit the model's "
                f"{max_positions} positions; lower --prompt-tokens or --output-tokens"
            )
        batches = (1,) if test == "prompt" else options.batches
        workloads += [Workload(test, batch, prompt_tokens, output_tokens) for batch in batches]
    return workloads


def check_options(options: ThroughputOptions) -> None:
    """Raises ConfigError for the first option out of its range that a look at the model is not needed for."""
    if bool(options.model) == (options.config is not None):
        raise ConfigError(
            f"MODEL is '{options.model}' and --config '{options.config or ''}'; give one of them: a model with its "
            "weights, or a shape to fill with random ones"
        )
    if options.config is not None and options.load_format not in ("auto", "dummy"):
        raise ConfigError(
            f"--load-format is '{options.load_format}', but --config has no weights to read; leave it out"
        )
    unknown = [test for test in options.tests if test not in TESTS]
    if unknown or not options.tests:
        named = f"test '{unknown[0]}' is not known" if unknown else "no test is named"
        raise ConfigError(f"{named}; choose from: {', '.join(TESTS)}")
    if not options.batches:
        raise ConfigError("no batch is named; give --batches at least one number, 1 say")
    numbers = [("batch", batch, 1) for batch in options.batches]
    numbers += [("depth", depth, 0) for depth in options.depths or ()]
    numbers += [("--repetitions", options.repetitions, 1)]
    if options.prompt_tokens is not None:
        numbers.append(("--prompt-tokens", options.prompt_tokens, 1))
    if {"generate", "decode"} & set(options.tests):
        # The first new token comes with the prompt: decoding begins with the second.
        numbers.append(("--output-tokens", options.output_tokens, 2))
    for name, number, least in numbers:
        if number < least:
            raise ConfigError(f"{name} is {number}; it must be an integer of at least {least}")
    for name, values in (("batch", options.batches), ("depth", options.depths or ())):
        for value in values:
            if values.count(value) > 1:
                raise ConfigError(f"{name} {value} is named twice; name each once")


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
