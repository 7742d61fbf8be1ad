"""`sleb eval` from flags to table, file and plot; its numbers against a plain transformers loop and over HTTP."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from sleb.benchmarks.old import load
from sleb.benchmarks.quality import evaluate as quality
from sleb.benchmarks.quality import scores as quality_scores
from sleb.benchmarks.quality.answers import PROMPTS
from sleb.benchmarks.quality.evaluate import run_eval
from sleb.benchmarks.quality.options import EvalOptions
from sleb.benchmarks.record import Measurement, Result
from sleb.cli.eval import evaluate
from sleb.cli.options import OptionsCommand
from sleb.engine.engine import Engine
from sleb.engine.model.scoring import DecoderScorer
from sleb.errors import ConfigError, LayerMapError, RequestError, SlebError
from sleb.layer_map.layer_map import LayerMap, shipped_maps
from sleb.server.api.models import model_card
from sleb.server.bench_result import BenchResult
from sleb.server.names import name_tiers

TEXT = "The sea is everything. It covers seven tenths of the globe; its breath is pure and life-giving. " * 4


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "sea.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def map_file(tmp_path, tiny_chain):
    path = tmp_path / "map.json"
    tiny_chain.save(path)
    return path


@pytest.fixture
def options(tiny_model_dir, tiny_chain, text_file):
    """Perplexity alone, at depths 0, 2 and 3."""
    return {
        "model": str(tiny_model_dir),
        "layer_map": tiny_chain,
        "depths": (2, 3),
        "text": (str(text_file),),
        "seqlen": 48,
        "generate": False,
        "device": "cpu",
    }


def run(options, **changes):
    return run_eval(EvalOptions(**options | changes))


def figures(result: Result, depth: int, case: str = "sea.txt") -> dict[str, Measurement]:
    """Those of a depth, by metric."""
    found = [each for each in result.measurements if each.facts["depth"] == depth and each.case == case]
    assert all(each.subject == f"depth {depth}" for each in found)
    return {each.metric: each for each in found}


def depths_of(result: Result) -> list[int]:
    return list(dict.fromkeys(each.facts["depth"] for each in result.measurements))


def invoke(*arguments):
    app = typer.Typer()
    app.command(cls=OptionsCommand)(evaluate)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def reference(path, removed, windows, dtype=torch.float32, patches=()):
    """Mean loss a scored token, by transformers with units' outputs zeroed: a loop with nothing of ours in it.

    patches: for runs of whole blocks, as `Patch` has them.

    windows: (token ids, how many of the last are scored).
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    with torch.no_grad():
        for unit in removed:
            for block, part in unit.sublayers:
                layer = model.model.layers[block]
                (layer.self_attn.o_proj if part == "attention" else layer.mlp.down_proj).weight.zero_()
    for patch in patches:
        weight, bias = (torch.from_numpy(patch.tensors[name]).to(dtype) for name in ("weight", "bias"))
        model.model.layers[patch.last[0]].register_forward_hook(
            lambda module, _, hidden, weight=weight, bias=bias: (
                hidden + torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=1e-5) @ weight.T + bias
            )
        )
    total, count = 0.0, 0
    for ids, num_scored in windows:
        with torch.inference_mode():
            logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0, -num_scored:]
        wanted = torch.tensor(ids[-num_scored:])
        for rows, tokens in zip(logits.split(256), wanted.split(256), strict=True):
            total += float(torch.nn.functional.cross_entropy(rows.double(), tokens, reduction="sum"))
        count += num_scored
    return total / count


def packed(token_ids, seqlen):
    return [
        (token_ids[start : start + seqlen], seqlen - 1)
        for start in range(0, len(token_ids) - seqlen + 1, seqlen)
    ]


def rolling(token_ids, prefix, seqlen):
    """Every token once: a window's context is the prefix or the token before, and more where the last has room."""
    ids, made = [prefix, *token_ids], []
    for start in range(1, len(ids), seqlen):
        end = min(start + seqlen, len(ids))
        made.append((ids[max(0, end - seqlen - 1) : end], end - start))
    return made


class TestPerplexity:
    @pytest.mark.parametrize("scheme", ["sleb", "lm-eval"])
    def test_against_transformers(self, options, tiny_model_dir, tiny_chain, scheme):
        """To more than four digits, at every depth."""
        result = run(options, windows_like=scheme)
        token_ids = list(TEXT.encode())
        windows = packed(token_ids, 48) if scheme == "sleb" else rolling(token_ids, 256, 48)
        assert depths_of(result) == [0, 2, 3]
        for depth in (0, 2, 3):
            found = figures(result, depth)
            loss = reference(tiny_model_dir, tiny_chain.removed[:depth], windows)
            assert found["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-5)
            assert found["perplexity"].facts["tokens"] == sum(number for _, number in windows)
            if scheme == "lm-eval":
                total = loss * len(token_ids)
                by_word, by_byte, bits = (
                    found[name].value for name in ("word perplexity", "byte perplexity", "bits per byte")
                )
                assert by_word == pytest.approx(math.exp(total / len(TEXT.split(" "))), rel=1e-4)
                assert bits == pytest.approx(total / len(token_ids) / math.log(2), rel=1e-5)
                assert by_byte == pytest.approx(2**bits, rel=1e-6)
            else:
                assert "word perplexity" not in found

    def test_is_that_of_the_search(self, options, tiny_chain):
        """`sleb prune` tells the same perplexity of the same windows."""
        from sleb.pruning.search import total_loss

        result = run(options)
        scorer = DecoderScorer.load(options["model"], device="cpu")
        windows = torch.tensor([ids for ids, _ in packed(list(TEXT.encode()), 48)])
        loss = total_loss(scorer, windows, "sublayers", tiny_chain.removed[:3])
        assert figures(result, 3)["perplexity"].value == pytest.approx(
            math.exp(loss / windows.numel()), rel=1e-5
        )

    def test_figures_agree_with_each_other(self, options):
        result = run(options)
        dense = figures(result, 0)
        assert set(dense) == {"perplexity"} and dense["perplexity"].ratio is None
        for depth in (2, 3):
            found = figures(result, depth)
            ratio = found["perplexity"].ratio
            assert ratio.estimate == pytest.approx(dense["perplexity"].value / found["perplexity"].value)
            assert ratio.low <= ratio.estimate <= ratio.high
            for each in found.values():
                assert each.spread[0] <= each.value <= each.spread[1]
            assert 0 <= found["same token"].value <= 1 and found["KL"].value > 0

    def test_several_texts_count_by_their_tokens(self, options, tmp_path):
        other = tmp_path / "other.txt"
        other.write_text("0123456789" * 12)
        one, two = run(options), run(options, text=(str(other),))
        both = run(options, text=(*options["text"], str(other)))
        for depth in (0, 2, 3):
            parts = [figures(one, depth)["perplexity"], figures(two, depth, "other.txt")["perplexity"]]
            tokens = [each.facts["tokens"] for each in parts]
            losses = [math.log(each.value) * each.facts["tokens"] for each in parts]
            joined = figures(both, depth, "sea.txt+other.txt")["perplexity"]
            assert joined.value == pytest.approx(math.exp(sum(losses) / sum(tokens)))
            own = [figures(both, depth, name)["perplexity"] for name in ("sea.txt", "other.txt")]
            assert [each.value for each in own] == pytest.approx([each.value for each in parts])
            assert [each.facts["tokens"] for each in own] == tokens
        assert both.settings["dataset"] == "sea.txt+other.txt"
        assert both.settings["windows"] == [8, 2]

    def test_quantised_weights(self, options, tiny_model_dir):
        """As the engine computes them with torch's operators."""
        from sleb import LLM

        for weights in ("int8", "int4"):
            result = run(options, weights=weights, layer_map="none", depths=(0,), windows=2)
            llm = LLM(tiny_model_dir, device="cpu", kernels="torch", weights=weights, kv_cache_memory=0.01)
            scores = torch.cat([llm.score(ids) for ids, _ in packed(list(TEXT.encode()), 48)[:2]])
            expected = math.exp(-scores.double().mean())
            assert figures(result, 0)["perplexity"].value == pytest.approx(expected, rel=1e-4)

    def test_default_lengths(self, options, text_file):
        text_file.write_text(TEXT * 3)
        assert run(options, seqlen=None).settings["seqlen"] == 512
        assert run(options, seqlen=None, windows_like="lm-eval").settings["seqlen"] == 510


class TestWhole:
    """Every part at once, through the command."""

    @pytest.fixture
    def stand_in(self, tmp_path):
        """A program in lm_eval's place that scores a text over HTTP with lm-eval's requests and windows."""
        path = tmp_path / "lm_eval"
        path.write_text(f"#!{sys.executable}\n{ROLLING}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def test_table_file_and_plot(self, tiny_model_dir, map_file, text_file, stand_in, tmp_path):
        file, stem, prompts = tmp_path / "result.json", tmp_path / "plot", tmp_path / "prompts"
        prompts.write_text("Hello\nWhat is the sea?\n")
        done = invoke(
            *(tiny_model_dir, "--layer-map", map_file, "--depths", "3,0", "--text", text_file),
            *("--windows-like", "lm-eval", "--seqlen", 60, "--prompts", prompts, "--output-tokens", 12),
            *(
                "--tasks",
                text_file,
                "--lm-eval",
                stand_in,
                "--json",
                file,
                "--plot",
                stem,
                "--dtype",
                "float32",
            ),
        )
        assert done.exit_code == 0, done.output
        for piece in (
            "perplexity",
            "perplexity ×",
            "same token",
            "KL",
            "2 answers",
            "sea.txt",
        ):
            assert piece in done.stdout
        result = load(file)
        assert str(tmp_path) not in file.read_text()
        assert result.complete and "problem" not in result.settings
        assert depths_of(result) == [0, 3]
        for depth in (0, 3):
            # Our own scores and those over HTTP: the same tokens, windows and prefix.
            score, own = (figures(result, depth, case)["perplexity"] for case in ("text", "sea.txt"))
            assert score.value == pytest.approx(own.value, rel=2e-5)
            assert score.spread is None and score.facts["standard_error"] is None
            assert figures(result, depth, "2 answers")["mean tokens"].value > 0
        assert result.settings["model"]["removed"] == ["3", "1", "4.attention"]
        assert result.settings["lm_eval_max_length"] == 62
        assert figures(result, 3)["perplexity"].facts["interval_stretches"] >= 10
        assert result.environment["dtype"] == "float32"
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        assert "perplexity" in (tmp_path / "plot.svg").read_text()

    def test_the_server_reads_the_file(self, tiny_model_dir, map_file, text_file, tmp_path):
        file = tmp_path / "result.json"
        arguments = (tiny_model_dir, "--layer-map", map_file, "--depths", "3", "--text", text_file)
        done = invoke(*arguments, "--seqlen", 48, "--no-generate", "--json", file)
        assert done.exit_code == 0, done.output
        result = BenchResult.load(str(file))
        dense, pruned = (figures(load(file), depth)["perplexity"].value for depth in (0, 3))
        told = {"dense": dense, "pruned": pruned, "dataset": "sea.txt"}
        unseen = frozenset({"sky.txt"})
        assert result.perplexities(3, unseen) == told | {"held_out": True}
        assert result.perplexities(3, unseen | {"sea.txt"}) == told | {"held_out": False}
        assert result.perplexities(2, unseen) is None and result.speedup(3) is None
        chain = LayerMap.load(map_file)
        engine = SimpleNamespace(
            layer_map=chain,
            tiers=[SimpleNamespace(depth=depth) for depth in (0, 3, 5)],
            model_name="tiny-llama",
        )
        result.check(engine)

    def test_a_server_shows_it(self, tiny_model_dir, map_file, text_file, tmp_path):
        from sleb.engine.config import EngineConfig

        file = tmp_path / "result.json"
        arguments = (tiny_model_dir, "--layer-map", map_file, "--depths", "3", "--text", text_file)
        assert invoke(*arguments, "--seqlen", 48, "--no-generate", "--json", file).exit_code == 0
        result = BenchResult.load(str(file))
        config = EngineConfig(
            str(tiny_model_dir), map_file, [0, 3], device="cpu", kernels="torch", kv_cache_memory=0.01
        )
        engine = Engine(config)
        result.check(engine)
        context = SimpleNamespace(
            engine=SimpleNamespace(model=engine.served),
            auto=None,
            results=(result,),
            created=0,
            names=name_tiers(engine.tiers, engine.default_tier, ()),
        )
        tier = engine.tier(3)
        assert model_card(context, tier, tier.id)["pruning"]["perplexity"]["dataset"] == "sea.txt"

    def test_answers_alone(self, tiny_model_dir, map_file, tmp_path):
        file = tmp_path / "result.json"
        arguments = (tiny_model_dir, "--layer-map", map_file, "--output-tokens", 4, "--json", file)
        done = invoke(*arguments, "--device", "cpu")
        assert done.exit_code == 0, done.output
        result, case = load(file), f"{len(PROMPTS)} answers"
        assert depths_of(result) == [0, 3]  # what the map recommends
        assert figures(result, 3, case)["mean tokens"].facts["example"]["prompt"] in PROMPTS
        assert "perplexity" not in done.stdout
        assert BenchResult.load(str(file)).perplexities(3, frozenset()) is None


# As lm-eval's local-completions: the server's tokenizer, the prefix token, rolling windows of max_length - 2 tokens,
# echoed log-probabilities of prompts given as token ids.
ROLLING = """
import json, math, pathlib, sys, httpx
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
arguments = dict(pair.split("=", 1) for pair in given["--model_args"].split(","))
server = arguments["base_url"].removesuffix("/v1/completions")
def post(path, **body):
    return httpx.post(server + path, json=body, timeout=60).raise_for_status().json()
def encode(text):
    return post("/tokenize", prompt=text, add_special_tokens=False)["tokens"]
text = pathlib.Path(given["--tasks"]).read_text()
prefix = encode(httpx.get(server + "/tokenizer_info", timeout=60).json()["bos_token"])[0]
ids, size, total = [prefix, *encode(text)], int(arguments["max_length"]) - 2, 0.0
for start in range(1, len(ids), size):
    end = min(start + size, len(ids))
    prompt = ids[max(0, end - size - 1):end]
    answer = post("/v1/completions", model=arguments["model"], prompt=[prompt], max_tokens=1, logprobs=1, echo=True,
                  temperature=0)
    total += sum(answer["choices"][0]["logprobs"]["token_logprobs"][:-1][-(end - start):])
folder = pathlib.Path(given["--output_path"])
scores = {"perplexity,none": math.exp(-total / (len(ids) - 1)), "perplexity_stderr,none": "N/A"}
(folder / "results_1.json").write_text(json.dumps({"results": {"text": scores}}))
"""


class TestCutShort:
    def test_while_a_text_is_scored(self, options, monkeypatch):
        monkeypatch.setattr(quality_scores, "_BATCH_TOKENS", 48)

        def stop(what, done, total):
            if done == 7:
                raise KeyboardInterrupt

        result = run_eval(EvalOptions(**options | {"generate": True}), (), stop)
        assert not result.complete and "problem" not in result.settings
        assert result.settings["windows"] == [2]
        assert {each.case for each in result.measurements} == {"sea.txt"}
        assert {figures(result, depth)["perplexity"].facts["tokens"] for depth in (0, 2, 3)} == {94}

    def test_before_anything_is_complete(self, tiny_model_dir, tmp_path, text_file, monkeypatch):
        """An older result stays."""
        file = tmp_path / "result.json"
        file.write_text("older")

        def stop(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(DecoderScorer, "run", stop)
        done = invoke(tiny_model_dir, "--text", text_file, "--seqlen", 48, "--json", file)
        assert done.exit_code == 130
        assert "before anything was complete" in done.stderr
        assert file.read_text() == "older"

    def test_between_depths_of_answers(self, options, monkeypatch):
        def stop(what, done, total):
            if what == "answering at depth 3":
                raise KeyboardInterrupt

        result = run_eval(EvalOptions(**options | {"generate": True, "output_tokens": 3}), (), stop)
        answered = [each.facts["depth"] for each in result.measurements if each.metric == "looped"]
        assert answered == [0, 2]
        assert all(figures(result, depth)["perplexity"].value for depth in (0, 2, 3))

    def test_the_command_says_so(self, tiny_model_dir, text_file, monkeypatch, tmp_path):
        file = tmp_path / "result.json"

        def stop(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(quality, "_load_engine", stop)
        done = invoke(tiny_model_dir, "--text", text_file, "--seqlen", 48, "--json", file)
        assert done.exit_code == 130
        assert "Interrupted" in done.stdout
        assert json.loads(file.read_text())["complete"] is False

    def test_what_fails_later_keeps_what_was_found(self, tiny_model_dir, text_file, tmp_path):
        file, prompts = tmp_path / "result.json", tmp_path / "prompts"
        prompts.write_text("much too long " * 100)
        arguments = (
            tiny_model_dir,
            "--text",
            text_file,
            "--seqlen",
            48,
            "--prompts",
            prompts,
            "--json",
            file,
        )
        done = invoke(*arguments, "--device", "cpu")
        assert isinstance(done.exception, SlebError) and "context" in str(done.exception)
        result = load(file)
        assert figures(result, 0)["perplexity"].value > 1
        assert "context" in result.settings["problem"]

    def test_what_fails_first_is_an_error(self, tiny_model_dir, tmp_path):
        prompts = tmp_path / "prompts"
        prompts.write_text("much too long " * 100)
        with pytest.raises(RequestError, match="context"):
            run_eval(EvalOptions(str(tiny_model_dir), prompts=prompts, device="cpu"))


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"windows_like": "gptq"}, "windows_like 'gptq' is not known; choose one of: sleb, lm-eval"),
            ({"seqlen": 1}, "--seqlen is 1; .* at least 2"),
            ({"seqlen": 0, "windows_like": "lm-eval"}, "seqlen is 0; .* at least 1"),
            ({"seqlen": 513}, "--seqlen 513 is longer .* 512 at most"),
            ({"seqlen": 400}, "sea.txt has 384 tokens, fewer than one window of 400"),
            ({"windows": 0}, "windows is 0"),
            ({"depths": (-1,)}, "depths is -1"),
            ({"depths": (6,)}, "depth 6 is not there: .* 0 to 5"),
            ({"depths": (7,)}, "depth 7 is not there"),
            ({"layer_map": "none"}, "without a layer map"),
            ({"text": ("nowhere.txt",)}, "--text nowhere.txt cannot be read"),
            ({"text": (), "generate": True}, "--seqlen has nothing to apply to; name a --text"),
            ({"text": (), "seqlen": None}, "nothing to measure"),
            ({"prompts": Path("x")}, "--prompts has nothing to apply to; leave out --no-generate"),
            ({"limit": 3}, "--limit has nothing to apply to; name --tasks"),
            ({"limit": 0, "tasks": ["x"]}, "limit is 0"),
            ({"lm_eval": "x"}, "--lm-eval has nothing"),
            ({"tasks": ["x"], "lm_eval": "nowhere"}, "--lm-eval nowhere is no executable"),
            ({"tasks": ["x"], "include_path": Path("nowhere")}, "--include-path nowhere is no folder"),
            ({"generate": True, "prompts": Path("nowhere")}, "--prompts nowhere cannot be read"),
            ({"generate": True, "output_tokens": 0}, "output_tokens is 0"),
            ({"dtype": "float8"}, "dtype 'float8'"),
            ({"threads": 0}, "threads is 0"),
            ({"device": "tpu"}, "device 'tpu'"),
        ],
    )
    def test_before_the_model_is_loaded(self, options, changes, match, monkeypatch):
        def refuse(*arguments):
            raise AssertionError("it was loaded")

        monkeypatch.setattr(DecoderScorer, "load", refuse)
        with pytest.raises(ConfigError, match=match):
            run(options, **changes)

    def test_a_map_that_is_not_there(self, options):
        with pytest.raises(LayerMapError, match="does not exist"):
            run(options, layer_map="nowhere.json")

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (("--depths", "0,x"), "--depths"),
            (("--windows-like", "gptq"), "--windows-like 'gptq' is not known; choose one of: sleb, lm-eval"),
            (("--output-tokens", "0"), "--output-tokens"),
            (("--plot", "x"), "--plot draws perplexity by depth; name a --text"),
            (("--json", "nowhere/x.json"), "cannot be written"),
            (("--tasks", " , "), "--tasks"),
        ],
    )
    def test_of_the_command(self, tiny_model_dir, arguments, match):
        done = invoke(tiny_model_dir, *arguments)
        assert isinstance(done.exception, ConfigError) and match in str(done.exception)


@pytest.mark.slow
class TestRealModel:
    """SmolLM2, with real tokens: the same perplexity by `sleb eval` and by transformers, to five digits."""

    TEXT = Path(__file__).resolve().parents[2] / "README.md"

    @pytest.mark.parametrize("scheme", ["sleb", "lm-eval"])
    def test_against_transformers(self, scheme):
        from sleb.engine.text import TextProcessor
        from sleb.models.resolve import resolve_model

        path = resolve_model("smollm2").path
        chain = LayerMap.load(shipped_maps()["smollm2-135m-instruct"])
        result = run_eval(
            EvalOptions(
                "smollm2",
                depths=(0, 3),
                text=(str(self.TEXT),),
                windows_like=scheme,
                seqlen=256,
                windows=4,
                generate=False,
                dtype="float32",
                device="cpu",
            )
        )
        token_ids = TextProcessor(path).encode(self.TEXT.read_text("utf-8"))
        windows = (packed(token_ids, 256) if scheme == "sleb" else rolling(token_ids, 1, 256))[:4]
        for depth in (0, 3):
            loss = reference(path, chain.removed[:depth], windows, patches=chain.patches_at(depth, 576))
            found = figures(result, depth, self.TEXT.name)["perplexity"]
            assert found.value == pytest.approx(math.exp(loss), rel=1e-5)

    @pytest.mark.skipif("SLEB_LM_EVAL" not in os.environ, reason="SLEB_LM_EVAL names no lm_eval")
    def test_against_lm_eval(self, tmp_path, monkeypatch):
        """The real one, over HTTP, on the passages that scripts/clients use."""
        folder = Path(__file__).resolve().parents[1] / "clients" / "lm_eval_tasks"
        monkeypatch.chdir(folder)  # the paths of data files in tasks are relative to the working directory
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        lines = (folder / "passages.jsonl").read_text("utf-8").splitlines()
        texts = []
        for number, line in enumerate(lines):
            texts.append(tmp_path / f"{number}.txt")
            texts[-1].write_text(json.loads(line)["text"], encoding="utf-8")
        result = run_eval(
            EvalOptions(
                "smollm2",
                depths=(0, 3),
                text=tuple(map(str, texts)),
                windows_like="lm-eval",
                seqlen=40,
                generate=False,
                tasks=("sleb_passages",),
                include_path=folder,
                lm_eval=os.environ["SLEB_LM_EVAL"],
                dtype="float32",
                device="cpu",
            )
        )
        joined = "+".join(path.name for path in texts)
        for depth in (0, 3):
            own, scores = figures(result, depth, joined), figures(result, depth, "sleb_passages")
            for name in ("word perplexity", "byte perplexity", "bits per byte"):
                assert scores[name].value == pytest.approx(own[name].value, rel=1e-4)
