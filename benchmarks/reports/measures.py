"""The main figures of results of every kind, by what they measured: what `sleb bench diff` compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

from sleb.benchmarks.reports.choosing import method
from sleb.benchmarks.reports.kinds import Result
from sleb.benchmarks.reports.measure import Measure, sample_interval
from sleb.benchmarks.reports.quality import dataset, prune_perplexities
from sleb.benchmarks.reports.serving import serve_measures
from sleb.benchmarks.reports.speed_notes import workload


def measures(result: Result) -> dict[str, Measure]:
    """By name. Raises ConfigError for a result that is not whole."""
    found: dict[str, Measure] = {}
    with result.reading():
        for each in _MEASURES[result.kind](result):
            if each.name in found:
                raise ValueError(f"{each.name} is there twice")
            each.check()
            found[each.name] = each
    return found


def _throughput(result: Result) -> Iterator[Measure]:
    for row in result.rows:
        ran = row.get("variant") or f"depth {row['depth']}"
        yield Measure(
            f"{workload(row)}, {ran}",
            row["tokens_per_second"],
            "tokens/s",
            interval=sample_interval(row.get("tokens_per_second_samples")),
            speedup=row["speedup"],
        )


def _peers(result: Result) -> Iterator[Measure]:
    for row in result.rows:
        test, peer, weight_format = row["test"], row["peer"], row["weight_format"]
        turns = [
            repetition["rounds"].get(peer, {}).get(f"sleb-{weight_format}")
            for repetition in (result.data.get("repetitions") or {}).get(test, ())
        ]
        yield Measure(
            f"{test}, {weight_format} beside {peer}",
            row["rate"],
            "tokens/s",
            interval=sample_interval([turn["rate"] for turn in turns if turn]),
            speedup=row["ratio"],
        )


def _kernels(result: Result) -> Iterator[Measure]:
    for row in result.rows:
        if row.get("microseconds") is not None:
            interval = sample_interval(row.get("microseconds_samples"))
            name = f"{row['op']}, {row['shape']}, {row['backend']}"
            yield Measure(name, row["microseconds"], "µs", False, interval)


def _search(result: Result) -> Iterator[Measure]:
    runs = result.rows or result.data["runs"]
    for mode, found in result.data["summary"].items():
        over = found.get("speedup_over_reference")
        samples = [sum(run["seconds"]) for run in runs if run["mode"] == mode]
        speedup = over["median"] if over else None
        yield Measure(mode, found["seconds"], "s", False, sample_interval(samples), speedup)


def _methods(result: Result) -> Iterator[Measure]:
    for row in result.rows:
        for key, text in (("held_out_perplexity", "held out"), ("perplexity", "calibration")):
            if row[key] is not None:
                yield Measure(f"{method(row)}, {row['count']} blocks, {text}", row[key], "perplexity", False)


def _method_speed(result: Result) -> Iterator[Measure]:
    for row in result.rows:
        name = f"{row['load']}, {row['variant']}"
        yield Measure(name, row["seconds"], "s", higher_is_better=False, speedup=row["speedup"])


def _quality(result: Result) -> Iterator[Measure]:
    for row in result.rows:
        if row.get("perplexity") is not None:
            ends = row.get("perplexity_interval")
            interval = None if ends is None else (ends[0], ends[1])
            name = f"depth {row['depth']}, {dataset(result)}"
            yield Measure(name, row["perplexity"], "perplexity", False, interval)
        for text in row.get("texts") or ():
            if text["perplexity"] is not None:
                yield Measure(
                    f"depth {row['depth']}, {text['name']}", text["perplexity"], "perplexity", False
                )


def _formats(result: Result) -> Iterator[Measure]:
    for row in result.rows:
        yield Measure(f"{row['implementation']}, {row['weights']}", row["perplexity"], "perplexity", False)


def _mixed(result: Result) -> Iterator[Measure]:
    data, settings = result.data, result.settings
    rates, repetitions = data["tokens_per_second"], data["repetitions"]
    tokens = settings["streams"] * len(settings["depths"]) * settings["output_tokens"]
    mixed = sample_interval([tokens / each["mixed"] for each in repetitions])
    yield Measure("mixed batch", rates["mixed"], "tokens/s", interval=mixed, speedup=data["ratio"])
    for depth, value in rates["alone"].items():
        alone = sample_interval([tokens / each["alone"][depth] for each in repetitions])
        yield Measure(f"depth {depth} alone", value, "tokens/s", interval=alone)


def _http(result: Result) -> Iterator[Measure]:
    data, settings = result.data, result.settings
    tokens = settings["streams"] * settings["output_tokens"]
    for side, value in data["tokens_per_second"].items():
        interval = sample_interval([tokens / each[side] for each in data["repetitions"]])
        speedup = data["ratio"] if side == "http" else None
        yield Measure(side, value, "tokens/s", interval=interval, speedup=speedup)


def _transformers(result: Result) -> Iterator[Measure]:
    for side in ("ours", "transformers"):
        found = result.data[side]
        if found["tokens_per_second"] is not None:
            yield Measure(
                side,
                median(found["tokens_per_second_samples"]),
                "tokens/s",
                interval=sample_interval(found["tokens_per_second_samples"]),
                speedup=result.data.get("ratio") if side == "ours" else None,
            )


def _fronts(result: Result) -> Iterator[Measure]:
    for row in result.rows:
        name = f"{row['map']}, depth {row['depth']}"
        if row.get("measured_speedup") is not None:
            interval = sample_interval(row.get("measured_samples"))
            yield Measure(f"{name}, measured", row["measured_speedup"], "times", interval=interval)
        yield Measure(f"{name}, predicted", row["predicted_speedup"], "times")


def _prune(result: Result) -> Iterator[Measure]:
    for depth, value in prune_perplexities(result).items():
        yield Measure(f"depth {depth}, calibration text", value, "perplexity", False)


_MEASURES: dict[str, Callable[[Result], Iterator[Measure]]] = {
    "throughput": _throughput,
    "serve": serve_measures,
    "peers": _peers,
    "transformers": _transformers,
    "mixed": _mixed,
    "http-overhead": _http,
    "quality": _quality,
    "weight-formats": _formats,
    "fronts": _fronts,
    "methods": _methods,
    "method-speed": _method_speed,
    "search": _search,
    "prune": _prune,
    "kernels": _kernels,
}
