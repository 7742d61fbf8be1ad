"""The steps of a GPU on torch's meta device: what they launch, and with what it would be compiled. No GPU is asked.

Kernels are replaced by recorders where Triton launches them, whatever they are called and wherever they are. On the
meta device `.item()`, `.tolist()`, `nonzero` and whatever else waits for a device raise, so a step that runs to its end
does not. Counted are launches and the torch operators that compute or copy: a captured graph has a node for each.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import random
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import sleb.kernels.triton
from sleb.engine.config import EngineConfig
from sleb.engine.execute.cuda_graphs import decode_buckets, prompt_buckets, trial_step
from sleb.engine.execute.executor import PlannedUnit
from sleb.engine.execute.gpu import GpuExecutor
from sleb.engine.execute.gpu_setup import GpuSetup
from sleb.engine.execute.step_arrays import NEVER, unit_rows
from sleb.engine.model.allocation import allocate, patch_weights
from sleb.engine.model.architecture import DecoderSpec, resolve_spec
from sleb.engine.requests.sampling_params import MAX_LOGPROBS
from sleb.kernels.attention.select import AttentionBackend
from sleb.kernels.quantization import WEIGHT_FORMATS
from sleb.kernels.registry import GpuKernels, Kernels, select_kernels, triton_gpu_kernels
from sleb.kernels.triton import runtime
from sleb.kernels.triton.tuning import Config
from sleb.layer_map.patches import Patch

META = torch.device("meta")
PROCESSORS = 132  # of an H100 or H200
CONFIGS = Path(inspect.getfile(sleb)).with_name("configs")
PAGE_SIZE = 16
_NUM_PAGES = 1000

_VIEWS = {
    *(
        "view",
        "slice",
        "split",
        "split_with_sizes",
        "unsqueeze",
        "squeeze",
        "expand",
        "t",
        "transpose",
        "select",
    ),
    *("as_strided", "permute", "_unsafe_view", "detach", "alias", "reshape", "_reshape_alias", "unflatten"),
    *("unbind", "empty", "empty_like", "empty_strided", "new_empty"),
}
_PRODUCTS = ("torch.mm", "torch.addmm", "torch.linear")

_GEMMA = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
_PHI = {
    "architectures": ["PhiForCausalLM"],
    "model_type": "phi",
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": None,
    "partial_rotary_factor": 0.4,
    "rope_theta": 10000.0,
    "vocab_size": 51200,
}
_WRITTEN = {"gemma-2-9b": _GEMMA, "mixtral-8x7b": _MIXTRAL, "phi-2": _PHI}


def spec_of(name: str) -> DecoderSpec:
    """Of a shipped config, or of one that is written here."""
    if name not in _WRITTEN:
        return resolve_spec(CONFIGS / name)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_WRITTEN[name]))
        return resolve_spec(Path(folder))


@dataclass(frozen=True)
class Launch:
    """A launch of `kernel`, or a torch operator, whose kernel is None."""

    name: str
    kernel: Any = None
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)

    @property
    def is_product(self) -> bool:
        """Whether it reads a weight: a matrix product."""
        return "linear" in self.name or "experts" in self.name or self.name in _PRODUCTS

    @property
    def specialisation(self) -> tuple[object, ...]:
        """What Triton compiles the kernel for: types, constants, alignments and options."""
        assert self.kernel is not None
        parameters = _parameters(self.kernel)
        given = dict(zip((each.name for each in parameters), self.arguments, strict=False)) | self.keywords
        kinds = [(each.name, _specialised(given.pop(each.name), each)) for each in parameters]
        return (self.name, *kinds, *sorted(given.items()))


_kernel_parameters: dict[Any, list[Any]] = {}


def _parameters(kernel: Any) -> list[Any]:
    """As Triton's compiler knows them, of an interpreted kernel too."""
    if kernel not in _kernel_parameters:
        compiled = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)
        _kernel_parameters[kernel] = compiled.params
    return _kernel_parameters[kernel]


def _specialised(value: Any, parameter: Any) -> object:
    """A constant's value, or a type and whether it is known to be a multiple of 16, as Triton's launcher finds them."""
    if parameter.is_constexpr or value is None:
        return value
    of_alignment = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    if isinstance(value, torch.Tensor):  # every allocation is aligned
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        return str(value.dtype), of_alignment and aligned
    if isinstance(value, float):
        return "float"
    if value == 1 and not parameter.do_not_specialize:
        return "1"
    return "i64" if value >= 1 << 31 else "i32", of_alignment and value % 16 == 0


Choose = Callable[[tuple[object, ...], Sequence[Config]], Config]  # of a key and its configurations


def fused(key: tuple[object, ...], configs: Sequence[Config]) -> Config:
    """The first configuration of one launch, where there is one."""
    return next((config for config in configs if "library" not in config), configs[0])


def composed(key: tuple[object, ...], configs: Sequence[Config]) -> Config:
    """The vendor's matrix products, and what stands before and after them as launches of their own."""
    return next((config for config in configs if "library" in config), configs[0])


class Tuner:
    """A table of choices as at a second start: inside `tuning` an unknown key gets one, outside it is noted."""

    def __init__(self, choice: int) -> None:
        self.choice = choice
        self.table: dict[tuple[object, ...], Config] = {}
        self.unknown: list[tuple[object, ...]] = []
        self._is_on = False

    def __call__(self, key: tuple[object, ...], configs: Sequence[Config]) -> Config:
        if key not in self.table:
            if not self._is_on:
                self.unknown.append(key)
                return configs[0]
            self.table[key] = configs[(self.choice + zlib.crc32(repr(key).encode())) % len(configs)]
        return self.table[key]

    @contextmanager
    def tuning(self, report: object = None) -> Iterator[None]:
        before, self._is_on = self._is_on, True
        try:
            yield
        finally:
            self._is_on = before


CHOICES: dict[str, Choose] = {"fused": fused, "composed": composed}


class _Operators(TorchDispatchMode):
    """Records torch's operators, but for those that make views and empty tensors."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _VIEWS:
            self.launches.append(Launch(f"torch.{name}"))
        return func(*args, **(kwargs or {}))


@contextmanager
def recording(choose: Choose = fused) -> Iterator[list[Launch]]:
    """Inside, what is launched is noted in the list that it gives; nothing runs. choose: what tuning would."""
    launches: list[Launch] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append(Launch(kernel.__name__, kernel, arguments, keywords))

    def tuned(key: Any, configs: Any, launch: Any) -> None:
        launch.run(choose(key, configs))

    with ExitStack() as stack:
        runtime.counters(META)  # made once, before any step
        stack.callback(runtime.num_processors.cache_clear)
        runtime.num_processors.cache_clear()
        stack.enter_context(mock.patch.object(runtime, "_INTERPRETED_PROCESSORS", PROCESSORS))
        for kind in (InterpretedFunction, JITFunction):
            stack.enter_context(mock.patch.object(kind, "run", run))
        for found in pkgutil.iter_modules(sleb.kernels.triton.__path__, "sleb.kernels.triton."):
            module = importlib.import_module(found.name)
            if hasattr(module, "tuned") and not found.name.endswith(".tuning"):
                stack.enter_context(mock.patch.object(module, "tuned", tuned))
        stack.enter_context(_Operators(launches))
        stack.enter_context(torch.inference_mode())
        yield launches


@dataclass(frozen=True)
class MetaSetup:
    """A model without data, on a card that is not there: its first blocks, of which depth 1 leaves out the last.

    Attributes:
        weights: "bf16", "int8" or "int4".
        patches: what depth 1 gets in its place, one after another.
    """

    model: str
    num_blocks: int = 2
    weights: str = "bf16"
    max_num_seqs: int = 64
    max_model_len: int = 4096
    step_tokens: int = 2048
    patches: tuple[Patch, ...] = ()

    def setup(self, tuner: Tuner | None = None) -> GpuSetup:
        """Tuning is the tuner's, where there is one."""
        spec = spec_of(self.model)
        last = 1 if self.num_blocks > 1 else NEVER
        sublayers = [(block, part) for block in range(self.num_blocks) for part in ("attention", "mlp")]
        plan = [
            PlannedUnit(sublayer, (0, last if sublayer[0] == self.num_blocks - 1 else NEVER))
            for sublayer in sublayers
        ]
        plan += [PlannedUnit(index, (1, NEVER)) for index in range(len(self.patches))]
        weight_format = WEIGHT_FORMATS.get(self.weights)
        weights, _ = allocate(spec, set(sublayers), torch.bfloat16, META, weight_format)
        cpu = torch.device("cpu")
        made = tuple(patch_weights(patch, torch.bfloat16, cpu, weight_format) for patch in self.patches)
        operators = triton_gpu_kernels()
        if tuner is not None:
            operators = replace(operators, tuning=tuner.tuning)
        return GpuSetup(
            EngineConfig(
                *("model",), max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.step_tokens
            ),
            spec,
            replace(weights, patches=_without_data(made)),
            _kernels(operators),
            operators,
            AttentionBackend("triton", operators.attention),
            tuple(plan),
            (0, 1) if self.num_blocks > 1 else (0,),
            PAGE_SIZE,
            META,
        )

    def executor(self) -> GpuExecutor:
        return self.setup()._executor(self.max_model_len, _NUM_PAGES)


def _without_data(node: Any) -> Any:
    """A record, or a tuple of them, with every tensor on the meta device."""
    if isinstance(node, torch.Tensor):
        return node.to(META)
    if isinstance(node, tuple):
        return tuple(map(_without_data, node))
    if is_dataclass(node) and not isinstance(node, type):
        return replace(node, **{each.name: _without_data(getattr(node, each.name)) for each in fields(node)})
    return node


def _kernels(operators: GpuKernels) -> Kernels:
    return replace(
        select_kernels("torch", torch.device("cpu")),
        greedy=operators.greedy,
        sample=operators.sample,
        log_softmax_gather=operators.log_softmax_gather,
        gpu=operators,
    )


def decode(
    executor: GpuExecutor, bucket: int, choose: Choose = fused, depths: tuple[int, int] = (0, 0)
) -> list[Launch]:
    """What the graph holds of a bucket and of a fullest and a deepest depth."""
    with recording(choose) as launches:
        units = executor._decode_units(*depths, bucket)
        launches.clear()
        executor._decode(units, bucket)
    return launches


@dataclass(frozen=True)
class Nodes:
    """Of a captured step: those of every block, and those that there are once."""

    block: Counter[str]
    step: Counter[str]


def nodes_of(model: str, weights: str, bucket: int, choose: Choose = fused) -> Nodes:
    """By the difference between a model of three blocks and one of one."""
    one, three = (
        Counter(launch.name for launch in decode(MetaSetup(model, count, weights).executor(), bucket, choose))
        for count in (1, 3)
    )
    block = Counter({name: (three[name] - one[name]) / 2 for name in three if three[name] != one[name]})
    return Nodes(block, Counter({name: one[name] - block[name] for name in one if one[name] != block[name]}))


@dataclass(frozen=True)
class Serving:
    """What was compiled before requests were served, and what their steps asked for besides.

    Attributes:
        num_launches, num_compiled: of the warm-up, with the graphs' captures.
        late: specialisations and keys of tuning that were first met while serving.
    """

    num_launches: int
    num_compiled: int
    late: list[str]


def serve(setup: MetaSetup, choice: int = 0, graphs: bool = True, num_steps: int = 60) -> Serving:
    """Warms up as a start does, then runs random steps. choice: which configurations tuning has chosen."""
    tuner = Tuner(choice)
    with recording(tuner) as launches:
        gpu_setup = setup.setup(tuner)
        executor = gpu_setup._executor(setup.max_model_len, _NUM_PAGES)
        gpu_setup._warm_up(executor, setup.max_model_len, _NUM_PAGES)
        if graphs:
            buckets, prompts = decode_buckets(setup.max_num_seqs), prompt_buckets(setup.step_tokens)
            executor.capture(buckets, lambda function: function() or function, prompts=prompts)
        num_launches, warm = len(launches), _specialisations(launches)
        launches.clear()
        rng = random.Random(choice)
        for _ in range(num_steps):
            _random_step(setup, executor, gpu_setup.kernels, rng)
        late = _specialisations(launches)
    shown = [text for specialisation, text in late.items() if specialisation not in warm]
    return Serving(num_launches, len(warm), [*shown, *map(str, dict.fromkeys(tuner.unknown))])


def _specialisations(launches: Sequence[Launch]) -> dict[tuple[object, ...], str]:
    """Each with what is told of it: the kernel, its constants and options."""
    found: dict[tuple[object, ...], str] = {}
    for launch in launches:
        if launch.kernel is not None:
            told = {
                name: value for name, value in launch.keywords.items() if not isinstance(value, torch.Tensor)
            }
            found.setdefault(launch.specialisation, f"{launch.name} {told}")
    return found


def _random_step(setup: MetaSetup, executor: GpuExecutor, kernels: Kernels, rng: random.Random) -> None:
    """Prompts in chunks and single tokens of some depths; then tokens are chosen as requests may ask."""
    rows: list[tuple[int, int]] = []
    most, longest, left = rng.randint(1, setup.max_num_seqs), setup.max_model_len, setup.step_tokens
    decodes = rng.random() < 0.3
    while left and len(rows) < most:
        count = (
            1
            if decodes or rng.random() < 0.6
            else rng.choice((2, 3, 7, 15, 16, 17, 33, 64, 65, 100, 129, 500))
        )
        count = min(count, left)
        rows.append((count, rng.randint(count, longest)))
        left -= count
    step = trial_step(executor, rows)
    depths = tuple(sorted(rng.choice(executor.depths) for _ in rows))
    starts, ends = unit_rows(depths, executor.unit_depths)
    step = replace(step, depths=depths, unit_starts=starts, unit_rows=ends)
    last = None
    if rng.random() < 0.5:
        step = replace(step, sources=array("i", [rng.choice((-1, 0)) for _ in step.token_ids]))
        last = torch.empty(rng.randint(1, setup.max_num_seqs), dtype=torch.int64, device=META)
    chosen = sorted(rng.sample(range(len(rows)), rng.randint(0, len(rows))))
    forward = executor.run(step, [step.query_starts[row + 1] - 1 for row in chosen], rng.random() < 0.5, last)
    if forward.logits is not None:
        _choose(forward.logits, kernels, rng)
    if rng.random() < 0.3:
        number = min(rng.randint(1, 256), step.num_tokens)
        logits = executor.logits(forward.hidden[:number])
        ids = torch.empty(number, 1 + rng.randint(0, MAX_LOGPROBS), dtype=torch.int64, device=META)
        kernels.log_softmax_gather(logits, ids)


def _choose(logits: Tensor, kernels: Kernels, rng: random.Random) -> None:
    count = len(logits)
    kernels.greedy(logits)
    number = rng.randint(1, count)
    filters = rng.choice(((0, 1.0, 0.0), (40, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05), (40, 0.9, 0.05)))
    kernels.sample(logits[:number], *([value] * number for value in (0.7, *filters, 0.5)))
    kernels.log_softmax_gather(
        logits, torch.empty(count, 1 + rng.randint(0, MAX_LOGPROBS), dtype=torch.int64, device=META)
    )
