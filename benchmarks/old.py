"""Result files: those of now, and those that commands wrote before every result was made of measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sleb.benchmarks.record import Measurement, Ratio, Result, read_json
from sleb.errors import ConfigError

Document = Mapping[str, Any]

# Kind -> keys of a file, or of one of its rows, by which a file is known that does not say its kind.
_SIGNS = {
    "peers": ("weight_format", "peer_rate"),
    "serve": ("output_throughput",),
    "throughput": ("tokens_per_second", "prompt_tokens", "speedup"),
    "weight-formats": ("implementation", "weights"),
    "quality": ("depth", "perplexity", "generation"),
    "search": ("summary", "runs"),
    "prune": ("losses", "removed", "calibration"),
    "mixed": ("depths", "streams", "ratio"),
    "http-overhead": ("streams", "ratio"),
}
_SERVE = {
    "tokens/s": "output_throughput",
    "requests/s": "request_throughput",
    "TTFT p50 ms": "median_ttft_ms",
    "TPOT p50 ms": "median_tpot_ms",
    "TTFT p99 ms": "p99_ttft_ms",
    "TPOT p99 ms": "p99_tpot_ms",
    "ITL p99 ms": "p99_itl_ms",
    "latency p50 ms": "median_e2el_ms",
    "latency p99 ms": "p99_e2el_ms",
    "goodput requests/s": "request_goodput",
}
_TEXTS = {
    "same token": "agreement",
    "KL": "kl",
    "word perplexity": "word_perplexity",
    "byte perplexity": "byte_perplexity",
    "bits per byte": "bits_per_byte",
}


def load(path: Path) -> Result:
    """The result in a file of either form. Raises ConfigError for a file that is neither, naming it."""
    return read_result(read_json(path), str(path))


def read_result(document: Document, name: str) -> Result:
    """The result in a JSON object of either form. Raises ConfigError for what is neither, with `name`."""
    try:
        if isinstance(document.get("notes"), list):  # which no old form has
            return _checked(Result.of_document(document))
        kind = document.get("kind") or _kind_of(document)
        settings = dict(document.get("settings") or {})
        if document.get("model"):
            settings["model"] = document["model"]
        return _checked(
            Result(
                "eval" if kind == "quality" else kind,
                dict(document.get("environment") or {}),
                settings,
                list(_READERS[kind](document)),
                _notes(document),
                bool(document.get("complete", True)),
            )
        )
    except (
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        ArithmeticError,
        LookupError,
        StopIteration,
    ) as error:
        raise ConfigError(
            f"{name} is no result of sleb; give a file that `sleb bench --json` or `sleb eval --json` wrote"
        ) from error


def _checked(result: Result) -> Result:
    """The result, whose figures are numbers and each there once; ValueError or TypeError if not."""
    for each in result.measurements:
        ratio = each.ratio or Ratio(1.0)
        figures = (each.value, *(each.spread or ()), ratio.estimate, ratio.low, ratio.high)
        if not all(math.isfinite(figure) for figure in figures if figure is not None):
            raise ValueError(f"{each.key} has a figure that is no finite number")
        if not all(isinstance(part, str) for part in each.key):
            raise TypeError(f"{each.key} is no name")
    if len({each.key for each in result.measurements}) < len(result.measurements):
        raise ValueError("a figure is there twice")
    return result


def _notes(document: Document) -> list[str]:
    servers = document.get("servers") or {}
    told = [f"{name}: {server['owned_by']} {server['version']}" for name, server in servers.items()]
    return [*told, *(str(note) for note in (document.get("conditions") or {}).get("notices", ()))]


def _kind_of(document: Document) -> str:
    rows = document.get("rows") or [{}]
    known = {*document, *rows[0], *(document.get("settings") or {})}
    return next(kind for kind, signs in _SIGNS.items() if known.issuperset(signs))


def _ratio(row: Document, name: str) -> Ratio | None:
    """None for a baseline, whose ratio is exactly 1 by definition."""
    if row.get(name) is None or row.get("verdict") == "baseline":
        return None
    return Ratio(row[name], row.get(f"{name}_low"), row.get(f"{name}_high"))


def _spread(row: Document, name: str) -> tuple[float, float] | None:
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return None if low is None or high is None else (low, high)


def _interval(row: Document, name: str) -> tuple[float, float] | None:
    found = row.get(f"{name}_interval")
    return None if found is None else (found[0], found[1])


def _throughput(document: Document) -> Iterator[Measurement]:
    kept = ("test", "depth", "batch", "prompt_tokens", "output_tokens", "ideal_speedup", "roofline_share")
    for row in document["rows"]:
        work = f"{row['output_tokens']} after {row['prompt_tokens']}"
        case = f"{row['test']} {row['batch']} × {row['prompt_tokens'] if row['test'] == 'prompt' else work}"
        subject = row.get("variant") or f"depth {row['depth']}"
        facts = {name: row[name] for name in kept if row.get(name) is not None}
        value, spread = row["tokens_per_second"], _spread(row, "tokens_per_second")
        yield Measurement(case, subject, "tokens/s", value, spread, _ratio(row, "speedup"), facts)


def _serve(document: Document) -> Iterator[Measurement]:
    pairs = {(each["level"], each["metric"]): each for each in document.get("comparisons") or ()}
    settings = document.get("settings") or {}
    sizes = (
        f", {settings['prompt_tokens']} → {settings['output_tokens']}" if "prompt_tokens" in settings else ""
    )
    for row in document["rows"]:
        subject = row.get("label") or row.get("model_id") or "server"
        for metric, key in _SERVE.items():
            if row.get(key) is not None:
                pair = pairs.get((row["level"], key), {}) if row.get("label") == "B" else {}
                facts = {"failed": row["failed"]} if row.get("failed") else {}
                ratio = _ratio(pair, "speedup")
                yield Measurement(row["level"] + sizes, subject, metric, row[key], None, ratio, facts)


def _peers(document: Document) -> Iterator[Measurement]:
    told = set()
    for row in document["rows"]:
        kind, _, size = row["test"].partition("-")
        decode = f"{'decode' if size == '1' else 'generate'} {size} × 128 after 64"
        case = f"prompt 1 × {size}" if kind == "prompt" else decode
        case += f" beside {row['peer']}" + (" over HTTP" if row.get("http") else "")
        if case not in told:
            yield Measurement(case, row["peer"], "tokens/s", row["peer_rate"], _spread(row, "peer_rate"))
            told.add(case)
        name, _, depth = row["weight_format"].removesuffix("-http").partition(":")
        subject = f"sleb {name}" + (f" depth {depth}" if depth else "")
        yield Measurement(case, subject, "tokens/s", row["rate"], _spread(row, "rate"), _ratio(row, "ratio"))
    for subject, memory in (document.get("memory") or {}).items():
        yield Measurement("peak memory", subject.replace("sleb-", "sleb "), "MiB", memory["peak_rss"] / 2**20)


def _quality(document: Document) -> Iterator[Measurement]:
    case = str(document["settings"].get("dataset"))
    for row in document["rows"]:
        subject = f"depth {row['depth']}"
        if row.get("perplexity") is not None:
            ends = _interval(row, "ratio")
            ratio = None if row.get("ratio") is None else Ratio(1 / row["ratio"])
            if ratio is not None and ends is not None:
                ratio = Ratio(ratio.estimate, 1 / ends[1], 1 / ends[0])
            spread = _interval(row, "perplexity")
            yield Measurement(case, subject, "perplexity", row["perplexity"], spread, ratio)
        for metric, key in _TEXTS.items():
            if row.get(key) is not None:
                yield Measurement(case, subject, metric, row[key], _interval(row, key))
    for row in document["rows"]:
        subject, answers = f"depth {row['depth']}", row.get("generation") or {}
        for key, value in answers.items():
            if key not in ("answers", "example") and value is not None:
                yield Measurement(f"{answers['answers']} answers", subject, key.replace("_", " "), value)
        for task, metrics in (row.get("tasks") or {}).items():
            for metric, score in metrics.items():
                yield Measurement(task, subject, metric.replace("_", " "), score["value"])


def _mixed(document: Document) -> Iterator[Measurement]:
    settings, rates = document["settings"], document["tokens_per_second"]
    case = f"generate {settings['streams']} × {settings['output_tokens']} after {settings['prompt_tokens']}"
    for depth, rate in rates["alone"].items():
        yield Measurement(case, f"depth {depth}", "tokens/s", rate)
    yield Measurement(case, "mixed", "tokens/s", rates["mixed"], None, _ratio(document, "ratio"))


def _http(document: Document) -> Iterator[Measurement]:
    settings, rates = document["settings"], document["tokens_per_second"]
    case = f"generate {settings['streams']} × {settings['output_tokens']} after {settings['prompt_tokens']}"
    yield Measurement(case, "in one process", "tokens/s", rates["direct"])
    yield Measurement(case, "over HTTP", "tokens/s", rates["http"], None, _ratio(document, "ratio"))


def _formats(document: Document) -> Iterator[Measurement]:
    settings = document["settings"]
    for row in document["rows"]:
        ratio = None if row.get("ratio") in (None, 1) else Ratio(1 / row["ratio"])
        subject = f"{row['implementation']} {row['weights']}"
        case = f"{settings['num_tokens']} tokens in windows of {settings['window']}"
        yield Measurement(case, subject, "perplexity", row["perplexity"], None, ratio)


def _fronts(document: Document) -> Iterator[Measurement]:
    for row in document["rows"]:
        names = {
            "predicted ×": "predicted_speedup",
            "measured ×": "measured_speedup",
            "of KV removed": "kv_removed",
        }
        facts = {name: row[key] for name, key in names.items()}
        value = row["held_out_perplexity"]
        yield Measurement(
            row["map"], f"depth {row['depth']}", "held-out perplexity", value, None, None, facts
        )


def _methods(document: Document) -> Iterator[Measurement]:
    for row in document["rows"]:
        subject = row["method"] + ("" if row["seed"] is None else f" {row['seed']}")
        facts = {
            "calibration text": row["perplexity"],
            "answers looped": (row["answers"] or {}).get("looped"),
        }
        value = row["held_out_perplexity"]
        yield Measurement(f"{row['count']} blocks", subject, "held-out perplexity", value, None, None, facts)


def _method_speed(document: Document) -> Iterator[Measurement]:
    for row in document["rows"]:
        ratio = None if row["variant"] == "dense" else _ratio(row, "speedup")
        yield Measurement(row["load"], row["variant"], "seconds", row["seconds"], None, ratio)


def _search(document: Document) -> Iterator[Measurement]:
    for mode, found in document["summary"].items():
        over = found.get("speedup_over_reference") or {}
        ratio = None
        if over and mode != "reference":
            ends = (over["low"], over["high"]) if over["low"] < over["high"] else (None, None)
            ratio = Ratio(over["median"], *ends)
        facts = {"same blocks": (found.get("agreement") or {}).get("same_set")}
        yield Measurement("search", mode, "seconds", found["seconds"], None, ratio, facts)


def _prune(document: Document) -> Iterator[Measurement]:
    calibration = document["calibration"]
    num_tokens = calibration["windows"] * calibration["seqlen"]
    for depth, loss in enumerate(document["losses"]):
        yield Measurement(calibration["source"], f"depth {depth}", "perplexity", math.exp(loss / num_tokens))


_READERS: Mapping[str, Callable[[Document], Iterator[Measurement]]] = {
    "throughput": _throughput,
    "serve": _serve,
    "peers": _peers,
    "quality": _quality,
    "mixed": _mixed,
    "http-overhead": _http,
    "weight-formats": _formats,
    "fronts": _fronts,
    "methods": _methods,
    "method-speed": _method_speed,
    "search": _search,
    "prune": _prune,
}
