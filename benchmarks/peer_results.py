"""What turns of engines say: ratios within repetitions, and whether the targets are met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sleb.benchmarks.peer_options import FLOOR_SHARE_TARGET, MEMORY_TARGET, PeerTest, Target

_MIN_WIDTH = 120  # where standard error is no terminal, a line may be as long as it needs to be


@dataclass(frozen=True)
class Turn:
    """One engine's turn: tokens/s and the seconds behind it; the rest as in QuietRun."""

    rate: float
    seconds: list[float]
    others_share: float | None
    disturbed: bool
    attempts: int


@dataclass(frozen=True)
class Repetition:
    """rounds: peer -> contestant -> turn. bandwidth: GB/s, read between the rounds of decode-1."""

    rounds: dict[str, dict[str, Turn]]
    bandwidth: list[float]


Samples = dict[PeerTest, list[Repetition]]


def ours(weight_format: str) -> str:
    """The name that sleb takes part under."""
    return f"sleb-{weight_format}"


@dataclass(frozen=True)
class Comparison:
    """One format of ours against one peer. Rates are tokens/s; ratios are of two turns of one repetition.

    disturbed: repetitions in which others took more of the processors than allowed in spite of all attempts.
    """

    test: str
    weight_format: str
    peer: str
    repetitions: int
    disturbed: int
    rate: float
    rate_low: float
    rate_high: float
    peer_rate: float
    peer_rate_low: float
    peer_rate_high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ratio_samples: list[float]


def compare(samples: Samples) -> list[Comparison]:
    """A comparison for every pair that has met in a complete repetition, in the order of their first meeting."""
    pairs: dict[tuple[str, str, str], list[tuple[Turn, Turn]]] = {}
    for test, repetitions in samples.items():
        for repetition in repetitions:
            for peer, turns in repetition.rounds.items():
                for name, turn in turns.items():
                    if name != peer:
                        key = (str(test), name.removeprefix("sleb-"), peer)
                        pairs.setdefault(key, []).append((turn, turns[peer]))
    return [_comparison(*key, met) for key, met in pairs.items()]


def _comparison(test: str, weight_format: str, peer: str, met: Sequence[tuple[Turn, Turn]]) -> Comparison:
    rates, peer_rates = [own.rate for own, _ in met], [other.rate for _, other in met]
    ratios = [own.rate / other.rate for own, other in met]
    return Comparison(
        test=test,
        weight_format=weight_format,
        peer=peer,
        repetitions=len(met),
        disturbed=sum(own.disturbed or other.disturbed for own, other in met),
        rate=median(rates),
        rate_low=min(rates),
        rate_high=max(rates),
        peer_rate=median(peer_rates),
        peer_rate_low=min(peer_rates),
        peer_rate_high=max(peer_rates),
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        ratio_samples=ratios,
    )


@dataclass(frozen=True)
class Verdict:
    """One target. met is None where something that it needs was not measured; at_most: smaller is better."""

    what: str
    target: float
    measured: float | None
    low: float | None
    high: float | None
    met: bool | None
    at_most: bool = False


def judge(target: Target, rows: Sequence[Comparison]) -> Verdict:
    """The best of our formats against the best of its peers; not measured unless all of them are."""
    by_pair = {(row.weight_format, row.peer): row for row in rows if row.test == target.test}
    versus = target.peers[0] if len(target.peers) == 1 else f"best of {', '.join(target.peers)}"
    what = f"{target.test} {' or '.join(target.formats)} against {versus}"
    wanted = [(weight_format, peer) for weight_format in target.formats for peer in target.peers]
    if any(pair not in by_pair for pair in wanted):
        return Verdict(what, target.factor, None, None, None, None)
    hardest = [
        min((by_pair[weight_format, peer] for peer in target.peers), key=lambda row: row.ratio)
        for weight_format in target.formats
    ]
    best = max(hardest, key=lambda row: row.ratio)
    if len(wanted) > 1:
        what += f" ({best.weight_format} against {best.peer})"
    return Verdict(
        what, target.factor, best.ratio, best.ratio_low, best.ratio_high, best.ratio >= target.factor
    )


def floor_shares(samples: Samples, weight_format: str, bytes_per_token: float) -> list[float]:
    """Of each repetition of decode-1: the share of the measured bandwidth that our decoding used."""
    shares = []
    for test, repetitions in samples.items():
        for repetition in repetitions if test.single else ():
            rates = [
                turns[ours(weight_format)].rate
                for turns in repetition.rounds.values()
                if ours(weight_format) in turns
            ]
            if rates and repetition.bandwidth:
                bandwidth = median(repetition.bandwidth) * 1e9
                shares.append(median(rates) * bytes_per_token / bandwidth)
    return shares


def judge_floor(shares: Sequence[float]) -> Verdict:
    """The share of decode-1's bandwidth floor in bf16."""
    what = "decode-1 bf16, share of the speed that memory allows"
    if not shares:
        return Verdict(what, FLOOR_SHARE_TARGET, None, None, None, None)
    share = median(shares)
    return Verdict(what, FLOOR_SHARE_TARGET, share, min(shares), max(shares), share >= FLOOR_SHARE_TARGET)


def judge_memory(memory: Mapping[str, Mapping[str, int]]) -> Verdict:
    """Our peak memory serving bf16 over vLLM's."""
    what = "peak memory in bf16 over vLLM's"
    own, other = (memory.get(name, {}).get("peak_rss", 0) for name in (ours("bf16"), "vllm"))
    if not own or not other:
        return Verdict(what, MEMORY_TARGET, None, None, None, None, at_most=True)
    ratio = own / other
    return Verdict(what, MEMORY_TARGET, ratio, ratio, ratio, ratio <= MEMORY_TARGET, at_most=True)


def print_results(
    rows: Sequence[Comparison],
    verdicts: Sequence[Verdict],
    memory: Mapping[str, Mapping[str, int]],
    console: Console,
) -> None:
    """All pairs, the memory, and the targets."""
    if not console.is_terminal:
        console.width = max(console.width, _MIN_WIDTH)
    table = _table("test", "weights", "peer", right=("ours", "peer's", "ratio", "low–high", "runs"))
    for row in rows:
        runs = f"{row.repetitions}" + (f" ({row.disturbed} disturbed)" if row.disturbed else "")
        rates = (f"{row.rate:,.1f}", f"{row.peer_rate:,.1f}", f"{row.ratio:.2f}")
        table.add_row(
            row.test, row.weight_format, row.peer, *rates, f"{row.ratio_low:.2f}–{row.ratio_high:.2f}", runs
        )
    console.print(table)
    if memory:
        table = _table("engine", right=("peak memory", "shared pages once", "processes"))
        for name, facts in memory.items():
            pss = f"{facts['pss'] / 2**20:,.0f} MiB" if facts.get("pss") else ""
            size = f"{facts['peak_rss'] / 2**20:,.0f} MiB"
            table.add_row(name, size, pss, str(facts["processes"]))
        console.print(table)
    table = _table("target", right=("at least", "measured", "low–high", "met"))
    for verdict in verdicts:
        bound = f"{'≤ ' if verdict.at_most else ''}{verdict.target:.2f}"
        if verdict.measured is None:
            table.add_row(verdict.what, bound, "", "", "not measured")
        else:
            met = "yes" if verdict.met else "[red]no[/red]"
            spread = f"{verdict.low:.2f}–{verdict.high:.2f}"
            table.add_row(verdict.what, bound, f"{verdict.measured:.2f}", spread, met)
    console.print(table)


def _table(*left: str, right: Sequence[str]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    return table
