"""Steps operator by operator: the reference that other executors are tested against."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sleb.engine.execute.executor import Forward, PlannedUnit
from sleb.engine.execute.kv_cache import PagedKVCache
from sleb.engine.execute.step_arrays import StepArrays
from sleb.engine.execute.transfer import to_device
from sleb.engine.model.decoder import Decoder
from sleb.kernels.batch import PagedBatch


class EagerExecutor:
    """Runs the plan in order; every sublayer touches only the prefix of rows whose tier keeps it, a patch only those of
    its depths."""

    name = "eager"
    instruction_set: str | None = None
    attention: str | None = None
    asynchronous = False

    def __init__(
        self, decoder: Decoder, kv_cache: PagedKVCache, plan: tuple[PlannedUnit, ...], page_size: int
    ) -> None:
        self.kernels = decoder.kernels.name
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.page_size = page_size
        self.unit_depths = tuple(planned.depths for planned in plan)
        self._units = tuple(planned.unit for planned in plan)

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
        self, step: StepArrays, samples: Sequence[int], greedy: bool, last: Tensor | None = None
    ) -> Forward:
        """One step; see `Executor`. Logits are given whatever `greedy` says."""
        assert step.sources is None, "this executor takes tokens from the host alone"
        device = self.decoder.device
        hidden = self._run_units(step)
        if not samples:
            return Forward(hidden, None, None)
        return Forward(hidden, self.logits(hidden[torch.tensor(samples, device=device)]), None)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """See `Executor`."""
        return self.decoder.logits(hidden)

    def _run_units(self, step: StepArrays) -> Tensor:
        """The residual stream [T, E] of all the step's tokens after their last sublayer; K and V are stored."""
        decoder = self.decoder
        token_ids, positions, slots, page_table = (
            to_device(values, torch.int64, decoder.device)
            for values in (step.token_ids, step.positions, step.slots, step.page_table)
        )
        decoder.select_context(step.long_context)
        residual = decoder.embed(token_ids, positions)
        rotation = decoder.rotation(positions)
        batches: dict[int, PagedBatch] = {}
        for unit, num_rows, first_token, num_tokens in zip(
            self._units, step.unit_rows, step.unit_first_tokens, step.unit_tokens, strict=True
        ):
            if num_tokens == first_token:
                continue
            if isinstance(unit, int):
                rows = residual[first_token:num_tokens]
                residual[first_token:num_tokens] = decoder.patch(decoder.weights.patches[unit], rows)
                continue
            if num_rows not in batches:
                lens = step.query_lens[:num_rows], tuple(step.context_lens[:num_rows])
                batches[num_rows] = PagedBatch(*lens, page_table[:num_rows], self.page_size)
            attend = partial(self._attend, slots[:num_tokens], batches[num_rows])
            updated = decoder.run(unit, residual[:num_tokens], rotation.prefix(num_tokens), attend)
            if num_tokens == residual.shape[0]:
                residual = updated
            elif decoder.spec.parallel:  # the block's MLP has yet to read what its attention has read
                residual = torch.cat((updated, residual[num_tokens:]))
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
            query,
            key_cache,
            value_cache,
            batch,
            spec.attention_scale,
            spec.windows[block],
            spec.attention_softcap,
            self.decoder.weights.attention[block].sinks,
        )
