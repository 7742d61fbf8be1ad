"""Models with quantised weights: what is quantised, what it computes, and what the cache does.

`kernels="torch"` throughout: the reference, whose activations are not quantised.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sleb import files
from sleb.engine.config import EngineConfig
from sleb.engine.model import loader, weight_cache
from sleb.engine.model.allocation import all_sublayers
from sleb.engine.model.architecture import resolve_spec
from sleb.engine.model.loader import load_weights
from sleb.engine.model.resolve import resolve_dtype
from sleb.engine.model.weights import num_bytes
from sleb.errors import ConfigError, ModelError
from sleb.kernels.quantization import WEIGHT_FORMATS, Int4Weight, Int8Weight, quantize_int4, quantize_int8
from sleb.layer_map.layer_map import Unit

CPU = torch.device("cpu")
FILE = "model.safetensors"
QUANTIZERS = {"int8": quantize_int8, "int4": quantize_int4}
TOKENS = [5, 17, 3, 88, 41, 9, 60, 2, 33, 71, 12, 50]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(weight_cache, "cache_dir", lambda: folder)
    return folder


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny Llama's folder, to be changed."""
    return Path(shutil.copytree(tiny_model("llama-gqa").path, tmp_path / "model"))


@pytest.fixture
def made(monkeypatch):
    """Names of the tensors that were quantised, as opposed to taken from the cache."""
    names = []
    original = loader._read_quantized

    def spy(stored, target):
        names.append(stored.name)
        original(stored, target)

    monkeypatch.setattr(loader, "_read_quantized", spy)
    return names


def load(path, name="int8", dtype=torch.float32, keep=None, **options):
    spec = resolve_spec(path)
    keep = all_sublayers(spec) if keep is None else keep
    return load_weights(path, spec, keep, dtype, CPU, weight_format=WEIGHT_FORMATS[name], **options)


def widened(weights):
    """All quantised matrices of the decoder, as float32."""
    linears = [weights.head]
    for part in (*weights.attention.values(), *weights.mlp.values()):
        linears += [getattr(part, name) for name in ("qkv", "out", "up", "down") if hasattr(part, name)]
    return [linear.weight.dequantize(torch.float32) for linear in linears]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(widened(one), widened(other), strict=True))


def stored(cache_folder):
    return sorted(cache_folder.glob("quantized/*/*/*.safetensors"))


def with_dequantized(tiny, name):
    """transformers' model with every matrix that is to be quantised replaced by what the format stands for.

    Which ones those are is told here by the modules' kinds: linear layers inside blocks, and the head; of experts the
    matrices, which lie stacked, in gpt-oss transposed, but neither routers nor the gate of a shared one.
    """
    model = copy.deepcopy(tiny.model)
    head = model.get_output_embeddings()
    with torch.no_grad():
        for path, module in model.named_modules():
            if module is head:
                module.weight.copy_(quantize_int8(module.weight).dequantize(torch.float32))
            elif isinstance(module, torch.nn.Linear) and ".layers." in path and not path.endswith("_gate"):
                module.weight.copy_(QUANTIZERS[name](module.weight).dequantize(torch.float32))
        for each in (each for each in model.parameters() if each.dim() == 3):
            stacked = each.transpose(1, 2) if "GptOss" in type(model).__name__ else each
            for matrix in stacked:
                matrix.copy_(QUANTIZERS[name](matrix.contiguous()).dequantize(torch.float32))
    return type(tiny)(f"{tiny.name} {name}", tiny.path, model)


class TestWhatIsComputed:
    @pytest.mark.parametrize("name", QUANTIZERS)
    def test_logits_are_those_of_the_dequantised_model(self, name, architecture, tiny_model, make_llm):
        model = tiny_model(architecture)
        # 24: a context that keeps phi3-longrope at its short factors, as transformers does for these tokens
        scores = make_llm(model, weights=name, kernels="torch", max_model_len=24).score(TOKENS)
        expected = with_dequantized(model, name).logprobs(TOKENS)
        following = torch.tensor(TOKENS[1:])
        torch.testing.assert_close(
            scores, expected[:-1].gather(1, following[:, None]).squeeze(1), atol=2e-4, rtol=0
        )
        untouched = model.logprobs(TOKENS)[:-1].gather(1, following[:, None]).squeeze(1)
        assert (scores - untouched).abs().max() > 1e-3  # the test would see weights that were not quantised

    @pytest.mark.parametrize("name", QUANTIZERS)
    @pytest.mark.parametrize("mixture", ["qwen2-moe", "gpt-oss"])
    def test_experts_are_quantised_row_by_row(self, mixture, name, tiny_model, make_llm):
        self.test_logits_are_those_of_the_dequantised_model(name, mixture, tiny_model, make_llm)

    @pytest.mark.parametrize("name", QUANTIZERS)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_stays_near(self, name, dtype, tiny_model, make_llm):
        model = tiny_model("llama-tied")
        exact = make_llm(model, weights=name, kernels="torch").score(TOKENS)
        half = make_llm(model, weights=name, dtype=dtype, kernels="torch").score(TOKENS)
        assert (half - exact).abs().mean() < 0.25

    def test_several_depths_of_one_model(self, tiny_model, make_llm):
        model, removed = tiny_model("qwen3"), (Unit(1), Unit(3, "attention"))
        both = make_llm(model, removed, (0, 2), weights="int4", kernels="torch")
        alone = make_llm(model, removed, (2,), weights="int4", kernels="torch")
        torch.testing.assert_close(both.score(TOKENS, 2), alone.score(TOKENS), atol=1e-4, rtol=0)
        assert both.engine.weight_bytes(2) == alone.engine.weight_bytes(2)

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", QUANTIZERS)
    def test_on_a_gpu(self, name, tiny_model, make_llm):
        model = tiny_model("llama-tied")
        here = make_llm(model, weights=name, kernels="torch").score(TOKENS)
        there = make_llm(model, weights=name, kernels="torch", device="cuda").score(TOKENS)
        torch.testing.assert_close(there, here, atol=5e-2, rtol=0)


class TestWhatIsQuantised:
    @pytest.mark.parametrize("name", QUANTIZERS)
    def test_matrices_of_blocks_and_the_head(self, name, architecture, tiny_model):
        weights = load(tiny_model(architecture).path, name, torch.bfloat16)
        kind = Int8Weight if name == "int8" else Int4Weight
        for attention in weights.attention.values():
            assert isinstance(attention.qkv.weight, kind) and isinstance(attention.out.weight, kind)
        for mlp in weights.mlp.values():
            assert isinstance(mlp.up.weight, kind) and isinstance(mlp.down.weight, kind)
        assert isinstance(weights.head.weight, Int8Weight)
        if resolve_spec(tiny_model(architecture).path).tied_embeddings:
            assert weights.embed is weights.head.weight
        else:
            assert weights.embed.dtype == torch.bfloat16
        for linear in (weights.project_in, weights.project_out):
            assert linear is None or linear.weight.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("name", "tied"), [("int8", True), ("int8", False), ("int4", True), ("int4", False)]
    )
    def test_bytes_by_hand(self, name, tied, tiny_model, make_llm):
        """Llama: 5 blocks, hidden 32, MLP 48, 4 heads; 96 tokens; float32 for the rest."""
        model = tiny_model("llama-tied" if tied else "llama")
        num_kv = 1 if tied else 4
        shapes = [((4 + 2 * num_kv) * 8, 32), (32, 32), (2 * 48, 32), (32, 48)]
        if name == "int8":
            block = sum(rows * columns + 4 * rows for rows, columns in shapes)
        else:
            block = sum(rows * -(-columns // 32) * (16 + 4) for rows, columns in shapes)
        block += 2 * 32 * 4
        outside = 96 * 32 + 96 * 4 + 32 * 4 + (0 if tied else 96 * 32 * 4)
        assert num_bytes(load(model.path, name)) == 5 * block + outside
        llm = make_llm(model, (1, 3), (0, 1, 2), weights=name, kernels="torch")
        assert [llm.engine.weight_bytes(depth) for depth in (0, 1, 2)] == [
            kept * block + outside for kept in (5, 4, 3)
        ]

    def test_a_decode_step_reads_what_the_benchmark_says(self, tiny_model, make_llm):
        """All weights and two rows of the embedding: of eight bits where it is tied, else of the dtype."""
        from sleb.benchmarks.ideal import DepthCost, step_weight_bytes

        tied = make_llm(tiny_model("llama-tied"), weights="int4", kernels="torch").engine
        assert step_weight_bytes(DepthCost.of(tied, 0), 2) == tied.weight_bytes(0) + 2 * (32 + 4)
        untied = make_llm(tiny_model("llama"), weights="int4", kernels="torch").engine
        assert step_weight_bytes(DepthCost.of(untied, 0), 2) == untied.weight_bytes(0) - 94 * 32 * 4

    def test_removed_sublayers_are_not_read(self, folder, made):
        spec = resolve_spec(folder)
        load(folder, keep=all_sublayers(spec) - {(2, "attention"), (2, "mlp"), (4, "mlp")})
        assert not any(".layers.2." in name or ".layers.4.mlp" in name for name in made)
        assert len(made) == 5 * 7 - 7 - 3 + 1

    def test_random_weights_need_no_checkpoint_and_no_cache(self, folder, make_llm, tiny_model, cache_folder):
        (folder / FILE).unlink()
        model = tiny_model("llama-gqa")
        copied = type(model)(model.name, folder, model.model)
        options = {"load_format": "dummy", "kernels": "torch"}
        scores = [make_llm(copied, weights="int4", seed=seed, **options).score(TOKENS) for seed in (1, 1, 2)]
        assert scores[0].isfinite().all()
        assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
        assert not cache_folder.exists()


class TestCache:
    @pytest.mark.parametrize("name", QUANTIZERS)
    def test_the_second_load_quantises_nothing(self, name, folder, made):
        first = load(folder, name)
        assert len(made) == 36
        made.clear()
        assert same(load(folder, name), first)
        assert made == []

    def test_it_lies_in_the_cache_folder_of_models(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(weight_cache, "cache_dir", files.cache_dir)
        monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "named"))
        load(folder)
        assert len(stored(tmp_path / "named")) == 36

    def test_a_dtype_of_activations_does_not_matter_to_it(self, folder, made):
        first = load(folder, "int4", torch.float32)
        made.clear()
        assert same(load(folder, "int4", torch.bfloat16), first) and made == []

    def test_other_kept_sublayers_take_what_is_there(self, folder, made):
        keep = {each for each in all_sublayers(resolve_spec(folder)) if each[0] != 3}
        load(folder, "int4", keep=keep)
        made.clear()
        load(folder, "int4")
        assert len(made) == 7 and all(".layers.3." in name for name in made)

    def test_formats_share_the_head(self, folder, made):
        load(folder, "int8")
        made.clear()
        load(folder, "int4")
        assert "lm_head.weight" not in made and len(made) == 35

    @pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "flipped", "other tensor", "pickle"])
    def test_a_damaged_file_is_made_anew(self, damage, folder, made, cache_folder):
        first = load(folder, "int4")
        files = stored(cache_folder)
        victim = next(file for file in files if "layers.2.mlp.down" in file.name)
        content = bytearray(victim.read_bytes())
        if damage == "flipped":
            content[-40] ^= 4
        replaced = {
            "empty": b"",
            "cut": content[:-7],
            "garbage": b"\xff" * len(content),
            "flipped": content,
            "other tensor": files[0].read_bytes(),
            "pickle": b"cos\nsystem\n(S'false'\ntR.",
        }[damage]
        victim.write_bytes(bytes(replaced))
        made.clear()
        assert same(load(folder, "int4"), first)
        assert made == ["model.layers.2.mlp.down_proj.weight"]
        made.clear()
        assert same(load(folder, "int4"), first) and made == []

    def test_a_changed_checkpoint_is_quantised_again(self, folder, made, cache_folder):
        first = load(folder, "int4")
        tensors = load_file(folder / FILE)
        save_file({name: each * -1.5 for name, each in tensors.items()}, folder / FILE)
        os.utime(folder / FILE, ns=(1, time.time_ns() + 1_000_000_000))
        made.clear()
        second = load(folder, "int4")
        assert len(made) == 36 and not same(first, second)
        assert len(stored(cache_folder)) == 36  # in place of the old ones

    @pytest.mark.parametrize("how", ["written over", "renamed over"])
    def test_other_weights_of_the_same_size_and_times_are_quantised_again(self, how, folder, made):
        file, tensors = folder / FILE, load_file(folder / FILE)
        save_file(tensors, file)
        first, facts = load(folder), file.stat()
        tensors["model.layers.3.mlp.up_proj.weight"][7, 5:9] += 1.0
        place = file if how == "written over" else folder / "other"
        save_file(tensors, place)
        os.utime(place, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        place.replace(file)
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)
        made.clear()
        second = load(folder)
        assert len(made) == 36 and not same(first, second)
        expected = quantize_int8(tensors["model.layers.3.mlp.up_proj.weight"]).dequantize(torch.float32)
        assert torch.equal(second.mlp[3].up.weight.dequantize(torch.float32)[48:], expected)

    def test_another_folder_is_another_checkpoint(self, folder, made, tmp_path):
        other = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "model"))
        tensors = load_file(other / FILE)
        save_file({name: each * 2 for name, each in tensors.items()}, other / FILE)
        load(folder)
        made.clear()
        load(other)
        assert len(made) == 36

    def test_another_version_is_made_anew(self, folder, made, monkeypatch):
        load(folder)
        made.clear()
        monkeypatch.setattr(weight_cache, "VERSION", weight_cache.VERSION + 1)
        load(folder)
        assert len(made) == 36

    def test_a_folder_that_cannot_be_written_costs_one_warning(self, folder, cache_folder, caplog, made):
        cache_folder.write_text("a file where the folder should be")
        with caplog.at_level(logging.WARNING):
            weights = load(folder)
        assert len(caplog.records) == 1 and "SLEB_CACHE" in caplog.text
        assert all(each.isfinite().all() for each in widened(weights))
        assert cache_folder.read_text().startswith("a file")

    def test_nothing_half_written_stays(self, folder, cache_folder, monkeypatch):
        def fail(tensors, file, metadata):
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(weight_cache, "save_file", fail)
            load(folder)
        assert [file for file in cache_folder.rglob("*") if file.is_file()] == []
        load(folder)
        leftover = stored(cache_folder)[0].with_name(".model.norm.safetensors.1-2.tmp")
        leftover.write_bytes(b"of a process that was killed")
        load(folder)
        assert leftover.exists()  # its writer may be at work
        os.utime(leftover, (1, time.time() - 1e5))
        load(folder)
        assert not leftover.exists()

    def test_files_are_canonical_tensors(self, folder, cache_folder):
        load(folder, "int4")
        file = next(file for file in stored(cache_folder) if "layers.0.self_attn.k_proj" in file.name)
        tensors = load_file(file)
        expected = quantize_int4(load_file(folder / FILE)["model.layers.0.self_attn.k_proj.weight"])
        assert set(tensors) == {"values", "scale", "minimum"}
        assert all(torch.equal(tensor, getattr(expected, name)) for name, tensor in tensors.items())


class TestLoading:
    def test_progress_goes_from_nothing_to_everything(self, folder):
        for _ in range(2):  # quantised, then from the cache
            seen, threads = [], set()

            def report(done, total, seen=seen, threads=threads):
                seen.append((done, total))
                threads.add(threading.current_thread())

            load(folder, on_progress=report)
            total = sum(tensor.numel() for tensor in load_file(folder / FILE).values())
            assert seen[0] == (0, total) and seen[-1] == (total, total)
            assert [done for done, _ in seen] == sorted(done for done, _ in seen) and len(seen) > 20
            assert threads == {threading.current_thread()}

    def test_progress_of_an_engine(self, tiny_model, make_llm):
        for weights in ("auto", "int8"):
            seen = []
            make_llm(
                tiny_model("llama"),
                weights=weights,
                kernels="torch",
                on_progress=lambda *now, seen=seen: seen.append(now),
            )
            assert seen[-1][0] == seen[-1][1] > 0

    def test_torch_keeps_its_threads(self, folder):
        """A thread that starts later takes the number that was set last, whoever set it."""
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            load(folder)
            found = [torch.get_num_threads()]
            thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert found == [3, 3]
        finally:
            torch.set_num_threads(before)

    def test_the_checkpoints_own_values_are_quantised(self, folder):
        """Not what is left of them in the dtype of the activations."""
        exact = load_file(folder / FILE)["model.layers.1.self_attn.o_proj.weight"]
        found = load(folder, dtype=torch.bfloat16).attention[1].out.weight
        assert torch.equal(found.values, quantize_int8(exact).values)

    @pytest.mark.parametrize("stored_dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_checkpoints_of_sixteen_bits(self, stored_dtype, folder):
        tensors = load_file(folder / FILE)
        save_file({name: each.to(stored_dtype) for name, each in tensors.items()}, folder / FILE)
        weights = load(folder, "int4")
        expected = quantize_int4(tensors["model.layers.1.self_attn.o_proj.weight"].to(stored_dtype))
        assert torch.equal(weights.attention[1].out.weight.values, expected.values)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
    def test_what_is_not_finite_is_refused(self, value, folder, cache_folder):
        tensors = load_file(folder / FILE)
        tensors["model.layers.3.mlp.up_proj.weight"][5, 7] = value
        save_file(tensors, folder / FILE)
        with pytest.raises(ModelError, match=r"layers\.3\.mlp\.up_proj\.weight.*not finite.*weights auto"):
            load(folder, "int4")
        assert not any("layers.3.mlp.up_proj" in file.name for file in stored(cache_folder))
        load(folder, "int4", keep=all_sublayers(resolve_spec(folder)) - {(3, "mlp")})


class TestOptions:
    @pytest.mark.parametrize("option", ["dtype", "weights"])
    @pytest.mark.parametrize("name", ["int2", "INT8", "q4_1", "", "float64"])
    def test_errors_name_what_is_allowed(self, option, name):
        with pytest.raises(ConfigError, match=f"{option} '{name}'") as caught:
            EngineConfig("model", **{option: name}).check()
        allowed = ["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
        allowed += ["int8", "int4"] if option == "weights" else []
        assert all(each in str(caught.value) for each in allowed)

    def test_a_dtype_cannot_be_int8(self):
        with pytest.raises(ConfigError, match="dtype 'int8'"):
            EngineConfig("model", dtype="int8").check()

    @pytest.mark.parametrize(
        ("dtype", "weights", "checkpoint", "expected"),
        [
            ("auto", "int8", "bfloat16", torch.bfloat16),
            ("auto", "int4", None, torch.float32),
            ("float16", "int4", "bfloat16", torch.float16),
            ("fp32", "int8", "bfloat16", torch.float32),
            ("bf16", "auto", "float32", torch.bfloat16),
            ("auto", "fp16", "float32", torch.float16),
            ("float32", "bf16", "float16", torch.bfloat16),
        ],
    )
    def test_dtype_of_activations(self, dtype, weights, checkpoint, expected):
        EngineConfig("model", dtype=dtype, weights=weights).check()
        assert resolve_dtype(dtype, weights, checkpoint, torch.device("cpu")) == expected

    def test_the_kv_cache_has_the_dtype_of_activations(self, tiny_model, make_llm):
        model = tiny_model("llama")
        sizes = [
            make_llm(model, weights=weights, dtype="bf16", kernels="torch").engine.kv_bytes_per_token(0)
            for weights in ("auto", "int8", "int4")
        ]
        assert sizes == [5 * 2 * 32 * 2] * 3


_MEASURE = """
    import resource, sys
    from pathlib import Path
    import torch
    from sleb.engine.model.architecture import resolve_spec
    from sleb.engine.model.loader import load_weights
    from sleb.engine.model.resolve import resolve_dtype
from sleb.engine.model.allocation import all_sublayers
from sleb.engine.model.weights import num_bytes
    from sleb.kernels.quantization import WEIGHT_FORMATS, quantize_int4

    def peak():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    torch.set_num_threads(2)
    path = Path(sys.argv[1])
    spec = resolve_spec(path)
    quantize_int4(torch.ones(64, 64))
    before = peak()
    weights = load_weights(path, spec, all_sublayers(spec), torch.bfloat16, torch.device("cpu"),
                           weight_format=WEIGHT_FORMATS[sys.argv[2]])
    print(num_bytes(weights), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTIZERS)
def test_memory_peaks_near_what_is_kept_and_one_block(name, tmp_path):
    """A float32 checkpoint of 340 MB, 28 MB a block; a process that quantises, then one that finds the cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=512
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    size = (tmp_path / FILE).stat().st_size
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(_MEASURE), str(tmp_path), name],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"SLEB_CACHE": str(tmp_path / "cache")},
        )
        kept, grown = map(int, done.stdout.split())
        assert kept < size * (0.27 if name == "int8" else 0.17)
        assert grown < kept * 1.1 + size / 12 + 24e6


def test_a_tensor_is_kept_for_its_own_shard(folder, made):
    """A sharded checkpoint gives the same weights as one file; after a change of one shard, its tensors are made."""
    whole = load(folder, "int4")
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    weight_map = {}
    for shard in range(3):
        part = {name: tensors[name] for name in list(tensors)[shard::3]}
        save_file(part, folder / f"part-{shard}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    made.clear()
    assert same(load(folder, "int4"), whole) and len(made) == 36
    of_one_shard = {name for name in made if weight_map[name] == "part-1.safetensors"}
    os.utime(folder / "part-1.safetensors", ns=(1, 2))
    made.clear()
    assert same(load(folder, "int4"), whole)
    assert set(made) == of_one_shard and 5 < len(made) < 20
