"""What `sleb bench throughput` is asked to measure, checked, and as workloads for one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sleb.errors import ConfigError
from sleb.layer_map import LayerMap

Test = Literal["prompt", "generate"]
TESTS: tuple[Test, ...] = get_args(Test)
DEFAULT_PROMPT_TOKENS: dict[Test, int] = {"prompt": 2048, "generate": 64}


@dataclass(frozen=True)
class ThroughputOptions:
    """What to measure. None: depths 0 and the map's recommended one; 2,048 prompt tokens for "prompt" (or what the
    model holds), 64 for "generate". batches and output_tokens are of "generate"; the rest is as in EngineConfig.
    """

    model: str
    layer_map: LayerMap | str | None = None
    depths: Sequence[int] | None = None
    tests: Sequence[str] = TESTS
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


@dataclass(frozen=True)
class Workload:
    """`batch` equal requests; a "prompt" test asks one new token, so that the head runs for one row."""

    test: Test
    batch: int
    prompt_tokens: int
    output_tokens: int

    @property
    def counted_tokens(self) -> int:
        """The tokens of tokens/s: those of the prompt, or the new ones."""
        return self.batch * (self.prompt_tokens if self.test == "prompt" else self.output_tokens)

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
    if (
        "generate" in options.tests
    ):  # the first new token comes with the prompt: decoding begins with the second
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
