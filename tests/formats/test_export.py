"""Pruned checkpoints: what transformers and our own engine compute from them, and how they come to be."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sleb import LLM, LayerMap, SamplingParams, cli
from sleb.errors import ConfigError, ModelError
from sleb.formats import FOLDER_FORMATS, safetensors_copy
from sleb.formats.decilm_model import DeciLMForCausalLM
from sleb.formats.exporting import export_model
from sleb.formats.importing import import_map
from sleb.layer_map.layer_map import Unit, shipped_maps

PROMPT = torch.randint(3, 96, (29,), generator=torch.Generator().manual_seed(7)).tolist()
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PARTS = (Unit(3), Unit(1, "mlp"), Unit(4, "attention"))


@pytest.fixture
def export(tmp_path):
    """export(model or folder, removed, notation, **options): the folder that was written."""

    def call(model, removed, notation="hf", **options):
        path = Path(getattr(model, "path", model))
        options.setdefault("layer_map", chain(path, removed))
        target = options.pop("output", tmp_path / notation)
        export_model(str(path), notation, target, **options)
        return target

    return call


def chain(path, removed):
    units = tuple(unit if isinstance(unit, Unit) else Unit(unit) for unit in removed)
    config = json.loads((path / "config.json").read_text())
    num_blocks = next(
        config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config
    )
    return LayerMap(path.name, None, num_blocks, removed=units)


def reload(folder, cls=None):
    """The model that transformers makes of a folder, which must have every weight and no other."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, info = (cls or AutoModelForCausalLM).from_pretrained(folder, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(model):
    with torch.inference_mode():
        return model(torch.tensor([PROMPT]), use_cache=False).logits[0]


def engine(path, layer_map="none", depth=0):
    options = {"page_size": 4, "dtype": "float32", "device": "cpu", "kernels": "torch", "max_num_seqs": 4}
    return LLM(path, layer_map, [depth], **options)


def another(model, folder, **changes):
    """A model of the same architecture, with fresh weights, and other numbers in its configuration."""
    config = copy.deepcopy(model.model.config)
    for name, value in changes.items():
        setattr(config, name, value)
    type(model.model)(config).save_pretrained(folder)


def edit_config(source, target, change):
    """A copy of a model's folder with another config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


# --- what the exported models compute


@pytest.mark.parametrize("removed", [(2,), (3, 0, 1)], ids=str)
def test_compact_checkpoints_are_the_model_without_its_blocks(architecture, removed, tiny_model, export):
    model = tiny_model(architecture)
    folder = export(model, removed)
    assert torch.equal(logits(reload(folder)), model.without(removed).logits(PROMPT))
    tokens = engine(folder).generate([PROMPT], GREEDY)[0].token_ids
    ours = engine(model.path, chain(model.path, removed), depth=len(removed))
    assert tokens == ours.generate([PROMPT], GREEDY)[0].token_ids


@pytest.mark.slow
@pytest.mark.parametrize("removed", [(1,), (0, 3)], ids=str)
def test_compact_checkpoints_of_every_family(variant, removed, tiny_model, export):
    """In transformers and in our engine the model without its blocks."""
    model = tiny_model(variant)
    folder = export(model, removed)
    theirs = logits(reload(folder))
    torch.testing.assert_close(theirs, model.without(removed).logits(PROMPT), atol=1e-5, rtol=0)
    following = torch.tensor(PROMPT[1:])[:, None]
    theirs = theirs.log_softmax(-1)[:-1].gather(1, following).squeeze(1)
    torch.testing.assert_close(engine(folder).score(PROMPT), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "cohere2", "exaone4", "olmo3", "ministral"])
def test_kinds_of_blocks_that_the_configuration_does_not_list(name, tiny_model, tmp_path, export):
    """Older files say that every so manieth block attends to everything; of the blocks that are left it is stated."""
    model = tiny_model(name)
    source = edit_config(model.path, tmp_path / "old", lambda config: config.pop("layer_types"))
    folder, whole = export(source, (1,)), reload(source)
    kept = replace(model, path=source, model=whole).without((1,))
    torch.testing.assert_close(logits(reload(folder)), kept.logits(PROMPT), atol=1e-5, rtol=0)


def test_zeroed_checkpoints_are_the_model_without_its_parts(architecture, tiny_model, export):
    model = tiny_model(architecture)
    if architecture == "opt-350m":
        with pytest.raises(ConfigError, match="norms after the residual add here"):
            export(model, PARTS, "zeroed")
        return
    folder = export(model, PARTS, "zeroed")
    reloaded = reload(folder)
    assert torch.equal(logits(reloaded), model.without_sublayers(PARTS).logits(PROMPT))
    ours = engine(model.path, chain(model.path, PARTS), depth=3).score(PROMPT)
    following = torch.tensor(PROMPT[1:])[:, None]
    theirs = logits(reloaded).log_softmax(-1)[:-1].gather(1, following).squeeze(1)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", ["llama", "llama-gqa", "llama-tied", "llama-biases", "llama3", "llama-yarn", "mistral"]
)
def test_decilm_checkpoints_are_the_model_without_its_parts(name, tiny_model, export):
    """With the class that lies beside the weights; generation with a cache, whose places skip removed attentions."""
    model = tiny_model(name)
    folder = export(model, PARTS, "decilm")
    reloaded = reload(folder, DeciLMForCausalLM)
    torch.testing.assert_close(
        logits(reloaded), model.without_sublayers(PARTS).logits(PROMPT), atol=1e-6, rtol=0
    )
    tokens = reloaded.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    ours = engine(model.path, chain(model.path, PARTS), depth=3).generate([PROMPT], GREEDY)[0].token_ids
    assert tokens[0, len(PROMPT) :].tolist() == ours
    names = set(load_file(folder / "model.safetensors"))
    assert not [each for each in names if each.startswith(("model.layers.3.", "model.layers.1.mlp"))]
    assert {
        "model.layers.1.input_layernorm.weight",
        "model.layers.4.post_attention_layernorm.weight",
    } <= names
    assert (
        not {"model.layers.1.post_attention_layernorm.weight", "model.layers.4.input_layernorm.weight"}
        & names
    )


def test_decilm_loads_by_its_own_code(tiny_model, export, tmp_path, monkeypatch):
    """As a user of transformers does it, and as vLLM reads the configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = tiny_model("llama-gqa")
    folder = export(model, PARTS, "decilm")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    blocks = config.block_configs
    assert [block.attention.no_op for block in blocks] == [False, False, False, True, True]
    assert [block.ffn.no_op for block in blocks] == [False, True, False, True, False]
    assert blocks[0].attention.n_heads_in_group == 2
    assert blocks[0].ffn.intermediate_size == 48  # no multiple of 256: no ffn_mult is that
    assert not hasattr(blocks[0].ffn, "ffn_mult")
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    torch.testing.assert_close(
        logits(loaded), model.without_sublayers(PARTS).logits(PROMPT), atol=1e-5, rtol=0
    )
    assert set(import_map(folder).removed) == set(PARTS)
    loaded.save_pretrained(tmp_path / "saved")
    assert set(import_map(tmp_path / "saved").removed) == set(PARTS)


def test_widths_that_ffn_mult_can_say(tiny_model, tmp_path, export):
    changes = {"hidden_size": 48, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 12}
    another(tiny_model("llama"), tmp_path / "wide", **changes)
    config = json.loads(
        (export(tmp_path / "wide", (Unit(1, "attention"),), "decilm") / "config.json").read_text()
    )
    [first, second, _] = config["block_configs"]
    assert first["ffn"] == {"no_op": False, "replace_with_linear": False, "ffn_mult": 8.0}
    assert second["attention"] == {"no_op": True, "replace_with_linear": False, "n_heads_in_group": None}


# --- the configuration


@pytest.mark.parametrize(
    ("name", "dropped", "removed", "kept", "max_window_layers"),
    [
        ("qwen2-window", "layer_types", (0, 3), ["full", "sliding", "sliding"], 1),
        ("qwen3-window", "layer_types", (0, 3), ["sliding"] * 3, 0),
        ("smollm3-interval", "no_rope_layers", (0, 3), [0, 1, 1], None),
        (
            "smollm3-interval",
            "no_rope_layers",
            (1, 3),
            [1, 1, 1],
            None,
        ),  # not what the interval says of 3 blocks
    ],
)
def test_what_follows_from_a_blocks_number_is_stated(
    name, dropped, removed, kept, max_window_layers, tiny_model, tmp_path, export
):
    """Older checkpoints have no lists: windows follow from max_window_layers, rotation from an interval."""
    model = tiny_model(name)
    source = edit_config(model.path, tmp_path / "old", lambda config: config.pop(dropped))
    folder = export(source, removed)
    assert torch.equal(logits(reload(folder)), model.without(removed).logits(PROMPT))
    config = json.loads((folder / "config.json").read_text())
    assert config[dropped] == [f"{each}_attention" if isinstance(each, str) else each for each in kept]
    assert config.get("max_window_layers") == max_window_layers


def test_every_list_of_blocks_is_cut_and_no_other(tmp_path, tiny_model, export):
    """In a model of 4 blocks with 4 rotary frequencies and 4 tokens that end an answer."""
    another(tiny_model("phi3-longrope"), tmp_path / "four", num_hidden_layers=4)

    def change(config):
        config["eos_token_id"] = [2, 3, 4, 5]
        config["windows"] = [10, 11, 12, 13]
        config["extra"] = {"inner": {"heads": ["a", "b", "c", "d"], "others": [1, 2, 3]}}
        config["auto_map"] = {"AutoConfig": "configuration_phi3.Phi3Config"}
        config["_name_or_path"] = "/home/someone/phi"

    source = edit_config(tmp_path / "four", tmp_path / "changed", change)
    folder = export(source, (1,))
    config = json.loads((folder / "config.json").read_text())
    assert config["windows"] == [10, 12, 13]
    assert config["extra"] == {"inner": {"heads": ["a", "c", "d"], "others": [1, 2, 3]}}
    assert config["eos_token_id"] == [2, 3, 4, 5]
    original = json.loads((source / "config.json").read_text())
    assert config["rope_parameters"] == original["rope_parameters"]
    assert not {"auto_map", "_name_or_path"} & set(config)
    reload(folder)


def test_lists_longer_than_the_model(tmp_path, tiny_model, export):
    """SmolLM3's class allows no_rope_layers for more blocks than there are."""
    model = tiny_model("smollm3")
    source = edit_config(
        model.path, tmp_path / "long", lambda config: config.update(no_rope_layers=[1, 0, 1, 1, 0, 1, 1])
    )
    folder = export(source, (1, 2))
    assert json.loads((folder / "config.json").read_text())["no_rope_layers"] == [1, 1, 0]
    assert torch.equal(logits(reload(folder)), model.without((1, 2)).logits(PROMPT))


# --- files


def test_what_lies_beside_the_weights_comes_along(tiny_model_dir, tmp_path, export):
    source = Path(shutil.copytree(tiny_model_dir, tmp_path / "source"))
    (source / "additional_chat_templates").mkdir()
    copied = {
        "chat_template.jinja": "{{ x }}",
        "LICENSE.txt": "theirs",
        "additional_chat_templates/a.jinja": "a",
    }
    for name, text in copied.items():
        (source / name).write_text(text)
    for name in ("modeling_x.py", "optimizer.bin", "README.md", ".sleb-model.json", "training.pt"):
        (source / name).write_text("stays")
    folder = export(source, (3, 1))
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    ours = {"config.json", "model.safetensors", "sleb.json", "README.md"}
    assert found == {*copied, *ours, "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    for name in found - ours:
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    output = engine(folder).generate("abc", GREEDY)[0]
    assert output.text == engine(source, chain(source, (3, 1)), 2).generate("abc", GREEDY)[0].text


def test_provenance(tiny_model_dir, tiny_chain, tmp_path):
    export_model(str(tiny_model_dir), "zeroed", tmp_path / "out", layer_map=tiny_chain, depth=3)
    record = json.loads((tmp_path / "out/sleb.json").read_text())
    assert record["removed"] == ["3", "1", "4.attention"]
    assert (record["depth"], record["num_blocks"], record["kept_blocks"]) == (3, 6, [0, 2, 4, 5])
    assert record["layer_map"]["digest"] == tiny_chain.digest(3)
    assert (record["source_model"], record["format"]) == ("tiny-llama", "zeroed")
    card = (tmp_path / "out/README.md").read_text()
    assert "tiny-llama at depth 3" in card and "3, 1, 4.attention" in card and tiny_chain.digest(3) in card
    for text in (card, json.dumps(record)):
        assert str(tiny_model_dir.parent) not in text  # a path on this machine means nothing elsewhere


@pytest.mark.parametrize("name", ["llama-tied", "opt", "llama"])
def test_tied_embeddings_stay_tied(name, tiny_model, export):
    folder = export(tiny_model(name), (2,))
    tied = name != "llama"
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (not tied)
    model = reload(folder)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_a_head_that_the_config_calls_tied_but_is_not_stays_its_own(tiny_model, tmp_path, export):
    source = Path(shutil.copytree(tiny_model("llama-tied").path, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors | {"lm_head.weight": head}, source / "model.safetensors")
    folder = export(source, (2,))
    assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert torch.equal(reload(folder).get_output_embeddings().weight, head)


def test_names_are_transformers_whatever_the_source_calls_them(tiny_model, tmp_path, export):
    source = Path(shutil.copytree(tiny_model("opt").path, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, source / "model.safetensors")
    folder = export(source, (2,))
    ours = load_file(export(tiny_model("opt"), (2,), output=tmp_path / "plain") / "model.safetensors")
    assert {name: tuple(each.shape) for name, each in load_file(folder / "model.safetensors").items()} == {
        name: tuple(each.shape) for name, each in ours.items()
    }
    assert torch.equal(logits(reload(folder)), logits(reload(tmp_path / "plain")))


def test_shards(tiny_model, tmp_path, export, monkeypatch):
    """Source and export in shards; bytes are copied in pieces that do not fit the tensors."""
    monkeypatch.setattr(safetensors_copy, "_CHUNK_BYTES", 1000)
    model = tiny_model("qwen2")
    model.model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    seen = []

    def note(done, total):
        seen.append((done, total))

    sharded = export(tmp_path / "source", (2,), shard_bytes=30_000, progress=note, output=tmp_path / "a")
    whole = export(tmp_path / "source", (2,), output=tmp_path / "b")
    expected = load_file(whole / "model.safetensors")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    total = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    assert index["metadata"]["total_size"] == total
    assert set(index["weight_map"]) == set(expected)
    for file in set(index["weight_map"].values()):
        tensors = load_file(sharded / file)
        assert sum(tensor.numel() * 4 for tensor in tensors.values()) <= 30_000
        assert all(torch.equal(tensor, expected[each]) for each, tensor in tensors.items())
    with safe_open(whole / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(set(done)) and done[-1] == total and set(totals) == {total}
    assert torch.equal(logits(reload(sharded)), model.without((2,)).logits(PROMPT))


def test_other_dtypes_are_copied_as_they_are(tiny_model, tmp_path, export):
    model = tiny_model("llama")
    source = Path(shutil.copytree(model.path, tmp_path / "source"))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    written = load_file(export(source, (Unit(1, "mlp"),), "zeroed") / "model.safetensors")
    for name, tensor in tensors.items():
        wanted = torch.zeros_like(tensor) if name == "model.layers.1.mlp.down_proj.weight" else tensor
        assert written[name].dtype == torch.bfloat16 and torch.equal(written[name], wanted)


def test_links_of_the_hubs_cache_become_files(tiny_model_dir, tmp_path, export):
    (tmp_path / "snapshot").mkdir()
    for file in tiny_model_dir.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    folder = export(tmp_path / "snapshot", (1,))
    assert not [file for file in folder.iterdir() if file.is_symlink()]
    assert (folder / "tokenizer.json").read_bytes() == (tiny_model_dir / "tokenizer.json").read_bytes()


def test_buffers_of_old_checkpoints(tiny_model, tmp_path, export):
    model = tiny_model("llama")
    source = Path(shutil.copytree(model.path, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    for block in range(5):
        tensors[f"model.layers.{block}.self_attn.rotary_emb.inv_freq"] = torch.full((4,), float(block))
    save_file(tensors, source / "model.safetensors")
    written = load_file(export(source, (0,)) / "model.safetensors")
    assert written["model.layers.0.self_attn.rotary_emb.inv_freq"].unique().item() == 1.0
    assert not [
        each
        for each in load_file(export(source, PARTS, "decilm") / "model.safetensors")
        if "inv_freq" in each
    ]


# --- what goes wrong


@pytest.mark.parametrize("notation", FOLDER_FORMATS)
def test_an_interrupted_export_leaves_nothing(notation, tiny_model, tmp_path, export):
    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tiny_model("llama"), (3,), notation, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_replacing(tiny_model, tmp_path, export):
    model = tiny_model("llama")
    folder = export(model, (3, 1))
    before = sorted((file.name, file.read_bytes()) for file in folder.iterdir())
    with pytest.raises(ConfigError, match="exists: replace it with --force, or name another"):
        export(model, (2,))

    def fail(done, total):
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match="no space left for"):
        export(model, (2,), force=True, progress=fail)
    assert sorted((file.name, file.read_bytes()) for file in folder.iterdir()) == before
    assert json.loads((export(model, (2,), force=True) / "sleb.json").read_text())["removed"] == ["2"]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_force_must_not_replace(tiny_model, tmp_path, export):
    """A folder that is no export of ours; the model that is exported; one that holds it; a file."""
    model = tiny_model("llama")
    other = tmp_path / "other"
    other.mkdir()
    assert export(model, (1,), output=other) == other  # empty: nothing is lost
    (other / "sleb.json").unlink()
    with pytest.raises(ConfigError, match="was not exported by sleb: name another folder, or remove it"):
        export(model, (1,), output=other, force=True)
    inner = Path(shutil.copytree(model.path, tmp_path / "outer/inner"))
    for place in (inner, inner.parent):
        (place / "sleb.json").write_text("{}")
        with pytest.raises(ConfigError, match="holds the model that is exported"):
            export(inner, (1,), output=place, force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="was not exported by sleb"):
        export(model, (1,), output=tmp_path / "file", force=True)
    with pytest.raises(ConfigError, match="cannot be written"):
        export(model, (1,), output=tmp_path / "file/below")
    with pytest.raises(ConfigError, match="format hf writes a folder: name one with --output"):
        export_model(str(model.path), "hf", layer_map=chain(model.path, (1,)))


@pytest.mark.parametrize(
    ("name", "removed", "notation", "message"),
    [
        (
            "llama",
            PARTS,
            "hf",
            "format hf can only remove whole blocks, but depth 3 removes 1.mlp, 4.attention: use",
        ),
        (
            "qwen2",
            PARTS,
            "decilm",
            "format decilm is a Llama without sliding windows; Qwen2ForCausalLM here is none",
        ),
        ("mistral-window", PARTS, "decilm", "MistralForCausalLM here is none"),
        (
            "llama",
            (Unit(0, "attention"),),
            "decilm",
            "block 0, the first that runs, has no attention at depth 1",
        ),
        (
            "llama",
            (Unit(0), Unit(1, "attention")),
            "decilm",
            "block 1, the first that runs, has no attention",
        ),
        ("llama", range(5), "zeroed", "removes every block: choose a smaller one"),
    ],
)
def test_what_a_format_cannot_hold(name, removed, notation, message, tiny_model, tmp_path, export):
    with pytest.raises(ConfigError, match=message):
        export(tiny_model(name), removed, notation)
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoints(tiny_model, tmp_path, export):
    model = tiny_model("llama")
    source = Path(shutil.copytree(model.path, tmp_path / "source"))
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ModelError, match="is not a readable safetensors file"):
        export(source, (1,))
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(ModelError, match="pickled weights"):
        export(source, (1,))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_file_that_shrinks_meanwhile(tiny_model, tmp_path, export):
    source = Path(shutil.copytree(tiny_model("llama").path, tmp_path / "source"))

    def shrink(done, total):
        os.truncate(source / "model.safetensors", 5000)

    with pytest.raises(ModelError, match="ends inside"):
        export(source, (1,), progress=shrink)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_command(tiny_model_dir, tiny_chain, tmp_path, capsys, monkeypatch):
    tiny_chain.save(tmp_path / "map.json")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sleb", "export", str(tiny_model_dir), *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    target = str(tmp_path / "out")
    chosen = ("--layer-map", str(tmp_path / "map.json"), "-o", target)
    assert run(*chosen, "--depth", "2", "--max-shard-size", "50KB") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "depth 2, 4 of 6 blocks" in captured.err
    assert (tmp_path / "out/model.safetensors.index.json").is_file()
    assert run(*chosen) == 2  # the recommended depth, 3, has a part
    assert "exists: replace it with --force" in capsys.readouterr().err
    assert run(*chosen, "--force") == 2
    assert (
        "error: format hf can only remove whole blocks, but depth 3 removes 4.attention"
        in capsys.readouterr().err
    )
    assert run(*chosen, "--force", "--max-shard-size", "big") == 2
    assert "size 'big' must be like 5GB" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2_at_depth_6(tmp_path):
    """The demo model: transformers continues as our engine does, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    layer_map = replace(LayerMap.load(shipped_maps()["smollm2-135m-instruct"]), patches=None)
    export_model("smollm2", "hf", tmp_path / "out", layer_map=layer_map, depth=6)
    prompts = [
        "The capital of France is",
        "Once upon a time, in a village by the sea,",
        "def fibonacci(n):\n",
    ]
    llm = LLM("smollm2", layer_map, [6], dtype="float32", max_model_len=256)
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    ours = [output.text for output in llm.generate(prompts, params)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    assert model.config.num_hidden_layers == 24
    for prompt, text in zip(prompts, ours, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=48, pad_token_id=2)
        assert tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]) == text


@pytest.mark.parametrize(
    "name",
    [
        *("gemma3", "glm4", "cohere2", "cwm", "gpt-neox", "gpt2", "gpt-neo"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "gemma2",
                "olmo3",
                "granite",
                "exaone4",
                "phi",
                "falcon",
                "gptj",
                "gpt-bigcode",
                "biogpt",
            )
        ),
    ],
)
def test_checkpoints_of_other_families(name, tiny_model, export):
    """Their blocks numbered anew, their lists cut, under their own names for them."""
    model, removed = tiny_model(name), (3, 1)
    folder, layer_map = export(model, removed), chain(model.path, removed)
    assert torch.equal(logits(reload(folder)), model.without(removed).logits(PROMPT))
    ours, pruned = engine(folder).score(PROMPT), engine(model.path, layer_map, 2).score(PROMPT, depth=2)
    torch.testing.assert_close(ours, pruned, atol=1e-5, rtol=0)
    zeroed = reload(export(model, removed, "zeroed"))
    torch.testing.assert_close(logits(zeroed), model.without(removed).logits(PROMPT), atol=1e-5, rtol=0)
