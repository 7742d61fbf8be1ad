"""What turns of engines say: ratios within repetitions, with intervals, and what the machine was like meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from sleb.benchmarks.peer_options import Own, PeerTest
from sleb.benchmarks.stats import LEAST_FOR_LEVEL, RatioInterval, Verdict, ratio_interval, verdict


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


@dataclass(frozen=True)
class Comparison:
    """One contestant of ours against one peer. Rates are tokens/s; ratios are of two turns of one repetition.

    Attributes:
        weight_format: as Own.label: of our weights, "-http" behind our server, ":6" at depth 6.
        disturbed: repetitions in which others took more of the processors than allowed in spite of all attempts.
        ratio, ratio_low, ratio_high: as `ratio_interval`; with fewer than six repetitions the median, the least and
            the greatest, and no ratio_level and no verdict. verdict: on ours.
    """

    test: str
    weight_format: str
    peer: str
    depth: int
    http: bool
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
    ratio_level: float | None
    verdict: Verdict | None
    ratio_samples: list[float]


def compare(samples: Samples, own: Sequence[Own], peers: Sequence[str]) -> list[Comparison]:
    """A comparison for every pair that has met in a complete repetition: by test, then peer, then ours."""
    rows = []
    for test, repetitions in samples.items():
        for peer in peers:
            rounds = [each.rounds[peer] for each in repetitions if peer in each.rounds]
            for each in own:
                met = [(turns[each.name], turns[peer]) for turns in rounds if each.name in turns]
                if met:
                    rows.append(_comparison(str(test), each, peer, met))
    return rows


def _comparison(test: str, own: Own, peer: str, met: Sequence[tuple[Turn, Turn]]) -> Comparison:
    rates, peer_rates = [ours.rate for ours, _ in met], [other.rate for _, other in met]
    ratios = [ours.rate / other.rate for ours, other in met]
    interval = _interval(ratios)
    return Comparison(
        test=test,
        weight_format=own.label,
        peer=peer,
        depth=own.depth,
        http=own.http,
        repetitions=len(met),
        disturbed=sum(ours.disturbed or other.disturbed for ours, other in met),
        rate=median(rates),
        rate_low=min(rates),
        rate_high=max(rates),
        peer_rate=median(peer_rates),
        peer_rate_low=min(peer_rates),
        peer_rate_high=max(peer_rates),
        ratio=interval.estimate,
        ratio_low=interval.low,
        ratio_high=interval.high,
        ratio_level=interval.level,
        verdict=None if interval.level is None else verdict(interval),
        ratio_samples=ratios,
    )


def _interval(ratios: Sequence[float]) -> RatioInterval:
    if len(ratios) < LEAST_FOR_LEVEL:
        return RatioInterval(median(ratios), min(ratios), max(ratios), None)
    return ratio_interval(ratios)


def floor_shares(samples: Samples, own: Own, bytes_per_token: float) -> list[float]:
    """Of each repetition of decode-1: the share of the measured bandwidth that our decoding used."""
    shares = []
    for test, repetitions in samples.items():
        for repetition in repetitions if test.single else ():
            met = repetition.rounds.values()
            rates = [turns[own.name].rate for turns in met if own.name in turns]
            if rates and repetition.bandwidth:
                shares.append(median(rates) * bytes_per_token / (median(repetition.bandwidth) * 1e9))
    return shares


def all_turns(samples: Samples) -> Iterator[Turn]:
    """Of complete repetitions."""
    for repetitions in samples.values():
        for repetition in repetitions:
            for turns in repetition.rounds.values():
                yield from turns.values()


def conditions(samples: Samples, notices: Sequence[str], limit: float) -> dict[str, Any]:
    """What others took of the processors, and what a reader must know. limit: what was allowed, as a share."""
    turns = list(all_turns(samples))
    shares = [turn.others_share for turn in turns if turn.others_share is not None]
    disturbed = [turn.others_share or 0.0 for turn in turns if turn.disturbed]
    found = list(notices)
    if disturbed:
        found.append(
            f"Others took more than {limit:.0%} of the processors in {len(disturbed)} of {len(turns)} turns, up to "
            f"{max(disturbed):.0%}. Ratios suffer less than tokens/s, as their turns are close in time."
        )
    return {
        "notices": found,
        "others_share": {"median": median(shares), "high": max(shares)} if shares else None,
        "clock": None,
    }


def bandwidth_summary(samples: Samples) -> Mapping[str, Any]:
    """GB/s of the memory's reads."""
    reads = [
        value
        for repetitions in samples.values()
        for repetition in repetitions
        for value in repetition.bandwidth
    ]
    return {"median": median(reads) if reads else None, "samples": reads}
