"""Depth under load: which depth a request gets that leaves it to the server, decided when it is admitted.

The shallowest depth whose predicted wait meets a target, one level at a time, held for a while before it returns, and
never one that loses more quality than the operator allows. Pure arithmetic: time and waits are passed in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from sleb.errors import ConfigError

_MAX_TEXT = 1000
_FIELDS = ("depths", "ttft", "max-perplexity", "hold")
_DURATION = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)(ms|s)")
_SHARE = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)%")
_EXAMPLE = "depths=0,3,6 ttft=800ms max-perplexity=60% hold=20s"


@dataclass(frozen=True)
class DepthPolicy:
    """What an operator allows.

    Attributes:
        depths: to choose from, from the shallowest cut to the deepest; two or more.
        ttft: seconds within which a first token should come.
        max_perplexity: how much more perplexity than depth 0's is allowed, as a share: 0.6 for 60 %.
        hold: seconds for which a depth is kept at least before a shallower one returns.
    """

    depths: tuple[int, ...]
    ttft: float
    max_perplexity: float
    hold: float = 20.0

    @classmethod
    def parse(cls, text: str) -> DepthPolicy:
        """From `depths=0,3,6 ttft=800ms max-perplexity=60% hold=20s`; hold may be left out. Raises ConfigError."""
        words = [word.partition("=") for word in text[:_MAX_TEXT].split()]
        given = {name: value for name, equals, value in words if equals}
        unknown = [name for name, equals, _ in words if name not in _FIELDS or not equals]
        if unknown or len(given) < len(words):
            _refuse(
                text,
                f"{unknown[0]!r} is not one of {', '.join(_FIELDS)}" if unknown else "a part comes twice",
            )
        for name in _FIELDS[:3]:
            if name not in given:
                _refuse(text, f"{name} is missing")
        depths = given["depths"].split(",")
        if not all(each.isascii() and each.isdecimal() and len(each) < 6 for each in depths):
            _refuse(text, f"depths is {given['depths']!r}; it must be a list of numbers such as 0,3,6")
        numbers = tuple(map(int, depths))
        if len(numbers) < 2 or list(numbers) != sorted(set(numbers)):
            _refuse(
                text, f"depths is {given['depths']!r}; name two or more, each once, the shallowest cut first"
            )
        share = _SHARE.fullmatch(given["max-perplexity"])
        if share is None:
            _refuse(text, f"max-perplexity is {given['max-perplexity']!r}; it must be a share such as 60%")
        return cls(
            numbers,
            _seconds(text, given, "ttft"),
            float(share[1]) / 100,
            _seconds(text, given, "hold") if "hold" in given else cls.hold,
        )

    def allowed(self, increases: Mapping[int, float | None]) -> tuple[int, ...]:
        """The depths that are within the bound, up to the first that is not.

        increases: by depth, how much more perplexity than depth 0 was measured, as a share; None: not measured.
        """
        found: list[int] = []
        for depth in self.depths:
            increase = 0.0 if depth == 0 else increases.get(depth)
            if increase is None or increase > self.max_perplexity:
                break
            found.append(depth)
        return tuple(found)


@dataclass(frozen=True)
class Choice:
    """degraded: whether it is another depth than the shallowest of the policy."""

    depth: int
    degraded: bool


class DepthGovernor:
    """Chooses depths for a replica's intake.

    Args:
        depths: that are allowed, from the shallowest cut to the deepest; one at least. now: when it begins.
    """

    def __init__(self, policy: DepthPolicy, depths: tuple[int, ...], now: float) -> None:
        assert depths
        self.policy = policy
        self.depths = depths
        self._level = 0
        self._since = now  # when the present level was last needed
        self._seconds = dict.fromkeys(depths, 0.0)
        self._counted = now  # up to where those count

    @property
    def depth(self) -> int:
        """That of the present level."""
        return self.depths[self._level]

    def choose(self, now: float, ahead: float, wait: Callable[[int], float]) -> Choice | None:
        """The depth of a request that is admitted now; None if it must be refused.

        now: seconds on any clock that does not go back. ahead: the predicted seconds until what is there already has
        been begun; 0: the replica is idle. wait: those to the request's own first token, at a depth. A long prompt
        takes its time on an idle replica too, so it is refused for what stands before it alone.
        """
        self.seconds(now)
        target = self.policy.ttft
        if ahead > 0 and wait(self.depth) > target:
            self._since = now
            if self._level < len(self.depths) - 1:
                self._level += 1
            elif ahead > target:
                return None
        elif self._level and ahead > 0 and wait(self.depths[self._level - 1]) > target:
            self._since = now
        while self._level and now - self._since >= self.policy.hold:
            self._level -= 1
            self._since += self.policy.hold
        return Choice(self.depth, self._level > 0)

    def seconds(self, now: float) -> dict[int, float]:
        """How long the level has been that of each depth."""
        self._seconds[self.depth] += now - self._counted
        self._counted = now
        return dict(self._seconds)


def _seconds(text: str, given: Mapping[str, str], name: str) -> float:
    found = _DURATION.fullmatch(given[name])
    seconds = 0.0 if found is None else float(found[1]) / (1000 if found[2] == "ms" else 1)
    if not 0 < seconds <= 86400:
        _refuse(text, f"{name} is {given[name]!r}; it must be a time such as 800ms or 20s")
    return seconds


def _refuse(text: str, reason: str) -> NoReturn:
    raise ConfigError(f"--auto {text[:200]!r}: {reason}; write it like {_EXAMPLE!r}")
