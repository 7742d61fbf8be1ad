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
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import sleb.kernels.triton
from sleb.engine.config import EngineConfig
from sleb.engine.execute.executor import PlannedUnit
from sleb.engine.execute.gpu import GpuExecutor
from sleb.engine.execute.gpu_setup import GpuSetup
from sleb.engine.execute.step_arrays import NEVER
from sleb.engine.model.allocation import allocate, patch_weights
from sleb.engine.model.architecture import DecoderSpec, resolve_spec
from sleb.kernels.attention.select import AttentionBackend
from sleb.kernels.quantization import WEIGHT_FORMATS
from sleb.kernels.registry import Kernels, select_kernels, triton_gpu_kernels
from sleb.kernels.triton import runtime
from sleb.kernels.triton.tuning import Config
from sleb.layer_map.patches import Patch

META = torch.device("meta")
PROCESSORS = 132  # of an H100 or H200
CONFIGS = Path(inspect.getfile(sleb)).with_name("configs")
PAGE_SIZE = 16

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
    """The first configuration of a kernel of ours."""
    return next(config for config in configs if "library" not in config)


def library(key: tuple[object, ...], configs: Sequence[Config]) -> Config:
    """The vendor's matrix products where there is a choice."""
    return next((config for config in configs if "library" in config), configs[0])


CHOICES: dict[str, Choose] = {"fused": fused, "library": library}


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
    """A model without data: its first blocks, in one format of weights, with patches, on a card that is not there.

    Attributes:
        weights: "bf16", "int8" or "int4".
        patches: what depth 1 gets in the place of the last of the blocks, each alone and in this order.
    """

    model: str
    num_blocks: int = 2
    weights: str = "bf16"
    max_num_seqs: int = 64
    max_model_len: int = 4096
    step_tokens: int = 2048
    patches: tuple[Patch, ...] = ()

    @property
    def setup(self) -> GpuSetup:
        spec = spec_of(self.model)
        last = (1 if self.patches else NEVER) if self.num_blocks > 1 else NEVER
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
        return GpuSetup(
            EngineConfig(
                *("model",), max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.step_tokens
            ),
            spec,
            replace(weights, patches=_without_data(made)),
            _kernels(),
            operators,
            AttentionBackend("triton", operators.attention),
            tuple(plan),
            (0, 1) if self.patches else (0,),
            PAGE_SIZE,
            META,
        )

    def executor(self) -> GpuExecutor:
        return self.setup._executor(self.max_model_len, 1000)


def _without_data(node: Any) -> Any:
    """A record, or a tuple of them, with every tensor on the meta device."""
    if isinstance(node, torch.Tensor):
        return node.to(META)
    if isinstance(node, tuple):
        return tuple(map(_without_data, node))
    if is_dataclass(node) and not isinstance(node, type):
        return replace(node, **{each.name: _without_data(getattr(node, each.name)) for each in fields(node)})
    return node


def _kernels() -> Kernels:
    operators = triton_gpu_kernels()
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
