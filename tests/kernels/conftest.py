"""Fixtures of the Triton operators' tests, which run interpreted on a CPU and compiled on a GPU (`pytest -m gpu`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

_HAS_GPU = torch.cuda.is_available()
# The step between neighbouring numbers near 1. A result that is rounded once is off by half of it; by all of it where
# the interpreter makes bfloat16, for it cuts bits off.
_EPSILON = {torch.float32: 4e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(_HAS_GPU, reason="kernels are compiled for the GPU")),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not _HAS_GPU, reason="no GPU")]),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton's kernels run."""
    return torch.device(request.param)


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype of weights and activations."""
    chosen: torch.dtype = getattr(torch, request.param)
    return chosen


@pytest.fixture
def randn(device: torch.device) -> Callable[..., Tensor]:
    """randn(*shape, dtype=float32) -> normal numbers on the device; the same in every run of a test."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return make


@pytest.fixture
def count(device: torch.device) -> Callable[[int], Tensor]:
    """count(n) -> a number of rows as kernels read it."""
    return lambda number: torch.tensor([number], dtype=torch.int32, device=device)


@pytest.fixture
def close() -> Callable[..., None]:
    """close(actual, expected, slack=1): within one rounding to the dtype of `actual`, or `slack` times that."""

    def check(actual: Tensor, expected: Tensor, slack: float = 1.0) -> None:
        tolerance = slack * _EPSILON[actual.dtype]
        torch.testing.assert_close(
            actual.double().cpu(), expected.double().cpu(), atol=tolerance, rtol=tolerance, equal_nan=True
        )

    return check
