"""Result files: those of now, and those that commands wrote before every result was made of measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sleb.benchmarks.record import Measurement, Ratio, Result, read_json
from sleb.errors import ConfigError

Document = Mapping[str, Any]

# Kinds by a key of a file, or of its settings, that only they have: those files do not say their kind.
_SIGNS = {"losses": "prune", "summary": "search", "depths": "mixed", "streams": "http-overhead"}
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


def load(path: Path) -> Result:
    """The result in a file of either form. Raises ConfigError for a file that is neither, naming it."""
    return read_result(read_json(path), str(path))


def read_result(document: Document, name: str) -> Result:
    """The result in a JSON object of either form. Raises ConfigError for what is neither, with `name`."""
    try:
        result = Result.of_document(document) if isinstance(document.get("notes"), list) else _old(document)
        seen = set()
        for each in result.measurements:
            ratio = each.ratio or Ratio(1.0)
            figures = (each.value, *(each.spread or ()), ratio.estimate, ratio.low, ratio.high)
            if not all(math.isfinite(figure) for figure in figures if figure is not None):
                raise ValueError("a figure is not finite")
            if each.key in seen or not all(isinstance(part, str) for part in each.key):
                raise ValueError("a figure is there twice, or a name is none")
            seen.add(each.key)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{name} is no result of sleb; give a file that `sleb bench --json` or `sleb eval --json` wrote"
        ) from error
    return result


def _old(document: Document) -> Result:
    settings = dict(document.get("settings") or {})
    signs = (kind for key, kind in _SIGNS.items() if key in document or key in settings)
    kind = document.get("kind") or next(signs, "weight-formats")
    if document.get("model"):
        settings["model"] = document["model"]
    servers = document.get("servers") or {}
    notes = [f"{name}: {server['owned_by']} {server['version']}" for name, server in servers.items()]
    notes += (document.get("conditions") or {}).get("notices", ())
    kept = list(_READERS[kind](document))
    environment = dict(document.get("environment") or {})
    complete = bool(document.get("complete", True))
    return Result("eval" if kind == "quality" else kind, environment, settings, kept, notes, complete)


def _ratio(row: Document, name: str) -> Ratio | None:
    """None for a baseline, whose ratio is exactly 1 by definition."""
    if row.get(name) is None or row.get("verdict") == "baseline":
        return None
    return Ratio(row[name], row.get(f"{name}_low"), row.get(f"{name}_high"))


def _spread(row: Document, name: str) -> tuple[float, float] | None:
    low, high = row.get(f"{name}_interval") or (row.get(f"{name}_low"), row.get(f"{name}_high"))
    return None if low is None or high is None else (low, high)


def _throughput(document: Document) -> Iterator[Measurement]:
    for row in document["rows"]:
        work = f"{row['output_tokens']} after {row['prompt_tokens']}"
        case = f"{row['test']} {row['batch']} × {row['prompt_tokens'] if row['test'] == 'prompt' else work}"
        subject = row.get("variant") or f"depth {row['depth']}"
        names = ("ideal_speedup", "roofline_share")
        facts = {name: row[name] for name in names if row.get(name) is not None}
        rate, spread = row["tokens_per_second"], _spread(row, "tokens_per_second")
        yield Measurement(case, subject, "tokens/s", rate, spread, _ratio(row, "speedup"), facts)


def _serve(document: Document) -> Iterator[Measurement]:
    pairs = {(each["level"], each["metric"]): each for each in document.get("comparisons") or ()}
    settings = document.get("settings") or {}
    sizes = ", {prompt_tokens} → {output_tokens}".format(**settings) if "prompt_tokens" in settings else ""
    for row in document["rows"]:
        subject = row.get("label") or row.get("model_id") or "server"
        facts = {"failed": row["failed"]} if row.get("failed") else {}
        for metric, key in _SERVE.items():
            if row.get(key) is not None:
                ratio = _ratio(pairs.get((row["level"], key), {}), "speedup") if subject == "B" else None
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
        subject = "sleb " + row["weight_format"].removesuffix("-http").replace(":", " depth ")
        yield Measurement(case, subject, "tokens/s", row["rate"], _spread(row, "rate"), _ratio(row, "ratio"))
    for subject, memory in (document.get("memory") or {}).items():
        yield Measurement("peak memory", subject.replace("sleb-", "sleb "), "MiB", memory["peak_rss"] / 2**20)


def _quality(document: Document) -> Iterator[Measurement]:
    case = str(document["settings"].get("dataset"))
    for row in document["rows"]:
        subject, answers = f"depth {row['depth']}", row.get("generation") or {}
        if row.get("perplexity") is not None:
            low, high = row.get("ratio_interval") or (None, None)
            ratio = row.get("ratio") and Ratio(1 / row["ratio"], high and 1 / high, low and 1 / low)
            spread = _spread(row, "perplexity")
            yield Measurement(case, subject, "perplexity", row["perplexity"], spread, ratio)
        for key in ("agreement", "kl", "word_perplexity", "byte_perplexity", "bits_per_byte"):
            if row.get(key) is not None:
                metric = {"agreement": "same token", "kl": "KL"}.get(key, key.replace("_", " "))
                yield Measurement(case, subject, metric, row[key], _spread(row, key))
        for key, value in answers.items():
            if key not in ("answers", "example") and value is not None:
                yield Measurement(f"{answers['answers']} answers", subject, key.replace("_", " "), value)
        for task, metrics in (row.get("tasks") or {}).items():
            for metric, score in metrics.items():
                yield Measurement(task, subject, metric.replace("_", " "), score["value"])


def _streams(document: Document) -> Iterator[Measurement]:
    """Depths alone and mixed, or one process and HTTP; the last has a ratio."""
    case = "generate {streams} × {output_tokens} after {prompt_tokens}".format(**document["settings"])
    rates = document["tokens_per_second"]
    alone = {f"depth {depth}": rate for depth, rate in rates.get("alone", {}).items()}
    for subject, rate in (alone or {"in one process": rates["direct"]}).items():
        yield Measurement(case, subject, "tokens/s", rate)
    last = "mixed" if alone else "http"
    subject = "mixed" if alone else "over HTTP"
    yield Measurement(case, subject, "tokens/s", rates[last], None, _ratio(document, "ratio"))


def _formats(document: Document) -> Iterator[Measurement]:
    case = "{num_tokens} tokens in windows of {window}".format(**document["settings"])
    for row in document["rows"]:
        ratio = None if row.get("ratio") in (None, 1) else Ratio(1 / row["ratio"])
        subject = f"{row['implementation']} {row['weights']}"
        yield Measurement(case, subject, "perplexity", row["perplexity"], None, ratio)


def _fronts(document: Document) -> Iterator[Measurement]:
    for row in document["rows"]:
        facts = {f"{word} ×": row[f"{word}_speedup"] for word in ("predicted", "measured")}
        facts["of KV removed"] = row["kv_removed"]
        case, value = f"depth {row['depth']}", row["held_out_perplexity"]
        yield Measurement(row["map"], case, "held-out perplexity", value, facts=facts)


def _methods(document: Document) -> Iterator[Measurement]:
    for row in document["rows"]:
        subject = row["method"] + ("" if row["seed"] is None else f" {row['seed']}")
        looped = (row["answers"] or {}).get("looped")
        facts = {"calibration text": row["perplexity"], "answers looped": looped}
        value = row["held_out_perplexity"]
        yield Measurement(f"{row['count']} blocks", subject, "held-out perplexity", value, facts=facts)


def _method_speed(document: Document) -> Iterator[Measurement]:
    for row in document["rows"]:
        ratio = None if row["variant"] == "dense" else _ratio(row, "speedup")
        yield Measurement(row["load"], row["variant"], "seconds", row["seconds"], None, ratio)


def _search(document: Document) -> Iterator[Measurement]:
    for mode, found in document["summary"].items():
        over = found.get("speedup_over_reference") or {}
        ends = (over["low"], over["high"]) if over and over["low"] < over["high"] else ()
        ratio = Ratio(over["median"], *ends) if over and mode != "reference" else None
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
    "mixed": _streams,
    "http-overhead": _streams,
    "weight-formats": _formats,
    "fronts": _fronts,
    "methods": _methods,
    "method-speed": _method_speed,
    "search": _search,
    "prune": _prune,
}
