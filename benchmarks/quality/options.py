"""What `sleb eval` is asked to measure, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sleb.benchmarks.quality.texts import SCHEMES
from sleb.benchmarks.workloads import choose_depths
from sleb.engine.config import EngineConfig
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap


@dataclass(frozen=True)
class QualityOptions:
    """A model, the depths to compare with depth 0, and by what.

    Attributes:
        depths: None: the one that the map recommends. Depth 0 is always among them.
        texts: text files, or "wikitext2"; none: no perplexity.
        windows_like: a scheme of `sleb.benchmarks.quality.texts`. seqlen: tokens of a window; None: 2,048, or what the
            model holds. windows: of each text; None: all.
        generate: whether to compare answers. prompts: a file of them, one a line; None: those built in.
            output_tokens: new tokens of an answer at most.
        tasks: of lm-eval; limit: documents of each, None: all; include_path: a folder with more tasks; lm_eval: its
            executable, None: the one beside this Python or on the PATH.
        Others: as in EngineConfig.
    """

    model: str
    layer_map: LayerMap | str | None = None
    depths: Sequence[int] | None = None
    texts: Sequence[str] = ()
    windows_like: str = "sleb"
    seqlen: int | None = None
    windows: int | None = None
    generate: bool = True
    prompts: Path | None = None
    output_tokens: int = 128
    tasks: Sequence[str] = ()
    limit: int | None = None
    include_path: Path | None = None
    lm_eval: str | None = None
    dtype: str = "auto"
    weights: str = "auto"
    device: str = "auto"
    threads: int | None = None

    def check(self) -> None:
        """Raises ConfigError for what can be seen to be wrong before the model is loaded."""
        EngineConfig(self.model, dtype=self.dtype, weights=self.weights, threads=self.threads).check()
        if self.windows_like not in SCHEMES:
            raise ConfigError(
                f"--windows-like '{self.windows_like}' is not known; choose {' or '.join(SCHEMES)}"
            )
        least = 2 if self.windows_like == "sleb" else 1
        numbers = (
            ("--seqlen", self.seqlen, least),
            ("--windows", self.windows, 1),
            ("--output-tokens", self.output_tokens, 1),
            ("--limit", self.limit, 1),
        )
        for name, number, smallest in numbers:
            if number is not None and number < smallest:
                raise ConfigError(f"{name} is {number}; it must be an integer of at least {smallest}")
        for depth in self.depths or ():
            if depth < 0:
                raise ConfigError(f"depth {depth} must be an integer of at least 0")
        self._check_parts()

    def _check_parts(self) -> None:
        """Nothing that was asked for may be passed over in silence."""
        if not (self.texts or self.generate or self.tasks):
            raise ConfigError(
                "there is nothing to measure; name a --text or --tasks, or leave out --no-generate"
            )
        needs = (
            ("--prompts", self.prompts, self.generate, "leave out --no-generate"),
            ("--windows", self.windows, bool(self.texts), "name a --text"),
            ("--seqlen", self.seqlen, bool(self.texts), "name a --text"),
            ("--limit", self.limit, bool(self.tasks), "name --tasks"),
            ("--include-path", self.include_path, bool(self.tasks), "name --tasks"),
            ("--lm-eval", self.lm_eval, bool(self.tasks), "name --tasks"),
        )
        for name, value, used, remedy in needs:
            if value is not None and not used:
                raise ConfigError(f"{name} has nothing to apply to; {remedy}, or leave it out")
        if self.include_path is not None and not self.include_path.is_dir():
            raise ConfigError(f"--include-path {self.include_path} is no folder; name one with lm-eval tasks")


def ascending_depths(depths: Sequence[int] | None, layer_map: LayerMap, model: str) -> tuple[int, ...]:
    """0 and the depths asked for, ascending, each once. Raises ConfigError for one that the map lacks."""
    return tuple(sorted({0, *choose_depths(depths, layer_map, model)}))
