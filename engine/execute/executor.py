"""How a step's forward is run: what an executor is given and what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sleb.engine.execute.step_arrays import DepthRange, StepArrays
from sleb.layer_map.units import Sublayer

# Rows of logits computed at once for prompt logprobs: 256 rows of 128k entries in float32 are 128 MiB.
LOGPROB_ROWS = 256


@dataclass(frozen=True)
class PlannedUnit:
    """A step of the plan: a sublayer that some served tier runs, or a patch, by its place in `DecoderWeights.patches`.

    depths: from where to before where rows run it; a sublayer's begin at 0, and end with NEVER if no depth skips it.
    """

    unit: Sublayer | int
    depths: DepthRange


def attention_blocks(plan: Sequence[PlannedUnit]) -> list[int]:
    """The blocks whose attention runs, in order: those that have K and V."""
    units = [planned.unit for planned in plan]
    return [unit[0] for unit in units if not isinstance(unit, int) and unit[1] == "attention"]


@dataclass(frozen=True)
class Forward:
    """What a step gives. T tokens, B of them sampled from; E hidden size, V vocabulary.

    Attributes:
        hidden: [T, E], the residual stream after the last sublayer; valid until the next step.
        logits: [B, V] float32, to be changed at will; None if nothing is sampled or `greedy` is there.
        greedy: the most probable token of each of the B, where only that was asked for and the executor can tell;
            [B] int64 if they are on a device, valid until the next step. As of `sleb.kernels.reference.ops.greedy`,
            NO_TOKEN where there is none.
    """

    hidden: Tensor
    logits: Tensor | None
    greedy: list[int] | Tensor | None


class Executor(Protocol):
    """Computes steps and stores their K and V."""

    name: str
    """eager, cpu or gpu."""
    kernels: str
    """torch, cpu or triton."""
    instruction_set: str | None
    """That of the C kernels; None: other kernels compute."""
    attention: str | None
    """The attention backend on a GPU, with its version; None: the kernels' own."""
    asynchronous: bool
    """Whether `run` only queues work, and takes tokens that are pending from the step before."""
    page_size: int
    unit_depths: tuple[DepthRange, ...]
    """Of each unit of its plan, as `StepArrays.of` asks for it."""

    @property
    def num_threads(self) -> int:
        """CPU threads that compute."""
        ...

    @property
    def description(self) -> str:
        """What computes, in words."""
        ...

    def run(
        self, step: StepArrays, samples: Sequence[int], greedy: bool, last: Tensor | None = None
    ) -> Forward:
        """The step's rows; `samples` are the tokens to sample from, `greedy` says that the most probable will do.

        last: what the step before has sampled, [B] int64 on the device: what `step.sources` point into.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: rows of `Forward.hidden` [B, E] to logits [B, V] in float32."""
        ...
