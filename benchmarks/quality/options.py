"""What `sleb eval` is asked to measure, checked before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from sleb.engine.config import EngineConfig
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.options import check_values, option, option_of

SCHEMES = ("sleb", "lm-eval")
QUESTION_SAMPLES = 20
_TEXTS, _ANSWERS, _TASKS = "Text", "Answers", "lm-eval"


@dataclass(frozen=True)
class EvalOptions:
    """A model, the depths to compare with depth 0, and by what. `check` raises ConfigError."""

    model: str
    layer_map: LayerMap | str | Path | None = option_of(EngineConfig, "layer_map")
    depths: Sequence[int] | None = option(
        None,
        "Depths to compare, as 0,2,4,6; 0 is always there.",
        unset="what the map recommends, or half its order",
        minimum=0,
    )
    _: KW_ONLY
    text: Sequence[str] = option(
        (), "Text for perplexity: a file, wikitext2 or c4; repeatable.", unset="no perplexity", group=_TEXTS
    )
    windows_like: str = option(
        "sleb",
        "sleb: as in the paper; lm-eval: rolling, after a prefix token.",
        choices=SCHEMES,
        group=_TEXTS,
    )
    seqlen: int | None = option(
        None, "Tokens of a window.", unset="2048, or the model's context", minimum=1, group=_TEXTS
    )
    windows: int | None = option(None, "Windows of each text.", unset="all", minimum=1, group=_TEXTS)
    generate: bool = option(True, "Compare greedy answers to some prompts.", group=_ANSWERS)
    prompts: Path | None = option(
        None, "Text file with a prompt a line.", unset="16 built in", group=_ANSWERS
    )
    output_tokens: int = option(128, "New tokens of an answer at most.", minimum=1, group=_ANSWERS)
    questions: bool = option(False, "Ask twenty plain questions with known answers.", group=_ANSWERS)
    question_samples: int | None = option(
        None,
        "Ask each so many times with the model's sampling defaults too; 0: greedily alone.",
        unset=str(QUESTION_SAMPLES),
        minimum=0,
        group=_ANSWERS,
    )
    tasks: Sequence[str] = option(
        (), "Tasks of lm-eval, as arc_easy,piqa; needs lm_eval[api].", unset="none", commas=True, group=_TASKS
    )
    limit: int | None = option(None, "Documents of each task.", unset="all", minimum=1, group=_TASKS)
    include_path: Path | None = option(None, "Folder with more lm-eval tasks.", unset="none", group=_TASKS)
    lm_eval: str | None = option(
        None, "lm_eval of another environment.", unset="beside this Python, or on PATH", group=_TASKS
    )
    dtype: str = option_of(EngineConfig, "dtype")
    weights: str = option_of(EngineConfig, "weights")
    device: str = option_of(EngineConfig, "device")
    threads: int | None = option_of(EngineConfig, "threads")

    def check(self) -> None:
        """Raises ConfigError for what can be seen to be wrong before the model is loaded."""
        check_values(self)
        if self.windows_like == "sleb" and self.seqlen == 1:
            raise ConfigError(
                "--seqlen is 1; a window's first token is not predicted, so it must be at least 2"
            )
        if not (self.text or self.generate or self.questions or self.tasks):
            raise ConfigError(
                "there is nothing to measure; name a --text, --questions or --tasks, or leave out --no-generate"
            )
        needs = {
            "leave out --no-generate": (self.generate, ("prompts",)),
            "name a --text": (self.text, ("windows", "seqlen")),
            "ask --questions": (self.questions, ("question_samples",)),
            "name --tasks": (self.tasks, ("limit", "include_path", "lm_eval")),
        }
        for remedy, (used, names) in needs.items():
            for name in names:
                if getattr(self, name) is not None and not used:
                    flag = f"--{name.replace('_', '-')}"
                    raise ConfigError(f"{flag} has nothing to apply to; {remedy}, or leave it out")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ConfigError(f"--include-path {self.include_path} is no folder; name one with lm-eval tasks")

    def chosen_depths(self, layer_map: LayerMap, model: str) -> tuple[int, ...]:
        """0 and those asked for, ascending, each once. Raises ConfigError for one that the map lacks."""
        for depth in self.depths or ():
            if depth > layer_map.max_depth:
                has = f"the layer map has depths 0 to {layer_map.max_depth}"
                if not layer_map.max_depth:
                    has = f"without a layer map {model} has depth 0 alone"
                raise ConfigError(
                    f"depth {depth} is not there: {has}; name another in --depths, or a longer --layer-map"
                )
        return tuple(sorted({0, *((layer_map.measured_depth,) if self.depths is None else self.depths)}))
