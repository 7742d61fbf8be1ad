"""How fast steps are, learnt from those that ran, and what that makes of a wait.

A step costs what it takes to read the weights once, and more for every token of a prompt: both at depth 0, of which a
depth takes its share. Pure arithmetic, on any clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_WEIGHT = 0.1  # of a new observation
_LEAST_PROMPT = 8  # tokens in a step from which the cost of one is learnt


@dataclass(frozen=True)
class Work:
    """What is to be done before a request's first token: tokens of prompts by depth, and requests without a seat.

    Attributes:
        prompt_tokens: that are not computed yet, of running and waiting requests, by depth.
        num_waiting: requests that wait for a seat. num_free: seats that are free.
    """

    prompt_tokens: Mapping[int, int]
    num_waiting: int
    num_free: int

    @property
    def is_any(self) -> bool:
        """Whether anything stands before a new request: prompts, or no free seat."""
        return bool(self.prompt_tokens) or self.num_waiting > 0 or self.num_free <= 0


class Pace:
    """Seconds of steps, of prompt tokens and of a seat.

    Args:
        shares: by depth, what it costs beside depth 0. step_tokens: the most tokens in a step. num_seats: the most
            requests in one.
    """

    def __init__(self, shares: Mapping[int, float], step_tokens: int, num_seats: int) -> None:
        self._shares, self._step_tokens, self._num_seats = dict(shares), step_tokens, num_seats
        self.step_seconds = 0.0  # without a prompt
        self.token_seconds = 0.0  # of a prompt's, beside that
        self.seat_seconds = 0.0  # from a request's first step to its last

    def observe_step(self, seconds: float, fullest: int, prompt_tokens: Mapping[int, int]) -> None:
        """A step that took `seconds`; fullest: the least depth of its rows; prompt_tokens: by depth."""
        num_tokens = sum(prompt_tokens.values())
        if not num_tokens:
            self.step_seconds = _mixed(self.step_seconds, seconds / self._shares[fullest])
        elif num_tokens >= _LEAST_PROMPT:
            own = seconds - self.step_seconds * self._shares[fullest]
            self.token_seconds = _mixed(self.token_seconds, max(own, 0.0) / self._units(prompt_tokens))

    def observe_seat(self, seconds: float) -> None:
        """A request that has ended had its seat for so long."""
        self.seat_seconds = _mixed(self.seat_seconds, seconds)

    def forget(self) -> None:
        """Begins anew: what is done at the first time takes longer than it ever will again."""
        self.step_seconds = self.token_seconds = self.seat_seconds = 0.0

    def wait(self, work: Work, num_prompt_tokens: int, depth: int) -> float:
        """Predicted seconds to the first token of a prompt that comes behind `work`, at `depth`; 0 as long as nothing
        has been observed."""
        prompts = dict(work.prompt_tokens)
        prompts[depth] = prompts.get(depth, 0) + num_prompt_tokens
        num_steps = math.ceil(sum(prompts.values()) / self._step_tokens)
        seconds = self._units(prompts) * self.token_seconds
        seconds += num_steps * self.step_seconds * self._shares[depth]
        num_before = max(work.num_waiting + 1 - work.num_free, 0)  # that must leave their seats first
        return seconds + num_before * self.seat_seconds / self._num_seats

    def _units(self, tokens: Mapping[int, int]) -> float:
        return sum(count * self._shares[depth] for depth, count in tokens.items())


def _mixed(known: float, new: float) -> float:
    return new if known == 0.0 else known + _WEIGHT * (new - known)
