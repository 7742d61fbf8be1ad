"""Answers that loop: the same tokens over and over, until nothing but their length would end them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sleb.errors import RequestError

REPETITION = "repetition_detected"  # the stop_reason, as vLLM calls it
MAX_PATTERN_SIZE = 256
MAX_COUNT = 2**20


@dataclass(frozen=True)
class RepetitionDetection:
    """When an answer loops: its last tokens are a pattern of so many tokens, `min_count` times in a row.

    The fields are vLLM's (`RepetitionDetectionParams`). max_pattern_size 0: never. min_pattern_size 0 is 1.

    Raises RequestError for values that go against each other, or are out of range.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        sizes = 0 <= self.min_pattern_size <= self.max_pattern_size <= MAX_PATTERN_SIZE
        if not sizes or (self.max_pattern_size and not 2 <= self.min_count <= MAX_COUNT):
            raise RequestError(
                f"repetition_detection has patterns of {self.min_pattern_size} to {self.max_pattern_size} tokens, "
                f"{self.min_count} times; give 0 <= min_pattern_size <= max_pattern_size <= {MAX_PATTERN_SIZE} and "
                f"min_count from 2 to {MAX_COUNT}",
                param="repetition_detection",
            )

    def start(self) -> RepetitionCounter | None:
        """A counter for one answer; None if it would find nothing."""
        return RepetitionCounter(self) if self.max_pattern_size else None


class RepetitionCounter:
    """Follows one answer; a token takes time by the number of sizes, however long the answer is."""

    def __init__(self, detection: RepetitionDetection) -> None:
        self._sizes = range(max(1, detection.min_pattern_size), detection.max_pattern_size + 1)
        self._count = detection.min_count
        self._runs = [0] * len(self._sizes)  # by size: how many last tokens are each that one so many before

    def push(self, tokens: Sequence[int], num_output: int) -> bool:
        """Whether the answer loops, now that the last of `tokens` is there; `num_output` of them are the answer's."""
        loops = False
        for number, size in enumerate(self._sizes):
            if size >= num_output:
                break
            self._runs[number] = self._runs[number] + 1 if tokens[-1] == tokens[-1 - size] else 0
            loops |= self._runs[number] >= size * (self._count - 1)
        return loops
