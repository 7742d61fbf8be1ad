"""How a step's forward is run. Eager: operator by operator, the reference that other executors are tested against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from sleb.engine.execute.kv_cache import PagedKVCache
from sleb.engine.model.decoder import Decoder
from sleb.engine.requests.request import Request
from sleb.engine.schedule.step import Step, StepInput
from sleb.kernels.batch import PagedBatch
from sleb.layer_map.units import Sublayer


@dataclass(frozen=True)
class PlannedSublayer:
    """A sublayer that some served tier runs; depths of `removed_at` and more skip it, None: no depth does."""

    sublayer: Sublayer
    removed_at: int | None


@dataclass(frozen=True)
class Forward:
    """What a step gives. T tokens, B of them sampled from; E hidden size, V vocabulary.

    Attributes:
        hidden: [T, E], the residual stream after the last sublayer; valid until the next step.
        logits: [B, V] float32, to be changed at will; None if nothing is sampled or `greedy` is there.
        greedy: the most probable token of each of the B, where only that was asked for and the executor can tell;
            [B] int64 if they are on a device, valid until the next step.
    """

    hidden: Tensor
    logits: Tensor | None
    greedy: list[int] | Tensor | None


@dataclass(frozen=True)
class LastSampled:
    """What the step before has sampled: tokens [B] int64 on the device, and the place of each request's among them."""

    token_ids: Tensor
    rows: Mapping[Request, int]


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

    @property
    def num_threads(self) -> int:
        """CPU threads that compute."""
        ...

    @property
    def description(self) -> str:
        """What computes, in words."""
        ...

    def run(
        self, step: Step, samples: Sequence[int], greedy: bool, last: LastSampled | None = None
    ) -> Forward:
        """The step's rows; `samples` are the tokens to sample from, `greedy` says that the most probable will do.

        last: where the tokens of pending rows are.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: rows of `Forward.hidden` [B, E] to logits [B, V] in float32."""
        ...


class EagerExecutor:
    """Runs the plan in order; every sublayer touches only the prefix of rows whose tier keeps it."""

    name = "eager"
    instruction_set: str | None = None
    attention: str | None = None
    asynchronous = False

    def __init__(
        self, decoder: Decoder, kv_cache: PagedKVCache, plan: tuple[PlannedSublayer, ...], page_size: int
    ) -> None:
        self.kernels = decoder.kernels.name
        self.decoder = decoder
        self.kv_cache = kv_cache
        self._plan = plan
        self._page_size = page_size

    @property
    def num_threads(self) -> int:
        """CPU threads that compute."""
        return torch.get_num_threads()

    @property
    def description(self) -> str:
        """What computes, in words."""
        device = self.decoder.device
        threads = f", {self.num_threads} threads" if device.type == "cpu" else ""
        return f"{self.kernels} operators on {device}{threads}"

    @torch.inference_mode()
    def run(
        self, step: Step, samples: Sequence[int], greedy: bool, last: LastSampled | None = None
    ) -> Forward:
        """One step; see `Executor`. Logits are given whatever `greedy` says."""
        assert not any(row.pending for row in step.rows), "this executor takes tokens from the host alone"
        device = self.decoder.device
        hidden = self(StepInput(step, self._page_size, device))
        if not samples:
            return Forward(hidden, None, None)
        return Forward(hidden, self.logits(hidden[torch.tensor(samples, device=device)]), None)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `Executor`."""
        return self.decoder.logits(hidden)

    def __call__(self, step: StepInput) -> Tensor:
        """The residual stream [T, E] of all the step's tokens after their last sublayer; K and V are stored."""
        decoder = self.decoder
        residual = decoder.embed(step.token_ids, step.positions)
        rotation = decoder.rotation(step.positions)
        for planned in self._plan:
            prefix = step.prefix(planned.removed_at)
            if prefix is None:
                continue
            num_tokens = prefix.num_tokens
            attend = partial(self._attend, step.slots[:num_tokens], prefix.batch)
            updated = decoder.run(
                planned.sublayer, residual[:num_tokens], rotation.prefix(num_tokens), attend
            )
            if num_tokens == residual.shape[0]:
                residual = updated
            else:
                residual[:num_tokens] = updated
        return residual

    def _attend(
        self, slots: Tensor, batch: PagedBatch, block: int, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        spec, kernels = self.decoder.spec, self.decoder.kernels
        key_cache, value_cache = self.kv_cache.layer(block)
        kernels.store_kv(key, value, key_cache, value_cache, slots)
        return kernels.paged_attention(
            query, key_cache, value_cache, batch, self.decoder.scale, spec.windows[block]
        )
