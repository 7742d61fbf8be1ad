"""How a step's forward is run. Eager: operator by operator, the reference that other executors are tested against."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from sleb.engine.decoder import Decoder
from sleb.engine.kv_cache import PagedKVCache
from sleb.engine.step import StepInput
from sleb.kernels.batch import PagedBatch
from sleb.units import Sublayer


@dataclass(frozen=True)
class PlannedSublayer:
    """A sublayer that some served tier runs; depths of `removed_at` and more skip it, None: no depth does."""

    sublayer: Sublayer
    removed_at: int | None


class EagerExecutor:
    """Runs the plan in order; every sublayer touches only the prefix of rows whose tier keeps it."""

    def __init__(self, decoder: Decoder, kv_cache: PagedKVCache, plan: tuple[PlannedSublayer, ...]) -> None:
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._plan = plan

    def __call__(self, step: StepInput) -> Tensor:
        """The residual stream [T, E] of all the step's tokens after their last sublayer; K and V are stored."""
        decoder = self._decoder
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
        spec, kernels = self._decoder.spec, self._decoder.kernels
        key_cache, value_cache = self._kv_cache.layer(block)
        kernels.store_kv(key, value, key_cache, value_cache, slots)
        return kernels.paged_attention(
            query, key_cache, value_cache, batch, self._decoder.scale, spec.windows[block]
        )
