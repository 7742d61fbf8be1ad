"""Checkpoints: what is read, what is refused and in which words, and how much memory it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sleb.engine.model.allocation import all_sublayers, allocate
from sleb.engine.model.architecture import resolve_spec
from sleb.engine.model.loader import load_weights
from sleb.errors import ModelError
from sleb.layer_map.layer_map import Unit
from sleb.models import weight_files

CPU = torch.device("cpu")
FILE = "model.safetensors"


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny Llama's folder, to be damaged."""
    return Path(shutil.copytree(tiny_model("llama-gqa").path, tmp_path / "model"))


@pytest.fixture
def rewrite(folder):
    """rewrite(change): the folder's tensors, changed by a function, written back."""

    def apply(change):
        tensors = load_file(folder / FILE)
        change(tensors)
        save_file(tensors, folder / FILE)

    return apply


def load(path, keep=None, dtype=torch.float32, **options):
    spec = resolve_spec(path)
    return load_weights(path, spec, all_sublayers(spec) if keep is None else keep, dtype, CPU, **options)


def tensors_of(weights):
    from sleb.engine.model.weights import _walk

    return list(_walk(weights))


def refused(path, match, **options):
    with pytest.raises(ModelError, match=match):
        load(path, **options)


class TestRefusals:
    def test_a_missing_tensor(self, folder, rewrite):
        rewrite(lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
        refused(folder, r"lacks model\.layers\.2\.mlp\.up_proj\.weight")

    def test_a_number_that_float16_does_not_hold(self, folder, rewrite):
        """It would become infinite, and the logits no numbers; the largest that is held is 65504."""
        name = "model.layers.2.mlp.up_proj.weight"
        for number, is_held in ((65504.0, True), (-65504.0, True), (65536.0, False), (-7e4, False)):
            rewrite(lambda tensors, number=number: tensors[name][3, 4].fill_(number))
            load(folder, dtype=torch.bfloat16)
            if is_held:
                load(folder, dtype=torch.float16)
            else:
                refused(
                    folder, rf"'{name}' holds {abs(number):g}, .*65504.*--dtype float32", dtype=torch.float16
                )

    def test_many_missing_tensors_are_counted(self, folder, rewrite):
        rewrite(lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.4." in name])
        refused(folder, "and 6 more")

    def test_a_missing_tensor_of_a_removed_block_is_missing_all_the_same(self, folder, rewrite):
        rewrite(lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
        spec = resolve_spec(folder)
        refused(folder, "lacks", keep={each for each in all_sublayers(spec) if each[0] != 2})

    def test_an_extra_tensor(self, folder, rewrite):
        rewrite(lambda tensors: tensors.update({"model.layers.2.self_attn.q_proj.bias": torch.zeros(64)}))
        refused(folder, r"holds model\.layers\.2\.self_attn\.q_proj\.bias")

    def test_buffers_of_old_checkpoints_are_no_extra_tensors(self, folder, rewrite):
        rewrite(
            lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
        )
        load(folder)

    def test_more_blocks_than_the_config_says(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
        refused(folder, r"holds model\.layers\.4")

    @pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"])
    def test_a_misshaped_tensor(self, name, folder, rewrite):
        shape = tuple(load_file(folder / FILE)[name].shape)
        rewrite(lambda tensors: tensors.update({name: torch.zeros(shape[0] + 1, shape[1])}))
        refused(folder, rf"{name} has shape \({shape[0] + 1}, {shape[1]}\).*\({shape[0]}, {shape[1]}\)")

    def test_a_transposed_square_is_not_noticed_but_a_transposed_oblong_is(self, folder, rewrite):
        name = "model.layers.0.mlp.down_proj.weight"
        rewrite(lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
        refused(folder, "down_proj")

    def test_a_head_of_its_own_is_needed_when_not_tied(self, folder, rewrite):
        rewrite(lambda tensors: tensors.pop("lm_head.weight"))
        refused(folder, r"lacks lm_head\.weight")

    @pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
    def test_pickles_are_never_opened(self, suffix, folder):
        (folder / FILE).unlink()
        (folder / f"pytorch_model.{suffix}").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        refused(folder, rf"pickled weights \(pytorch_model\.{suffix}\).*safetensors")

    def test_no_weights_at_all(self, folder):
        (folder / FILE).unlink()
        refused(folder, r"no \.safetensors file")

    @pytest.mark.parametrize("length", [0, 4, 100, -1], ids=["empty", "length-only", "header", "last-byte"])
    def test_a_truncated_file(self, length, folder):
        content = (folder / FILE).read_bytes()
        (folder / FILE).write_bytes(content[:length])
        refused(folder, r"model\.safetensors is not a readable safetensors file.*again")

    def test_a_file_that_is_something_else(self, folder):
        (folder / FILE).write_bytes(b"<html>404</html>" * 100)
        refused(folder, "not a readable safetensors file")

    def test_an_unsupported_architecture(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))
        refused(folder, r"MambaForCausalLM.*docs/models\.md.*sleb prune --runtime transformers")

    @pytest.mark.parametrize(
        "text", ["{", "[]", "", '{"architectures": ["LlamaForCausalLM"], "model_type": "qwen2"}']
    )
    def test_a_bad_config(self, text, folder):
        (folder / "config.json").write_text(text)
        refused(folder, r"config\.json")

    def test_an_activation_or_rope_rule_that_is_not_there(self, tiny_model, make_llm, tmp_path):
        model = tiny_model("llama")
        config = json.loads((model.path / "config.json").read_text())
        for change, match in (
            ({"hidden_act": "mish"}, "mish.*silu"),
            (
                {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}},
                "dynamic.*llama3",
            ),
        ):
            folder = Path(shutil.copytree(model.path, tmp_path / match[:4]))
            (folder / "config.json").write_text(json.dumps(config | change))
            with pytest.raises(ModelError, match=match):
                make_llm(type(model)(model.name, folder, model.model))


class TestShards:
    def split(self, folder, num_shards=3):
        """The folder's one file as several, with an index, as the hub has them."""
        tensors = load_file(folder / FILE)
        (folder / FILE).unlink()
        weight_map = {}
        for shard in range(num_shards):
            name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
            part = {key: tensors[key] for key in list(tensors)[shard::num_shards]}
            save_file(part, folder / name)
            weight_map |= dict.fromkeys(part, name)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return index

    def test_a_sharded_checkpoint_equals_the_single_file(self, folder):
        whole = tensors_of(load(folder))
        self.split(folder)
        sharded = tensors_of(load(folder))
        assert len(whole) == len(sharded)
        assert all(torch.equal(one, other) for one, other in zip(whole, sharded, strict=True))

    def test_a_missing_shard(self, folder):
        self.split(folder)
        (folder / "model-00002-of-00003.safetensors").unlink()
        refused(folder, r"model-00002-of-00003\.safetensors.*missing")

    def test_a_truncated_shard(self, folder):
        self.split(folder)
        shard = folder / "model-00002-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[:-8])
        refused(folder, r"model-00002-of-00003\.safetensors is not a readable")

    def test_an_index_that_names_the_wrong_shard(self, folder):
        index = self.split(folder)
        content = json.loads(index.read_text())
        content["weight_map"]["model.norm.weight"] = next(
            name
            for name in content["weight_map"].values()
            if name != content["weight_map"]["model.norm.weight"]
        )
        index.write_text(json.dumps(content))
        refused(folder, "safetensors")

    @pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": []}'])
    def test_a_bad_index(self, text, folder):
        self.split(folder).write_text(text)
        refused(folder, "index")

    def test_an_index_that_points_out_of_the_folder(self, folder):
        index = self.split(folder)
        content = json.loads(index.read_text())
        content["weight_map"]["model.norm.weight"] = "../secret.safetensors"
        index.write_text(json.dumps(content))
        shutil.copy(folder / "model-00001-of-00003.safetensors", folder.parent / "secret.safetensors")
        refused(folder, "outside the folder")


class TestWhatIsRead:
    def test_tensors_of_removed_sublayers_are_never_read(self, folder, make_llm, tiny_model, monkeypatch):
        read = []

        class Spy:
            """safe_open, with a list of the tensors whose data was asked for."""

            def __init__(self, *args, **kwargs):
                self.file = safe_open(*args, **kwargs)

            def __enter__(self):
                self.handle = self.file.__enter__()
                return self

            def __exit__(self, *error):
                return self.file.__exit__(*error)

            def get_tensor(self, name):
                read.append(name)
                return self.handle.get_tensor(name)

            def __getattr__(self, name):
                return getattr(self.handle, name)

        monkeypatch.setattr(weight_files, "safe_open", Spy)
        model = tiny_model("llama-gqa")
        copied = type(model)(model.name, folder, model.model)
        make_llm(copied, (Unit(1), Unit(3, "attention"), Unit(4, "mlp"), Unit(0)), tiers=(3,))
        everything = set(load_file(folder / FILE))
        gone = {name for name in everything if ".layers.1." in name}
        gone |= {
            name for name in everything if ".layers.3." in name and ("self_attn" in name or "input_" in name)
        }
        gone |= {name for name in everything if ".layers.4." in name and ("mlp" in name or "post_" in name)}
        assert len(gone) == 9 + 5 + 4
        assert sorted(read) == sorted(everything - gone)

    def test_nan_in_a_removed_block_does_no_harm(self, folder, rewrite, tiny_model, make_llm):
        def poison(tensors):
            for name in tensors:
                if ".layers.2." in name:
                    tensors[name].fill_(float("nan"))

        rewrite(poison)
        model = tiny_model("llama-gqa")
        scores = make_llm(type(model)(model.name, folder, model.model), (2,)).score(list(range(20)))
        assert torch.allclose(scores, make_llm(model, (2,)).score(list(range(20))), atol=1e-6)

    def test_every_element_is_filled_exactly_once(self, architecture, tiny_model):
        """The targets tile the allocated matrices: a counter in each element ends at one."""
        spec = resolve_spec(tiny_model(architecture).path)
        weights, targets = allocate(spec, all_sublayers(spec), torch.float32, CPU)
        distinct = {id(tensor): tensor for tensor in tensors_of(weights)}.values()
        for tensor in distinct:
            tensor.zero_()
        for target in targets.values():
            target.weight.add_(1)
        assert all(bool((tensor == 1).all()) for tensor in distinct)

    def test_names_are_the_checkpoints_own(self, architecture, tiny_model):
        model = tiny_model(architecture)
        spec = resolve_spec(model.path)
        _, targets = allocate(spec, all_sublayers(spec), torch.float32, torch.device("meta"))
        with safe_open(model.path / FILE, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert {name: target.stored_shape for name, target in targets.items()} == shapes

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
    def test_dtypes_are_converted(self, stored, dtype, folder, rewrite):
        original = load_file(folder / FILE)
        rewrite(lambda tensors: tensors.update({name: each.to(stored) for name, each in tensors.items()}))
        weights = load(folder, dtype=dtype)
        assert all(tensor.dtype == dtype for tensor in tensors_of(weights))
        expected = original["model.layers.0.self_attn.o_proj.weight"].to(stored).to(dtype)
        assert torch.equal(weights.attention[0].out.weight, expected)

    def test_tied_embeddings_may_come_with_a_copy_of_the_head(self, tiny_model, tmp_path):
        folder = Path(shutil.copytree(tiny_model("llama-tied").path, tmp_path / "tied"))
        tensors = load_file(folder / FILE)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / FILE)
        weights = load(folder)
        assert weights.head.weight is weights.embed

    def test_auto_dtype_is_the_checkpoints(self, folder, rewrite):
        from sleb import LLM

        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
        assert LLM(folder).engine.runner.dtype == torch.bfloat16
        assert LLM(folder, dtype="float32").engine.runner.dtype == torch.float32
        assert LLM(folder, dtype="float16", weights="float32").engine.runner.dtype == torch.float32


class TestDummy:
    def test_only_a_config_is_needed(self, folder, make_llm, tiny_model):
        (folder / FILE).unlink()
        model = tiny_model("llama-gqa")
        copied = type(model)(model.name, folder, model.model)
        scores = [make_llm(copied, load_format="dummy", seed=seed).score([1, 2, 3]) for seed in (1, 1, 2)]
        assert torch.isfinite(scores[0]).all()
        assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])

    def test_weights_are_random_and_finite(self, architecture, tiny_model):
        for tensor in tensors_of(load(tiny_model(architecture).path, load_format="dummy")):
            assert tensor.isfinite().all() and tensor.abs().max() < 2


_MEASURE = """
    import resource, sys
    import torch
    from sleb.engine.model.architecture import resolve_spec
    from sleb.engine.model.loader import load_weights
    from sleb.engine.model.allocation import all_sublayers
    from sleb.engine.model.weights import num_bytes
    from pathlib import Path

    def peak():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    path = Path(sys.argv[1])
    spec = resolve_spec(path)
    torch.ones(8, 8) @ torch.ones(8, 8)
    keep = {each for each in all_sublayers(spec) if each[0] % 2 == 0}
    before = peak()
    weights = load_weights(path, spec, keep, getattr(torch, sys.argv[2]), torch.device("cpu"))
    print(num_bytes(weights), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_peaks_near_what_is_kept(dtype, tmp_path):
    """A float32 checkpoint of 170 MB with every other block removed, in a process of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12, vocab_size=512
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    size = (tmp_path / FILE).stat().st_size
    assert size > 150e6
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MEASURE), str(tmp_path), dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    kept, grown = map(int, done.stdout.split())
    assert kept < size * (0.55 if dtype == "float32" else 0.28)
    assert grown < kept * 1.35 + 24e6
