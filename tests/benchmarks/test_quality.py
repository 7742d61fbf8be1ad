"""Perplexity, against transformers and by hand, and the script that compares weight formats."""

from __future__ import annotations

import json
import math

import pytest
import torch
import typer
from typer.testing import CliRunner

from sleb import LLM
from sleb.benchmarks import cpu_quality
from sleb.benchmarks.cpu_quality import make_table, measure_quality
from sleb.benchmarks.perplexity import perplexity, split_windows, transformers_perplexity
from sleb.errors import ConfigError, RequestError

TEXT = "The sea is everything. It covers seven tenths of the globe; its breath is pure and life-giving. " * 2


@pytest.fixture(scope="module")
def llm(tiny_model_dir):
    return LLM(tiny_model_dir, dtype="float32", device="cpu", kernels="torch", kv_cache_memory=0.01)


def by_hand(path, token_ids, window):
    """Every token but a window's first, from transformers' log-probabilities, one at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    losses = []
    for start in range(0, len(token_ids), window):
        part = token_ids[start : start + window]
        with torch.inference_mode():
            logprobs = model(torch.tensor([part])).logits[0].double().log_softmax(dim=-1)
        losses += [-float(logprobs[at, token]) for at, token in enumerate(part[1:])]
    return math.exp(sum(losses) / len(losses))


class TestWindows:
    def test_they_follow_one_another(self):
        assert split_windows(list(range(7)), 3) == [[0, 1, 2], [3, 4, 5]]  # a lone 6 predicts nothing
        assert split_windows(list(range(8)), 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]
        assert split_windows([1, 2], 100) == [[1, 2]]

    @pytest.mark.parametrize(("tokens", "window"), [([], 8), ([1], 8), ([1, 2, 3], 1), ([1, 2, 3], 0)])
    def test_nothing_to_predict(self, tokens, window):
        with pytest.raises(ConfigError, match="at least 2"):
            split_windows(tokens, window)


class TestPerplexity:
    @pytest.mark.parametrize("window", [16, 50, 400])
    def test_against_transformers(self, llm, tiny_model_dir, window):
        token_ids = llm.engine.encode(TEXT)
        expected = by_hand(tiny_model_dir, token_ids, window)
        assert perplexity(llm, token_ids, window) == pytest.approx(expected, rel=1e-4)
        windows = split_windows(token_ids, window)
        found = transformers_perplexity(tiny_model_dir, windows, torch.float32)
        assert found == pytest.approx(expected, rel=1e-4)

    def test_of_a_depth(self, tiny_model_dir, tiny_chain):
        options = {"dtype": "float32", "device": "cpu", "kernels": "torch", "kv_cache_memory": 0.01}
        llm = LLM(tiny_model_dir, tiny_chain, [0, 3], **options)
        token_ids = llm.engine.encode(TEXT)
        values = [perplexity(llm, token_ids, 64, depth) for depth in (None, 3, 0)]
        assert values[0] == values[1] != values[2]

    def test_a_window_beyond_the_context(self, llm):
        with pytest.raises(RequestError, match="context"):
            perplexity(llm, [5] * 600, 600)


class TestScript:
    def test_rows(self, tiny_model_dir):
        said = []
        result = measure_quality(
            str(tiny_model_dir), TEXT, window=32, num_tokens=100, kernels="torch", say=said.append
        )
        rows = {(row["implementation"], row["weights"]): row for row in result["rows"]}
        assert list(rows) == [
            *(("sleb", name) for name in ("float32", "bfloat16", "int8", "int4")),
            ("transformers", "bfloat16"),
        ]
        assert rows["sleb", "bfloat16"]["ratio"] == 1
        for row in rows.values():
            assert row["ratio"] == pytest.approx(row["perplexity"] / rows["sleb", "bfloat16"]["perplexity"])
        assert rows["sleb", "int8"]["perplexity"] > 1
        sizes = [rows["sleb", name]["weight_bytes"] for name in ("float32", "bfloat16", "int8", "int4")]
        assert sizes == sorted(sizes, reverse=True)
        assert result["settings"] == {"window": 32, "num_tokens": 100, "num_windows": 4}
        assert len(said) == 5
        exact = by_hand(tiny_model_dir, list(TEXT.encode())[:100], 32)
        assert rows["sleb", "float32"]["perplexity"] == pytest.approx(exact, rel=1e-4)

    def test_the_file_and_the_table(self, tiny_model_dir, tmp_path):
        text, file = tmp_path / "text.txt", tmp_path / "result.json"
        text.write_text(TEXT, encoding="utf-8")
        app = typer.Typer()
        app.command()(cpu_quality.main)
        arguments = [
            str(tiny_model_dir),
            "--text",
            str(text),
            "--weights",
            "bf16,int8",
            "--tokens",
            "64",
            "--kernels",
            "torch",
        ]
        done = CliRunner().invoke(app, [*arguments, "--no-peer", "--json", str(file)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        result = json.loads(file.read_text())
        assert [row["weights"] for row in result["rows"]] == ["bfloat16", "int8"]
        assert result["rows"][1]["ratio"] is not None
        assert str(tmp_path) not in file.read_text()
        assert "int8" in done.stdout and "perplexity of 64 tokens" in done.stdout

    @pytest.mark.parametrize(
        ("weights", "match"), [("int2", "int2.*int8"), ("", "no weight format"), ("bf16,int9", "int9")]
    )
    def test_formats_that_are_not_there(self, weights, match, tiny_model_dir):
        names = [name for name in weights.split(",") if name]
        with pytest.raises(ConfigError, match=match):
            measure_quality(str(tiny_model_dir), TEXT, names)

    def test_a_text_that_is_not_there(self, tiny_model_dir, tmp_path):
        for path in (tmp_path / "none.txt", tmp_path):
            with pytest.raises(ConfigError, match="cannot be read"):
                cpu_quality.main(str(tiny_model_dir), path)

    def test_what_transformers_does_not_load_is_left_out(self, tiny_model_dir, monkeypatch):
        def fail(*arguments):
            raise ValueError("unknown architecture")

        said = []
        monkeypatch.setattr(cpu_quality, "transformers_perplexity", fail)
        result = measure_quality(
            str(tiny_model_dir), TEXT, ["float32"], window=32, kernels="torch", say=said.append
        )
        assert [row["implementation"] for row in result["rows"]] == ["sleb"]
        assert result["rows"][0]["ratio"] is None
        assert "unknown architecture" in said[-1]
        assert make_table(result).row_count == 1
