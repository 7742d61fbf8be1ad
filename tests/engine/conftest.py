"""Helpers of the engine's tests, as fixtures, because test modules cannot import each other."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sleb.engine.engine import Engine
from sleb.engine.execute.step_arrays import StepArrays
from sleb.engine.generation import GenerationDefaults
from sleb.engine.llm import LLM
from sleb.engine.outputs import TokenLogprobs
from sleb.engine.requests.detokenizer import Detokenizer
from sleb.engine.requests.request import Request
from sleb.engine.requests.sampling_params import SamplingParams
from sleb.engine.requests.tier import Tier
from sleb.engine.schedule.step import ScheduledRow
from sleb.layer_map.layer_map import LayerMap, Patch, Patches, Unit
from sleb.layer_map.patches import Form
from sleb.layer_map.units import Sublayer

TOLERANCE = 1e-4


@pytest.fixture(scope="session")
def make_llm() -> Callable[..., LLM]:
    """make_llm(TinyModel or folder, removed=units or blocks, tiers=…, patches=…, **options): float32, small pages,
    torch.

    Without `tiers` it serves the one depth that all of `removed` makes.
    """

    def make(
        model: Any,
        removed: Sequence[Unit | int] = (),
        tiers: Sequence[int] | None = None,
        patches: Sequence[Patch] = (),
        **options: Any,
    ) -> LLM:
        path = Path(getattr(model, "path", model))
        num_blocks = model.num_blocks if hasattr(model, "num_blocks") else 6
        units = tuple(unit if isinstance(unit, Unit) else Unit(unit) for unit in removed)
        layer_map = LayerMap(
            model=path.name,
            fingerprint=None,
            num_blocks=num_blocks,
            removed=units,
            patches=Patches.of(patches) if patches else None,
        )
        defaults = {
            "page_size": 4,
            "max_num_seqs": 8,
            "dtype": "float32",
            "device": "cpu",
            "kernels": "torch",
        }
        options = defaults | options
        return LLM(path, layer_map, tiers, **options)

    return make


@pytest.fixture(scope="session")
def random_patch() -> Callable[..., Patch]:
    """random_patch(width, first, last, first_depth, last_depth, form="full", normed=True): numbers of float16."""

    def make(
        width: int,
        first: Sublayer,
        last: Sublayer,
        first_depth: int,
        last_depth: int | None = None,
        form: Form = "full",
        normed: bool = True,
    ) -> Patch:
        rng = np.random.default_rng([width, *map(ord, f"{first}{last}{first_depth}{form}")])
        shapes = {
            "full": {"weight": (width, width)},
            "low-rank": {"down": (5, width), "up": (width, 5)},
            "scale": {"scale": (width,)},
        }[form]
        tensors = {name: rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
        tensors["bias"] = rng.normal(0, 0.3, width)
        halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
        return Patch(first, last, first_depth, last_depth, form, normed and form != "scale", halves)

    return make


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Request]:
    """make_request(tokens, tier=…, pages=…, max_tokens=…, **sampling params): a request without an engine."""
    numbers = iter(range(1_000_000))

    def make(
        tokens: Sequence[int],
        tier: Tier | None = None,
        pages: Sequence[int] = (),
        tokenizer: Any = None,
        num_prompt_tokens: int | None = None,
        **params: Any,
    ) -> Request:
        resolved = GenerationDefaults().resolve(SamplingParams(**params))
        return Request(
            request_id=f"request-{next(numbers)}",
            tokens=list(tokens),
            num_prompt_tokens=len(tokens) if num_prompt_tokens is None else num_prompt_tokens,
            params=resolved,
            max_tokens=16 if resolved.max_tokens is None else resolved.max_tokens,
            tier=tier or Tier("model", 0, "digest-0", 1, ()),
            rng=random.Random(resolved.seed),
            detokenizer=Detokenizer(tokenizer, list(tokens), resolved.stop_strings),
            pages=list(pages),
            prompt_logprobs=None if resolved.prompt_logprobs is None else [None],
        )

    return make


@pytest.fixture(scope="session")
def forward() -> Callable[..., Tensor]:
    """forward(engine, [(request, start, end), …]): logits [T, V] of a step made by hand, past the scheduler."""

    def run(engine: Engine, rows: Sequence[tuple[Request, int, int]]) -> Tensor:
        executor, short = engine.runner.executor, engine.spec.short_context
        for request, _, _ in rows:
            request.long_context = short is not None and len(request.tokens) > short
        scheduled = [ScheduledRow(request, start, end - start) for request, start, end in rows]
        step = StepArrays.of(scheduled, executor.unit_depths, executor.page_size)
        with torch.inference_mode():
            return executor.logits(executor.run(step, [], greedy=False).hidden)

    return run


@pytest.fixture(scope="session")
def assert_logprobs() -> Callable[..., None]:
    """assert_logprobs(entries, reference [n, V]): chosen and top values agree with the reference within 1e-4.

    The alternatives must be the most probable ones: their values are compared with the reference's best, since
    the ids of a near tie may swap.
    """

    def check(entries: Sequence[TokenLogprobs], reference: Tensor) -> None:
        assert len(entries) == reference.shape[0]
        for entry, row in zip(entries, reference, strict=True):
            assert abs(entry.logprob - row[entry.token_id].item()) < TOLERANCE
            ids = [token for token, _ in entry.top]
            values = torch.tensor([value for _, value in entry.top])
            assert len(set(ids)) == len(ids)
            torch.testing.assert_close(values, row[ids], atol=TOLERANCE, rtol=0)
            torch.testing.assert_close(values, row.topk(len(ids)).values, atol=TOLERANCE, rtol=0)

    return check
