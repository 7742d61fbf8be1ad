"""sleb against transformers' generate(): one shape, one batch, one process, in turns.

    python -m sleb.benchmarks.transformers_generate --config llama-2-7b [--batch 64] [--no-compile] [--json FILE]

Both have random weights of the same distribution, take the same random prompts and give exactly --output-tokens
tokens, the most probable ones. transformers has a static cache and, on a card, compiles its decode step as it does for
such a cache. The ratio is its time over ours within a repetition; warm-up runs, in which it compiles, are not counted.
Where both models do not fit into memory together, ours runs first and goes, and the result says so.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from sleb.benchmarks.command import run_command, write_result
from sleb.benchmarks.environment import describe_environment, shown_command
from sleb.benchmarks.throughput import ThroughputBench
from sleb.benchmarks.workloads import ThroughputOptions, Workload, with_model
from sleb.files import check_writable

TARGET = 3.0  # times transformers' throughput, at batch 64 on a card
_WARM_UPS = 2  # the second finds everything compiled
_DEVIATION = 0.02  # of random weights, as in sleb's own
_SPARE_BYTES = 4 << 30  # for activations, graphs and what compiling takes


@dataclass(frozen=True)
class GenerateOptions:
    """What to measure. Of MODEL, too, only the config is read."""

    model: str = ""
    config: str | None = None
    batch: int = 64
    prompt_tokens: int = 64
    output_tokens: int = 128
    repetitions: int = 5
    dtype: str = "bfloat16"
    device: str = "auto"
    compile: bool = True
    seed: int = 0

    def throughput(self) -> ThroughputOptions:
        """The same as options of our own benchmark, whose engine runs ours."""
        return ThroughputOptions(
            model=self.model,
            config=self.config,
            layer_map="none",
            depths=(0,),
            tests=("generate",),
            batches=(self.batch,),
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            repetitions=self.repetitions,
            dtype=self.dtype,
            device=self.device,
            load_format="dummy",
            seed=self.seed,
        )


class TransformersModel:
    """A model of transformers with random weights, ready to generate."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, options: GenerateOptions
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self._model = model.to(device).eval()
        self._device = device
        _fill_random(self._model, options.seed)
        # The end of a sequence is ignored, so that every answer has its full length.
        self._model.generation_config = GenerationConfig(pad_token_id=0)
        self._generation = GenerationConfig(
            max_new_tokens=options.output_tokens,
            do_sample=False,
            use_cache=True,
            cache_implementation="static",
            disable_compile=not options.compile,
            pad_token_id=0,
        )

    def generate(self, prompts: Sequence[Sequence[int]]) -> float:
        """Seconds to answer prompts of equal length."""
        started = time.perf_counter()
        inputs = torch.tensor(prompts, device=self._device)
        outputs = self._model.generate(
            inputs, attention_mask=torch.ones_like(inputs), generation_config=self._generation
        )
        num_tokens = len(outputs[0].tolist())  # waits for the device
        seconds = time.perf_counter() - started
        wanted = inputs.shape[1] + int(self._generation.max_new_tokens)
        assert num_tokens == wanted, f"transformers gave {num_tokens} tokens instead of {wanted}"
        return seconds


def _fill_random(model: Any, seed: int) -> None:
    """As sleb's loader fills its weights: norms 1, everything else normal."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, _DEVIATION, generator=generator)


def run_generate(
    options: GenerateOptions,
    command: Sequence[str] = (),
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Loads, measures, and gives the result file; Ctrl-C keeps complete repetitions. Raises SlebError."""
    throughput = options.throughput()
    bench = ThroughputBench(throughput)
    folder = Path(with_model(throughput).model).expanduser()
    engine = bench.llm.engine
    device, dtype = engine.runner.device, engine.runner.dtype
    [workload] = bench.workloads
    needed = engine.weight_bytes(0) + workload.batch * workload.context * engine.kv_bytes_per_token(0)
    together = needed + _SPARE_BYTES * (device.type == "cuda") <= _free_bytes(device)
    result = {
        "kind": "transformers",
        "environment": describe_environment(engine, shown_command(command, options.model)),
        "model": engine.model_name,
        "settings": {key: value for key, value in asdict(options).items() if key not in ("model", "config")},
        "together": together,
        "compiled": options.compile and device.type == "cuda",
    }
    prompts = [bench.prompts(workload, number) for number in range(options.repetitions + 1)]
    ours, theirs = _Times(workload, bench), _Times(workload)
    complete = True
    try:
        if together:
            theirs.model = TransformersModel(folder, dtype, device, options)
            _take_turns((ours, theirs), prompts, on_progress)
        else:
            on_progress("both models do not fit together: one after the other")
            _take_turns((ours,), prompts, on_progress)
            ours.bench = None
            del bench, engine
            _free(device)
            theirs.model = TransformersModel(folder, dtype, device, options)
            _take_turns((theirs,), prompts, on_progress)
    except KeyboardInterrupt:
        complete = False
    return result | summarise(workload, ours.seconds, theirs.seconds) | {"complete": complete}


class _Times:
    """The seconds of the counted runs of one side: our benchmark's engine, or transformers."""

    def __init__(self, workload: Workload, bench: ThroughputBench | None = None) -> None:
        self.bench, self._workload = bench, workload
        self.model: TransformersModel | None = None
        self.seconds: list[float] = []

    @property
    def name(self) -> str:
        return "transformers" if self.model is not None else "sleb"

    def run(self, number: int, prompts: Sequence[Sequence[int]]) -> float:
        """Seconds of one run on the prompts of repetition `number`."""
        if self.model is not None:
            return self.model.generate(prompts)
        assert self.bench is not None
        answer = self.bench.prepare(self._workload, number)
        started = time.perf_counter()
        answer(0)
        return time.perf_counter() - started


def _take_turns(
    sides: Sequence[_Times], prompts: Sequence[Sequence[Sequence[int]]], on_progress: Callable[[str], None]
) -> None:
    """Each side once a repetition, the order turned round from one to the next; warm-ups first."""
    for number in [0] * _WARM_UPS + list(range(1, len(prompts))):
        times: dict[str, float] = {}
        for side in sides if number % 2 == 0 else sides[::-1]:
            which = f"repetition {number} of {len(prompts) - 1}" if number else "warm-up"
            on_progress(f"{side.name}, {which}")
            gc.collect()
            times[side.name] = side.run(number, prompts[number])
        if number:
            for side in sides:
                side.seconds.append(times[side.name])


def summarise(workload: Workload, ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Throughputs and their ratio, repetition by repetition; no ratio where no repetition is complete."""

    def throughput(seconds: Sequence[float]) -> dict[str, Any]:
        rates = [workload.counted_tokens / each for each in seconds]
        return {
            "tokens_per_second": median(rates) if rates else None,
            "tokens_per_second_samples": rates,
            "seconds_samples": list(seconds),
        }

    ratios = [their / our for our, their in zip(ours, theirs, strict=False)]
    found: dict[str, Any] = {"ours": throughput(ours), "transformers": throughput(theirs)}
    if ratios:
        found |= {
            "ratio": median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "ratio_samples": ratios,
        }
    return found


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder, hub id, .gguf file, or smollm2: of its config.", show_default=False),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Instead of MODEL: a shape that comes with sleb.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="Requests at once.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option(help="New tokens of a request.")] = 128,
    repetitions: Annotated[int, typer.Option(help="Times that each side is measured.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    compile_: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Let transformers compile its step, on a card.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of weights and prompts.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure sleb against transformers' generate, in turns."""
    if json_path is not None:
        check_writable(json_path)
    console = Console(stderr=True, highlight=False)
    options = GenerateOptions(
        model or "",
        config,
        batch,
        prompt_tokens,
        output_tokens,
        repetitions,
        dtype,
        device,
        compile_,
        seed,
    )
    command = ["python", "-m", "sleb.benchmarks.transformers_generate", *sys.argv[1:]]
    result = run_generate(options, command, console.print)
    if "ratio" in result:
        rates = [result[side]["tokens_per_second"] for side in ("ours", "transformers")]
        console.print(f"sleb {rates[0]:,.0f}, transformers {rates[1]:,.0f} tokens/s")
        spread = f"{result['ratio_low']:.2f}–{result['ratio_high']:.2f}"
        console.print(f"ratio {result['ratio']:.2f} ({spread}); target on a card at batch 64: {TARGET}")
        if json_path is not None:
            write_result(json_path, result)
    if not result["complete"]:
        raise typer.Exit(130)


if __name__ == "__main__":
    run_command(main)
