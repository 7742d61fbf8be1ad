"""Which parts there are, in the order of what a failure would teach, and how the time is shared out.

The standard library alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_SECONDS = 10.0  # a part that has less is not begun


@dataclass(frozen=True)
class Part:
    """Processes that run at the same time.

    Attributes:
        seconds: its share of the whole, where a fresh machine compiles every kernel.
        jobs: what its processes do, see JOBS in `jobs`; each writes NAME.json.
        beside: processes that go on with later work meanwhile; their end is not waited for.
        program: what must be there for it.
    """

    name: str
    seconds: float
    jobs: Sequence[str]
    beside: Sequence[str] = ()
    program: str | None = None


PARTS = (
    Part("smoke", 90, ("smoke-float32", "smoke-bfloat16", "smoke-int8", "smoke-int4")),
    # While the tests compile on some cores, the kernels of what is measured later are compiled on others.
    Part("tests", 190, ("tests",), beside=("warm-7b", "warm-70b")),
    Part("kernels", 110, ("kernels",)),
    Part("7b", 170, ("7b",)),
    Part("70b", 140, ("70b",)),
    Part("patched", 30, ("patched",)),
    Part("mixed", 40, ("mixed",)),
    Part("memcheck", 30, ("memcheck",), program="compute-sanitizer"),
)
NAMES = tuple(part.name for part in PARTS)


def limits(parts: Sequence[Part], seconds: float) -> list[float]:
    """Seconds that each of `parts` may take if those before it take all of theirs: their sum is at most `seconds`.

    Asked anew before each part, what one leaves goes to all that follow, by their shares.
    """
    total = sum(part.seconds for part in parts)
    return [part.seconds * max(0.0, seconds) / total for part in parts]
