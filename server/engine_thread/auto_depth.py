"""The depth of requests that leave it to the server, chosen in the engine's thread when they are admitted."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sleb.engine.depth_policy import Choice, DepthGovernor, DepthPolicy
from sleb.server.errors import OverloadedError

if TYPE_CHECKING:
    from sleb.engine.engine import Engine

_MOST_CONVERSATIONS = 2**16


@dataclass(frozen=True)
class AutoStats:
    """degraded: requests by the depth that they got instead of the shallowest. seconds: by the depth of the intake."""

    shallowest: int
    degraded: Mapping[int, int]
    seconds: Mapping[int, float]


class AutoDepth:
    """Belongs to the engine's thread.

    Args:
        depths: that are allowed, from the shallowest cut to the deepest; one at least.
    """

    def __init__(self, engine: Engine, policy: DepthPolicy, depths: tuple[int, ...]) -> None:
        self.policy, self.depths = policy, depths
        self._engine = engine
        self._pace = engine.follow_pace()
        self._governor = DepthGovernor(policy, depths, time.monotonic())
        self._conversations: OrderedDict[bytes, int] = OrderedDict()  # the depth of each, the newest last
        self._degraded: Counter[int] = Counter()

    def choose(self, num_prompt_tokens: int, conversation: tuple[bytes, ...]) -> Choice:
        """conversation: see `conversation_keys`; what goes on keeps its depth. Raises OverloadedError 429."""
        now, work = time.monotonic(), self._engine.work()
        ahead = self._pace.wait(work, 0, self._governor.depth) if work.is_any else 0.0
        known = next(
            (self._conversations[key] for key in conversation[-2::-1] if key in self._conversations), None
        )
        choice = self._governor.choose(
            now, ahead, lambda depth: self._pace.wait(work, num_prompt_tokens, depth)
        )
        if known is not None:
            choice = Choice(known, known != self.depths[0])
        if choice is None:
            raise OverloadedError(
                f"the wait is about {ahead:.1f} s at depth {self.depths[-1]}, the deepest that may be used; the target "
                f"is {self.policy.ttft:g} s; try again later, or name a depth, which waits its turn",
                status=429,
            )
        if conversation:
            self._remember(conversation[-1], choice.depth)
        if choice.degraded:
            self._degraded[choice.depth] += 1
        return choice

    def forget_pace(self) -> None:
        """Once the server is warm; from any thread."""
        self._pace.forget()

    def _remember(self, key: bytes, depth: int) -> None:
        self._conversations[key] = depth
        self._conversations.move_to_end(key)
        while len(self._conversations) > _MOST_CONVERSATIONS:
            self._conversations.popitem(last=False)

    def stats(self) -> AutoStats:
        """Cheap enough to call after every step."""
        return AutoStats(self.depths[0], dict(self._degraded), self._governor.seconds(time.monotonic()))
