"""Ways to leave parts of a model out, side by side: what they cost in quality, at speeds that are measured.

    python research/compare.py MODEL --calibration FILE --text FILE --text FILE \\
        --maps sleb.json,kl.json,patched.json --rules shortgpt,run,replaceme --depths 3,6 --json FILE

A way is a layer map, with patches or without, or a published rule that chooses here (`rules`):

    shortgpt    the blocks of least influence
    run         the contiguous run of least angular distance
    replaceme   that run, and the down projection before it followed by ReplaceMe's map: nothing runs in its place

With `--formats bfloat16,int4,awq` each map is a way in each of them; awq: of four bits by `awq`, quantised here.

Perplexities, greedy answers and lm-eval's tasks are those of `sleb eval`. Speed is measured in turns: a token of one
request, and a prompt. Depths of the same parts and the same patches are one subject of it, whatever the way.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

from awq import quantise
from common import TextOptions, run, say, text_windows
from rules import contiguous_run, replace_me, shortgpt, write_replaced

from sleb.benchmarks.environment import describe_environment, shown_command
from sleb.benchmarks.plots import Panel, Point, draw_lines
from sleb.benchmarks.quality.evaluate import run_eval
from sleb.benchmarks.quality.options import EvalOptions
from sleb.benchmarks.record import Measurement, Result
from sleb.benchmarks.throughput import decode_seconds, greedy_params, plain_token_ids
from sleb.benchmarks.turns import Case, Run, TurnOptions, measure
from sleb.cli.bench.shared import OutputOptions
from sleb.cli.options import Model
from sleb.engine.config import EngineConfig
from sleb.engine.llm import LLM
from sleb.engine.model.scoring import DecoderScorer
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.models.resolve import resolve_model
from sleb.options import option, option_of

RULES = ("shortgpt", "run", "replaceme")
_PROMPT, _SHORT_PROMPT = 500, 64  # tokens: where a prompt is measured, and where decoding is


@dataclass(frozen=True, kw_only=True)
class Options(TextOptions):
    """What to compare."""

    maps: Sequence[Path] = option(
        MISSING, "Layer maps, each a way of its file's name.", commas=True, metavar="FILE"
    )
    formats: Sequence[str] = option(
        (),
        "Formats of weights that each map is a way in, as for --weights; or awq.",
        commas=True,
        unset="auto",
    )
    group_size: int = option(64, "Inputs of a group of awq.", minimum=32)
    rules: Sequence[str] = option((), "Rules: shortgpt, run, replaceme.", commas=True, unset="none")
    depths: Sequence[int] = option((3, 6), "Depths to compare; of the maps, those they have.", minimum=1)
    text: Sequence[str] = option(MISSING, "A text that no way has seen; repeatable.")
    text_windows: int = option(4, "Windows of each text.", minimum=1)
    output_tokens: int = option(64, "Tokens of an answer, and of what is timed.", minimum=2)
    tasks: Sequence[str] = option_of(EvalOptions, "tasks")
    limit: int | None = option_of(EvalOptions, "limit")
    include_path: Path | None = option_of(EvalOptions, "include_path")
    lm_eval: str | None = option_of(EvalOptions, "lm_eval")
    served_dtype: str = option_of(EngineConfig, "dtype", flags=("--served-dtype",))
    plot: Path | None = option(None, "Draw to this name with .png and .svg.")

    def check(self) -> None:
        """ConfigError for what can be seen before the model is loaded."""
        if unknown := set(self.rules) - set(RULES):
            raise ConfigError(f"--rules {', '.join(sorted(unknown))}: known are {', '.join(RULES)}")
        if len({path.stem for path in self.maps} | set(self.rules)) < len(self.maps) + len(self.rules):
            raise ConfigError("--maps: give files of different names, and none of a rule's")


@dataclass(frozen=True)
class Way:
    """Depths of one layer map of one model folder, called `name`."""

    name: str
    model: str
    layer_map: Path
    depths: tuple[int, ...]
    form: str = ""  # one of --formats

    @property
    def weights(self) -> str:
        """As for --weights."""
        return self.form if self.form not in ("", "awq") else "auto"

    @property
    def dense(self) -> str:
        """What the whole model is called in this form."""
        return f"dense {self.form}".strip()

    @property
    def removed(self) -> list[str]:
        """What its deepest depth leaves out, in order."""
        return list(map(str, LayerMap.load(self.layer_map).removed[: self.depths[-1]]))

    def shape(self, depth: int) -> tuple[Any, ...]:
        """What its speed depends on: how many of each part are gone, and the runs and size of the patches."""
        layer_map = LayerMap.load(self.layer_map)
        parts = [part for unit in layer_map.removed[:depth] for _, part in unit.sublayers]
        patches = layer_map.patches
        weights = 0 if patches is None else patches.num_parameters(depth)
        num = 0 if patches is None else len(patches.at(depth))
        return parts.count("attention"), parts.count("mlp"), num, weights, self.form


def ways_of(model: str, options: Options, folder: Path) -> Iterator[Way]:
    """Those of the maps, then those of the rules, whose maps and models are written to `folder`."""
    for path in options.maps:
        depths = tuple(depth for depth in options.depths if depth <= LayerMap.load(path).max_depth)
        if not depths:
            raise ConfigError(f"--maps {path} has none of the depths {list(options.depths)}")
        for form in options.formats or ("",):
            changed = str(folder / "awq") if form == "awq" else model
            yield Way(f"{path.stem} {form}".strip(), changed, path, depths, form)
    if not options.rules and "awq" not in options.formats:
        return
    scorer = DecoderScorer.load(model, dtype=options.dtype, device=options.device)
    [windows] = text_windows(model, scorer, options.pruning())
    if "awq" in options.formats:
        say("quantising")
        quantise(resolve_model(model).path, windows, folder / "awq", options.group_size)
    for rule in options.rules:
        say(f"choosing by {rule}")
        choose = (shortgpt if rule == "shortgpt" else contiguous_run)(scorer, windows)
        for depth in options.depths:
            units, changed = choose(depth), model
            if rule == "replaceme":
                changed = str(folder / f"replaced-{depth}")
                transform = replace_me(scorer, windows, units)
                write_replaced(resolve_model(model).path, Path(changed), units[0].block - 1, transform)
            path = folder / f"{rule}-{depth}.json"
            LayerMap(scorer.model_name, None, scorer.num_blocks, tuple(units)).save(path)
            yield Way(rule, changed, path, (depth,))


def quality(way: Way, options: Options, *, dense: bool) -> Iterator[Measurement]:
    """Perplexities, answers and tasks of a way's depths; of the dense model too, where it is asked for."""
    asked = EvalOptions(
        way.model, way.layer_map, way.depths, text=options.text, seqlen=options.seqlen,
        windows=options.text_windows, output_tokens=options.output_tokens, tasks=options.tasks,
        limit=options.limit, include_path=options.include_path, lm_eval=options.lm_eval,
        dtype=options.served_dtype, device=options.device, weights=way.weights,
    )  # fmt: skip
    found = run_eval(asked, on_progress=lambda what, done, total: None)
    if problem := found.settings.get("problem"):
        say(f"{way.name}: {problem}")
    for each in found.measurements:
        name = way.dense if each.subject == "depth 0" else way.name
        left_out = each.metric in ("same token", "KL", "mean tokens", "early", "identical")
        if left_out or "+" in each.case or (name == way.dense and not dense):  # +: of all texts together
            continue
        # Depth 0 of a model that ReplaceMe changed is not the dense one.
        ratio = None if way.name == "replaceme" else each.ratio
        metric = each.metric if "answers" in each.case else f"{Path(each.case).stem} {each.metric}"
        yield replace(each, case=name, metric=metric, ratio=ratio, facts={})


def speed(
    ways: Sequence[Way], options: Options, turns: TurnOptions
) -> tuple[list[Measurement], dict[str, Any]]:
    """Tokens a second of every depth of every way beside the dense model's, and what they were measured on."""
    engines: dict[str, tuple[LLM, int]] = {}
    names: dict[tuple[Any, ...], str] = {}
    for way in ways:
        new = [depth for depth in way.depths if way.shape(depth) not in names]
        if engines and not new:
            continue
        say(f"loading {way.name}")
        llm = LLM(
            way.model, way.layer_map, (0, *way.depths), dtype=options.served_dtype, device=options.device,
            weights=way.weights, prefix_caching=False, max_num_seqs=1, max_num_batched_tokens=_PROMPT,
            max_model_len=max(_PROMPT, _SHORT_PROMPT + options.output_tokens) + 1,
        )  # fmt: skip
        engines.setdefault(way.dense, (llm, 0))
        for depth in new:
            names[way.shape(depth)] = f"{way.name} {depth}"
            engines[f"{way.name} {depth}"] = (llm, depth)
    baseline = ways[0].dense
    engine = engines[baseline][0].engine
    token_ids = plain_token_ids(engine)

    def timed(llm: LLM, depth: int, num_prompt: int, num_output: int) -> Run:
        def once(turn: int) -> Mapping[str, float]:
            prompt = random.Random(f"{turns.seed} {turn}").choices(token_ids, k=num_prompt)
            if num_output > 1:
                seconds = decode_seconds(llm.engine, [prompt], greedy_params(num_output), depth)
                return {"decode tokens/s": (num_output - 1) / seconds}
            [output] = llm.generate([prompt], greedy_params(1), depth)
            assert output.timings is not None and output.timings.finished is not None
            return {"prompt tokens/s": num_prompt / (output.timings.finished - output.timings.arrival)}

        return once

    loads = {"decode": (_SHORT_PROMPT, options.output_tokens), "prompt": (_PROMPT, 1)}
    cases = [
        Case(name, {each: timed(*engines[each], *load) for each in engines}, baseline)
        for name, load in loads.items()
    ]
    found = measure(cases, turns, on_turn=lambda so_far, case: say(so_far.line(case))).measurements()
    rows = [
        replace(each, case=each.subject, subject="depth 0", facts={})
        for each in found
        if each.subject in {way.dense for way in ways}
    ]
    for way, depth in ((each, depth) for each in ways for depth in each.depths):
        same = names[way.shape(depth)]
        facts = {} if same == f"{way.name} {depth}" else {"speed of": same}
        rows += [
            replace(each, case=way.name, subject=f"depth {depth}", facts=facts)
            for each in found
            if each.subject == same
        ]
    return rows, describe_environment(engine, shown_command(sys.argv, ways[0].model))


def draw(result: Result, stem: Path) -> None:
    """Each text's perplexity against the measured speed of a token, one line a way."""
    speeds = {
        each.key[:2]: each.ratio.estimate if each.ratio else 1.0
        for each in result.measurements
        if each.metric == "decode tokens/s"
    }
    panels: dict[str, dict[str, list[Point]]] = {}
    for each in result.measurements:
        if each.metric.endswith("perplexity") and each.value is not None:
            lines = panels.setdefault(each.metric, {})
            lines.setdefault(each.case, []).append((speeds[each.key[:2]], each.value, None))
    x_label = "decoding beside the dense model, measured (higher is better)"
    drawn = [Panel(name, "perplexity (lower is better)", lines, x_label) for name, lines in panels.items()]
    draw_lines(stem, f"{result.settings['model']}: what to leave out", drawn, (".png", ".svg"))


def main(model: Model, options: Options, turns: TurnOptions, output: OutputOptions) -> None:
    """Compare layer maps and published rules: quality of two texts and of answers against measured speed."""
    with tempfile.TemporaryDirectory() as folder:
        ways = list(ways_of(model, options, Path(folder)))
        found: list[Measurement] = []
        for number, way in enumerate(ways):
            say(f"{way.name}, depths {', '.join(map(str, way.depths))}")
            first = all(way.form != other.form for other in ways[:number])
            found += quality(way, options, dense=first)
        measured, environment = speed(ways, options, turns)
        removed = {f"{way.name} {way.depths[-1]}": way.removed for way in ways}
    order = {each.key[:2]: None for each in found}
    rows = [each for key in order for each in (*found, *measured) if each.key[:2] == key]
    settings = {
        "model": resolve_model(model).name, "depths": list(options.depths), "seqlen": options.seqlen,
        "windows": options.windows, "text_windows": options.text_windows, "removed": removed,
    }  # fmt: skip
    result = Result("compare", environment, settings, rows)
    if options.plot is not None:
        draw(result, options.plot)
    output.show(result)


if __name__ == "__main__":
    run(main)
