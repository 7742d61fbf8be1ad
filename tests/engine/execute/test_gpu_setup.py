"""What happens on a GPU before it serves, on a stand-in for torch.cuda: the order of events and the sums of memory.

The stand-in has streams, graphs and a memory that the test writes; "capturing" records the function and a replay calls
it. What the real GPU does is in test_gpu.py.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from types import SimpleNamespace

import pytest
import torch

from sleb import SamplingParams
from sleb.engine import runner
from sleb.engine.execute import cuda_graphs, gpu_setup, kv_cache
from sleb.engine.execute.gpu import GpuExecutor
from sleb.engine.memory import GIB
from sleb.engine.model import resolve
from sleb.engine.model.architecture import resolve_spec
from sleb.engine.model.rotary import RotaryTables
from sleb.errors import ConfigError
from sleb.kernels import registry
from sleb.kernels.attention import select as attention

pytest.importorskip("triton")  # the interpreter, or a GPU: the registry asks for one


class FakeGpu:
    """torch.cuda as far as it is used; free memory falls by `graph_bytes` for each graph captured.

    `current` is the device on which it makes what is made without naming one; `allocated`, what counts memory.
    """

    def __init__(self):
        self.events = []
        self.total = 10 * GIB
        self.free = 8 * GIB
        self.graph_bytes = 0
        self.current = torch.device("cuda", 0)
        self.allocated = lambda: 0

    def install(self, monkeypatch):
        replacements = {
            "Stream": self.make_stream,
            "current_stream": self.make_stream,
            "stream": lambda stream: self.device(stream.device),
            "device": self.device,
            "set_device": self.set_device,
            "graph_pool_handle": lambda: "pool",
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
            "graph": self.graph,
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: self.events.append("empty"),
            "memory_allocated": lambda device=None: self.allocated(),
            "max_memory_allocated": lambda device=None: self.allocated() + GIB // 2,
            "reset_peak_memory_stats": lambda device=None: None,
            "mem_get_info": lambda device=None: (self.free, self.total),
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)

    def make_stream(self, device=None):
        return SimpleNamespace(wait_stream=self.waits_on_its_device, device=device or self.current)

    def waits_on_its_device(self, other):
        assert other.device == self.current

    def set_device(self, device):
        self.events.append(f"set {device}")
        self.current = device

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode="global"):
        """What begins on a stream of another device, or in a mode that another thread's call breaks, fails."""
        assert pool == "pool" and stream.device == self.current and capture_error_mode == "thread_local"
        self.events.append("capture")
        yield
        self.free -= self.graph_bytes


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeGpu()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def make(make_llm, monkeypatch):
    """An LLM over the operators' specification, set up on the CPU as if on a GPU."""

    def build(model, **options):
        specification = registry.torch_gpu_kernels()
        monkeypatch.setattr(registry, "triton_gpu_kernels", lambda: specification)
        # Its attention waits for the device, so the real one would not be captured.
        backend = attention.AttentionBackend("stand-in", specification.attention)
        monkeypatch.setattr("sleb.engine.execute.build.select_attention", lambda *arguments, **needs: backend)
        monkeypatch.setattr(gpu_setup, "is_gpu", lambda device: True)
        return make_llm(model, kernels="triton", **options)

    return build


def test_set_up_measures_sizes_warms_up_and_captures(gpu, make, tiny_model_dir, monkeypatch):
    """Trial graphs first, then the cache, then a graph for every bucket; progress is told; it still generates."""
    seen = []
    sized = kv_cache.choose_num_pages

    def spy(*arguments):
        gpu.events.append("size")
        return sized(*arguments)

    monkeypatch.setattr(kv_cache, "choose_num_pages", spy)
    options = {"max_num_seqs": 5, "max_num_batched_tokens": 40}
    llm = make(tiny_model_dir, **options, on_capture=lambda done, total: seen.append((done, total)))
    order = [event for event in gpu.events if event != "empty"]
    assert order == ["capture"] * 2 + ["size"] + ["capture"] * 7  # 1, 2, 4 and 5 rows; 16, 32 and 40 tokens
    assert seen == [(count, 7) for count in range(8)]
    assert "7 captured graphs" in llm.engine.description
    # The stand-in's replays compute nothing: generate by the eager path.
    llm.engine.runner.executor._graphs.clear()
    [output] = llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
    assert len(output.token_ids) == 6


def test_the_reserve_is_activations_and_graphs(gpu, make, tiny_model_dir):
    """1 MiB a graph: the largest of each depth as measured, each further one like a second; 10 % on top. Those of
    prompts likewise."""
    executor = make(tiny_model_dir, kv_cache_memory=0.01, max_num_seqs=5).engine.runner.executor
    gpu.graph_bytes = 1 << 20
    reserve = cuda_graphs.measure_reserve(executor, 64, 32, (1, 2, 4, 5))
    assert reserve == int(1.1 * (GIB // 2 + 4 * (1 << 20)))
    with_prompts = cuda_graphs.measure_reserve(executor, 64, 32, (1, 2, 4, 5), (16, 32, 64))
    assert with_prompts == int(1.1 * (GIB // 2 + 7 * (1 << 20)))
    without = cuda_graphs.measure_reserve(executor, 64, 32, ())
    assert without == int(1.1 * (GIB // 2))


def test_the_reserve_counts_what_measuring_kernels_takes(gpu, make, tiny_model_dir):
    """Before graphs are captured: the larger of the two."""
    assert registry.triton_gpu_kernels().tuning_bytes == 256 << 20
    executor = make(tiny_model_dir, kv_cache_memory=0.01, max_num_seqs=5).engine.runner.executor
    gpu.graph_bytes = 1 << 20
    for tuning, more in ((1 << 28, 1 << 28), (1 << 20, 4 << 20)):
        reserve = cuda_graphs.measure_reserve(executor, 64, 32, (1, 2, 4, 5), tuning_bytes=tuning)
        assert reserve == int(1.1 * (GIB // 2 + more))


def test_the_reserve_counts_what_stays_between_steps(gpu, make, tiny_model_dir, monkeypatch):
    """Rotary tables among them, for the model's longest context: those of the trial are gone when pages are counted."""
    living = weakref.WeakSet()
    gpu.allocated = lambda: sum(table.cos.nbytes + table.sin.nbytes for table in living)
    made, sized = RotaryTables.__init__, []

    def spy(tables, *arguments):
        made(tables, *arguments)
        living.add(tables)

    monkeypatch.setattr(RotaryTables, "__init__", spy)
    choose = kv_cache.choose_num_pages
    monkeypatch.setattr(
        kv_cache, "choose_num_pages", lambda *arguments: sized.append(arguments) or choose(*arguments)
    )
    make(tiny_model_dir, cuda_graphs=False)
    *_, reserve = sized[0]
    positions, half = 512, 8  # the head dimension is 16
    assert reserve == int(1.1 * (GIB // 2)) + 2 * positions * half * 4


def test_a_second_gpu_is_the_current_one_from_the_start(gpu, make_llm, tiny_model_dir, monkeypatch):
    """Triton launches on the current device, whatever device the pointers are of."""
    second = torch.device("cuda", 1)
    monkeypatch.setattr(runner, "resolve_device", lambda name: second)

    class LoadedError(Exception):
        pass

    def load(path, spec, keep, dtype, device, *arguments, **options):
        gpu.events.append(f"load on {device}")
        raise LoadedError

    monkeypatch.setattr(runner, "load_weights", load)
    with pytest.raises(LoadedError):
        make_llm(tiny_model_dir)
    assert gpu.events == [f"set {second}", f"load on {second}"]


def test_graphs_are_captured_on_their_device(gpu):
    """Also where another is the current one, which it is again afterwards."""
    second, seen = torch.device("cuda", 1), []
    cuda_graphs.CudaCapture(second)(lambda: seen.append(gpu.current))
    assert seen == [second] * 2 and gpu.current == torch.device("cuda", 0)


def test_prompts_of_every_patched_depth_are_warmed_up(gpu, make, tiny_model_dir, random_patch, monkeypatch):
    """What a patch launches is compiled before a request asks for it."""
    width = json.loads((tiny_model_dir / "config.json").read_text())["hidden_size"]
    patch = random_patch(width, (3, "attention"), (3, "mlp"), 2, 2)
    seen, run = [], GpuExecutor.run

    def spy(executor, step, *arguments, **options):
        seen.append(set(step.depths))
        return run(executor, step, *arguments, **options)

    monkeypatch.setattr(GpuExecutor, "run", spy)
    make(tiny_model_dir, removed=(3, 1, 2), tiers=(0, 2, 3), patches=[patch], cuda_graphs=False)
    assert {2} in seen and {0} in seen and {3} not in seen


def test_the_reserve_leaves_fewer_pages(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (6 * GIB, 10 * GIB))
    device = torch.device("cuda", 0)
    assert kv_cache.choose_num_pages(GIB, 100, None, device, 0.9) == 5
    assert kv_cache.choose_num_pages(GIB, 100, None, device, 0.9, reserve=2 * GIB) == 3
    with pytest.raises(ConfigError, match="gpu_memory_utilization"):
        kv_cache.choose_num_pages(GIB, 100, None, device, 0.9, reserve=5 * GIB)


def test_a_capture_that_fails_names_the_way_out(gpu, monkeypatch):
    @contextlib.contextmanager
    def refuse(graph, **options):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.raises(ConfigError, match=r"not permitted.*--no-cuda-graphs"):
        cuda_graphs.CudaCapture(torch.device("cpu"))(lambda: None)


class TestBfloat16:
    """Compute capability 8.0 brought it (CUDA programming guide, table of arithmetic instructions)."""

    @pytest.mark.parametrize(
        ("capability", "model", "weights", "expected"),
        [
            ((7, 0), "llama", "auto", torch.float16),
            ((7, 5), "llama", "auto", torch.float16),
            ((7, 5), "llama", "int8", torch.float16),
            ((7, 5), "gemma2", "auto", torch.float32),
            ((7, 5), "gemma3", "int4", torch.float32),
            ((7, 5), "glm4", "auto", torch.float32),
            ((8, 0), "llama", "auto", torch.bfloat16),
            ((8, 6), "gemma3", "auto", torch.bfloat16),
            ((12, 0), "llama", "int4", torch.bfloat16),
        ],
    )
    def test_what_takes_its_place(
        self, capability, model, weights, expected, tiny_model, monkeypatch, caplog
    ):
        """The residual stream of some models leaves float16's range."""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        spec, device = resolve_spec(tiny_model(model).path), torch.device("cuda", 0)
        resolve._say_once.cache_clear()
        for _ in range(2):
            chosen = resolve.resolve_dtype("auto", weights, "bfloat16", device, wide_range=spec.wide_range)
            assert chosen == expected
        said = [record.message for record in caplog.records]
        if expected == torch.bfloat16:
            assert not said
        else:
            name, number = str(expected).removeprefix("torch."), ".".join(map(str, capability))
            assert said == [
                f"the GPU cuda:0 has compute capability {number}, and bfloat16 needs 8.0: {name} takes the place of "
                "the checkpoint's bfloat16"
            ]

    @pytest.mark.parametrize(
        "asked", [("bfloat16", "auto"), ("auto", "bf16"), ("bf16", "int8"), ("float32", "bf16")]
    )
    def test_asked_for_it_is_refused_with_the_remedy(self, asked, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        device = torch.device("cuda", 0)
        for wide_range, remedy in ((False, "float16"), (True, "float32")):
            with pytest.raises(
                ConfigError, match=f"capability 7.5.*needs 8.0; use --dtype auto or {remedy}$"
            ):
                resolve.resolve_dtype(*asked, "bfloat16", device, wide_range=wide_range)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
        assert resolve.resolve_dtype(*asked, "float32", device) == torch.bfloat16

    def test_other_dtypes_and_devices_are_as_asked(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        device = torch.device("cuda", 0)
        assert resolve.resolve_dtype("float16", "auto", "bfloat16", device, wide_range=True) == torch.float16
        assert resolve.resolve_dtype("auto", "fp32", "bfloat16", device) == torch.float32
        assert resolve.resolve_dtype("auto", "auto", None, device) == torch.float32
        assert resolve.resolve_dtype("auto", "auto", "bfloat16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(
    ("built", "count", "told"),
    [
        (None, 0, "is built without CUDA.; try cpu, or install a CUDA build$"),
        ("13.0", 0, "0 CUDA GPUs.; try cpu$"),
        ("13.0", 2, "2 CUDA GPUs.; try cuda:0 to cuda:1$"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_with_the_remedy(built, count, told, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ConfigError, match=f"'cuda:2' is not on this machine.*{told}"):
        resolve.resolve_device("cuda:2")
