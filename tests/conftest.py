"""Fixtures for everyone: tiny random models of every architecture, made by transformers, nothing downloaded.

    architecture    parametrises a test over all variants in ARCHITECTURES
    variant         over those in VARIANTS: at least one of every other family, for one test each
    tiny_model      tiny_model("qwen3") -> TinyModel: the folder and, as the oracle, the transformers model
    tiny_model_dir  a 6-block Llama folder with a byte-level tokenizer, chat template and generation config
    tiny_chain      a LayerMap of 5 removals over it

Weights are drawn much wider than any initialiser's, norms and biases too: logits differ by whole units, so that a
token attended too many or a rotation off by one position cannot hide in a tolerance.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

if (
    not torch.cuda.is_available()
):  # Triton chooses when a kernel is defined: without a GPU it can only interpret
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from sleb.layer_map.layer_map import LayerMap, Patch, Unit

_TIMES_LONGER = 20
# The default run finds the same again, so that a red one is the change's own doing; `long` looks for what is new.
settings.register_profile(
    "sleb",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("long", settings.get_profile("sleb"), derandomize=False)
_PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "sleb")
settings.load_profile(_PROFILE)
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Interpreted kernels run under the sanitizer, wherever in the suite."""
    path = Path(__file__).parent / "kernels" / "sanitizer.py"
    specification = importlib.util.spec_from_file_location("sanitizer", path)
    assert specification is not None and specification.loader is not None
    sanitizer = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(sanitizer)
    config.pluginmanager.register(sanitizer, "sanitizer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The profile `long` multiplies the examples of every property, also of those that say a number of their own."""
    if _PROFILE == "long":
        for test in {getattr(item, "function", None) for item in items}:
            own = getattr(test, "_hypothesis_internal_use_settings", None)  # there is no public name for them
            if own is not None:
                longer = settings(own, max_examples=_TIMES_LONGER * own.max_examples)
                test._hypothesis_internal_use_settings = longer  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def one_processor() -> Iterator[None]:
    """Keeps this thread, and those that it starts, on one processor: for pools of C threads.

    They wait for one another some thousand times a test. Where others compute on all processors, as xdist's other
    workers do, one thread of a pool that is spread over them nearly always waits for its turn.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    usable = os.sched_getaffinity(0)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(usable)[worker % len(usable)]})
    yield
    os.sched_setaffinity(0, usable)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` only these folders are looked at: machines with a GPU often lack what the others' tests import."""
    others = collection_path.parent == Path(__file__).parent and collection_path.name not in _WITH_GPU_TESTS
    return True if others and config.option.markexpr.startswith("gpu") else None


_WITH_GPU_TESTS = ("conftest.py", "engine", "kernels")
_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_OPT_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
_LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
# Phi-3 rotates half of each head of 16 features: four frequencies.
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.5, 2.5, 4.0, 8.0],
    "partial_rotary_factor": 0.5,
}
_PHI3_LONGROPE = {
    "hidden_size": 64,
    "rope_parameters": _LONGROPE,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 24,
}

# name: (transformers class, what its config changes in the common shape)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("Llama", {"head_dim": 16, "rms_norm_eps": 1e-3}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": _LINEAR}),
    "llama-yarn": ("Llama", {"rope_parameters": _YARN}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral-window": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen2-window-off": ("Qwen2", {"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-window": (
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_parameters": _YARN,
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 1, 0]}),
    "smollm3-interval": ("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "smollm3-window": (
        "SmolLM3",
        {"no_rope_layers": [0, 1, 0, 1, 1], "use_sliding_window": True, "sliding_window": 6},
    ),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-partial": ("Phi3", {"hidden_size": 64, "partial_rotary_factor": 0.5, "sliding_window": None}),
    "phi3-window": ("Phi3", {"sliding_window": 7, "num_key_value_heads": 4}),
    "phi3-longrope": ("Phi3", _PHI3_LONGROPE),
    "opt": ("OPT", {"do_layer_norm_before": True}),
    "opt-untied": ("OPT", {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "opt-350m": ("OPT", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt-no-bias": ("OPT", {"enable_bias": False}),
    "opt-no-affine": ("OPT", {"layer_norm_elementwise_affine": False}),
    "opt-no-final-norm": ("OPT", {"_remove_final_layer_norm": True}),
}

_GPT2_SHAPE = {"n_inner": 48, "activation_function": "gelu_new"}
_SLIDING = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
}
_KINDS = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
_GEMMA2 = {
    **_SLIDING,
    "head_dim": 16,
    "query_pre_attn_scalar": 10,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
_GRANITE = {
    "embedding_multiplier": 1.7,
    "attention_multiplier": 0.6,
    "residual_multiplier": 0.4,
    "logits_scaling": 1.3,
    "attention_bias": True,
}
_GLM = {"hidden_size": 64, "head_dim": 16, "pad_token_id": 0}
_MQA = {"num_key_value_heads": None}

# The same of the other families: windows and caps bite, scales are not 1.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "internlm3": ("InternLM3", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "iquestcoder": ("IQuestCoder", {"head_dim": 16}),
    "ministral": ("Ministral", _SLIDING | {"head_dim": 8}),
    "gemma": ("Gemma", {"head_dim": 16, "hidden_act": "gelu", "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", _GEMMA2),
    "gemma3": ("Gemma3Text", _GEMMA2 | {"rope_parameters": _KINDS, "attn_logit_softcapping": None}),
    "gemma3-uncapped": (
        "Gemma3Text",
        _GEMMA2
        | {"layer_types": None, "sliding_window_pattern": 3}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "vaultgemma": ("VaultGemma", _GEMMA2),
    "olmo2": ("Olmo2", {"attention_bias": True}),
    "olmo3": ("Olmo3", {**_SLIDING, "rope_parameters": _KINDS}),
    "granite": ("Granite", _GRANITE),
    "hyperclovax": ("HyperCLOVAX", _GRANITE | {"mlp_bias": True}),
    "glm": ("Glm", _GLM),
    "glm4": ("Glm4", _GLM | {"attention_bias": False}),
    "exaone4": ("Exaone4", _SLIDING),
    "exaone4-full": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 5}),
    "cwm": ("Cwm", {"sliding_window": 5, "head_dim": 16}),
    "seed-oss": ("SeedOss", {"head_dim": 12, "attention_out_bias": True}),
    "arcee": ("Arcee", {"mlp_bias": True}),
    "hunyuan": (
        "HunYuanDenseV1",
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "alpha": 7.0, "factor": 1.0, "rope_theta": 500.0},
        },
    ),
    "ernie4.5": ("Ernie4_5", {"head_dim": 16, "use_bias": True}),
    "helium": ("Helium", {"head_dim": 8, "attention_bias": True, "pad_token_id": 0}),
    "olmo": ("Olmo", {"clip_qkv": 0.8}),
    "nemotron": ("Nemotron", {"hidden_size": 64, "attention_bias": True}),
    "jais2": ("Jais2", {}),
    "stablelm": ("StableLm", {"hidden_size": 64, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "starcoder2": ("Starcoder2", {"sliding_window": 6}),
    "cohere": ("Cohere", {"logit_scale": 0.7}),
    "cohere2": ("Cohere2", {**_SLIDING, "logit_scale": 0.7, "attention_bias": True}),
    "phi": ("Phi", {"hidden_size": 64}),
    "persimmon": ("Persimmon", {"hidden_size": 64, **_MQA}),
    "gpt-neox": ("GPTNeoX", {"hidden_size": 64}),
    "gpt-neox-sequential": (
        "GPTNeoX",
        {"use_parallel_residual": False, "rotary_pct": 1.0, "attention_bias": False},
    ),
    "falcon": ("Falcon", {"ffn_hidden_size": 48, "bias": True, "num_kv_heads": None}),
    "gptj": ("GPTJ", {**_GPT2_SHAPE, "rotary_dim": 4}),
    "gpt2": ("GPT2", _GPT2_SHAPE),
    "gpt2-unscaled": ("GPT2", {"scale_attn_weights": False, "n_inner": None}),
    "gpt-bigcode": ("GPTBigCode", _GPT2_SHAPE),
    "gpt-neo": ("GPTNeo", {"attention_types": [[["global", "local"], 2], [["local"], 1]], "window_size": 5}),
    "biogpt": ("BioGpt", {"pad_token_id": 0}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "mlp_only_layers": [1],
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            "decoder_sparse_step": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "num_experts": 5,
            "num_experts_per_tok": 2,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 1.5}),
    "granite-moe": ("GraniteMoe", _GRANITE | {"num_local_experts": 4}),
    "gpt-oss": (
        "GptOss",
        {
            "head_dim": 16,
            "intermediate_size": 64,
            "sliding_window": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {**_YARN, "truncate": False},
        },
    ),
    "ernie4.5-moe": (
        "Ernie4_5_Moe",
        {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 20, "moe_num_shared_experts": 2},
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, variants in (("architecture", ARCHITECTURES), ("variant", VARIANTS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(variants))


@pytest.fixture(scope="session")
def model_names() -> list[str]:
    """Every name that tiny_model knows."""
    return [*ARCHITECTURES, *VARIANTS]


@pytest.fixture(scope="session", autouse=True)
def weight_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where this session keeps quantised weights: those of tiny models have no place in the user's cache."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sleb.engine.model.weight_cache.cache_dir", lambda: folder)
        yield folder


_OUTPUTS = {
    "attention": (
        "attn.o_proj",
        "attn.out_proj",
        "attn.c_proj",
        "attention.out_proj",
        "attn.dense",
        "attention.dense",
    ),
    "mlp": ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "fc2"),
}


def _layers(model: Any) -> tuple[Any, str]:
    """The module that holds a model's blocks, and its attribute for them."""
    return next(
        (module, name)
        for module in model.modules()
        for name in ("layers", "h")
        if isinstance(getattr(module, name, None), nn.ModuleList)
    )


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint folder and the transformers model that wrote it (float32, eager attention)."""

    name: str
    path: Path
    model: Any

    @cached_property
    def num_blocks(self) -> int:
        return int(self.model.config.num_hidden_layers)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """transformers' logits [L, V] of one sequence, computed at once and without a cache."""
        with torch.inference_mode():
            return self.model(torch.tensor([list(token_ids)]), use_cache=False).logits[0].float()

    def logprobs(self, token_ids: Sequence[int]) -> Tensor:
        """log-softmax of `logits`, [L, V]."""
        return self.logits(token_ids).log_softmax(dim=-1)

    def without(self, blocks: Sequence[int]) -> TinyModel:
        """The same model with blocks deleted and the others renumbered, configuration included."""
        model = copy.deepcopy(self.model)
        parent, name = _layers(model)
        kept = [block for block in range(self.num_blocks) if block not in blocks]
        setattr(parent, name, nn.ModuleList(getattr(parent, name)[block] for block in kept))
        for index, layer in enumerate(getattr(parent, name)):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index
        for config in {id(each.config): each.config for each in (model, parent)}.values():
            for field in ("layer_types", "no_rope_layers"):
                if getattr(config, field, None) is not None:
                    setattr(config, field, [getattr(config, field)[block] for block in kept])
            config.num_hidden_layers = len(kept)
        return TinyModel(f"{self.name} without {list(blocks)}", self.path, model)

    def without_sublayers(self, units: Sequence[Unit]) -> TinyModel:
        """The same model with the output projections of these sublayers zeroed: their residual adds nothing."""
        model = copy.deepcopy(self.model)
        layers = getattr(*_layers(model))
        with torch.no_grad():
            for unit in units:
                for block, part in unit.sublayers:
                    output = next(
                        module
                        for name, module in layers[block].named_modules()
                        if name.endswith(_OUTPUTS[part]) and hasattr(module, "weight")
                    )
                    output.weight.zero_()
                    if output.bias is not None:
                        output.bias.zero_()
        return TinyModel(f"{self.name} without {', '.join(map(str, units))}", self.path, model)

    def patched(self, units: Sequence[Unit], patches: Sequence[Patch]) -> TinyModel:
        """A Llama (or one that names its modules alike) `without_sublayers`, the last of each patch's run doing, by
        hooks, what the patch says, in float64."""
        pruned = self.without_sublayers(units)
        for patch in patches:
            block, part = patch.last
            layer = pruned.model.model.layers[block]
            norm, module = (
                (layer.input_layernorm, layer.self_attn)
                if part == "attention"
                else (layer.post_attention_layernorm, layer.mlp)
            )
            state: list[Tensor] = []

            def read(module: Any, inputs: Any, state: list[Tensor] = state) -> None:
                state[:] = inputs

            def replace(
                module: Any, inputs: Any, output: Any, state: list[Tensor] = state, patch: Patch = patch
            ) -> Any:
                hidden = state[0].double()
                update = (_apply(patch, hidden, pruned.model.config.rms_norm_eps) - hidden).float()
                return (update, *output[1:]) if isinstance(output, tuple) else update

            norm.register_forward_pre_hook(read)
            module.register_forward_hook(replace)
        return pruned


def _apply(patch: Patch, hidden: Tensor, eps: float) -> Tensor:
    """By the formulas of `sleb.layer_map.patches`, for a model whose norm is RMS."""
    tensors = {name: torch.from_numpy(tensor.astype("float64")) for name, tensor in patch.tensors.items()}
    if patch.form == "scale":
        return hidden * tensors["scale"] + tensors["bias"]
    weight = tensors["weight"] if patch.form == "full" else tensors["up"] @ tensors["down"]
    inputs = hidden / (hidden.pow(2).mean(-1, keepdim=True) + eps).sqrt() if patch.normed else hidden
    return hidden + inputs @ weight.T + tensors["bias"]


def make_model(architecture: str, seed: int = 0, **changes: Any) -> Any:
    """A random transformers model of an architecture of ARCHITECTURES or VARIANTS, in float32."""
    import transformers

    family, overrides = (ARCHITECTURES | VARIANTS)[architecture]
    shape = _OPT_SHAPE if family == "OPT" else _SHAPE
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**copy.deepcopy({**shape, **overrides, **changes}), attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    randomise(model, seed)
    return model


def randomise(model: Any, seed: int) -> None:
    """Every parameter anew: matrices with deviation 1.7 / sqrt(inputs), norm weights around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    shifted = "gemma" in model.config.model_type or model.config.model_type == "nemotron"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith("weight") and parameter.dim() == 1 and not shifted else 0.0
            deviation = 1.7 / parameter.shape[-1] ** 0.5 if parameter.dim() >= 2 else 0.3
            parameter.copy_(centre + deviation * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """tiny_model(name) -> TinyModel of that variant; made once a session."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, TinyModel] = {}

    def get(name: str) -> TinyModel:
        if name not in made:
            model = make_model(name)
            model.save_pretrained(root / name)
            (root / name / "generation_config.json").unlink(missing_ok=True)
            made[name] = TinyModel(name, root / name, model)
        return made[name]

    return get


# The tokenizer of tiny_model_dir: token i < 256 is byte i, then these.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role ' ~ message['role']) }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def make_byte_tokenizer(merges: Sequence[tuple[str, str]] = ()) -> Any:
    """A `tokenizers.Tokenizer`: ids below 256 are bytes, then SPECIAL_TOKENS, then the merges' results."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    for token in SPECIAL_TOKENS:
        vocabulary[token] = len(vocabulary)
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """The tokenizer of tiny_model_dir: token i is byte i, then four special tokens."""
    return make_byte_tokenizer()


@pytest.fixture(scope="session")
def merged_tokenizer() -> Any:
    """Byte-level with merges, some of which end inside a character, as real vocabularies have."""
    characters = _byte_characters()
    space, euro = characters[0x20], [characters[byte] for byte in "€".encode()]
    return make_byte_tokenizer(
        [
            ("a", "b"),
            ("ab", "c"),
            (space, "a"),
            (space, euro[0]),
            (space + euro[0], euro[1]),
            (euro[1], euro[2]),
        ]
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Path:
    """A Llama of 6 blocks, 512 positions and a vocabulary of 264 (four more than the tokenizer knows)."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    model = make_model(
        "llama-gqa",
        vocab_size=264,
        num_hidden_layers=6,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=258,
        pad_token_id=259,
    )
    model.save_pretrained(folder)
    byte_tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[3],
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    generation_config = {"bos_token_id": 256, "eos_token_id": [258, 256], "pad_token_id": 259}
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return folder


@pytest.fixture(scope="session")
def tiny_chain() -> LayerMap:
    """Five removals over tiny_model_dir, whole blocks and one attention and one MLP alone; recommends depth 3."""
    order = (Unit(3), Unit(1), Unit(4, "attention"), Unit(2), Unit(4, "mlp"))
    return LayerMap(model="tiny-llama", fingerprint=None, num_blocks=6, removed=order, depth=3)
