"""Checkpoints of patched depths: transformers, and where it can be had llama.cpp, compute what plain torch does."""

from __future__ import annotations

import ctypes
import json
import math
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sleb import LLM, LayerMap, SamplingParams, cli
from sleb.engine.model.scoring import DecoderScorer
from sleb.errors import ConfigError, LayerMapError
from sleb.formats.decilm_model import DeciLMForCausalLM
from sleb.formats.exporting import export_model
from sleb.formats.importing import import_map
from sleb.formats.merging import Merger, merge_patches
from sleb.formats.removal import Mending, Removal
from sleb.layer_map.layer_map import CalibrationRecord, Patch, Patches, Unit
from sleb.pruning.calibration import Calibration
from sleb.pruning.options import PruneOptions
from sleb.pruning.patching import RIDGE

PROMPT = torch.randint(3, 96, (29,), generator=torch.Generator().manual_seed(7)).tolist()


def patch(first, last, form="full", rank=3, *, normed=True, width=32, seed=0):
    """A random patch whose change is as large as a block's."""
    draw = np.random.default_rng([first[0], last[0], seed]).normal
    shapes = {
        "full": {"weight": (width, width)},
        "low-rank": {"down": (rank, width), "up": (width, rank)},
        "scale": {"scale": (width,)},
    }
    tensors = {name: draw(0, 0.3, shape) for name, shape in (shapes[form] | {"bias": (width,)}).items()}
    return Patch(first, last, 1, None, form, normed, tensors)


def chain(path, removed, *patches):
    units = tuple(unit if isinstance(unit, Unit) else Unit(unit) for unit in removed)
    num_blocks = json.loads((path / "config.json").read_text())["num_hidden_layers"]
    patches = (replace(each, first_depth=len(units)) for each in patches)
    return LayerMap(path.name, None, num_blocks, removed=units, patches=Patches.of(patches))


def patched(model, layer_map):
    """transformers' model without the sublayers, and with the patches as hooks: plain torch, float32.

    A run adds nothing, so that its patch may stand at the end of its last block, or before that one's attention.
    """
    config = model.model.config
    eps = getattr(config, "rms_norm_eps", 1e-5)
    changed = model.without_sublayers(layer_map.removed).model
    layers = next(
        m.layers for m in changed.modules() if isinstance(getattr(m, "layers", None), torch.nn.ModuleList)
    )

    def apply(each, hidden):
        tensors = {name: torch.from_numpy(np.float32(array)) for name, array in each.tensors.items()}
        if each.form == "scale":
            return tensors["scale"] * hidden + tensors["bias"]
        weight = tensors["weight"] if each.form == "full" else tensors["up"] @ tensors["down"]
        inputs = hidden
        if each.normed:
            rms = hasattr(config, "rms_norm_eps")
            inputs = (
                F.rms_norm(hidden, hidden.shape[-1:], None, eps)
                if rms
                else F.layer_norm(hidden, hidden.shape[-1:])
            )
        return hidden + inputs @ weight.T + tensors["bias"]

    for each in layer_map.patches.load():
        block, part = each.last
        if part == "mlp":
            layers[block].register_forward_hook(lambda module, _, output, each=each: apply(each, output))
        else:
            layers[block].register_forward_pre_hook(
                lambda module, inputs, each=each: (apply(each, inputs[0]), *inputs[1:])
            )
    return changed


def logits(model):
    with torch.inference_mode():
        return model(torch.tensor([PROMPT]), use_cache=False).logits[0]


def reload(folder, cls=None):
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, info = (cls or AutoModelForCausalLM).from_pretrained(folder, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def block_kinds(folder, width):
    """For each block: attention, linear or none; the width of its MLP."""
    kinds = []
    for each in json.loads((folder / "config.json").read_text())["block_configs"]:
        attention, ffn = each["attention"], each["ffn"]
        kind = "none" if attention["no_op"] else "linear" if attention["replace_with_linear"] else "attention"
        mult = ffn.get("ffn_mult")
        size = (
            0
            if ffn["no_op"]
            else ffn["intermediate_size"]
            if mult is None
            else -(-int(2 * mult * width / 3) // 256) * 256
        )
        kinds.append((kind, size))
    return kinds


BLOCK, ATTENTION, MLP = (
    ((2, "attention"), (2, "mlp")),
    ((2, "attention"), (2, "attention")),
    ((2, "mlp"), (2, "mlp")),
)
CASES = {
    "a run": ((2, 3), [patch((2, "attention"), (3, "mlp"))]),
    "two runs": (
        (1, 3),
        [patch((1, "attention"), (1, "mlp")), patch((3, "attention"), (3, "mlp"), "low-rank")],
    ),
    "one a block": ((2, 3), [patch(*BLOCK), patch((3, "attention"), (3, "mlp"), "low-rank", 5)]),
    "an MLP": ((Unit(2, "mlp"),), [patch(*MLP)]),
    "an attention": ((Unit(2, "attention"),), [patch(*ATTENTION, "low-rank")]),
    "between": (
        (Unit(2, "mlp"), Unit(3, "attention")),
        [patch((2, "mlp"), (3, "attention"))],
    ),
    "not all": ((1, 3), [patch((3, "attention"), (3, "mlp"))]),
    "the last": ((4,), [patch((4, "attention"), (4, "mlp"))]),
}


EVERY_MODEL = [("two runs", name) for name in ("llama-tied", "llama-biases", "mistral")]


@pytest.mark.parametrize(("case", "name"), [*((case, "llama-gqa") for case in CASES), *EVERY_MODEL])
def test_decilm_holds_patches_exactly(case, name, tiny_model, tmp_path):
    model = tiny_model(name)
    layer_map = chain(model.path, CASES[case][0], *CASES[case][1])
    export_model(str(model.path), "decilm", tmp_path / "out", layer_map=layer_map)
    expected = logits(patched(model, layer_map))
    torch.testing.assert_close(
        logits(reload(tmp_path / "out", DeciLMForCausalLM)), expected, atol=1e-4, rtol=0
    )
    assert (expected - logits(model.without_sublayers(layer_map.removed).model)).abs().max() > 0.1


def test_decilm_generates_with_its_cache_what_our_engine_does(tiny_model, tmp_path):
    model = tiny_model("llama-gqa")
    layer_map = chain(model.path, CASES["two runs"][0], *CASES["two runs"][1])
    export_model(str(model.path), "decilm", tmp_path / "out", layer_map=layer_map)
    loaded = reload(tmp_path / "out", DeciLMForCausalLM)
    tokens = loaded.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    llm = LLM(
        model.path,
        layer_map,
        [2],
        page_size=4,
        dtype="float32",
        device="cpu",
        kernels="torch",
        max_num_seqs=4,
    )
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    assert tokens[0, len(PROMPT) :].tolist() == llm.generate([PROMPT], params)[0].token_ids


@pytest.mark.parametrize(("case", "name"), [("two runs", name) for name in ("llama-gqa", "smollm3", "opt")])
def test_zeroed_holds_patches_exactly(case, name, tiny_model, tmp_path):
    """In the removed blocks' own MLPs, of 48 features here: those of 32 that a full patch has go into no such."""
    model = tiny_model(name)
    runs = [replace(each, form="low-rank", tensors=patch(each.first, each.last, "low-rank", 24).tensors)
            for each in CASES[case][1]]  # fmt: skip
    layer_map = chain(model.path, CASES[case][0], *runs)
    export_model(str(model.path), "zeroed", tmp_path / "out", layer_map=layer_map)
    torch.testing.assert_close(
        logits(reload(tmp_path / "out")), logits(patched(model, layer_map)), atol=1e-4, rtol=0
    )


def test_the_form_of_a_patch_is_the_one_that_takes_fewer_weights(tmp_path):
    """A model 1,024 wide: MLPs of 256 and 512 features for ranks up to 256, a linear attention for what is fuller."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 9, "vocab_size": 8}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "wide")

    def run(first, last, form, rank):
        return patch(first, last, form, rank, width=1024)

    removed = [Unit(1), Unit(3), Unit(5), Unit(6, "attention"), Unit(8, "mlp")]
    patches = [
        run((1, "attention"), (1, "mlp"), "low-rank", 128),
        run((3, "attention"), (3, "mlp"), "low-rank", 129),
        run((5, "attention"), (5, "mlp"), "full", 0),
        run((8, "mlp"), (8, "mlp"), "low-rank", 400),
    ]
    layer_map = chain(tmp_path / "wide", removed, *patches)
    export_model(str(tmp_path / "wide"), "decilm", tmp_path / "out", layer_map=layer_map)
    whole = ("attention", 512)
    kinds = [
        whole,
        ("none", 256),
        whole,
        ("none", 512),
        whole,
        ("linear", 256),
        ("none", 512),
        whole,
        ("attention", 0),
    ]
    assert block_kinds(tmp_path / "out", 1024) == [*kinds, ("linear", 256)]
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.float32}
    linear = tensors["model.layers.5.self_attn.linear_attn.weight"]
    stored = layer_map.patches.load()[2].tensors["weight"]
    assert np.array_equal(linear.numpy(), stored.astype(np.float32))  # bfloat16 would have rounded it
    assert tensors["model.layers.0.mlp.up_proj.bias"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "case", "notation", "message"),
    [
        ("llama", "a run", "hf", "depth 2 has 1 patch, which format hf cannot hold: use --format decilm"),
        ("llama", "two runs", "mergekit", "depth 2 has 2 patches, which format mergekit cannot hold: use"),
        ("llama", "a run", "zeroed", "patch 2.attention to 3.mlp, of rank 32, has no room in format zeroed"),
        ("llama", "an attention", "zeroed", "patch 2.attention to 2.attention, of rank 3, has no room"),
        ("qwen2", "two runs", "zeroed", "the MLPs of Qwen2ForCausalLM have no biases here"),
        (
            "llama",
            "a scale",
            "decilm",
            "patch 2.attention to 2.mlp is a scale of the residual stream as it is",
        ),
        (
            "llama",
            "not normed",
            "zeroed",
            "patch 2.attention to 2.mlp is a map of the residual stream as it is",
        ),
        ("llama", "the first", "decilm", "patch 0.attention to 0.mlp stands before the first attention"),
    ],
)
def test_patches_are_never_lost_in_silence(name, case, notation, message, tiny_model, tmp_path):
    others = {
        "a scale": ((2,), [patch(*BLOCK, "scale", normed=False)]),
        "not normed": ((2,), [patch(*BLOCK, "low-rank", normed=False)]),
        "the first": ((0,), [patch((0, "attention"), (0, "mlp"))]),
    }
    removed, patches = (CASES | others)[case]
    path = tiny_model(name).path
    with pytest.raises(ConfigError, match=message):
        export_model(str(path), notation, tmp_path / "out", layer_map=chain(path, removed, *patches))
    assert list(tmp_path.iterdir()) == []


def test_leaving_patches_out_is_said(tiny_model, tmp_path):
    model = tiny_model("llama-gqa")
    layer_map = chain(model.path, *CASES["two runs"][:1], *CASES["two runs"][1])
    export_model(str(model.path), "hf", tmp_path / "out", layer_map=layer_map, patches="drop")
    assert torch.equal(logits(reload(tmp_path / "out")), model.without((1, 3)).logits(PROMPT))
    record = json.loads((tmp_path / "out/sleb.json").read_text())["patches"]
    assert (record["written"], record["number"], record["sha256"]) == ("drop", 2, layer_map.patches.sha256)
    assert "The depth's 2 patches are left out" in (tmp_path / "out/README.md").read_text()
    text = export_model(str(model.path), "removal-list", layer_map=layer_map, patches="drop")[1]
    assert text == "[1, 3]\n"
    first = export_model(str(model.path), "removal-list", layer_map=layer_map, depth=1)[1]  # which has none
    assert first == "[1]\n"
    with pytest.raises(ConfigError, match="patches 'lose' is unknown: choose keep"):
        export_model(str(model.path), "hf", tmp_path / "x", layer_map=layer_map, patches="lose")


def test_the_model_card_says_what_stands_where_blocks_stood(tiny_model, tmp_path):
    model = tiny_model("llama-gqa")
    export_model(str(model.path), "decilm", tmp_path / "out", layer_map=chain(model.path, *CASES["two runs"][:1],
                                                                            *CASES["two runs"][1]))  # fmt: skip
    assert "2 linear maps of the residual stream" in (tmp_path / "out/README.md").read_text()
    record = json.loads((tmp_path / "out/sleb.json").read_text())["patches"]
    assert (record["written"], record["num_parameters"]) == ("keep", 32 * 32 + 32 + 2 * 3 * 32 + 32)
    with pytest.raises(
        LayerMapError, match=r"was exported with patches, .*: use the layer map that it was made from"
    ):
        import_map(tmp_path / "out")  # its blocks hold the patches: they are none of the model's


# --- merged into the blocks before


def test_merging_is_the_ridge_regression_on_the_neurons(tiny_model):
    """The first of two runs by numpy, from what transformers' hooks see; both together come closer than none."""
    model = tiny_model("llama-gqa")
    runs = [
        patch((2, "attention"), (2, "mlp"), seed=1),
        patch((4, "attention"), (4, "mlp"), "low-rank", seed=1),
    ]
    layer_map = chain(model.path, (2, 4), *runs)
    windows = torch.randint(3, 96, (24, 48), generator=torch.Generator().manual_seed(3))
    scorer = DecoderScorer.load(str(model.path), device="cpu")
    merger = Merger(scorer, windows, bias=True)
    for block, patches in ((0, ()), (1, runs[:1]), (3, runs[1:])):
        merger.run(block, patches)

    seen = {}
    plain = model.without_sublayers(layer_map.removed).model
    layers = plain.model.layers
    layers[1].mlp.down_proj.register_forward_hook(lambda module, inputs, _: seen.update(z=inputs[0]))
    layers[1].register_forward_hook(lambda module, _, output: seen.update(h=output))
    mended = patched(model, layer_map)
    mended.model.layers[3].register_forward_pre_hook(lambda module, inputs: seen.update(y=inputs[0]))
    with torch.inference_mode():
        plain(windows, use_cache=False)
        mended(windows, use_cache=False)
    z, h, y = (seen[name][:, 1:].flatten(0, 1).double().numpy() for name in "zhy")
    centred, wanted = z - z.mean(0), y - h
    gram = centred.T @ centred
    change = np.linalg.solve(gram + RIDGE * np.diag(np.diag(gram)), centred.T @ (wanted - wanted.mean(0))).T
    down = model.model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    np.testing.assert_allclose(merger.merged[1]["weight"], down + change, atol=1e-3)
    np.testing.assert_allclose(merger.merged[1]["bias"], wanted.mean(0) - change @ z.mean(0), atol=1e-3)
    assert sorted(merger.merged) == [1, 3]
    with_patches, merged = merger.losses()
    expected = F.cross_entropy(mended(windows).logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert with_patches == pytest.approx(float(expected.detach()), abs=1e-4)
    assert math.isfinite(merged)


@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_checkpoint_is_the_smaller_model_with_other_projections(bias, tiny_model, tmp_path):
    """Of a family whose MLPs may have biases, and of one whose may not; what is lost is measured and said."""
    model = tiny_model("llama-gqa" if bias else "qwen2")
    layer_map = chain(model.path, CASES["two runs"][0], *CASES["two runs"][1])
    merged = {}

    def merge(removal):
        draw = np.random.default_rng(5).normal
        for block in (0, 2):
            merged[block] = {"mlp.down_proj.weight": np.float32(draw(0, 0.3, (32, 48)))}
            merged[block] |= {"mlp.down_proj.bias": np.float32(draw(0, 0.3, 32))} if bias else {}
        return replace(removal.mending, merged=merged, losses=(2.0, 2.1))

    export_model(str(model.path), "hf", tmp_path / "out", layer_map=layer_map, patches="merge", merge=merge)
    expected = model.without((1, 3)).model
    for index, block in enumerate((0, 2)):
        down = expected.model.layers[index].mlp.down_proj
        down.weight.data = torch.from_numpy(merged[block]["mlp.down_proj.weight"])
        if bias:
            down.bias = torch.nn.Parameter(torch.from_numpy(merged[block]["mlp.down_proj.bias"]))
    torch.testing.assert_close(logits(reload(tmp_path / "out")), logits(expected), atol=1e-5, rtol=0)
    card = (tmp_path / "out/README.md").read_text()
    assert "an approximation: perplexity 8.166 instead of 7.389 on the text that it was fitted on" in card


@pytest.mark.parametrize("name", ["granite", "gpt2"])
def test_merging_where_updates_are_scaled_or_matrices_transposed(name, tiny_model, tmp_path, monkeypatch):
    """transformers computes, from the checkpoint, the loss that was measured as it was fitted."""
    model = tiny_model(name)
    windows = torch.randint(3, 96, (24, 48), generator=torch.Generator().manual_seed(3))
    texts = Calibration(windows, CalibrationRecord()), []
    monkeypatch.setattr("sleb.formats.merging.gather_tokens", lambda *args, **options: texts)
    layer_map = LayerMap(
        name, None, 5, removed=(Unit(2),), patches=Patches.of([patch((2, "attention"), (2, "mlp"))])
    )
    told = []

    def merge(removal):
        told.append(merge_patches(str(model.path), removal, PruneOptions()))
        return told[0]

    export_model(str(model.path), "hf", tmp_path / "out", layer_map=layer_map, patches="merge", merge=merge)
    with torch.inference_mode():
        found = reload(tmp_path / "out")(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    assert float(F.cross_entropy(found, windows[:, 1:].flatten())) == pytest.approx(
        told[0].losses[1], abs=1e-4
    )


@pytest.mark.parametrize("name", ["gemma2", "cohere"])
def test_what_no_output_projection_adds_is_not_merged(name, tiny_model):
    """Behind the one's MLP stands a norm; the other's reads what came into the block."""
    layer_map = LayerMap(
        name, None, 5, removed=(Unit(2),), patches=Patches.of([patch((2, "attention"), (2, "mlp"))])
    )
    removal = Removal(layer_map, 1, Mending("merge", layer_map.patches.at(1)))
    with pytest.raises(ConfigError, match=r"what attention and MLP add is normed|read the same residual"):
        merge_patches(str(tiny_model(name).path), removal, PruneOptions())


def test_merging_through_the_command(tiny_model_dir, tmp_path, capsys, monkeypatch):
    removed, runs = CASES["two runs"]
    width = json.loads((tiny_model_dir / "config.json").read_text())["hidden_size"]
    patches = [patch(each.first, each.last, each.form, width=width) for each in runs]
    chain(tiny_model_dir, removed, *patches).save(tmp_path / "map.json")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sleb", "export", str(tiny_model_dir), *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), capsys.readouterr().err

    chosen = ("--layer-map", str(tmp_path / "map.json"), "-o", str(tmp_path / "out"))
    assert "format hf cannot hold: use --format decilm" in run(*chosen)[1]
    assert "name one with --calibration" in run(*chosen, "--patches", "merge")[1]
    text = ("--calibration", str(tmp_path / "text.txt"), "--seqlen", "32", "--windows", "8")
    assert (
        "can only be merged in format hf"
        in run(*chosen, "--patches", "merge", "--format", "decilm", *text)[1]
    )
    code, told = run(*chosen, "--patches", "merge", *text)
    assert code == 0 and "merged into the output projections before them, which is an approximation" in told
    record = json.loads((tmp_path / "out/sleb.json").read_text())["patches"]
    assert record["merged_on"]["windows"] == 8 and set(record["token_losses"]) == {"patched", "merged"}
    first = chain(tiny_model_dir, (0,), patch((0, "attention"), (0, "mlp"), width=width))
    first.save(tmp_path / "map.json")
    assert (
        "has no block before it to be merged into" in run(*chosen, "--force", "--patches", "merge", *text)[1]
    )


# --- in llama.cpp, where the package llama-cpp-python is


def as_gguf(folder, path):
    """A folder as llama.cpp's conversion/deci.py writes it, without a vocabulary: it knows Llama 3's alone."""
    config = json.loads((folder / "config.json").read_text())
    blocks, heads = config["block_configs"], config["num_attention_heads"]
    groups = [block["attention"]["n_heads_in_group"] for block in blocks]
    linear = [block["attention"]["replace_with_linear"] for block in blocks]
    kv = [heads // group if group else 0 for group in groups]
    widths = [int(2 * (block["ffn"]["ffn_mult"] or 0) * config["hidden_size"] / 3) for block in blocks]
    writer = gguf.GGUFWriter(path, "deci")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(len(blocks))
    writer.add_head_count([heads if kv[i] or linear[i] else 0 for i in range(len(blocks))])
    writer.add_head_count_kv(kv)
    writer.add_feed_forward_length([-(-width // 256) * 256 for width in widths])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(10000.0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, len(blocks))
    for name, tensor in load_file(folder / "model.safetensors").items():
        for part in ("q_proj", "k_proj"):
            if part in name:  # the order of llama.cpp's rotation
                count = heads if part == "q_proj" else kv[int(name.split(".")[2])]
                tensor = tensor.reshape(count, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_logits(path, tokens, vocab_size):
    llama = pytest.importorskip("llama_cpp")
    llama.llama_backend_init()
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = 64
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama.GGML_TYPE_F32
    params.flash_attn_type = 0
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    context = llama.llama_init_from_model(model, params)
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens):
        batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
    assert llama.llama_decode(context, batch) == 0
    found = np.ctypeslib.as_array(
        ctypes.cast(llama.llama_get_logits(context), ctypes.POINTER(ctypes.c_float)),
        (len(tokens), vocab_size),
    ).copy()
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return torch.from_numpy(found)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["a run", "two runs", "an attention", "the last"])
def test_llama_cpp_computes_the_same(case, tiny_model, tmp_path):
    """Its `deci` graph, in float32; widths of 256, which its converter can say."""
    from transformers import LlamaConfig, LlamaForCausalLM

    plain = tiny_model("llama")
    options = plain.model.config.to_dict() | {"intermediate_size": 256}
    wide = LlamaForCausalLM(LlamaConfig(**options)).eval()
    with torch.no_grad():
        for parameter in wide.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    wide.save_pretrained(tmp_path / "wide")
    model = replace(plain, path=tmp_path / "wide", model=wide)
    layer_map = chain(model.path, CASES[case][0], *CASES[case][1])
    export_model(str(model.path), "decilm", tmp_path / "out", layer_map=layer_map)
    as_gguf(tmp_path / "out", tmp_path / "out.gguf")
    found = llama_cpp_logits(tmp_path / "out.gguf", PROMPT, 96)
    torch.testing.assert_close(found, logits(patched(model, layer_map)), atol=2e-3, rtol=0)
