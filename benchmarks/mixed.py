"""What a batch of several depths costs against the same requests in batches of one depth.

    python -m sleb.benchmarks.mixed MODEL --layer-map MAP --depths 0,3,6 [--streams 8] [--json FILE]
    python -m sleb.benchmarks.mixed --config llama-2-7b --depths 0,2,4,7 --streams 16 --device cuda

With D depths and S streams a depth, a batch of D·S requests runs mixed, S of each depth, and alone, all of one depth.
If mixing cost nothing, a mixed batch would take the mean of the D times alone, since 1/D of its requests are of each
depth. The ratio is that mean over the time that it took, both of one repetition; the variants take turns.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console

from sleb.benchmarks.command import run_command, write_result
from sleb.benchmarks.environment import describe_environment, shown_command
from sleb.benchmarks.harness import MOST_REPETITIONS, alternated_orders
from sleb.benchmarks.idle import QuietPolicy, run_quietly
from sleb.benchmarks.throughput import greedy_params, plain_token_ids
from sleb.benchmarks.variants import depths_in_turns
from sleb.benchmarks.workloads import ThroughputOptions, choose_map, with_model
from sleb.engine.llm import LLM
from sleb.engine.model.architecture import resolve_spec
from sleb.errors import ConfigError
from sleb.files import check_writable
from sleb.models.resolve import resolve_model

# The least that a mixed batch is to keep of the time-weighted throughput: the rest is for uneven ends of the runs.
TARGET = 0.95
TARGET_ON_CARD = 0.90
_MIXED = -1  # stands for the mixed batch among depths


@dataclass(frozen=True)
class MixedOptions:
    """What to measure; the engine's options are as in EngineConfig."""

    model: str = ""
    layer_map: str | None = None
    depths: Sequence[int] = (0, 3, 6)
    streams: int = 8
    prompt_tokens: int = 64
    output_tokens: int = 128
    repetitions: int = 5
    dtype: str = "auto"
    weights: str = "auto"
    threads: int | None = None
    seed: int = 0
    device: str = "cpu"
    config: str | None = None
    policy: QuietPolicy = field(default_factory=QuietPolicy)

    @property
    def batch(self) -> int:
        """Requests of every run."""
        return self.streams * len(self.depths)


@dataclass(frozen=True)
class MixedRepetition:
    """Seconds of the mixed batch and of each depth alone; others_share: the most that others took in any of them."""

    mixed: float
    alone: dict[int, float]
    others_share: float | None
    disturbed: bool

    @property
    def ratio(self) -> float:
        """Expected time over actual time: 1 if mixing costs nothing."""
        return sum(self.alone.values()) / len(self.alone) / self.mixed


def run_mixed(
    options: MixedOptions,
    command: Sequence[str] = (),
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Loads the model, measures, and gives the result file; Ctrl-C keeps complete repetitions. Raises SlebError."""
    if bool(options.model) == (options.config is not None):
        raise ConfigError("name a MODEL, or a shape with --config, and not both")
    if len(set(options.depths)) != len(options.depths) or len(options.depths) < 2:
        raise ConfigError(f"--depths is {list(options.depths)}; name at least two different depths")
    llm = _load(options)
    environment = describe_environment(llm.engine, shown_command(command, options.model))
    repetitions: list[MixedRepetition] = []
    complete = True
    try:
        _measure(llm, options, repetitions, on_progress)
    except KeyboardInterrupt:
        complete = False
    settings = {key: value for key, value in asdict(options).items() if key not in ("model", "layer_map")}
    model = llm.engine.model_name
    result = {"kind": "mixed", "environment": environment, "model": model, "settings": settings}
    return result | summarise(options, repetitions, llm.engine.runner.device.type) | {"complete": complete}


def summarise(
    options: MixedOptions, repetitions: Sequence[MixedRepetition], device_type: str = "cpu"
) -> dict[str, Any]:
    """Medians, spread and samples; nothing but samples where no repetition is complete.

    device_type: of the device that "auto" came to, which the target is for.
    """
    found: dict[str, Any] = {"repetitions": [asdict(each) | {"ratio": each.ratio} for each in repetitions]}
    if repetitions:
        target = TARGET_ON_CARD if device_type == "cuda" else TARGET
        ratios = [each.ratio for each in repetitions]
        tokens = options.batch * options.output_tokens
        found |= {
            "ratio": median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "target": target,
            "met": median(ratios) >= target,
            "tokens_per_second": {
                "mixed": median(tokens / each.mixed for each in repetitions),
                "expected": median(tokens / (each.ratio * each.mixed) for each in repetitions),
                "alone": {
                    depth: median(tokens / each.alone[depth] for each in repetitions)
                    for depth in options.depths
                },
            },
        }
    return found


def _load(options: MixedOptions) -> LLM:
    context = options.prompt_tokens + options.output_tokens
    source = with_model(
        ThroughputOptions(options.model, options.layer_map, config=options.config, device=options.device)
    )
    resolved = resolve_model(source.model)
    spec = resolve_spec(resolved.path)
    layer_map, _ = choose_map(source, spec.num_blocks, spec.fingerprint)
    return LLM(
        source.model,
        layer_map,
        options.depths,
        load_format=source.load_format,
        dtype=options.dtype,
        weights=options.weights,
        device=options.device,
        threads=options.threads,
        seed=options.seed,
        max_model_len=max(512, context),
        max_num_seqs=options.batch,
        max_num_batched_tokens=max(2048, options.batch * options.prompt_tokens),
        prefix_caching=False,
    )


def _measure(
    llm: LLM,
    options: MixedOptions,
    repetitions: list[MixedRepetition],
    on_progress: Callable[[str], None],
) -> None:
    variants = (_MIXED, *options.depths)
    token_ids = plain_token_ids(llm.engine)
    orders = alternated_orders(variants, options.repetitions, random.Random(options.seed))
    for number, order in enumerate([variants, *orders]):
        on_progress(f"repetition {number} of {options.repetitions}" if number else "warm-up")
        rng = random.Random(f"{options.seed} {number}")
        prompts = [rng.choices(token_ids, k=options.prompt_tokens) for _ in range(options.batch)]
        times = {}
        shares: list[float | None] = []
        disturbed = False
        for variant in order:
            action = _Run(llm, options, prompts, variant)
            if not number:
                action()
                continue
            done = run_quietly(action, (), options.policy)
            times[variant] = done.result
            shares.append(done.others_share)
            disturbed |= done.disturbed
        if number:
            repetitions.append(_repetition(times, shares, disturbed))


def _repetition(
    times: Mapping[int, float], shares: Sequence[float | None], disturbed: bool
) -> MixedRepetition:
    known = [share for share in shares if share is not None]
    alone = {depth: seconds for depth, seconds in sorted(times.items()) if depth != _MIXED}
    return MixedRepetition(times[_MIXED], alone, max(known) if known else None, disturbed)


class _Run:
    """One batch, of the depths in turn or all of one."""

    def __init__(
        self, llm: LLM, options: MixedOptions, prompts: Sequence[Sequence[int]], variant: int
    ) -> None:
        mixed = variant == _MIXED
        self._depths = depths_in_turns(options.depths, len(prompts)) if mixed else [variant] * len(prompts)
        self._llm, self._prompts = llm, prompts
        self._params = greedy_params(options.output_tokens)

    def __call__(self) -> float:
        """Seconds."""
        started = time.perf_counter()
        outputs = self._llm.generate(self._prompts, self._params, self._depths)
        seconds = time.perf_counter() - started
        expected = self._params.max_tokens
        assert all(len(output.token_ids) == expected for output in outputs), "an answer is too short"
        return seconds


def main(
    model: Annotated[
        str | None, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.", show_default=False)
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Instead of MODEL: a shape that comes with sleb.", show_default=False)
    ] = None,
    layer_map: Annotated[
        str | None, typer.Option(help="Layer map (JSON).", show_default="the one that comes with the model")
    ] = None,
    depths: Annotated[str, typer.Option(help="Depths of one batch.")] = "0,3,6",
    streams: Annotated[int, typer.Option(help="Requests of each depth.", min=1)] = 8,
    repetitions: Annotated[
        int, typer.Option(help="Times that each batch is measured.", min=1, max=MOST_REPETITIONS)
    ] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    weights: Annotated[str, typer.Option(help="auto (as --dtype), int8 or int4.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="the engine's choice")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random prompts and the order.")] = 0,
    wait: Annotated[float, typer.Option(help="Seconds to wait for an idle machine.", min=0)] = 60,
    retries: Annotated[int, typer.Option(help="Times that a disturbed run is made anew.", min=0)] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure a batch of several depths against batches of one depth, in turns."""
    try:
        chosen = [int(part) for part in depths.split(",")]
    except ValueError:
        raise ConfigError(f"--depths is '{depths}'; write integers with commas between, as 0,3,6") from None
    if json_path is not None:
        check_writable(json_path)
    console = Console(stderr=True, highlight=False)
    options = MixedOptions(
        model=os.path.expanduser(model or ""),
        config=config,
        device=device,
        layer_map=layer_map,
        depths=chosen,
        streams=streams,
        repetitions=repetitions,
        dtype=dtype,
        weights=weights,
        threads=threads,
        seed=seed,
        policy=QuietPolicy(wait_seconds=wait, retries=retries),
    )
    result = run_mixed(options, ["python", "-m", "sleb.benchmarks.mixed", *sys.argv[1:]], console.print)
    if result["repetitions"]:
        rates = result["tokens_per_second"]
        alone = ", ".join(f"depth {depth} {rate:,.0f}" for depth, rate in rates["alone"].items())
        console.print(
            f"alone: {alone}; expected {rates['expected']:,.0f}, mixed {rates['mixed']:,.0f} tokens/s"
        )
        spread = f"{result['ratio_low']:.3f}–{result['ratio_high']:.3f}"
        met = "met" if result["met"] else "not met"
        console.print(f"ratio {result['ratio']:.3f} ({spread}), target {result['target']}: {met}")
        disturbed = sum(each["disturbed"] for each in result["repetitions"])
        if disturbed:
            console.print(f"others took part of the processors in {disturbed} repetitions")
        if json_path is not None:
            write_result(json_path, result)
    if not result["complete"]:
        raise typer.Exit(130)


if __name__ == "__main__":
    run_command(main)
