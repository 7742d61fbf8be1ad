"""Weight formats, against loops over single numbers and against what the formats promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sleb.kernels import quantization
from sleb.kernels.quantization import GROUP, Int4Weight, Int8Weight, quantize_int4, quantize_int8
from sleb.kernels.reference import ops as reference

SHAPES = [(1, 1), (3, 7), (5, 31), (2, 32), (7, 33), (17, 100), (4, 64), (33, 257)]
KINDS = {"int8": quantize_int8, "int4": quantize_int4}


def draw(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def widen_by_hand(quantized):
    """The matrix [N, K] in float64, number by number, as the docstrings say."""
    num_rows, num_columns = quantized.shape
    matrix = np.empty((num_rows, num_columns))
    for row in range(num_rows):
        for column in range(num_columns):
            if isinstance(quantized, Int8Weight):
                matrix[row, column] = float(quantized.scale[row]) * int(quantized.values[row, column])
                continue
            byte = int(quantized.values[row, column // 2])
            q = byte % 16 if column % 2 == 0 else byte // 16
            group = column // 32
            matrix[row, column] = float(quantized.scale[row, group]) * q
            matrix[row, column] += float(quantized.minimum[row, group])
    return torch.from_numpy(matrix)


def groups_of(matrix):
    """(row, first column, the 32 numbers or fewer) of every group."""
    for row in range(matrix.shape[0]):
        for start in range(0, matrix.shape[1], GROUP):
            yield row, start, matrix[row, start : start + GROUP].double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestBothFormats:
    def test_dequantize_is_the_documented_formula(self, kind, shape):
        quantized = KINDS[kind](draw(shape))
        assert quantized.shape == shape
        expected = widen_by_hand(quantized)
        torch.testing.assert_close(
            quantized.dequantize(torch.float32).double(), expected, rtol=1e-6, atol=1e-7
        )
        assert quantized.dequantize(torch.bfloat16).dtype == torch.bfloat16

    def test_rows_are_those_of_the_matrix(self, kind, shape):
        quantized = KINDS[kind](draw(shape))
        indices = torch.tensor([shape[0] - 1, 0, 0, shape[0] // 2])
        for dtype in (torch.float32, torch.float16):
            assert torch.equal(quantized.rows(indices, dtype), quantized.dequantize(dtype)[indices])
            assert torch.equal(reference.embedding(indices, quantized, dtype), quantized.rows(indices, dtype))

    def test_rows_are_quantised_alone(self, kind, shape, monkeypatch):
        """Pieces of a few rows, and rows of a larger matrix as views, give the same tensors."""
        matrix = draw(shape)
        whole = KINDS[kind](matrix)
        monkeypatch.setattr(quantization, "_SLICE", 2 * shape[1] + 1)
        pieces = type(whole).empty(shape[0] + 2, shape[1])
        pieces.row_slice(1, shape[0] + 1).fill(matrix.t().contiguous().t())
        assert torch.equal(
            pieces.row_slice(1, shape[0] + 1).dequantize(torch.float32), whole.dequantize(torch.float32)
        )

    def test_linear_widens_slices_of_rows(self, kind, shape, monkeypatch):
        quantized = KINDS[kind](draw(shape))
        x, bias = draw((3, shape[1]), 1), draw((shape[0],), 2)
        expected = x.double() @ widen_by_hand(quantized).t()
        for widened in (1, 3 * shape[1], 1 << 24):
            monkeypatch.setattr(reference, "_WIDENED", widened)
            found = reference.linear(x, quantized, None).double()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            found = reference.linear(x, quantized, bias).double()
            torch.testing.assert_close(found, expected + bias, rtol=1e-4, atol=1e-4)

    def test_num_bytes_is_what_the_tensors_hold(self, kind, shape):
        num_rows, num_columns = shape
        num_groups = math.ceil(num_columns / 32)
        expected = num_rows * (num_columns + 4 if kind == "int8" else num_groups * (16 + 2 + 2))
        assert KINDS[kind](draw(shape)).num_bytes == expected


@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestInt8:
    def test_every_weight_is_the_nearest_of_its_row(self, shape):
        matrix = draw(shape)
        quantized = quantize_int8(matrix)
        assert quantized.values.dtype == torch.int8 and quantized.scale.dtype == torch.float32
        for row in range(shape[0]):
            step = float(matrix[row].abs().max()) / 127
            assert float(quantized.scale[row]) == pytest.approx(step, rel=1e-6)
            for column in range(shape[1]):
                exact = float(matrix[row, column]) / step
                assert abs(int(quantized.values[row, column]) - exact) <= 0.5 + 1e-4
        assert int(quantized.values.min()) >= -127

    def test_rows_of_zeros(self, shape):
        matrix = draw(shape)
        matrix[0] = 0
        quantized = quantize_int8(matrix)
        assert quantized.scale[0] == 0 and not quantized.values[0].any()
        assert not quantized.dequantize(torch.float32)[0].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestInt4:
    def test_padding_is_zero_nibbles(self, shape):
        num_rows, num_columns = shape
        quantized = quantize_int4(draw(shape) + 3)
        padded = math.ceil(num_columns / 32) * 32
        assert tuple(quantized.values.shape) == (num_rows, padded // 2)
        assert tuple(quantized.scale.shape) == tuple(quantized.minimum.shape) == (num_rows, padded // 32)
        for column in range(num_columns, padded):
            byte = quantized.values[:, column // 2]
            assert not (byte >> 4 if column % 2 else byte & 15).any()

    def test_no_group_is_worse_than_rounding_over_its_range(self, shape):
        """The bound by hand: 16 values from the smallest to the largest, half a step of error at most."""
        matrix = draw(shape)
        found = widen_by_hand(quantize_int4(matrix))
        for row, start, group in groups_of(matrix):
            error = (found[row, start : start + GROUP] - group).square().sum()
            step = float(group.max() - group.min()) / 15
            slack = float(group.abs().max()) * 2**-10  # scale and minimum are float16
            assert error <= len(group) * (step / 2 + slack) ** 2

    def test_weights_of_this_format_come_back(self, shape):
        """Widened to bfloat16, as the demo model is, only the rounding to bfloat16 remains."""
        generator = torch.Generator().manual_seed(1)
        once = Int4Weight.empty(*shape)
        once.fill_random(1.0, generator)
        once.scale.mul_(torch.rand(once.scale.shape, generator=generator) + 0.5)
        for q in (0x0F, 0xF0):  # every group of the original format reaches 0 and 15
            once.values[:, :: GROUP // 2] = q
        exact = once.dequantize(torch.float32)
        for dtype, tolerance in ((torch.float32, 2**-11), (torch.bfloat16, 2**-8)):
            again = quantize_int4(exact.to(dtype)).dequantize(torch.float32)
            assert (again - exact).abs().max() <= tolerance * exact.abs().max()


class TestExtremes:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_dtypes_of_checkpoints(self, kind, dtype):
        matrix = draw((5, 48), dtype=dtype)
        quantized = KINDS[kind](matrix)
        same = KINDS[kind](matrix.float())
        assert torch.equal(quantized.dequantize(torch.float32), same.dequantize(torch.float32))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "minus-inf"]
    )
    def test_what_is_not_finite_is_refused(self, kind, value):
        matrix = draw((4, 40))
        matrix[2, 37] = value
        with pytest.raises(ValueError, match="not finite"):
            KINDS[kind](matrix)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("factor", [0.0, 1e-44, 1e-38, 1e-10, 1e-7, 1e5, 1e38], ids=str)
    def test_ranges_beyond_float16_stay_finite(self, kind, factor):
        matrix = draw((6, 70)).clamp(-3, 3) * factor
        widened = KINDS[kind](matrix).dequantize(torch.float32)
        assert widened.isfinite().all()
        largest = float(matrix.abs().max())
        if kind == "int8" or 1e-5 < largest < 6e4:
            assert (widened - matrix).abs().max() <= largest / 15 + 4e-44
        elif largest <= 1e-5:  # below float16's own steps nothing but zero is left
            assert (widened - matrix).abs().max() <= 2**-24 * 8

    def test_values_past_float16_are_cut(self):
        matrix = torch.tensor([[-1e6, 1e6] + [0.0] * 30])
        widened = quantize_int4(matrix).dequantize(torch.float32)
        assert float(widened[0, 0]) == pytest.approx(-65504, rel=0.01) or float(widened[0, 0]) < -65504
        assert widened[0, 1] > 65504

    @pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1024.0])
    def test_a_constant_group_is_exact(self, value):
        quantized = quantize_int4(torch.full((3, 40), value))
        assert not quantized.scale.any()
        assert torch.equal(quantized.dequantize(torch.float32), torch.full((3, 40), value))

    def test_one_outlier_spoils_its_own_group_only(self):
        matrix = draw((2, 96))
        clean = quantize_int4(matrix).dequantize(torch.float32)
        matrix[0, 40] = 1000.0
        spoilt = quantize_int4(matrix).dequantize(torch.float32)
        assert torch.equal(spoilt[1], clean[1])
        assert torch.equal(spoilt[0, :32], clean[0, :32]) and torch.equal(spoilt[0, 64:], clean[0, 64:])
        assert float(spoilt[0, 40]) == pytest.approx(1000.0, rel=1e-2)


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 90), offset=st.floats(-8, 8), seed=st.integers(0, 2**16)
)
def test_int4_is_never_worse_than_its_first_try(rows, columns, offset, seed):
    """Against rounding in float64 with the float16 scale and minimum that span the range, group by group."""
    matrix = draw((rows, columns), seed) + offset
    found = quantize_int4(matrix).dequantize(torch.float32).double()
    for row, start, group in groups_of(matrix):
        if len(group) < GROUP:  # the last column stands in for the padding, and counts in the fit
            continue
        low = float(np.float16(group.min()))
        step = float(np.float16((float(group.max()) - low) / 15))
        plain = ((group - low) / step).round().clamp(0, 15) * step + low
        error = (found[row, start : start + GROUP] - group).square().sum()
        assert error <= (plain - group).square().sum() * (1 + 1e-4) + 1e-9


def test_the_fit_gains_over_plain_rounding():
    """Over normal weights the least-squares step takes more than 6 % off the mean squared error."""
    matrix = draw((64, 1024))
    groups = matrix.view(-1, GROUP)
    low, high = groups.aminmax(dim=1, keepdim=True)
    low = low.half().float()
    step = ((high - low) / 15).half().float()
    plain = ((groups - low) / step).round().clamp(0, 15) * step + low
    fitted = quantize_int4(matrix).dequantize(torch.float32).view(-1, GROUP)
    assert F.mse_loss(fitted, groups) < 0.94 * F.mse_loss(plain, groups)


@pytest.mark.parametrize("kind", [Int8Weight, Int4Weight])
def test_random_weights_have_the_deviation_asked_for(kind):
    weight = kind.empty(64, 256)
    weight.fill_random(0.02, torch.Generator().manual_seed(3))
    matrix = weight.dequantize(torch.float32)
    assert float(matrix.std()) == pytest.approx(0.02, rel=0.02)
    assert abs(float(matrix.mean())) < 0.001
    again = kind.empty(64, 256)
    again.fill_random(0.02, torch.Generator().manual_seed(3))
    assert torch.equal(again.dequantize(torch.float32), matrix)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_makes_the_same_tensors(kind):
    matrix = draw((65, 200))
    here, there = KINDS[kind](matrix), KINDS[kind](matrix.cuda())
    assert there.values.is_cuda
    torch.testing.assert_close(
        there.dequantize(torch.float32).cpu(), here.dequantize(torch.float32), rtol=0, atol=2e-2
    )
    x = draw((3, 200), 1)
    found = reference.linear(x.cuda(), there, None).cpu()
    torch.testing.assert_close(found, x @ there.dequantize(torch.float32).cpu().t(), rtol=1e-3, atol=1e-2)
