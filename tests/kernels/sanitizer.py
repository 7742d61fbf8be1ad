"""A sanitizer for Triton's interpreter, as a pytest plugin: what a GPU would do wrong in silence fails the test.

Every access of every interpreted launch, wherever in the suite, is looked at:

* bounds: each address lies in the extent of the tensor argument that its pointer was made from. Where that is unknown
  (a pointer cast from an integer, or chosen between two tensors), in the extent of some tensor of the launch;
* alignment: to the element's size; and scalars that `tl.multiple_of` vouches for are such multiples;
* one store does not give one address two values;
* races between programs of a launch: of two accesses to one address by two programs, one of which writes, the one must
  happen before the other. It does by way of an address that the first program touched by an atomic with release after
  its access, and the second by an atomic with acquire before its own. An atomic releases what came before the program's
  last `tl.debug_barrier()`: Triton emits none of its own between the stores of all threads and the atomic of one;
* within a program, a load of what it stored has a barrier between, for the two may lie in different threads;
* lanes that a masked load leaves without `other` are undefined: they hold NaN, or the largest integer.

Programs of every second launch run in reverse order. Fresh memory (`torch.empty`) holds NaN or the largest integer in
the tests of POISONED. A finding raises where the access is made; it also fails the test if somebody catches it there.

The clocks are those of FastTrack (Flanagan and Freund, PLDI 2009), worked out at the end of a launch for all addresses
at once.
"""

from __future__ import annotations

import copy
import os
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

POISONED = (Path(__file__).parent, Path(__file__).parents[1] / "engine")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
READ, WRITE, ATOMIC = 0, 1, 2

_launch = None  # the one that runs
_launches = 0
_is_on = True
_findings = []


class SanitizerError(AssertionError):
    """What the sanitizer found."""


def report(text):
    _findings.append(text)
    raise SanitizerError(text)


@contextmanager
def caught():
    """Findings within are not the test's failure: gives the list of them."""
    before, found = len(_findings), []
    try:
        yield found
    finally:
        found += _findings[before:]
        del _findings[before:]


@contextmanager
def off():
    """Launches within are not looked at: for kernels with faults put in, which other checks must catch."""
    global _is_on
    before, _is_on = _is_on, False
    try:
        yield
    finally:
        _is_on = before


class Extent:
    """The bytes of a tensor argument, from its first element to its last, and what it is called."""

    def __init__(self, name, tensor):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.low = tensor.data_ptr()
        self.high = self.low + ((last + 1) * tensor.element_size() if tensor.numel() else 0)
        self.name = f"{name} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


class Launch:
    """The accesses of one launch's programs, which run one after another."""

    def __init__(self, name, names):
        self.name, self.names = name, names
        self.extents = []
        self.program, self.clock, self.fenced, self.num_atomics = -1, 1, 0, 0
        self.seen = 0
        self.released = {}
        self.records, self.addresses, self.ends = [], [], []

    def set_grid(self, num_programs):
        self.num_programs = num_programs
        # A vector clock: for each program the barrier up to which, then for each the atomic up to which, its accesses
        # are known to have happened. The first knows nothing.
        self.snapshots = [np.zeros(2 * num_programs, np.int32)]

    def start_program(self):
        self.program += 1
        self.clock, self.fenced, self.num_atomics, self.seen = 1, 0, 0, 0

    def barrier(self):
        self.fenced, self.clock = self.clock, self.clock + 1

    def access(self, pointers, mask, kind):
        """Looks at one access; returns its addresses."""
        mask = np.asarray(mask, bool)
        addresses = pointers.data[mask] if not mask.all() else pointers.data.reshape(-1)
        if not addresses.size:
            return addresses
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if addresses.size == 1:
            low = high = bits = int(addresses[0])
        else:
            low, high = int(addresses.min()), int(addresses.max())
            bits = int(np.bitwise_or.reduce(addresses))
        word = ("load", "store", "atomic")[kind]
        extent = getattr(pointers.dtype, "sanitized_extent", None)
        if extent is not None:
            is_inside = extent.low <= low and high + size <= extent.high
        else:
            is_inside = any(e.low <= low and high + size <= e.high for e in self.extents)
        if not is_inside and not (extent is None and self._are_inside(addresses, size)):
            where = extent.name if extent is not None else "every tensor of the launch"
            outside = (
                f" by {extent.low - low} bytes before it" if extent is not None and low < extent.low else ""
            )
            if extent is not None and high + size > extent.high:
                outside = f" by {high + size - extent.high} bytes past its end"
            report(f"{self.name}: {word} out of bounds of {where}{outside}, at {self.place()}")
        if bits & (size - 1):
            where = extent.name if extent is not None else "a pointer"
            report(f"{self.name}: misaligned {word} of {size} bytes from {where}, at {self.place()}")
        epoch = self.clock
        if kind == ATOMIC:
            self.num_atomics += 1
            epoch = self.num_atomics
        self.records.append((self.program, kind, epoch, self.seen, self.fenced, size))
        self.addresses.append(addresses)
        self.ends.append((low, high + size, extent))
        return addresses

    def _are_inside(self, addresses, size):
        inside = np.zeros(addresses.shape, bool)
        for extent in self.extents:
            inside |= (addresses >= np.uint64(extent.low)) & (
                addresses + np.uint64(size) <= np.uint64(extent.high)
            )
        return bool(inside.all())

    def store(self, pointers, values, mask):
        addresses = self.access(pointers, mask, WRITE)
        if addresses.size > 1 and not (addresses[1:] > addresses[:-1]).all():
            mask = np.asarray(mask, bool)
            values = np.broadcast_to(values, pointers.data.shape)[np.broadcast_to(mask, pointers.data.shape)]
            order = np.argsort(addresses, kind="stable")
            addresses, values = addresses[order], np.ascontiguousarray(values[order])
            bits = values.view(f"u{values.itemsize}") if values.dtype.kind == "f" else values
            if ((addresses[1:] == addresses[:-1]) & (bits[1:] != bits[:-1])).any():
                report(f"{self.name}: one store gives one address two values, at {self.place()}")

    def synchronise(self, addresses, acquires, releases):
        """What an atomic, just accessed, learns from the atomics before it on the same addresses, and tells others."""
        if self.num_programs == 1:
            return
        for address in np.unique(addresses).tolist():
            left = self.released.get(address)
            seen = self.snapshots[self.seen]
            if acquires and left is not None:
                self.snapshots.append(np.maximum(seen, left))
                self.seen = len(self.snapshots) - 1
                seen = self.snapshots[self.seen]
            if releases:
                told = seen.copy() if left is None else np.maximum(seen, left)
                told[self.program], told[self.num_programs + self.program] = self.fenced, self.num_atomics
                self.released[address] = told

    def place(self):
        return f"program {builder().grid_idx}"

    def finish(self):
        """Looks for races."""
        kinds = np.array([record[1] for record in self.records], np.int8)
        if not (kinds != READ).any():
            return
        spans = {}
        for (low, high, extent), kind in zip(self.ends, kinds, strict=True):
            if kind != READ:
                before = spans.get(extent, (low, high))
                spans[extent] = min(before[0], low), max(before[1], high)
        spans = list(spans.values())
        chosen = [
            number
            for number, (low, high, _) in enumerate(self.ends)
            if kinds[number] != READ or any(low < end and high > start for start, end in spans)
        ]
        table = np.array([self.records[number] for number in chosen])
        if (kinds[chosen] != READ).all() and (table[:, 0] == table[0, 0]).all():
            return
        unit = int(table[:, 5].min())
        units = [self._units(self.addresses[number], self.records[number][5], unit) for number in chosen]
        record = np.repeat(np.arange(len(chosen)), [part.size for part in units])
        units = np.concatenate(units)
        order = np.argsort(
            units, kind="stable"
        )  # the accesses of an address stay in the order that they were made in
        units, record = units[order], record[order]
        first, second = self._neighbours(units, table[record, 1] != READ)
        pairs = np.unique(record[first] * len(chosen) + record[second])
        self._judge(table, pairs // len(chosen), pairs % len(chosen), chosen)

    @staticmethod
    def _units(addresses, size, unit):
        if size == unit:
            return addresses
        return (addresses[:, None] + np.arange(0, size, unit, dtype=np.uint64)).reshape(-1)

    @staticmethod
    def _neighbours(units, writes):
        """Pairs that must be ordered: each access with the write before it, each write with the reads before it."""
        places = np.arange(units.size)
        new = np.ones(units.size, bool)
        new[1:] = units[1:] != units[:-1]
        start = np.maximum.accumulate(np.where(new, places, 0))
        group = np.cumsum(new)
        last = np.maximum.accumulate(np.where(writes, places, -1))
        before = np.concatenate(([-1], last[:-1]))
        after = np.minimum.accumulate(np.where(writes, places, units.size)[::-1])[::-1]
        second = np.flatnonzero(before >= start)
        first = before[second]
        reads = np.flatnonzero(~writes & (after < units.size))
        reads = reads[group[after[reads]] == group[reads]]
        return np.concatenate((first, reads)), np.concatenate((second, after[reads]))

    def _judge(self, table, first, second, chosen):
        program, kind, epoch, seen, fenced = table.T[:5]
        is_atomic = kind == ATOMIC
        told = np.stack(self.snapshots)[seen[second], program[first] + self.num_programs * is_atomic[first]]
        same = program[first] == program[second]
        happened = np.where(same, fenced[second], told) >= epoch[first]
        # A program's own accesses are ordered but for a load of what another thread of it stored.
        happened |= same & ~((kind[first] == WRITE) & (kind[second] == READ))
        happened |= is_atomic[first] & is_atomic[second]
        wrong = np.flatnonzero(~happened)
        if not wrong.size:
            return
        a, b = first[wrong[0]], second[wrong[0]]
        words = ("reads", "writes", "changes by an atomic")
        extent = self.ends[chosen[a]][2]
        where = extent.name if extent is not None else "memory"
        if program[a] == program[b]:
            report(
                f"{self.name}: a program reads what it wrote to {where} without tl.debug_barrier() between"
            )
        report(
            f"{self.name}: race in {where}: program {program[a]} {words[kind[a]]} what program {program[b]} "
            f"{words[kind[b]]} and nothing orders them (programs counted as they ran; an atomic orders what came "
            "before tl.debug_barrier())"
        )


@cache
def poison_of(dtype):
    """NaN, or the largest integer, as the interpreter keeps a Triton type."""
    import triton.runtime.interpreter as interpreter

    kept = interpreter._get_np_dtype(dtype)
    if dtype.is_floating():
        patterns = {"bf16": 0x7FC0, "fp8e5": 0x7F, "fp8e4nv": 0x7F}
        return kept.type(patterns.get(dtype.name, 0xFF)) if kept.kind == "u" else kept.type("nan")
    return kept.type(True) if kept.kind == "b" else kept.type(np.iinfo(kept).max)


def builder():
    import triton.runtime.interpreter as interpreter

    return interpreter.interpreter_builder


def install():
    """Puts the sanitizer's eyes into Triton's interpreter, once a process."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    grids, builders = interpreter.GridExecutor, interpreter.InterpreterBuilder

    def wrap(owner, name):
        def decorate(function):
            original = getattr(owner, name)
            setattr(owner, name, lambda *arguments, **named: function(original, *arguments, **named))
            return function

        return decorate

    @wrap(grids, "__call__")
    def call(original, self, *arguments, **named):
        global _launch, _launches
        if not _is_on:
            return original(self, *arguments, **named)
        tensors = [*zip(self.arg_names, arguments, strict=False), *named.items()]
        names = {value.data_ptr(): name for name, value in tensors if hasattr(value, "data_ptr")}
        _launches += 1
        _launch = Launch(self.fn.__name__, names)
        try:
            result = original(self, *arguments, **named)
            _launch.finish()
            return result
        finally:
            _launch = None

    @wrap(interpreter, "_implicit_cvt")
    def convert(original, argument):
        value = original(argument)
        if _launch is not None and hasattr(argument, "data_ptr"):
            tensor = getattr(argument, "base", argument)
            extent = Extent(_launch.names.get(argument.data_ptr(), "a tensor"), tensor)
            _launch.extents.append(extent)
            value.handle.dtype = copy.copy(value.handle.dtype)
            value.handle.dtype.sanitized_extent = extent
        return value

    @wrap(builders, "set_grid_dim")
    def set_grid_dim(original, self, x, y, z):
        original(self, x, y, z)
        if _launch is not None:
            _launch.set_grid(x * y * z)

    @wrap(builders, "set_grid_idx")
    def set_grid_idx(original, self, x, y, z):
        if _launch is not None:
            _launch.start_program()
            if _launches % 2 == 0:
                x, y, z = (size - 1 - at for size, at in zip(self.grid_dim, (x, y, z), strict=True))
        original(self, x, y, z)

    @wrap(builders, "create_masked_load")
    def load(original, self, pointers, mask, other, *rest, **named):
        if _launch is not None:
            lanes = np.asarray(mask.data, bool)
            _launch.access(pointers, lanes, READ)
            # (Of one lane, the interpreter passes `other` on only where it is not 0.)
            if other is None and lanes.size > 1 and not lanes.all():
                dtype = pointers.get_element_ty()
                poison = poison_of(dtype)
                other = interpreter.TensorHandle(np.full(pointers.data.shape, poison, poison.dtype), dtype)
        return original(self, pointers, mask, other, *rest, **named)

    @wrap(builders, "create_masked_store")
    def store(original, self, pointers, value, mask, *rest, **named):
        if _launch is not None:
            _launch.store(pointers, value.data, mask.data)
        return original(self, pointers, value, mask, *rest, **named)

    acquire = {"ACQUIRE", "ACQUIRE_RELEASE"}
    release = {"RELEASE", "ACQUIRE_RELEASE"}

    def atomic(pointers, mask, sem):
        if _launch is not None:
            addresses = _launch.access(pointers, mask, ATOMIC)
            name = getattr(sem, "name", str(sem)).rpartition(".")[2]
            _launch.synchronise(addresses, name in acquire, name in release)

    @wrap(builders, "create_atomic_rmw")
    def rmw(original, self, operation, pointers, value, mask, sem, scope):
        atomic(pointers, mask.data, sem)
        return original(self, operation, pointers, value, mask, sem, scope)

    @wrap(builders, "create_atomic_cas")
    def cas(original, self, pointers, expected, value, sem, scope):
        atomic(pointers, np.ones(pointers.data.shape, bool), sem)
        return original(self, pointers, expected, value, sem, scope)

    @wrap(builders, "create_barrier")
    def barrier(original, self):
        if _launch is not None:
            _launch.barrier()
        return original(self)

    @wrap(builders, "create_select")
    def select(original, self, condition, left, right):
        result = original(self, condition, left, right)
        extents = (getattr(side.dtype, "sanitized_extent", None) for side in (left, right))
        if isinstance(result.dtype, tl.pointer_type) and len(set(extents)) > 1:
            result.dtype = tl.pointer_type(result.get_element_ty())
        return result

    @wrap(interpreter.TensorHandle, "set_attr")
    def set_attr(original, self, key, value):
        is_scalar = key == "tt.divisibility" and self.data.size == 1
        if _launch is not None and is_scalar and int(self.data.reshape(-1)[0]) % value[0]:
            report(f"{_launch.name}: tl.multiple_of vouches that {self.data} is a multiple of {value[0]}")
        return original(self, key, value)


if INTERPRETED:
    try:
        install()
    except ImportError:  # no Triton, no kernels
        INTERPRETED = False


@pytest.fixture
def unsanitized():
    """The test's launches are not looked at."""
    with off():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Fresh memory is poisoned in the folders' tests: what torch does for reproducibility, at the cost of a fill."""
    global _launches
    _launches = 0
    if not any(folder in item.path.parents for folder in POISONED):
        return (yield)
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return (yield)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    found = list(_findings)
    _findings.clear()
    if found:
        pytest.fail("found by the sanitizer, and caught by the code: " + "; ".join(found))
    return result


@pytest.hookimpl
def pytest_runtest_teardown(item):
    _findings.clear()
