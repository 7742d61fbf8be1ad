"""Measured speedups and perplexities that /v1/models tells: from result files, and from the layer map itself."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb.errors import ConfigError

if TYPE_CHECKING:
    from sleb.engine.engine import Engine
    from sleb.layer_map.layer_map import LayerMap

# Which of several tests of a depth gives its speedup: the first that was run, at the smallest batch.
_TESTS = ("decode", "generate", "prompt")


def perplexities(layer_map: LayerMap, depth: int) -> dict[str, Any] | None:
    """Perplexity of the dense model and at `depth` on the map's held-out text, else on its calibration text.

    None unless all of it is known, the text's name too.
    """
    for held_out, record in ((True, layer_map.held_out), (False, layer_map.calibration)):
        dense, pruned = (layer_map.perplexity(each, held_out=held_out) for each in (0, depth))
        if record is None or not record.source or dense is None or pruned is None:
            continue
        if math.isfinite(dense) and math.isfinite(pruned):
            return {"dense": dense, "pruned": pruned, "dataset": record.source}
    return None


@dataclass(frozen=True)
class BenchResult:
    """A result file of `sleb bench throughput` or `sleb eval`: rows with `depth`, and `speedup` or `perplexity`.

    rows: dictionaries, each with an integer `depth`. removed: the units that the deepest of them lacks.
    """

    path: str
    num_blocks: int
    fingerprint: str | None
    removed: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    device: str | None
    dtype: str | None
    dataset: str | None

    @classmethod
    def load(cls, path: str) -> BenchResult:
        """Reads a file. Raises ConfigError, which names it, for one that cannot be read or is none."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"it is not JSON: {error}"
            raise ConfigError(f"--bench-result {path} cannot be read: {reason}") from None
        try:
            environment, settings = content.get("environment", {}), content.get("settings", {})
            model = content.get("model") or settings["model"]
            # A batch of several depths is of none, the control repeats the full model, the paper's rows are of others.
            left_out = ("control", "mixed", "paper")
            rows = tuple(row for row in content["rows"] if row.get("variant") not in left_out)
            result = cls(
                path=path,
                num_blocks=model["num_blocks"],
                fingerprint=model.get("fingerprint"),
                removed=tuple(map(str, model["removed"])),
                rows=rows,
                device=environment.get("gpu") or environment.get("cpu") or environment.get("device"),
                dtype=environment.get("dtype"),
                dataset=settings.get("dataset"),
            )
            valid = all(type(row["depth"]) is int for row in rows)
        except (AttributeError, KeyError, TypeError):
            valid = False
        if not valid:
            raise ConfigError(
                f"--bench-result {path} is no result of `sleb bench throughput` or `sleb eval`; "
                "make one with `sleb bench throughput MODEL --json FILE`"
            )
        return result

    def check(self, engine: Engine) -> None:
        """Raises ConfigError unless what was measured is what `engine` serves."""
        layer_map, depths = engine.layer_map, {row["depth"] for row in self.rows}
        fingerprints = {self.fingerprint, layer_map.fingerprint} - {None}
        common = max((tier.depth for tier in engine.tiers if tier.depth in depths), default=0)
        removed = tuple(str(unit) for unit in layer_map.removed[:common])
        if self.num_blocks != layer_map.num_blocks or len(fingerprints) > 1:
            raise ConfigError(
                f"--bench-result {self.path} was measured on another model; leave it out, or measure "
                f"{engine.model_name}"
            )
        if self.removed[:common] != removed:
            raise ConfigError(
                f"--bench-result {self.path} was measured with blocks {', '.join(self.removed)} removed, but "
                f"this server removes {', '.join(removed)}; leave it out, or measure with the same layer map"
            )

    def speedup(self, depth: int) -> dict[str, Any] | None:
        """How much faster `depth` was than the full model, and on which device; None if that was not measured."""
        rows = [
            row
            for row in self.rows
            if row["depth"] == depth
            and row.get("baseline_depth") == 0
            and row.get("test") in _TESTS
            and depth
        ]
        if not rows:
            return None
        measured = [{name: row.get(name) for name in ("test", "batch", "speedup")} for row in rows]
        measured.sort(key=lambda row: (_TESTS.index(row["test"]), row["batch"]))
        first = measured[0]
        return {
            "value": first["speedup"],
            "test": first["test"],
            "batch": first["batch"],
            "device": self.device,
            "dtype": self.dtype,
            "measured": measured,
        }

    def perplexities(self, depth: int) -> dict[str, Any] | None:
        """As the function of that name; None unless the file has both depths."""
        found = {row["depth"]: row["perplexity"] for row in self.rows if row.get("perplexity") is not None}
        if 0 not in found or depth not in found:
            return None
        return {"dense": found[0], "pruned": found[depth], "dataset": self.dataset}
