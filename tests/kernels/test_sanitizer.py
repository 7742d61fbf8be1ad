"""The interpreter's sanitizer: kernels with one fault each, all of which the interpreter alone runs without a word."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled for the GPU")

SIZE = 16


@pytest.fixture
def found(request):
    """found(kernel, grid, *arguments) -> what the sanitizer says of a launch, or nothing."""
    sanitizer = request.config.pluginmanager.get_plugin("sanitizer")

    def launch(kernel, grid, *arguments, **constants):
        faults = triton.runtime.errors.InterpreterError, sanitizer.SanitizerError
        with sanitizer.caught() as findings, suppress(*faults):
            kernel[grid](*arguments, **constants)
        return "; ".join(findings)

    return launch


@triton.jit
def _copy(x, out, size, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, mask=at < size, other=0.0), mask=at < size)


class TestBounds:
    def test_inside(self, found):
        assert not found(_copy, (2,), torch.ones(20), torch.ones(20), 20, SIZE=SIZE)

    def test_one_past_the_end(self, found):
        """The neighbouring numbers are the test's own memory: nothing but the tensor's extent says that it is wrong."""
        whole = torch.ones(40)
        assert "load out of bounds of x float32[20] by 4 bytes" in found(
            _copy, (2,), whole[:20], torch.ones(40), 21, SIZE=SIZE
        )
        assert "store out of bounds of out" in found(_copy, (2,), torch.ones(40), whole[:20], 21, SIZE=SIZE)

    def test_before_the_start(self, found):
        assert "by 4 bytes before it" in found(
            _shifted, (1,), torch.ones(40)[8:], torch.ones(40), -1, SIZE=SIZE
        )

    def test_another_tensor_of_the_launch_is_not_its_own(self, found):
        whole = torch.ones(40)
        assert "of x float32[16]" in found(_shifted, (1,), whole[:16], whole[16:], 16, SIZE=SIZE)

    def test_a_pointer_chosen_between_two_tensors(self, found):
        x, y = torch.ones(4), torch.ones(4)
        assert not found(_chosen, (1,), x, y, torch.zeros(8), 0)
        assert "of every tensor of the launch" in found(_chosen, (1,), x, y, torch.zeros(8), 1 << 20)

    def test_a_finding_that_the_code_catches_fails_the_test(self, request):
        """As a tuner catches what a configuration raises."""
        sanitizer = request.config.pluginmanager.get_plugin("sanitizer")
        around = sanitizer.pytest_runtest_call(request.node)
        next(around)
        with suppress(triton.runtime.errors.TritonError):
            _shifted[(1,)](torch.ones(4), torch.ones(40), 0, SIZE=SIZE)
        with pytest.raises(pytest.fail.Exception, match="out of bounds"):
            around.send(None)


@triton.jit
def _shifted(x, out, shift, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at + shift))


@triton.jit
def _chosen(x, y, out, shift):
    at = tl.arange(0, 8)
    tl.store(out + at, tl.load(tl.where(at < 4, x + at, y + at - 4 + shift)))


@triton.jit
def _widened(x, out):
    tl.store(out, tl.load((x + 1).to(tl.pointer_type(tl.int32))))


@triton.jit
def _vouched(x, out, start, SIZE: tl.constexpr):
    at = tl.multiple_of(start, 16) + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at))


class TestAlignment:
    def test_a_misaligned_pointer(self, found):
        assert "misaligned load of 4 bytes" in found(
            _widened, (1,), torch.ones(8, dtype=torch.int8), torch.ones(1, dtype=torch.int32)
        )

    def test_a_multiple_that_is_none(self, found):
        x, out = torch.ones(64), torch.ones(64)
        assert not found(_vouched, (1,), x, out, 32, SIZE=SIZE)
        assert "is a multiple of 16" in found(_vouched, (1,), x, out, 8, SIZE=SIZE)


@triton.jit
def _rows(x, out, rows, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + tl.load(rows + tl.program_id(0)) * SIZE + at, tl.load(x + tl.program_id(0) * SIZE + at))


@triton.jit
def _pairs(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at // 2, tl.load(x + at))


@triton.jit
def _in_place(x, shift, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(x + at, tl.load(x + at + shift))


@triton.jit
def _again(x, out, BARRIER: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + at, tl.load(out + SIZE - 1 - at))


class TestRaces:
    def test_a_doubled_row(self, found):
        x, out = torch.randn(3, SIZE), torch.zeros(3, SIZE)
        assert not found(_rows, (3,), x, out, torch.tensor([2, 0, 1]), SIZE=SIZE)
        found_here = found(_rows, (3,), x, out, torch.tensor([2, 0, 2]), SIZE=SIZE)
        assert "race in out float32[3, 16]" in found_here and "writes what program" in found_here

    def test_one_store_with_two_values(self, found):
        assert not found(_pairs, (1,), torch.ones(SIZE), torch.zeros(SIZE), SIZE=SIZE)
        assert "two values" in found(_pairs, (1,), torch.randn(SIZE), torch.zeros(SIZE), SIZE=SIZE)

    @pytest.mark.parametrize("programs", [(2, 3), (3, 2)])
    def test_read_by_one_program_and_written_by_another(self, found, programs):
        """In both orders: each program reads what the next one writes."""
        for number in programs:
            x = torch.randn(4 * SIZE)
            assert not found(_in_place, (number,), x, 0, SIZE=SIZE)
            assert "race in x" in found(_in_place, (number,), x, SIZE, SIZE=SIZE)

    def test_elements_of_two_sizes(self, found):
        x = torch.zeros(8, dtype=torch.int8)
        assert not found(_bytes_and_words, (2,), x, torch.zeros(8), 4)
        assert "race in x" in found(_bytes_and_words, (2,), x, torch.zeros(8), 3)

    def test_a_program_that_reads_what_its_threads_wrote(self, found):
        assert not found(_again, (1,), torch.ones(SIZE), torch.ones(SIZE), BARRIER=True, SIZE=SIZE)
        assert "without tl.debug_barrier() between" in found(
            _again, (1,), torch.ones(SIZE), torch.ones(SIZE), BARRIER=False, SIZE=SIZE
        )


@triton.jit
def _bytes_and_words(x, out, place):
    if tl.program_id(0) == 0:
        tl.store(x.to(tl.pointer_type(tl.int32)), 1)
    else:
        tl.store(out, tl.load(x + place).to(tl.float32))


@triton.jit
def _join(x, partial, counter, out, num_parts, FAULT: tl.constexpr, SIZE: tl.constexpr):
    """The sum of all programs' numbers, made by the last to arrive."""
    at = tl.arange(0, SIZE)
    part = tl.program_id(0)
    tl.store(partial + part * SIZE + at, tl.load(x + part * SIZE + at))
    if FAULT == "early":
        first = tl.load(partial + (1 if part == 0 else 0) * SIZE + at)
    if FAULT != "no barrier":
        tl.debug_barrier()
    if FAULT == "no atomic":
        arrived = tl.load(counter)
        tl.store(counter, arrived + 1)
    elif FAULT == "relaxed":
        arrived = tl.atomic_add(counter, 1, sem="relaxed")
    elif FAULT == "another address":
        arrived = tl.atomic_add(counter + part, 1) + part
    else:
        arrived = tl.atomic_add(counter, 1)
    if arrived == num_parts - 1:
        total = tl.zeros([SIZE], tl.float32)
        for other in range(num_parts):
            total += tl.load(partial + other * SIZE + at)
        tl.store(out + at, total)
        tl.store(counter, 0)
    elif FAULT == "early":
        tl.store(out + at, first, mask=at < 0)


class TestAtomics:
    def test_the_last_to_arrive_joins(self, found):
        x, counter = torch.randn(5, SIZE), torch.zeros(5, dtype=torch.int32)
        for _ in range(2):
            out, partial = torch.zeros(SIZE), torch.empty(5, SIZE)
            assert not found(_join, (5,), x, partial, counter, out, 5, FAULT="", SIZE=SIZE)
            torch.testing.assert_close(out, x.sum(0))
            assert not counter.any()

    def test_every_second_launch_runs_its_programs_backwards(self, found):
        out = torch.zeros(4, dtype=torch.int32)
        for place in range(4):
            assert not found(_last, (5,), out[place:])
        assert out.tolist() == [4, 0, 4, 0]

    @pytest.mark.parametrize("fault", ["no barrier", "no atomic", "relaxed", "another address", "early"])
    def test_a_join_that_is_not_ordered(self, found, fault):
        arguments = torch.randn(5, SIZE), torch.zeros(5, SIZE), torch.zeros(5, dtype=torch.int32)
        assert "race in" in found(_join, (5,), *arguments, torch.zeros(SIZE), 5, FAULT=fault, SIZE=SIZE)

    def test_order_is_passed_on(self, found):
        """The third program reads what the first wrote, and hears of it from the second."""
        for links, is_right in (((0, 0, 1, 1), True), ((0, 0, 1, 2), False)):
            message = found(_chain, (3,), torch.zeros(1), torch.zeros(4, dtype=torch.int32), *links)
            found(_last, (1,), torch.zeros(1, dtype=torch.int32))  # so that the next one runs forwards again
            assert ("race in x" not in message) == is_right


@triton.jit
def _last(out):
    tl.atomic_xchg(out, tl.program_id(0))


@triton.jit
def _chain(x, counters, told, heard, passed, read):
    program = tl.program_id(0)
    if program == 0:
        tl.store(x, 1.0)
        tl.debug_barrier()
        tl.atomic_add(counters + told, 1)
    elif program == 1:
        tl.atomic_add(counters + heard, 1)
        tl.debug_barrier()
        tl.atomic_add(counters + passed, 1)
    else:
        tl.atomic_add(counters + read, 1)
        tl.load(x)


@triton.jit
def _sum(x, out, size, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out, tl.sum(tl.load(x + at, mask=at < size)))


class TestPoison:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_fresh_memory_that_reaches_a_result(self, dtype):
        made = torch.empty(2, SIZE, dtype=dtype)
        made[0] = 1.0
        out = torch.zeros(SIZE)
        for row, is_right in ((0, True), (1, False)):
            _shifted[(1,)](made, out, row * SIZE, SIZE=SIZE)
            assert bool(out.isfinite().all()) == is_right

    def test_fresh_integers_are_absurd(self):
        assert torch.empty(3, dtype=torch.int32).eq(2**31 - 1).all()
        assert torch.empty_like(torch.zeros(3)).isnan().all() and torch.zeros(3).new_empty(2).isnan().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_lanes_that_a_mask_leaves_out(self, dtype):
        out = torch.zeros(1)
        for size, is_right in ((SIZE, True), (SIZE - 1, False)):
            _sum[(1,)](torch.ones(SIZE, dtype=dtype), out, size, SIZE=SIZE)
            assert bool(out.isfinite().all()) == is_right
