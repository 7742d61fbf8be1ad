"""What /v1/models tells as measured: from result files, the operator's and the package's, and from the layer map."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import TypedDict

from sleb.errors import ConfigError

if TYPE_CHECKING:
    from sleb.engine.served_model import ServedModel
    from sleb.layer_map.layer_map import LayerMap

# Which of several tests of a depth gives its speedup: the first that was run, at the smallest batch.
_TESTS = ("decode", "generate", "prompt")
_GENERATED = "self"  # by the model, another text with every seed
_OTHER_SPLITS = {"wikitext2", "c4"}  # `sleb eval` takes other splits of these than a search
_QUESTIONS: dict[str, Literal["right", "right_sampled"]] = {
    "right": "right",
    "right sampled": "right_sampled",
}  # metrics of `sleb eval --questions`

_MEASURE = "`sleb prune --held-out FILE`, or a result of `sleb eval --text FILE --json` as --bench-result"


class Perplexity(TypedDict):
    """Of the full model and of a depth, on the text that `dataset` names; held_out: it took no part in the search."""

    dense: float
    pruned: float
    dataset: str
    held_out: bool


class Questions(TypedDict):
    """How many of `of` plain questions with known answers are answered rightly: greedily, and the mean of `samples`.

    sampling: the values that the samples were drawn with. command: what measured it.
    """

    of: int
    right: float | None
    right_sampled: float | None
    samples: int
    sampling: dict[str, float]
    command: str


def perplexities(layer_map: LayerMap, results: Sequence[BenchResult], depth: int) -> list[Perplexity]:
    """What is known of `depth`, the texts that took no part in the search first; those of the map before the files'."""
    calibration = layer_map.calibration_losses.record
    told: list[Perplexity] = []
    for text in (*layer_map.held_out, layer_map.calibration_losses):
        record, dense, pruned = text.record, text.perplexity(0), text.perplexity(depth)
        if record.source and dense is not None and pruned is not None and math.isfinite(dense + pruned):
            is_unseen = not calibration.sources & (record.sources - {_GENERATED})
            held_out = (
                is_unseen
                and text in layer_map.held_out
                and record.token_hash != (calibration.token_hash or "")
            )
            told.append({"dense": dense, "pruned": pruned, "dataset": record.source, "held_out": held_out})
    told += [found for each in results if (found := each.perplexities(depth, calibration.sources))]
    return sorted(told, key=lambda each: not each["held_out"])


def why_unknown(told: Sequence[Perplexity]) -> str | None:
    """Why no perplexity of these is one to go by; None where the first is."""
    if told and told[0]["held_out"]:
        return None
    if not told:
        return f"not known of any text; {_MEASURE} tells it"
    names = ", ".join(dict.fromkeys(each["dataset"] for each in told))
    return f"known on the calibration text alone ({names}), which flatters; {_MEASURE} tells of another"


def perplexity_increase(layer_map: LayerMap, results: Sequence[BenchResult], depth: int) -> float | None:
    """How much more perplexity than the full model `depth` has, as a share, on the text to go by (`why_unknown`)."""
    told = perplexities(layer_map, results, depth)
    return None if why_unknown(told) else told[0]["pruned"] / told[0]["dense"] - 1


@dataclass(frozen=True)
class BenchResult:
    """A result file of `sleb bench throughput` or `sleb eval`: rows with `depth`, and `speedup` or `perplexity`.

    rows: dictionaries, each with an integer `depth`. removed: the units that the deepest of them lacks. questions: by
    depth.
    """

    path: str
    num_blocks: int
    fingerprint: str | None
    removed: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    device: str | None
    dtype: str | None
    dataset: str | None
    questions: Mapping[int, Questions]

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
                questions=_questions(content),
            )
            valid = all(type(row["depth"]) is int for row in rows)
        except (AttributeError, KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            raise ConfigError(
                f"--bench-result {path} is no result of `sleb bench throughput` or `sleb eval`; "
                "make one with `sleb bench throughput MODEL --json FILE`"
            )
        return result

    def check(self, model: ServedModel) -> None:
        """Raises ConfigError unless what was measured is what is served."""
        layer_map, depths = model.layer_map, {row["depth"] for row in self.rows}
        fingerprints = {self.fingerprint, layer_map.fingerprint} - {None}
        common = max((tier.depth for tier in model.tiers if tier.depth in depths), default=0)
        removed = tuple(str(unit) for unit in layer_map.removed[:common])
        if self.num_blocks != layer_map.num_blocks or len(fingerprints) > 1:
            raise ConfigError(
                f"--bench-result {self.path} was measured on another model; leave it out, or measure "
                f"{model.model_name}"
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

    def perplexities(self, depth: int, calibration: frozenset[str]) -> Perplexity | None:
        """Of one text, or of several together; None unless the file has both depths and names the text.

        calibration: the names of what the search saw.
        """
        found = {row["depth"]: row["perplexity"] for row in self.rows if row.get("perplexity") is not None}
        if self.dataset is None or 0 not in found or depth not in found:
            return None
        held_out = not calibration & (set(self.dataset.split("+")) - _OTHER_SPLITS)
        return {"dense": found[0], "pruned": found[depth], "dataset": self.dataset, "held_out": held_out}


def _questions(content: dict[str, Any]) -> dict[int, Questions]:
    """What the rows of `sleb eval --questions` say, by depth. Raises KeyError, TypeError or ValueError for others."""
    settings, found = content.get("settings", {}), dict[int, Questions]()
    for row in content["rows"]:
        name = _QUESTIONS.get(row.get("metric", ""))
        if name is not None:
            told = found.setdefault(
                row["depth"],
                {
                    "of": int(settings["questions"]),
                    "right": None,
                    "right_sampled": None,
                    "samples": int(settings.get("question_samples") or 0),
                    "sampling": {each: float(value) for each, value in settings.get("sampling", {}).items()},
                    "command": str(content["environment"]["command"]),
                },
            )
            told[name] = float(row["value"])
    return found
