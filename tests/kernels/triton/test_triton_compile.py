"""Every Triton kernel compiled offline for GPUs that need not be there, at the shapes of real models.

The wrappers are called with tensors without data (torch's meta device) in a process of its own, where kernels are
compiled, not interpreted; each launch is compiled with the types and constants that the wrapper gives it, and the
machine code is asked what it takes: registers, local memory, shared memory, asynchronous loads.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

# Shared memory that a program may have, bytes, by compute capability (CUDA programming guide).
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
USUAL = (80, 90)  # for the others little is compiled, and that where everything is
PROCESSORS = 132  # of an H100
OPTIONS = {"num_warps", "enable_fp_fusion"}  # that every launch has
# What each module launches; its other functions are parts of these.
KERNELS = {
    "add_norm": {"_add_norm", "_moments"},
    "activation": {"_activate", "_soft_cap"},
    "rope_store": {"_rope_store"},
    "paged_decode": {"_decode", "_join"},
    "paged_prefill": {"_prefill"},
    "greedy": {"_scan", "_join"},
    "sample": {"_sample"},
    "quant_linear": {"_linear", "_add_parts"},
    "experts": {"_of_experts", "_combine"},
}
# query heads, KV heads, head dimension, hidden size, MLP size
MODELS = {
    "LLaMA 7B": (32, 32, 128, 4096, 11008),
    "Llama 3 8B": (32, 8, 128, 4096, 14336),
    "Qwen3 0.6B": (16, 8, 128, 1024, 3072),
}


def bundled(name):
    """A program of CUDA's that Triton brings along, or None."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return path if path.is_file() else None


class Recorder:
    """Stands where a module has a kernel: `kernel[grid](...)` compiles the launch and notes what it takes."""

    def __init__(self, kernel, records):
        self.kernel, self.records, self.arch = kernel, records, 0

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **keywords):
        parameters = self.kernel.params
        given = dict(zip((each.name for each in parameters), arguments, strict=False)) | keywords
        options = {name: given.pop(name) for name in (*OPTIONS, "num_stages") if name in given}
        signature, constants, attributes = {}, {}, {}
        for index, (parameter, value) in enumerate((each, given[each.name]) for each in parameters):
            signature[parameter.name], divisible = _type_of(value, parameter)
            if signature[parameter.name] == "constexpr":
                constants[(index,)] = value
            elif divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
        record = {"kernel": self.kernel.__name__, "arch": self.arch, **options}
        record |= {name: value for name, value in given.items() if name.isupper()}
        try:
            assert options.keys() >= OPTIONS, "launched without launch_options()"
            record |= self.compile(signature, constants, attributes, options)
        except Exception as error:  # whatever the compiler raises is a finding
            record["error"] = f"{type(error).__name__}: {error}"[:500]
        self.records.append(record)

    def compile(self, signature, constants, attributes, options):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(self.kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [bundled("cuobjdump"), "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found, usage
        numbers = dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))
        # The form .cg has 16 bytes; .ca, of 4 or 8, is what is left where alignment is not known.
        loads = {"loads": compiled.asm["ptx"].count("cp.async.cg"), "wgmma": "wgmma" in compiled.asm["ptx"]}
        return {**numbers, **loads, "shared": compiled.metadata.shared}


def _type_of(value, parameter):
    """An argument's type as Triton's launcher finds it, and whether it is known to be a multiple of 16."""
    from triton._utils import canonicalize_dtype

    aligned = not parameter.do_not_specialize_on_alignment
    if isinstance(value, torch.Tensor):
        return "*" + canonicalize_dtype(value.dtype), aligned
    if parameter.is_constexpr:
        return "constexpr", False
    if isinstance(value, float):
        return "fp32", False
    if parameter.do_not_specialize:
        return "i32", False
    return ("constexpr", False) if value == 1 else ("i32", aligned and value % 16 == 0)


def compile_all(archs, everything):
    """One record a launch and architecture."""
    import importlib

    modules = {name: importlib.import_module(f"sleb.kernels.triton.{name}") for name in KERNELS}
    records, recorders = [], []
    for name, module in modules.items():
        for kernel in KERNELS[name]:
            recorders.append(Recorder(getattr(module, kernel), records))
            setattr(module, kernel, recorders[-1])
        if hasattr(module, "num_processors"):
            module.num_processors = lambda device: PROCESSORS
    for arch in archs:
        for recorder in recorders:
            recorder.arch = arch
        modules["quant_linear"].shared_memory = lambda device, arch=arch: SHARED[arch]
        with torch.device("meta"):
            for label, work in _launches(modules, arch, everything and arch in USUAL):
                start = len(records)
                work()
                assert len(records) > start, f"{label} launched nothing"
                for record in records[start:]:
                    record["label"] = label
    return records


def _launches(modules, arch, everything):
    """(label, a function that launches) for every kernel, shape and configuration."""
    for name, shape in MODELS.items():
        if everything or name == "Qwen3 0.6B" or arch == 90:
            yield from _small(modules, name, *shape)
        if everything or name == "Llama 3 8B":
            every = arch == 90 and name == "Llama 3 8B"
            yield from _attention(modules, name, *shape[:3], everything, every)
    if everything or arch not in USUAL:
        for dtype in (torch.bfloat16, torch.float32):
            yield from _attention(modules, f"256 features of {dtype}", 8, 2, 256, everything, False, dtype)
    yield from _sampling(modules)
    yield from _linears(modules, arch, everything)
    yield from _mixtures(modules, everything)


def _small(modules, name, num_heads, num_kv, head_dim, hidden, mlp):
    from sleb.kernels.reference.device import HeadNorm

    x, weight, count = torch.empty(8, hidden, dtype=torch.bfloat16), _half(hidden), _integers(1)
    cache, table = _half(4096, num_kv, head_dim), torch.empty(4096, head_dim // 2)
    heads, places = _half(8, num_heads + 2 * num_kv, head_dim), _integers(8)
    norm = HeadNorm("rms", _half(head_dim), _half(head_dim)) if name.startswith("Qwen3") else None

    add_norm, activation, rope_store = (modules[each] for each in ("add_norm", "activation", "rope_store"))
    rope = (heads, num_heads, (table, table), places)
    stored = (cache, cache, places, count)
    yield f"norm, {name}", partial(add_norm.add_norm, x, x, weight, None, 1e-6, "rms", count, count)
    sums = torch.empty(8, hidden // 64)
    yield f"moments, {name}", partial(add_norm.moments, x)
    yield (
        f"add, {name}",
        partial(add_norm.add_norm, x, x, weight, None, 1e-6, "rms", count, count, moments=sums),
    )
    starts = {"delta_start": count, "norm_start": count}  # of a patch, and after one
    yield (
        f"norm of a range, {name}",
        partial(add_norm.add_norm, x, x, None, None, 1e-6, "rms", count, count, **starts),
    )
    scale = (x, x, weight, weight, 1e-6, "none", count, count)
    yield f"scale, {name}", partial(add_norm.add_norm, *scale, **starts, post=True)
    yield f"gated, {name}", partial(activation.gated_activate, _half(8, 2 * mlp), "silu", count)
    yield f"rope, {name}", partial(rope_store.rope_store, *rope, norm, *stored)
    if name == "LLaMA 7B":
        shifted = torch.empty(hidden)  # in float32
        for kind in ("rms", "layer"):  # as in Gemma, Granite
            update = {"delta_kind": kind, "delta_weight": shifted, "delta_bias": None, "delta_scale": 0.22}
            arguments = (x, x, shifted, None, 1e-6, kind, count, count)
            yield f"norm of the update, {kind}", partial(add_norm.add_norm, *arguments, **update)
        sizes = (num_heads * head_dim, num_kv * head_dim)
        whole = HeadNorm("layer", *map(_half, sizes * 2), whole=True)
        after = HeadNorm("layer", _half(head_dim), _half(head_dim), after_rotation=True)
        for each in (whole, after):
            yield f"rope, {each}", partial(rope_store.rope_store, *rope, each, *stored, 8.0)
        for post in (False, True):  # as in OPT
            arguments = (x, x, weight, weight, 1e-5, "layer", count, count)
            yield f"layer norm, {post=}", partial(add_norm.add_norm, *arguments, post=post)
        for act in ("relu", "relu2", "gelu", "gelu_new"):
            yield act, partial(activation.activate, _half(8, mlp), act, count)


def _attention(modules, name, num_heads, num_kv, head_dim, everything, every, dtype=torch.bfloat16):
    from sleb.kernels.batch import BatchTensors

    query, cache, sinks = (
        torch.empty(shape, dtype=dtype)
        for shape in ((32, num_heads, head_dim), (4096, num_kv, head_dim), (num_heads,))
    )
    batch = BatchTensors(
        _integers(9), _integers(8), _integers(8, 64), _integers(8), _integers(1), 16, 25, 1024
    )
    for operator in ("paged_decode", "paged_prefill"):
        module = modules[operator]
        configs = module.configs_for(head_dim, dtype.itemsize)
        every_config = every and (everything or operator == "paged_decode")
        for number, config in enumerate(configs if every_config else configs[:1]):
            kinds = [(None, None, None)]
            if (everything or head_dim > 128) and not number:
                kinds += [(4096, None, None), (None, 50.0, sinks), (4096, 50.0, None)]
            for kind in kinds:

                def work(module=module, operator=operator, config=config, kind=kind):
                    module.tuned = lambda key, configs, launch: launch.run(config)
                    getattr(module, operator)(query, cache, cache, batch, 0.1, *kind)

                yield f"{operator}, {name}, {config}, window {kind[0]}, softcap {kind[1]}", work


def _sampling(modules):
    logits, ids = torch.empty(4, 128256), torch.empty(4, 3, dtype=torch.int64)
    yield "soft cap", partial(modules["activation"].soft_cap, _half(4, 256000), 30.0)
    yield "greedy", partial(modules["greedy"].greedy, logits)
    yield "log-softmax", partial(modules["greedy"].log_softmax_gather, logits, ids)
    yield "sample", partial(modules["sample"].sample_packed, logits, torch.empty(5, 4, dtype=torch.float64))


def _linears(modules, arch, everything):
    from sleb.kernels.quantization import Int4Weight, Int8Weight

    module = modules["quant_linear"]
    for outputs, inputs in ((4096, 4096), (1024, 3072)) if everything else ((4096, 4096),):
        weights = [_half(outputs, inputs)]
        weights += [kind.empty(outputs, inputs, torch.device("meta")) for kind in (Int8Weight, Int4Weight)]
        for weight, rows in itertools.product(weights, (1, 64, 256)):
            is_plain = isinstance(weight, torch.Tensor)
            if not everything and rows > 1 and (arch == 80 or (rows == 64 and not is_plain)):
                continue
            few = arch == 90 and rows == 1 and (everything or not is_plain)
            by_library = is_plain and rows > 64  # but for a range of rows
            # Of many rows only what fits runs untuned.
            block = min(128, module.power_of_two(rows, 16))
            untuned = module.configs_for(_half(rows, inputs), weight, block)[0]
            for config in () if by_library else module.CONFIGS if few else (untuned,):
                for dtype in (torch.bfloat16, torch.float32)[: 2 if everything and rows > 64 else 1]:
                    x = torch.empty(rows, inputs, dtype=dtype, device="meta")
                    label = f"{type(weight).__name__} {outputs} × {inputs}, {rows} rows of {dtype}, {config}"
                    yield label, partial(module.quant_linear, x, weight, None, config=config)
            if rows != 1 or few or everything:
                x, ends = _half(rows, inputs), (_integers(1), _integers(1))
                label = f"{type(weight).__name__} {outputs} × {inputs}, a range of {rows} rows"
                yield label, partial(module.quant_linear, x, weight, None, ends, config=untuned)


def _mixtures(modules, everything):
    from sleb.kernels.quantization import Int4Weight, Int8Weight

    module, device = modules["experts"], torch.device("meta")
    module.tuned = lambda key, configs, launch: launch.run(configs[0])
    number, top_k, inner, hidden = 32, 4, 2880, 2880  # gpt-oss 20B
    count, sizes = _integers(1), ((number * 2 * inner, hidden), (number * hidden, inner))
    for tokens in (1, 512) if everything else (1,):
        x, chosen = _half(tokens, hidden), torch.empty(tokens, top_k, dtype=torch.int64)
        for kind in ("bf16", Int8Weight, Int4Weight) if everything else ("bf16", Int4Weight):
            up, down = (_half(*size) if kind == "bf16" else kind.empty(*size, device) for size in sizes)
            rest = (chosen, torch.empty(tokens, top_k), number, "clamped_swiglu", True, count)
            weights = (up, _half(number * 2 * inner), down, _half(number * hidden))
            yield f"experts of {kind}, {tokens} tokens", partial(module.mix_experts, x, *weights, *rest)


def _half(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def _integers(*shape):
    return torch.empty(shape, dtype=torch.int32, device="meta")


@pytest.fixture(scope="module", params=["usual", pytest.param("everything", marks=pytest.mark.slow)])
def records(request):
    if bundled("ptxas") is None or bundled("cuobjdump") is None:
        pytest.skip("Triton brings no ptxas and cuobjdump here")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, __file__, request.param],
        capture_output=True,
        text=True,
        timeout=1800 if request.param == "everything" else 300,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.fixture(params=SHARED)
def arch(request, records):
    """Each compute capability that was compiled for."""
    if request.param not in {record["arch"] for record in records}:
        pytest.skip("compiled for where everything is")
    return request.param


def compiled(records, arch):
    return [record for record in records if record["arch"] == arch and "error" not in record]


def refuse(records, message, wrong):
    found = [f"{record['label']}: {record}" for record in records if wrong(record)]
    assert not found, f"{message}:\n" + "\n".join(found)


class TestCompiled:
    def test_every_kernel_is_met_and_compiles(self, records, arch):
        records = [record for record in records if record["arch"] == arch]
        refuse(records, "does not compile", lambda record: "error" in record)
        assert {record["kernel"] for record in records} == set().union(*KERNELS.values())

    def test_registers_suffice(self, records, arch):
        """But for tiles of many rows where there is no wgmma, and in float32, whose products no tensor core takes in
        full."""
        records = compiled(records, arch)

        def spills(record):
            wide = record["kernel"] in ("_prefill", "_of_experts") or record.get("ROWS", 0) > 64
            allowed = 256 if wide and arch != 90 else 0 if arch in USUAL else 16
            return record.get("PRECISION") != "ieee" and record["stack"] + record["local"] > allowed

        refuse(records, "spills to local memory", spills)

    def test_shared_memory_suffices(self, records, arch):
        records = compiled(records, arch)
        refuse(records, f"more than {SHARED[arch]} bytes", lambda record: record["shared"] > SHARED[arch])

    def test_tiles_are_loaded_asynchronously(self, records, arch):
        """At least two tiles of keys and values, or of the weight, by copies of 16 bytes a thread."""
        records = compiled(records, arch)

        def too_few(record):
            if record["kernel"] == "_decode":
                tile = 2 * record["BLOCK"] * record["BLOCK_DIM"] * 2
            elif record["kernel"] in ("_linear", "_of_experts"):
                tile = record["OUTPUTS"] * record["INPUTS"] * 2 // (1, 2, 4)[record["KIND"]]
            else:
                return False
            return record["loads"] < 2 * tile // (16 * 32 * record["num_warps"])

        refuse(records, "the pipeline is lost", too_few)


def test_chunks_use_the_widest_products(records):
    chunks = [record for record in compiled(records, 90) if record["kernel"] == "_prefill"]
    assert chunks
    refuse(chunks, "no wgmma", lambda record: not record["wgmma"])


if __name__ == "__main__":
    everything = sys.argv[1:] == ["everything"]
    print(json.dumps(compile_all(SHARED if everything else USUAL, everything)))
