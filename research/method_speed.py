"""What removing a share of the weights gives in speed, by how they are removed (section on speed of arXiv 2402.09025).

    python research/method_speed.py MODEL --count 6 --json FILE

    blocks   `count` blocks left out
    width    every block's MLP narrowed until as many parameters are gone (channel pruning)

Speed does not depend on which weights go, so blocks are evenly spaced and the narrow model has random weights. 2:4
sparsity is left out: its zeros are multiplied like other numbers without the sparse kernels that no backend here has.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import run, say

from sleb.benchmarks.environment import describe_environment, shown_command
from sleb.benchmarks.record import Result
from sleb.benchmarks.throughput import greedy_params, plain_token_ids
from sleb.benchmarks.turns import Case, Run, TurnOptions, measure
from sleb.benchmarks.workloads import stand_in_map
from sleb.cli.bench.shared import OutputOptions
from sleb.cli.options import Model
from sleb.engine.config import EngineConfig
from sleb.engine.llm import LLM
from sleb.engine.model.architecture import resolve_spec
from sleb.errors import ConfigError
from sleb.models.resolve import resolve_model
from sleb.options import option, option_of

_WIDTH_STEP = 32  # what kernels are made for
_SHORT_PROMPT = 64  # tokens, where answers are generated


@dataclass(frozen=True)
class Options:
    """What to compare."""

    count: int = option(6, "Blocks to leave out.", minimum=1)
    batches: Sequence[int] = option((1, 8), "Requests at once where answers are generated.", minimum=1)
    prompt_tokens: int = option(512, "Tokens of the prompt that is measured alone.", minimum=1)
    output_tokens: int = option(64, "New tokens of a request.", minimum=2)
    dtype: str = option_of(EngineConfig, "dtype")
    device: str = option_of(EngineConfig, "device")


def narrow_config(config: Mapping[str, Any], count: int) -> tuple[dict[str, Any], float]:
    """`config` with MLPs so narrow that the parameters of `count` blocks are gone; and their share. ConfigError."""
    width, hidden, heads = config["intermediate_size"], config["hidden_size"], config["num_attention_heads"]
    head_dim, kv_heads = config.get("head_dim") or hidden // heads, config.get("num_key_value_heads") or heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    block = attention + 3 * hidden * width
    wanted = (block * (1 - count / config["num_hidden_layers"]) - attention) / (3 * hidden)
    narrow = round(wanted / _WIDTH_STEP) * _WIDTH_STEP
    if narrow < _WIDTH_STEP:
        raise ConfigError(f"{count} blocks are more parameters than the MLPs have; give a smaller --count")
    return {**config, "intermediate_size": narrow}, 1 - (attention + 3 * hidden * narrow) / block


def main(model: Model, options: Options, turns: TurnOptions, output: OutputOptions) -> None:
    """Compare the speed of a model without some blocks with that of a narrower one."""
    resolved = resolve_model(model)
    spec = resolve_spec(resolved.path)
    if not spec.gated or options.count > spec.num_blocks - 2:
        raise ConfigError(
            f"--count {options.count}: {resolved.name} must have a gated MLP and {options.count + 2} blocks or more"
        )
    context = max(options.prompt_tokens + 1, _SHORT_PROMPT + options.output_tokens)
    engine: dict[str, Any] = {
        "dtype": options.dtype, "device": options.device, "prefix_caching": False, "max_model_len": context,
        "max_num_seqs": max(options.batches),
        "max_num_batched_tokens": max(context, _SHORT_PROMPT * max(options.batches)),
    }  # fmt: skip
    ours = LLM(model, stand_in_map(resolved.name, spec.num_blocks, None), (0, options.count), **engine)
    raw = json.loads((resolved.path / "config.json").read_text("utf-8"))
    config, share = narrow_config(raw, options.count)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config), "utf-8")
        narrow = LLM(folder, load_format="dummy", **engine)
    token_ids = plain_token_ids(ours.engine)

    def generate(llm: LLM, depth: int, batch: int, num_prompt: int, num_output: int) -> Run:
        def once(turn: int) -> Mapping[str, float]:
            rng = random.Random(f"{turns.seed} {batch} {turn}")
            prompts = [rng.choices(token_ids, k=num_prompt) for _ in range(batch)]
            outputs = llm.generate(prompts, greedy_params(num_output), depth)
            seconds = max(each.timings.finished or 0.0 for each in outputs if each.timings)
            seconds -= min(each.timings.arrival for each in outputs if each.timings)
            return {"seconds": seconds}

        return once

    tokens, prompt, length = options.output_tokens, _SHORT_PROMPT, options.prompt_tokens
    loads = {f"prompt 1 × {length}": (1, length, 1)}
    loads |= {
        f"generate {batch} × {tokens} after {prompt}": (batch, prompt, tokens) for batch in options.batches
    }
    subjects = {"dense": (ours, 0), "blocks": (ours, options.count), "width": (narrow, 0)}
    shares = {"blocks": options.count / spec.num_blocks, "width": share}
    facts = {name: {"of parameters removed": gone} for name, gone in shares.items()}
    cases = [
        Case(name, {each: generate(*subjects[each], *load) for each in subjects}, "dense", facts=facts)
        for name, load in loads.items()
    ]
    found = measure(cases, turns, on_turn=lambda so_far, case: say(so_far.line(case)))
    environment = describe_environment(ours.engine, shown_command(sys.argv, model))
    settings = {"model": resolved.name, "count": options.count}
    output.show(Result("method-speed", environment, settings, found.measurements(), complete=found.complete))


if __name__ == "__main__":
    run(main)
