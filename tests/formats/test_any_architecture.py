"""Architectures that the engine does not know: searched by transformers' own modules, exported with fewer blocks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sleb import LLM, LayerMap, cli
from sleb.errors import ConfigError, ModelError
from sleb.formats.exporting import export_model
from sleb.layer_map.layer_map import Unit
from sleb.pruning.options import PruneOptions
from sleb.pruning.run import prune
from sleb.pruning.transformers_scorer import TransformersScorer

_SHAPE = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
    "mamba_d_conv": 4,
}  # fmt: skip
_MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = {**_MLA, **_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1}
_LINEAR = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
_JAMBA = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "mamba_d_state": 8,
}
_CONV = ["conv", "full_attention", "conv", "conv", "full_attention"]
_KINDS = ["linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"]

# name: (transformers class, what its config changes in the common shape)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "jamba": ("Jamba", {**_JAMBA, "mamba_d_state": 8, "expert_layer_period": 2, "expert_layer_offset": 1}),
    "bamba": ("Bamba", {**_MAMBA, "attn_layer_indices": [1, 3]}),
    "granite-hybrid": (
        "GraniteMoeHybrid",
        {
            **_MAMBA,
            "layer_types": ["mamba", "attention", "mamba", "mamba", "attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 24,
            "position_embedding_type": "rope",
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
    ),
    "nemotron-h": (
        "NemotronH",
        {
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention", "moe"],
            "head_dim": 8,
            "ssm_state_size": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            **_EXPERTS,
            "n_routed_experts": 2,
            "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "falcon-h1": (
        "FalconH1",
        {**_MAMBA, "mamba_d_ssm": 64, "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5},
    ),
    "lfm2": ("Lfm2", {"layer_types": _CONV, "block_auto_adjust_ff_dim": False}),
    "recurrent-gemma": (
        "RecurrentGemma",
        {"block_types": ["recurrent", "recurrent", "attention"], "lru_width": 32, "attention_window_size": 8},
    ),
    "qwen3-next": (
        "Qwen3Next",
        {
            **_LINEAR,
            **_EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [1],
            "layer_types": _KINDS,
        },
    ),
    "deepseek-v2": ("DeepseekV2", {**_DEEPSEEK, "first_k_dense_replace": 2}),
    "deepseek-v3": ("DeepseekV3", {**_DEEPSEEK, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}),
    "minicpm3": ("MiniCPM3", _MLA),
    "mamba": ("Mamba", {"state_size": 8}),
}
REFUSED = {
    "zamba": ("Zamba", {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_d_state": 8}),
    "minimax": (
        "MiniMax",
        {
            "layer_types": ["linear_attention", "full_attention"] * 2 + ["linear_attention"],
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "block_size": 8,
        },
    ),
}
TOKENS = torch.randint(3, 260, (2, 19), generator=torch.Generator().manual_seed(7))


class NoText:
    tokenizer = None


def make_model(name: str, **changes: Any) -> Any:
    import transformers

    family, shape = {**ARCHITECTURES, **REFUSED}[name]
    config = getattr(transformers, f"{family}Config")(**{**_SHAPE, **shape, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:  # wider than any initialiser's
                spread = 1.2 / parameter.shape[-1] ** 0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
            elif path.endswith("norm.weight"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def own_losses(model: Any) -> torch.Tensor:
    """The model's own, without any of our code."""
    with torch.inference_mode():
        logits = model(TOKENS, use_cache=False).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none")
    return losses.view(2, -1)


@torch.no_grad()
def walked_losses(scorer: TransformersScorer, removed: tuple[int, ...] = ()) -> torch.Tensor:
    hidden = scorer.embed(TOKENS)
    for block in range(scorer.num_blocks):
        if block not in removed:
            hidden = scorer.run(Unit(block), hidden)
    return scorer.token_losses(hidden, TOKENS)


def scorer_of(name: str, model: Any) -> TransformersScorer:
    return TransformersScorer(model, name, None, NoText())  # type: ignore[arg-type]


def layer_map(name: str, removed: tuple[int, ...], num_blocks: int = 5) -> LayerMap:
    return LayerMap(name, None, num_blocks, removed=tuple(map(Unit, removed)))


def reload(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exported_checkpoints_are_the_model_without_its_blocks(name: str, tmp_path: Path) -> None:
    """The walk over the blocks gives the model's own loss, and, without some, that of the exported checkpoint."""
    model = make_model(name)
    model.save_pretrained(tmp_path / "source")
    scorer = scorer_of(name, model)
    torch.testing.assert_close(walked_losses(scorer), own_losses(model), atol=2e-5, rtol=0)
    for removed in ((0, 3), (1,)):
        source, target = str(tmp_path / "source"), tmp_path / "out"
        export_model(source, "hf", target, layer_map=layer_map(name, removed), force=True)
        exported = reload(target)
        assert exported.config.num_hidden_layers == 5 - len(removed)
        torch.testing.assert_close(own_losses(exported), walked_losses(scorer, removed), atol=2e-5, rtol=0)


def test_the_search_finds_what_brute_force_finds(tmp_path: Path, byte_tokenizer: Any) -> None:
    """By hooks on the model's own forward pass that give a block's input as its output."""
    model = make_model("qwen3-next")
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(48, 110)) * 3)

    def loss(windows: torch.Tensor, removed: set[int]) -> float:
        hooks = [
            model.model.layers[block].register_forward_hook(lambda module, inputs, output: inputs[0])
            for block in removed
        ]
        with torch.inference_mode():
            logits = model(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
        for hook in hooks:
            hook.remove()
        return float(nn.functional.cross_entropy(logits, windows[:, 1:].flatten())) * windows.numel()

    windows = torch.tensor(list(text.read_bytes())[: 6 * 31]).view(6, 31)
    gone: list[int] = []
    losses = [loss(windows, set())]
    for _ in range(2):
        found = {block: loss(windows, {*gone, block}) for block in (1, 2, 3) if block not in gone}
        gone.append(min(found, key=lambda block: found[block]))
        losses.append(found[gone[-1]])
    result = prune(
        str(tmp_path / "m"), remove=2, calibration=text, seqlen=31, windows=6, runtime="transformers"
    )
    assert [unit.block for unit in result.removed] == gone
    assert result.losses == pytest.approx(losses, rel=1e-5)
    divergent = prune(
        str(tmp_path / "m"), remove=1, calibration=text, seqlen=31, windows=6, runtime="transformers",
        objective="kl", mode="fast",
    )  # fmt: skip
    assert divergent.search is not None and divergent.search.objective == "kl"
    screened = prune(
        str(tmp_path / "m"), remove=1, calibration=text, seqlen=31, windows=6, runtime="transformers",
        mode="fast", screen="gradient",
    )  # fmt: skip
    assert screened.losses is not None and screened.losses[1] >= result.losses[1] - 1e-3


def test_the_commands(
    tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prune, go on with it, export; the engine names this way."""

    def sleb(line: str) -> str:
        monkeypatch.setattr("sys.argv", ["sleb", *line.split()])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr().err
        assert ended.value.code in (0, None) or "error: " in told
        return told

    monkeypatch.chdir(tmp_path)
    make_model("mamba").save_pretrained("m")
    byte_tokenizer.save("m/tokenizer.json")
    Path("text.txt").write_bytes(bytes(range(48, 110)) * 3)
    prune = "prune m --calibration text.txt --seqlen 16 --windows 4 --no-plot -o map.json"
    assert "sleb prune --runtime transformers" in sleb(prune)
    assert "error: " not in sleb(f"{prune} --runtime transformers --remove 1")
    told = sleb(f"{prune} --runtime transformers --remove 2 --resume")
    assert "without patches and without predicted speedups" in told and "1 of 2 removals are decided" in told
    assert "3 of 5 blocks" in sleb("export m --layer-map map.json -o out")
    found = LayerMap.load("map.json")
    assert found.max_depth == 2 and found.patches is None
    walked = walked_losses(scorer_of("mamba", reload(Path("m"))), tuple(unit.block for unit in found.removed))
    torch.testing.assert_close(own_losses(reload(Path("out"))), walked, atol=2e-5, rtol=0)
    with pytest.raises(ModelError, match=r"`sleb prune --runtime transformers`.*`sleb export`"):
        LLM("m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": "sublayers"}, "--units other than blocks"),
        ({"patch": "full"}, "patches, which the checkpoint"),
        ({"target_speedup": 1.2}, "predicted speedups"),
        ({"cost": "kv"}, "--cost kv"),
        ({"calibration": "self"}, "calibration self"),
    ],
)
def test_what_takes_the_engine(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneOptions(**{"runtime": "transformers", **changes}).check()


def test_models_that_cannot_be_walked_or_cut(tmp_path: Path) -> None:
    """Zamba's blocks see the embedding too; MiniMax's know how many they are."""
    with pytest.raises(ModelError, match=r"share weights|other logits block by block|fails when its blocks"):
        scorer_of("zamba", make_model("zamba"))
    make_model("minimax").save_pretrained(tmp_path / "minimax")
    with pytest.raises(ConfigError, match=r"self_attn.num_hidden_layers would be 4, not 5"):
        export_model(str(tmp_path / "minimax"), "hf", tmp_path / "out", layer_map=layer_map("m", (2,)))
    tied = make_model("lfm2")
    tied.model.layers[3].feed_forward = tied.model.layers[0].feed_forward
    with pytest.raises(ModelError, match=r"blocks 0 and 3 of Lfm2ForCausalLM share weights"):
        scorer_of("lfm2", tied)


def test_periods_that_fit_no_longer_are_named(tmp_path: Path) -> None:
    """Without block 2 no period and offset has experts in blocks 1 and 2 of 4 alone; without 0 and 3 others do."""
    make_model("jamba").save_pretrained(tmp_path / "jamba")
    with pytest.raises(ConfigError, match=r"without blocks 2: layers_num_experts.*by expert_layer_period"):
        export_model(str(tmp_path / "jamba"), "hf", tmp_path / "out", layer_map=layer_map("jamba", (2,)))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match=r"JambaForCausalLM.* is not supported"):
        export_model(str(tmp_path / "jamba"), "zeroed", tmp_path / "out", layer_map=layer_map("jamba", (3,)))


def test_code_beside_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"code that lies beside a checkpoint is never run"):
        TransformersScorer.load(str(folder))
    assert not (tmp_path / "ran").exists()


def test_blocks_behind_the_last_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As DeepSeek V3's, which predicts a further token from the whole model's states."""
    from safetensors.torch import load_file, save_file

    make_model("mamba").save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    further = {"backbone.layers.5.norm.weight": torch.ones(32), "mtp.layers.0.norm.weight": torch.ones(32)}
    save_file(tensors | further, tmp_path / "m" / "model.safetensors")
    export_model(str(tmp_path / "m"), "hf", tmp_path / "out", layer_map=layer_map("m", (1, 2)))
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {name.split(".")[2] for name in names if name.startswith("backbone.layers.")} == {"0", "1", "2"}
    assert "mtp.layers.0.norm.weight" in names
    assert "1 tensors behind the last block, such as backbone.layers.5.norm.weight" in caplog.text


def test_a_checkpoint_that_is_not_whole(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model("mamba").save_pretrained(tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "less")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["backbone.layers.3.norm.weight"]
    save_file(tensors, tmp_path / "less" / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks backbone.layers.3.norm.weight"):
        TransformersScorer.load(str(tmp_path / "less"))
