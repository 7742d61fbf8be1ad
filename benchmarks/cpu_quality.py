"""What a weight format costs in quality: perplexity of a text with the same model in several formats.

    python -m sleb.benchmarks.cpu_quality MODEL --text FILE [--tokens 8192] [--json FILE]

The text is cut into windows that do not overlap, the same ones for every format. Where transformers loads the
folder, its own bfloat16 model scores them too: a number that this code has no part in.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sleb.benchmarks.command import run_command, write_result
from sleb.benchmarks.environment import describe_environment, shown_command
from sleb.benchmarks.perplexity import split_windows, transformers_perplexity, windowed_perplexity
from sleb.engine.config import EngineConfig
from sleb.engine.llm import LLM
from sleb.engine.text import TextProcessor
from sleb.errors import ConfigError
from sleb.files import check_writable
from sleb.kernels.names import DTYPE_ALIASES
from sleb.models.resolve import resolve_model

FORMATS = ("float32", "bfloat16", "int8", "int4")
BASELINE = "bfloat16"
_MIN_WIDTH = 120


@dataclass
class QualityRow:
    """One format. ratio: perplexity over that of the baseline, None without one. seconds: to score the text."""

    implementation: str
    weights: str
    dtype: str
    perplexity: float
    ratio: float | None
    weight_bytes: int | None
    seconds: float


def measure_quality(
    model: str,
    text: str,
    formats: Sequence[str] = FORMATS,
    *,
    window: int = 1024,
    num_tokens: int | None = None,
    kernels: str = "auto",
    peer: bool = True,
    command: Sequence[str] = (),
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Perplexity of `text` with `model` on the CPU in each of `formats`, and with transformers if `peer`.

    num_tokens: of the text, from its beginning; None: all. Returns an object with the keys environment, model,
    settings and rows, ready for JSON. Raises SlebError subclasses.
    """
    if not formats:
        raise ConfigError(f"no weight format is named; give some of: {', '.join(FORMATS)}")
    formats = [DTYPE_ALIASES.get(name, name) for name in formats]
    for name in formats:
        EngineConfig(model, weights=name, kernels=kernels).check()
    resolved = resolve_model(model)
    windows = split_windows(TextProcessor(resolved.path).encode(text)[:num_tokens], window)
    options: dict[str, Any] = {
        "max_model_len": min(window, max(map(len, windows))),
        "max_num_seqs": 1,
        "kernels": kernels,
    }
    rows: list[QualityRow] = []
    environment: dict[str, Any] = {}
    name = resolved.name
    for weights in formats:
        say(f"scoring {sum(map(len, windows))} tokens with {weights} weights ...")
        llm = LLM(model, "none", [0], weights=weights, device="cpu", prefix_caching=False, **options)
        environment, name = describe_environment(llm.engine, command), llm.engine.model_name
        rows.append(_measure_own(llm, weights, windows))
        del llm
    if peer:
        say("scoring them with transformers ...")
        rows += _measure_peer(resolved.path, windows, say)
    for row in rows:
        row.ratio = _ratio(row, rows)
    environment.pop("dtype")  # a column
    settings = {"window": window, "num_tokens": sum(map(len, windows)), "num_windows": len(windows)}
    return {
        "kind": "weight-formats",
        "environment": environment,
        "model": {"name": name},
        "settings": settings,
        "rows": [asdict(row) for row in rows],
    }


def _measure_own(llm: LLM, weights: str, windows: Sequence[Sequence[int]]) -> QualityRow:
    begin = time.perf_counter()
    value = windowed_perplexity(windows, lambda window: llm.score(window, 0))
    seconds = time.perf_counter() - begin
    dtype = str(llm.engine.runner.dtype).removeprefix("torch.")
    return QualityRow("sleb", weights, dtype, value, None, llm.engine.weight_bytes(0), seconds)


def _measure_peer(
    path: Path, windows: Sequence[Sequence[int]], say: Callable[[str], None]
) -> list[QualityRow]:
    begin = time.perf_counter()
    try:
        value = transformers_perplexity(path, windows, torch.bfloat16)
    except Exception as error:  # whatever it raises, the other rows stand
        say(f"left out: transformers does not score this model ({error})")
        return []
    seconds = time.perf_counter() - begin
    return [QualityRow("transformers", "bfloat16", "bfloat16", value, None, None, seconds)]


def _ratio(row: QualityRow, rows: Sequence[QualityRow]) -> float | None:
    own = [each for each in rows if each.implementation == "sleb" and each.weights == BASELINE]
    return row.perplexity / own[0].perplexity if own else None


def make_table(result: dict[str, Any]) -> Table:
    """The rows of a result for people."""
    settings = result["settings"]
    table = Table(
        box=SIMPLE,
        title=f"{result['model']['name']}: perplexity of {settings['num_tokens']} tokens, "
        f"windows of {settings['window']}",
    )
    table.add_column("implementation")
    table.add_column("weights")
    for heading in ("dtype", "perplexity", f"over {BASELINE}", "weights", "time"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        table.add_row(
            row["implementation"],
            row["weights"],
            row["dtype"],
            f"{row['perplexity']:.4f}",
            "" if row["ratio"] is None else f"{row['ratio']:.4f}",
            "" if row["weight_bytes"] is None else f"{row['weight_bytes'] / 2**20:.0f} MiB",
            f"{row['seconds']:.1f} s",
        )
    return table


def main(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.")],
    text: Annotated[Path, typer.Option(help="A text file (UTF-8).")],
    weights: Annotated[str, typer.Option(help="Formats to compare.")] = ",".join(FORMATS),
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the text to score.", show_default="all", min=2)
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 1024,
    kernels: Annotated[str, typer.Option(help="auto, or a backend of the engine's kernels.")] = "auto",
    peer: Annotated[bool, typer.Option(help="Score the text with transformers as well.")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Compare the perplexity of a text between weight formats, on the CPU."""
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--text {text} cannot be read as UTF-8 text ({error}); name another file"
        ) from None
    if json_path is not None:
        check_writable(json_path)
    progress = Console(stderr=True, highlight=False)
    result = measure_quality(
        model,
        content,
        [name.strip() for name in weights.split(",") if name.strip()],
        window=window,
        num_tokens=tokens,
        kernels=kernels,
        peer=peer,
        command=shown_command(["python", "-m", "sleb.benchmarks.cpu_quality", *sys.argv[1:]], model),
        say=lambda message: progress.print(message, markup=False, soft_wrap=True),
    )
    output = Console()
    if not output.is_terminal:  # a line may then be as long as it needs to be
        output.width = max(output.width, _MIN_WIDTH)
    output.print(make_table(result))
    if json_path is not None:
        write_result(json_path, result)


if __name__ == "__main__":
    run_command(main)
