"""The C kernels one by one, at every instruction set that this machine can run, against float64 and brute force."""

from __future__ import annotations

import ctypes
import itertools
import random
from array import array

import numpy as np
import pytest
import torch

from sleb.kernels.cpu import library, records
from sleb.kernels.cpu.features import cpu_features
from sleb.kernels.quantization import Groups, Int4Weight, Int8Weight
from sleb.kernels.reference import ops as reference

LEVELS = {
    "none": [],
    "avx512": ["avx512"],
    "avx512bf16": ["avx512", "avx512bf16", library.EMULATED],
    "amx": ["avx512", "avx512bf16", "amx", library.EMULATED],
}[cpu_features().level]
STORE, ADD, ACTIVATE = range(3)
GROUP = 32

pytestmark = [
    pytest.mark.skipif(not LEVELS, reason="the C kernels need AVX-512 with VNNI"),
    pytest.mark.usefixtures("one_processor"),
]


@pytest.fixture(scope="module", params=LEVELS)
def kernels(request):
    return library.CpuKernels.load(num_threads=3, level=request.param)


class Rig:
    """A model record with a workspace, for calls of single kernels. Keeps alive what the record points to."""

    def __init__(self, kernels, *, widest=64, samples=80, sequences=16, max_tokens=512, **fields):
        defaults = {
            "hidden_size": 32,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 16,
            "vocab_size": 64,
            "page_size": 16,
            "norm_eps": 1e-5,
            "scale": 0.3,
            "embed_scale": 1.0,
            "residual_scale": 1.0,
        }
        self.kernels = kernels
        self.model = records.Model(**(defaults | fields), max_tokens=max_tokens, pool=kernels.pool)
        size = ctypes.c_size_t()
        address = kernels.library.sleb_workspace_create(
            self.model, widest, widest, samples, sequences, ctypes.byref(size)
        )
        self.model.workspace = address
        self._freed = (kernels.library.sleb_workspace_destroy, address, size.value)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        free, address, size = self._freed
        free(address, size)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantised_rows(x):
    """Rows rounded to signed bytes by groups of 32 and back, in float32 as the kernels do it."""
    rows, features = x.shape
    padded = np.zeros((rows, -(-features // GROUP) * GROUP), dtype=np.float32)
    padded[:, :features] = x.numpy()
    groups = padded.reshape(rows, -1, GROUP)
    top = np.abs(groups).max(axis=2, keepdims=True)
    inverse = np.where(top > 0, np.float32(127) / np.where(top > 0, top, 1), 0).astype(np.float32)
    rounded = np.rint(groups * inverse) * (top / np.float32(127))
    return torch.from_numpy(rounded.reshape(rows, -1)[:, :features].astype(np.float64))


def make_weight(kind, rows, columns, seed):
    weight = randn(rows, columns, seed=seed)
    if kind in GROUPED:
        stored = GROUPED[kind].empty(rows, columns)
        for tensor, low, high in ((stored.values, 0, 256), (stored.scale, -9, 9), (stored.minimum, 0, 16)):
            if tensor is not None:
                tensor.copy_(torch.randint(low, high, tensor.shape))
        stored.scale.mul_(2.0 ** -(GROUPED[kind].bits + 2))
        if stored.groups.base == "minimum":
            stored.minimum.mul_(0.1)
        return stored, stored.dequantize(torch.float32).double()
    if kind in ("int8", "int4"):
        chosen = (Int8Weight if kind == "int8" else Int4Weight).empty(rows, columns)
        chosen.fill(weight)
        return chosen, chosen.dequantize(torch.float32).double()
    weight = weight.to(getattr(torch, kind))
    return weight, weight.double()


def expected_operand(kernels, kind, rows, x):
    """What a product makes of its rows: bf16, bytes or nothing; and the error that its sums may then have."""
    tiles = "amx" in kernels.level
    kind = "int4" if kind in GROUPED else kind
    if kind in ("int8", "int4") and not (tiles and rows >= 16):
        return quantised_rows(x), 1e-4
    if kind in ("int8", "int4"):  # a panel widened to bf16: each weight may be off by half of 2^-8
        return x.bfloat16().double(), 3e-2
    if kind == "bfloat16" and kernels.level != "avx512":
        return x.bfloat16().double(), 1e-4
    return x.double(), 1e-4


KINDS = ["float32", "float16", "bfloat16", "int8", "int4"]
GROUPED = {
    "4 by 64, zero": Groups(4, 64, "zero"),
    "4 by 32, middle": Groups(4, 32, "middle"),
    "4 by 128, minimum": Groups(4, 128, "minimum"),
    "8 by 32, middle": Groups(8, 32, "middle"),
    "8 by 64, minimum": Groups(8, 64, "minimum"),
    "8 by 16, middle": Groups(8, 16, "middle"),
    "8 by 16, minimum": Groups(8, 16, "minimum"),
    "8 by 96, zero": Groups(8, 96, "zero"),
}
ROWS = [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 17, 31, 32, 33, 113, 260]
SHAPES = [(1, 1), (7, 31), (31, 7), (32, 32), (33, 64), (64, 33), (65, 100), (100, 65), (96, 576), (576, 96)]


@pytest.mark.parametrize("kind", [*KINDS, *GROUPED])
def test_linear(kernels, kind):
    """All tails: rows past whole tiles, outputs past whole panels, inputs past whole groups; with and without bias."""
    with Rig(kernels, widest=576) as rig:
        for number, (rows, (n, k)) in enumerate(zip(itertools.cycle(ROWS), SHAPES * 5, strict=False)):
            weight, exact = make_weight(kind, n, k, number)
            bias = randn(n, seed=number + 1) if number % 2 else None
            x = randn(rows, k, seed=number + 2)
            packed = kernels.pack(weight, bias)
            operand, tolerance = expected_operand(kernels, kind, rows, x)
            expected = operand @ exact.T + (0 if bias is None else bias.double())
            out = torch.full((rows, n), 7.0)
            kernels.isa.linear(rig.model, None, packed, x.data_ptr(), rows, STORE, 0, out.data_ptr())
            atol = tolerance * k**0.5
            torch.testing.assert_close(out.double(), expected, atol=atol, rtol=1e-4)
            kernels.isa.linear(rig.model, None, packed, x.data_ptr(), rows, ADD, 0, out.data_ptr())
            torch.testing.assert_close(out.double(), 2 * expected, atol=2 * atol, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "gated"),
    [*((name, True) for name in library.ACTIVATIONS), *((name, False) for name in reference.ACTIVATIONS)],
)
def test_activation(kernels, name, gated):
    with Rig(kernels) as rig:
        for rows, features, k in [(1, 5, 33), (3, 16, 32), (7, 40, 64), (40, 100, 7)]:
            weight = 2 * randn(features * (2 if gated else 1), k, seed=features)
            bias, x = randn(weight.shape[0], seed=1), randn(rows, k, seed=rows)
            hidden = x.double() @ weight.double().T + bias.double()
            expected = (reference.gated_activate if gated else reference.activate)(hidden, name)
            packed = kernels.pack(weight, bias, gated=gated)
            out = torch.zeros(rows, features)
            activation = library.ACTIVATIONS[name]
            kernels.isa.linear(
                rig.model, None, packed, x.data_ptr(), rows, ACTIVATE, activation, out.data_ptr()
            )
            torch.testing.assert_close(out.double(), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("affine", [True, False])
def test_norm_before_a_product(kernels, norm, affine):
    with Rig(kernels, widest=600) as rig:
        for rows, k in [(1, 16), (2, 33), (5, 576), (70, 600)]:
            weight, x = torch.eye(k), 3 * randn(rows, k, seed=k) + 1
            scale, shift = (randn(k, seed=1), randn(k, seed=2)) if affine else (None, None)
            if norm == "rms":
                expected = reference.rms_norm(x.double(), None if scale is None else scale.double(), 1e-5)
            else:
                pair = (None, None) if scale is None else (scale.double(), shift.double())
                expected = reference.layer_norm(x.double(), *pair, 1e-5)
            bias = kernels.keep(shift if norm == "layer" else None)
            record = records.Norm(kernels.keep(scale), bias, library.NORMS[norm])
            out = torch.zeros(rows, k)
            packed = kernels.pack(weight)
            kernels.isa.linear(rig.model, record, packed, x.data_ptr(), rows, STORE, 0, out.data_ptr())
            torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_norm_and_activation_around_a_product_of_every_format(kernels, kind, gated):
    """As an MLP's first half runs. A float32 norm may round an operand to the value beside the expected one."""
    with Rig(kernels, widest=200) as rig:
        for rows, features, k in [(1, 5, 33), (4, 24, 64), (5, 16, 65), (16, 40, 200), (35, 72, 100)]:
            count = features * (2 if gated else 1)
            weight, _ = make_weight("float32", count, k, seed=features)
            weight /= k**0.5
            if kind in ("int8", "int4"):
                stored = (Int8Weight if kind == "int8" else Int4Weight).empty(count, k)
                stored.fill(weight)
                exact = stored.dequantize(torch.float32).double()
            else:
                stored = weight.to(getattr(torch, kind))
                exact = stored.double()
            x, scale = 2 * randn(rows, k, seed=rows), 1 + 0.2 * randn(k, seed=1)
            operand, _ = expected_operand(kernels, kind, rows, reference.rms_norm(x, scale, 1e-5))
            hidden = operand @ exact.T
            expected = (reference.gated_activate if gated else reference.activate)(hidden, "silu")
            record = records.Norm(kernels.keep(scale), None, library.NORMS["rms"])
            packed = kernels.pack(stored, gated=gated)
            out = torch.full((rows, features), torch.nan)
            address = x.data_ptr(), rows, ACTIVATE, library.ACTIVATIONS["silu"], out.data_ptr()
            kernels.isa.linear(rig.model, record, packed, *address)
            tolerance = 2e-4 if kind in ("float32", "float16") else 3e-2
            torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_in_one_row_leaves_the_others_as_they_are(kernels, kind, poison):
    weight, _ = make_weight(kind, 70, 100, seed=3)
    with Rig(kernels, widest=100) as rig:
        packed = kernels.pack(weight)
        for rows in (2, 5, 16, 40):
            x, outputs = randn(rows, 100, seed=rows), []
            for value in (0.5, poison):
                x[1] = value
                outputs.append(torch.zeros(rows, 70))
                kernels.isa.linear(
                    rig.model, None, packed, x.data_ptr(), rows, STORE, 0, outputs[-1].data_ptr()
                )
            others = [row for row in range(rows) if row != 1]
            assert torch.equal(outputs[0][others], outputs[1][others])
            assert not outputs[1][1].isfinite().any()


def test_a_row_of_zeros_and_large_values(kernels):
    """No division by the largest of nothing; and what overflows bf16 or a byte must not."""
    with Rig(kernels) as rig:
        for kind in KINDS:
            weight, exact = make_weight(kind, 40, 64, 3)
            packed = kernels.pack(weight)
            x = torch.cat([torch.zeros(1, 64), 1e4 * randn(1, 64)])
            out = torch.zeros(2, 40)
            kernels.isa.linear(rig.model, None, packed, x.data_ptr(), 2, STORE, 0, out.data_ptr())
            assert bool((out[0] == 0).all())
            error = (out[1].double() - x[1].double() @ exact.T).abs().max()
            assert error < 0.05 * 1e4 * 64**0.5


class TestPatch:
    """Steps of patches alone: the residual begins as the embedding, and each touches its range of it."""

    WIDTH, RANK = 100, 13

    def unit(self, kernels, kind, form, norm, seed):
        """A patch's record, and its arithmetic in float64 over rows that have been through its norm."""
        width, bias = self.WIDTH, randn(self.WIDTH, seed=seed)
        unit = records.Unit(kind=library.PATCH, norm=records.Norm(kind=library.NORMS.get(norm, 0)))
        if form == "scale":
            scale = 1 + randn(width, seed=seed + 1)
            unit.scale, unit.shift = kernels.keep(scale), kernels.keep(bias)
            return unit, lambda rows, x: x * scale.double() + bias.double()
        second, up = make_weight(kind, width, width if form == "full" else self.RANK, seed + 2)
        unit.second = kernels.pack(second, bias)
        if form == "full":
            return unit, lambda rows, x: expected_operand(kernels, kind, rows, x)[0] @ up.T + bias.double()
        first, down = make_weight(kind, self.RANK, width, seed + 3)
        unit.first = kernels.pack(first)

        def low_rank(rows, x):
            between = expected_operand(kernels, kind, rows, x)[0] @ down.T
            return expected_operand(kernels, kind, rows, between.float())[0] @ up.T + bias.double()

        return unit, low_rank

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("norm", ["rms", "layer"])
    def test_ranges_of_rows(self, kernels, kind, norm):
        """Single tokens and chunks, an empty range; the rows before and after it stay as they are, to the bit."""
        lengths = [1, 1, 3, 40, 2, 1, 7, 1]
        starts, count = [0, *itertools.accumulate(lengths)], sum(lengths)
        embed = 3 * randn(count, self.WIDTH, seed=9) + 0.5
        forms = [("full", 1), ("low-rank", 1)] + [("scale", 0), ("full", 0), ("low-rank", 0)] * (
            norm == "rms"
        )
        with Rig(
            kernels, hidden_size=self.WIDTH, vocab_size=count, widest=self.WIDTH,
            max_tokens=count, embed=embed.data_ptr(), num_units=1, head=kernels.pack(torch.zeros(count, self.WIDTH)),
        ) as rig:  # fmt: skip
            for seed, (form, normed) in enumerate(forms):
                unit, patch = self.unit(kernels, kind, form, norm if normed else None, seed)
                rig.model.units = ctypes.addressof(unit)
                for first, end in [(0, 8), (5, 6), (2, 5), (3, 3)]:
                    found = self.run(kernels, rig, lengths, starts, first, end).view(embed.shape)
                    rows = slice(starts[first], starts[end])
                    x, expected = embed[rows], embed.double()
                    if normed and norm == "rms":
                        x = reference.rms_norm(x, None, 1e-5)
                    elif normed:
                        x = reference.layer_norm(x, None, None, 1e-5)
                    if first < end:
                        patched = patch(rows.stop - rows.start, x)
                        expected[rows] = patched if form == "scale" else expected[rows] + patched
                    # What lies at the border of two values of an operand is rounded to either.
                    tolerance = 1e-5 if kind in ("float32", "float16") else 1e-2
                    atol = tolerance * float(expected.abs().max())
                    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=0)
                    others = torch.ones(count, dtype=torch.bool)
                    others[rows] = False
                    assert torch.equal(found[others], embed[others])

    def run(self, kernels, rig, lengths, starts, first, end):
        """The residual after a step of sequences of these lengths, of which those in [first, end) run the patch."""
        arrays = [array("i", values) for values in (range(starts[-1]), starts, lengths, [first], [end])]
        at = [values.buffer_info()[0] for values in arrays]
        step = records.Step(
            num_tokens=starts[-1], num_sequences=len(lengths), token_ids=at[0], positions=at[0], query_starts=at[1],
            context_lens=at[2], unit_starts=at[3], unit_ends=at[4],
        )  # fmt: skip
        kernels.isa.forward(rig.model, step)
        address = kernels.library.sleb_workspace_residual(rig.model.workspace)
        return torch.tensor((ctypes.c_float * (starts[-1] * self.WIDTH)).from_address(address))


class TestBlock:
    """A step of one block's attention and MLP: what stands around their products, against float64."""

    WIDTH, INNER, HEADS, DIM, VOCAB = 100, 44, 3, 20, 70

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"before": None, "after": "rms"},
            {"after": "rms", "embed_scale": 1.7, "residual_scale": 0.3, "logit_softcap": 2.0},
            {"before": "layer", "after": "layer", "residual_scale": 1.5},
            {"parallel": "shared", "before": "layer"},
            {"parallel": "own", "residual_scale": 0.6},
        ],
        ids=str,
    )
    def test_block(self, kernels, kind, options):
        """Chunks and single tokens of which the last sequence skips the block, then fewer rows than are shared."""
        width, before, after = self.WIDTH, options.get("before", "rms"), options.get("after")
        shapes = [(5 * self.DIM, width), (width, 3 * self.DIM), (2 * self.INNER, width), (width, self.INNER)]
        made = [make_weight(kind, *shape, number) for number, shape in enumerate(shapes)]
        biases = [0.3 * randn(shape[0], seed=20 + number) for number, shape in enumerate(shapes)]
        scales = [0.2 + 0.05 * randn(width, seed=40 + number) for number in range(4)]
        if options.get("parallel") == "shared":
            scales[2] = scales[0]
        kept = {id(scale): kernels.keep(scale) for scale in scales}
        packed = [
            kernels.pack(weight, bias, gated=number == 2)
            for number, ((weight, _), bias) in enumerate(zip(made, biases, strict=True))
        ]
        cache = [torch.full((8 * 48 * 32,), torch.nan) for _ in range(2)]
        units = (records.Unit * 2)(
            records.Unit(kind=library.ATTENTION, parallel="parallel" in options),
            records.Unit(kind=library.MLP, activation=library.ACTIVATIONS["silu"]),
        )
        units[0].key_cache, units[0].value_cache = (half.data_ptr() for half in cache)
        for number, unit in enumerate(units):
            unit.first, unit.second = packed[2 * number : 2 * number + 2]
            unit.norm, unit.post_norm = (
                records.Norm(kept[id(scale)], None, library.NORMS[norm]) if norm else records.Norm()
                for scale, norm in zip(scales[2 * number : 2 * number + 2], (before, after), strict=True)
            )
        embed, head = 0.2 * randn(self.VOCAB, width, seed=60), randn(self.VOCAB, width, seed=61)
        head_bias = randn(self.VOCAB, seed=62)
        fields = {name: value for name, value in options.items() if name.endswith(("_scale", "_softcap"))}

        def expected(start, end):
            """Residual and logits of the tokens [start, end), a sequence that runs the block."""

            def product(number, x):
                x = expected_operand(kernels, kind, rows, x.float())[0]
                return x @ made[number][1].T + biases[number].double()

            def normed(number, norm, x):
                scale = scales[number].double()
                if norm is None:
                    return x
                if norm == "rms":
                    return reference.rms_norm(x, scale, 1e-5)
                return reference.layer_norm(x, scale, None, 1e-5)

            first = x = embed[start:end].double() * fields.get("embed_scale", 1.0)
            heads = product(0, normed(0, before, x)).view(end - start, 5, self.DIM)
            query, key, value = heads[:, :3], heads[:, 3:4], heads[:, 4:]
            attended = reference.causal_attention(query, key, value, 0.3, None).flatten(1)
            factor = fields.get("residual_scale", 1.0)
            x = x + factor * normed(1, after, product(1, attended))
            gate_up = product(2, normed(2, before, first if "parallel" in options else x))
            update = product(3, reference.gated_activate(gate_up, "silu"))
            return x + factor * normed(3, after, update)

        with Rig(
            kernels, hidden_size=width, vocab_size=self.VOCAB, widest=width, num_heads=3, head_dim=self.DIM,
            page_size=48 // 3, kv_format=library.F32, embed=embed.data_ptr(), num_units=2,
            units=ctypes.addressof(units), head=kernels.pack(head, head_bias), **fields,
        ) as rig:  # fmt: skip
            for lengths, run in [([1, 3, 9, 1, 7], 4), ([1, 1], 2), ([1, 2, 1], 2)]:
                starts = [0, *itertools.accumulate(lengths)]
                rows = starts[run]
                residual, logits = self.forward(kernels, rig, lengths, starts, run)
                for row in range(run):
                    want = expected(starts[row], starts[row + 1])
                    tolerance = 1e-5 if kind in ("float32", "float16") else 2e-2
                    atol = tolerance * float(want.abs().max())
                    found = residual[starts[row] : starts[row + 1]]
                    torch.testing.assert_close(found.double(), want, atol=atol, rtol=0)
                skipped = embed[rows : starts[-1]] * fields.get("embed_scale", 1.0)
                assert torch.equal(residual[rows:], skipped)
                want = residual.double() @ head.double().T + head_bias.double()
                if cap := fields.get("logit_softcap"):
                    want = cap * (want / cap).tanh()
                torch.testing.assert_close(
                    logits.double(), want, atol=1e-6 * float(want.abs().max()), rtol=1e-5
                )

    def forward(self, kernels, rig, lengths, starts, run):
        count = starts[-1]
        positions = [position for length in lengths for position in range(length)]
        page_starts = list(range(len(lengths)))
        tables = range(count), positions, starts, lengths, page_starts, page_starts, [0] * 2, [run] * 2
        arrays = [array("i", values) for values in tables]
        at = [values.buffer_info()[0] for values in arrays]
        logits = torch.zeros(count, self.VOCAB)
        step = records.Step(
            num_tokens=count, num_sequences=len(lengths), num_samples=count, token_ids=at[0], positions=at[1],
            query_starts=at[2], context_lens=at[3], page_starts=at[4], pages=at[5], unit_starts=at[6],
            unit_ends=at[7], samples=at[0], logits=logits.data_ptr(),
        )  # fmt: skip
        kernels.isa.forward(rig.model, step)
        address = kernels.library.sleb_workspace_residual(rig.model.workspace)
        residual = torch.tensor((ctypes.c_float * (count * self.WIDTH)).from_address(address))
        return residual.view(count, self.WIDTH), logits


class TestHead:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("vocab", [17, 64, 1000])
    def test_logits_and_their_highest(self, kernels, kind, vocab):
        weight, exact = make_weight(kind, vocab, 64, vocab)
        packed = kernels.pack(weight)
        with Rig(kernels, hidden_size=64, vocab_size=vocab, head=packed) as rig:
            for rows in (1, 4, 9, 33, 70):
                x = randn(rows, 64, seed=rows)
                operand, tolerance = expected_operand(kernels, kind, rows, x)
                logits, argmax = torch.zeros(rows, vocab), torch.zeros(rows, dtype=torch.int32)
                kernels.isa.head(rig.model, x.data_ptr(), rows, logits.data_ptr(), argmax.data_ptr())
                torch.testing.assert_close(logits.double(), operand @ exact.T, atol=8 * tolerance, rtol=1e-4)
                assert argmax.tolist() == logits.argmax(dim=-1).tolist()
                alone = torch.zeros(rows, dtype=torch.int32)
                kernels.isa.head(rig.model, x.data_ptr(), rows, None, alone.data_ptr())
                assert alone.tolist() == argmax.tolist()

    def test_of_equal_logits_the_first_wins(self, kernels):
        """Whichever thread meets which panel first, and in either half of a panel."""
        weight = torch.zeros(500, 32)
        for first, other in [(3, 4), (3, 20), (40, 41), (33, 470), (499, 499), (100, 300)]:
            weight.zero_()
            weight[first] = weight[other] = 1.0
            packed = kernels.pack(weight)
            with Rig(kernels, vocab_size=500, head=packed) as rig:
                x, argmax = torch.ones(20, 32), torch.zeros(20, dtype=torch.int32)
                for _ in range(20):
                    kernels.isa.head(rig.model, x.data_ptr(), 20, None, argmax.data_ptr())
                    assert argmax.tolist() == [first] * 20

    def test_a_row_without_a_highest_logit_names_no_token(self, kernels):
        """A row of NaN says so, and reaches no other."""
        weight = randn(77, 32, seed=1)
        packed = kernels.pack(weight)
        with Rig(kernels, vocab_size=77, head=packed) as rig:
            x, argmax = randn(9, 32, seed=2), torch.zeros(9, dtype=torch.int32)
            expected = (x @ weight.T).argmax(dim=-1)
            x[4] = torch.nan
            kernels.isa.head(rig.model, x.data_ptr(), 9, None, argmax.data_ptr())
            assert argmax[4] == -1
            others = [row for row in range(9) if row != 4]
            assert argmax[others].tolist() == expected[others].tolist()

    @pytest.mark.parametrize("token", [0, 17, 31, 32, 76])
    @pytest.mark.parametrize("poison", [torch.nan, torch.inf])
    def test_one_logit_that_is_no_number_is_seen(self, kernels, token, poison):
        """In either half of a panel, whichever thread meets it; the highest of the others does not hide it."""
        weight = randn(77, 32, seed=1)
        weight[token] = poison
        packed = kernels.pack(weight)
        with Rig(kernels, vocab_size=77, head=packed) as rig:
            x, argmax = randn(9, 32, seed=2), torch.zeros(9, dtype=torch.int32)
            for _ in range(10):
                kernels.isa.head(rig.model, x.data_ptr(), 9, None, argmax.data_ptr())
                # Infinities of both signs add up to NaN.
                assert argmax.tolist() == [-1] * 9


class Sequences:
    """Sequences in scattered pages of a cache that is full of NaN, computed step by step."""

    def __init__(self, kernels, dtype, lengths, *, seed=0, heads=4, kv_heads=2, dim=16, page_size=16, window=0,
                 rotary=0, qk_norm=None, qk_after=False, norm="rms", clip=0.0, softcap=0.0, sinks=False,
                 int8=False):  # fmt: skip
        self.kernels, self.dtype, self.page_size, self.window = kernels, dtype, page_size, window
        self.heads, self.kv_heads, self.dim, self.rotary = heads, kv_heads, dim, rotary
        self.qk_norm, self.qk_after, self.norm, self.clip, self.softcap = (
            qk_norm,
            qk_after,
            norm,
            clip,
            softcap,
        )
        self.sinks = 2 * randn(heads, seed=92) if sinks else None
        self.scale = min(0.3, 3 / dim**0.5)
        width = (heads + 2 * kv_heads) * dim
        self.qkv = [randn(length, width, seed=seed + row) for row, length in enumerate(lengths)]
        self.done = [0] * len(lengths)
        counts = [-(-length // page_size) for length in lengths]
        order = list(range(sum(counts) + 2))
        random.Random(seed).shuffle(order)
        self.pages = [[order.pop() for _ in range(count)] for count in counts]
        padded = -(-dim // 16) * 16
        shape = ((sum(counts) + 2) * kv_heads * page_size * padded,)
        self.keys, self.values = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        self.int8 = int8
        if int8:  # and of scales that are NaN
            shape = (shape[0] // padded * (padded + 4),)
            self.keys, self.values = (torch.full(shape, 255, dtype=torch.uint8) for _ in range(2))
        longest = max(lengths)
        angles = torch.outer(torch.arange(longest).float(), 10.0 ** -torch.arange(max(rotary, 1)).float())
        self.cos, self.sin = angles.cos().contiguous(), angles.sin().contiguous()
        sizes = (heads * dim, kv_heads * dim) if qk_norm == "whole" else (dim, dim)
        self.norms = [1 + 0.3 * randn(size, seed=90 + size) for size in sizes] if qk_norm else None
        self.model = {
            "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "page_size": page_size, "clip": clip,
            "kv_format": library.FORMATS[dtype], "kv_int8": int8, "softcap": softcap, "qk_whole": qk_norm == "whole",
            "qk_after": qk_after, "widest": heads * dim, "scale": self.scale,
        }  # fmt: skip

    def step(self, rig, new):
        """Computes `new` more tokens of each sequence (0: it is not in the step); the attended heads of each."""
        rows = [row for row, count in enumerate(new) if count]
        starts = [0, *itertools.accumulate(new[row] for row in rows)]
        ends = [self.done[row] + new[row] for row in rows]
        positions = [p for row in rows for p in range(self.done[row], self.done[row] + new[row])]
        pages = [page for row in rows for page in self.pages[row]]
        page_starts = [0, *itertools.accumulate(len(self.pages[row]) for row in rows)][:-1]
        arrays = [array("i", values) for values in (positions, starts, ends, page_starts, pages)]
        at = [values.buffer_info()[0] for values in arrays]
        step = records.Step(
            num_tokens=starts[-1], num_sequences=len(rows), positions=at[0], query_starts=at[1],
            context_lens=at[2], page_starts=at[3], pages=at[4],
        )  # fmt: skip
        unit = records.Unit(
            key_cache=self.keys.data_ptr(), value_cache=self.values.data_ptr(), window=self.window
        )
        if self.norms:
            unit.query_norm, unit.key_norm = (
                records.Norm(self.kernels.keep(weight), None, library.NORMS[self.norm])
                for weight in self.norms
            )
        unit.sinks = self.kernels.keep(self.sinks)
        if self.rotary:
            unit.cos, unit.sin, unit.rotary_half = self.cos.data_ptr(), self.sin.data_ptr(), self.rotary
        qkv = torch.cat([self.qkv[row][self.done[row] : end] for row, end in zip(rows, ends, strict=True)])
        out = torch.full((starts[-1], self.heads * self.dim), torch.nan)
        self.kernels.isa.attention(rig.model, unit, step, qkv.contiguous().data_ptr(), out.data_ptr())
        results = {row: out[starts[i] : starts[i + 1]] for i, row in enumerate(rows)}
        expected = {row: self.expected(row, self.done[row], ends[i]) for i, row in enumerate(rows)}
        for row, end in zip(rows, ends, strict=True):
            self.done[row] = end
        return results, expected

    def expected(self, row, start, end):
        """Attention of positions start to end over all before, in float64, by the reference operators."""
        heads = self.qkv[row][:end].double().view(end, -1, self.dim)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.norms and not self.qk_after:
            query, key = map(self.normed, (query, key), self.norms)
        if self.clip:
            query, key, value = (part.clamp(-self.clip, self.clip) for part in (query, key, value))
        if self.rotary:
            tables = self.cos[:end], self.sin[:end]
            query, key = (reference.rope(part.float(), *tables).double() for part in (query, key))
        if self.norms and self.qk_after:
            query, key = map(self.normed, (query, key), self.norms)
        if self.int8:
            key, value = (in_bytes(part.float()).double() for part in (key, value))
        group = self.heads // self.kv_heads
        key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[start:], key) * self.scale
        if self.softcap:
            scores = self.softcap * (scores / self.softcap).tanh()
        own, seen = torch.arange(start, end)[:, None], torch.arange(end)[None]
        hidden = seen > own
        if self.window:
            hidden |= seen <= own - self.window
        scores = scores.masked_fill(hidden, -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.double()[:, None, None].expand(-1, end - start, 1)
            scores = torch.cat([scores, sinks], dim=-1)
        probs = scores.softmax(dim=-1)[..., :end]
        return torch.einsum("hqk,khd->qhd", probs, value).reshape(end - start, -1)

    def normed(self, heads, weight):
        whole = heads.flatten(1) if self.qk_norm == "whole" else heads
        if self.norm == "rms":
            return reference.rms_norm(whole, weight.double(), 1e-5).view(heads.shape)
        return reference.layer_norm(whole, weight.double(), None, 1e-5).view(heads.shape)


def in_bytes(heads):
    """Heads [T, K, D] rounded to 127 steps either way of the largest of each."""
    step = heads.abs().amax(dim=-1, keepdim=True) / 127
    return (heads / step).round() * step


TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def run(kernels, dtype, lengths, steps, **options):
    sequences = Sequences(kernels, dtype, lengths, **options)
    with Rig(kernels, max_tokens=2048, **sequences.model) as rig:
        for new in steps:
            results, expected = sequences.step(rig, new)
            for row in results:
                torch.testing.assert_close(
                    results[row].double(), expected[row], atol=TOLERANCES[dtype], rtol=0
                )


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
MIXED = [[40, 7, 1, 0, 100], [1, 1, 1, 1, 1], [1, 0, 30, 1, 17], [3, 9, 1, 1, 1]]


class TestAttention:
    @DTYPES
    @pytest.mark.parametrize("page_size", library.PAGE_SIZES)
    def test_chunks_and_single_tokens_in_one_step(self, kernels, dtype, page_size):
        run(kernels, dtype, [45, 17, 33, 3, 119], MIXED, page_size=page_size)

    @DTYPES
    @pytest.mark.parametrize("page_size", library.PAGE_SIZES)
    @pytest.mark.parametrize(
        "options",
        [
            {"heads": 9, "kv_heads": 3, "dim": 64, "rotary": 8},
            {"heads": 6, "kv_heads": 2, "dim": 7, "window": 20, "softcap": 3.0, "sinks": True},
        ],
        ids=["plain", "rest"],
    )
    def test_keys_and_values_in_bytes(self, kernels, dtype, page_size, options):
        """Against float64 over what the bytes and scales stand for."""
        run(
            kernels,
            dtype,
            [45, 17, 33, 3, 300],
            [*MIXED, [0, 0, 0, 0, 170]],
            page_size=page_size,
            int8=True,
            **options,
        )

    @DTYPES
    @pytest.mark.parametrize(
        ("heads", "kv_heads", "dim"),
        [
            *((1, 1, 8), (3, 1, 24), (9, 3, 64), (4, 4, 80), (8, 1, 96), (16, 1, 16), (34, 2, 128)),
            *((4, 1, 256), (6, 2, 7), (2, 2, 144)),
        ],
    )
    def test_head_shapes(self, kernels, dtype, heads, kv_heads, dim):
        steps = [[20, 1, 35], [1, 1, 1], [2, 13, 1]]
        run(kernels, dtype, [23, 15, 37], steps, heads=heads, kv_heads=kv_heads, dim=dim)

    @pytest.mark.parametrize("window", [1, 2, 16, 20, 100, 1000])
    def test_sliding_window(self, kernels, window):
        run(kernels, torch.float32, [45, 17, 33, 3, 119], MIXED, window=window)

    @pytest.mark.parametrize("rotary", [4, 8])
    @pytest.mark.parametrize("qk_norm", [None, "head"])
    def test_rotation_and_norms_of_heads(self, kernels, rotary, qk_norm):
        run(kernels, torch.float32, [45, 17, 33, 3, 119], MIXED, rotary=rotary, qk_norm=qk_norm)

    @pytest.mark.parametrize("norm", ["rms", "layer"])
    @pytest.mark.parametrize(("qk_norm", "qk_after"), [("head", True), ("head", False), ("whole", False)])
    def test_norms_of_queries_and_keys(self, kernels, norm, qk_norm, qk_after):
        options = {"norm": norm, "qk_norm": qk_norm, "qk_after": qk_after, "clip": 1.2, "rotary": 6}
        run(kernels, torch.float32, [45, 17, 33, 3, 119], MIXED, heads=6, dim=21, **options)

    @DTYPES
    @pytest.mark.parametrize(
        "options",
        [{"softcap": 0.7}, {"sinks": True}, {"softcap": 0.4, "sinks": True, "window": 20}, {"clip": 0.8}],
        ids=str,
    )
    def test_soft_cap_sinks_and_clipping(self, kernels, dtype, options):
        """Groups of few rows and of many, and contexts that are split between threads."""
        run(kernels, dtype, [45, 17, 33, 3, 119], MIXED, heads=8, kv_heads=1, dim=40, **options)
        run(kernels, dtype, [671], [[670], [1]], heads=2, kv_heads=1, **options)

    @pytest.mark.parametrize("height", [-1e4, 1e4])
    def test_a_sink_far_below_or_above_every_score(self, kernels, height):
        sequences = Sequences(kernels, torch.float32, [300], sinks=True)
        sequences.sinks = torch.tensor([0.0, height, 1.0, height])
        with Rig(kernels, **sequences.model) as rig:
            for new in ([299], [1]):
                results, expected = sequences.step(rig, new)
                torch.testing.assert_close(results[0].double(), expected[0], atol=2e-5, rtol=0)

    @DTYPES
    @pytest.mark.parametrize("window", [0, 300])
    def test_long_contexts_are_split_between_threads(self, kernels, dtype, window):
        steps = [[810, 500], [1, 1], [1, 0], [1, 1], [6, 1]]
        run(kernels, dtype, [819, 503], steps, heads=2, kv_heads=1, window=window)
        run(kernels, dtype, [601], [[600], [1]], heads=20, kv_heads=1, window=window)

    @pytest.mark.parametrize("page_size", library.PAGE_SIZES)
    @pytest.mark.parametrize("window", [0, 20, 300])
    def test_tiles_of_keys_and_values(self, kernels, page_size, window):
        """Heads of 32 features and more and groups of five and more: what AMX computes, where there is AMX."""
        options = {"heads": 8, "kv_heads": 1, "dim": 40, "page_size": page_size, "window": window}
        run(kernels, torch.bfloat16, [45, 17, 33, 3, 119], MIXED, **options)
        run(kernels, torch.bfloat16, [671], [[670], [1]], **options)  # split between the threads

    @DTYPES
    @pytest.mark.parametrize("window", [0, 700])
    def test_a_context_of_thousands(self, kernels, dtype, window):
        steps = [[700, 40], [700, 1], [700, 30], [1, 1], [1, 0], [5, 1]]
        run(kernels, dtype, [2107, 73], steps, heads=2, kv_heads=1, window=window)

    @pytest.mark.parametrize("num_threads", [1, 2, 5])
    def test_any_number_of_threads(self, num_threads):
        """Five are more than the cores of many machines; each number splits contexts in its own way."""
        kernels = library.CpuKernels.load(num_threads=num_threads, level=LEVELS[-1])
        for dtype in TOLERANCES:
            run(kernels, dtype, [45, 17, 33, 3, 119], MIXED, qk_norm="head", rotary=4)
            run(kernels, dtype, [1103, 3], [[1100, 1], [1, 1], [1, 0], [1, 1]], heads=5, kv_heads=1, dim=32)

    @DTYPES
    @pytest.mark.parametrize("page_size", [16, 64])
    @pytest.mark.parametrize("dim", [16, 40])
    def test_nan_in_one_sequence_stays_in_that_sequence(self, kernels, dtype, page_size, dim):
        lengths, outputs = [45, 17, 33, 3, 119], []
        for poison in (0.5, torch.nan):
            sequences = Sequences(
                kernels, dtype, lengths, heads=8, kv_heads=1, dim=dim, page_size=page_size, rotary=4
            )
            sequences.qkv[2][:] = poison
            with Rig(kernels, **sequences.model) as rig:
                outputs.append([sequences.step(rig, new)[0] for new in MIXED])
        for clean, dirty in zip(*outputs, strict=True):
            assert all(torch.equal(dirty[row], clean[row]) for row in clean if row != 2)
            assert 2 not in dirty or not dirty[2].isfinite().any()

    @pytest.mark.parametrize("int8", [False, True])
    def test_a_page_that_was_another_sequence_s_is_used_again(self, kernels, int8):
        """Its values are NaN: they must be gone before a probability of zero meets them."""
        first = Sequences(kernels, torch.bfloat16, [40], int8=int8)
        with Rig(kernels, num_heads=4, num_kv_heads=2, kv_format=library.BF16, kv_int8=int8) as rig:
            first.qkv[0][:] = torch.nan
            first.step(rig, [40])
            first.qkv, first.done = [randn(21, 8 * 16, seed=5)], [0]
            for new in ([5], [1], [1], [9], [1], [1], [1], [1], [1]):
                results, expected = first.step(rig, new)
                torch.testing.assert_close(results[0].double(), expected[0], atol=4e-2, rtol=0)


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_any_number_of_threads_gives_the_same_sums(num_threads):
    x, weight = randn(50, 200, seed=1), randn(300, 200, seed=2).bfloat16()
    outputs = []
    for count in (1, num_threads):
        kernels = library.CpuKernels.load(num_threads=count)
        assert kernels.num_threads == count
        packed, out = kernels.pack(weight), torch.zeros(50, 300)
        with Rig(kernels, widest=300) as rig:
            for _ in range(30):
                kernels.isa.linear(rig.model, None, packed, x.data_ptr(), 50, STORE, 0, out.data_ptr())
        outputs.append(out)
    assert torch.equal(*outputs)


def test_bandwidth_is_a_plausible_number():
    assert 0.1 < library.CpuKernels.load().read_bandwidth(8 << 20) < 10_000


@pytest.mark.parametrize(
    ("quota", "cores", "cpus", "expected"),
    [("max 100000", 8, 16, 8), ("250000 100000", 8, 16, 2), ("50000 100000", 8, 16, 1), (None, 1, 2, 2)],
)
def test_default_number_of_threads(quota, cores, cpus, expected, tmp_path, monkeypatch):
    file = tmp_path / "cpu.max"
    if quota:
        file.write_text(quota)
    monkeypatch.setattr(library, "CGROUP_QUOTA", file)
    monkeypatch.setattr(library, "num_usable_cpus", lambda: cpus)
    monkeypatch.setattr(library, "cpu_features", lambda: type(cpu_features())("x86_64", "test", cores))
    assert library.default_num_threads() == expected
