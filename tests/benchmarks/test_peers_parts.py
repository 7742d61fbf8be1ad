"""Parts of `sleb bench peers` alone: what weights are, which tokens prompts hold, tables, the command's own duties."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from sleb.benchmarks.peer_options import Own, PeerTest
from sleb.benchmarks.peer_prompts import Prompts
from sleb.benchmarks.peer_results import Repetition, Turn, compare
from sleb.benchmarks.peer_tables import print_peers
from sleb.benchmarks.peer_weights import declared_format, gguf_format, ir_format, is_quantised
from sleb.benchmarks.peer_workers.transformers_worker import Engine as TransformersEngine
from sleb.cli.bench import app
from sleb.cli.bench.shared import Outputs
from sleb.errors import ConfigError

command = import_module("sleb.cli.bench.peers")  # the package's attribute of that name is the function


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("llama 135M BF16", "bf16"),
        ("qwen2 ?B Q8_0", "q8_0"),
        ("llama 8B (guessed) Q4_1", "q4_1"),
        ("llama 8B Q4_K - Medium", "q4_k"),
        ("llama 8B IQ3_S mix - 3.66 bpw", "iq3_s"),
        ("gpt-oss 20B MXFP4 MoE", "mxfp4 moe"),
        ("llama 256M all F32", "all f32"),
        ("llama 135M unknown, may not work", None),
        ("BF16 llama 135M", None),
        (None, None),
    ],
)
def test_llama_cpp_s_line_about_a_model_names_its_format(told: str | None, found: str | None) -> None:
    assert gguf_format(told) == found


def test_the_format_of_a_folder_is_what_its_files_say(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    for content, found in (
        ('{"quantization_config": {"quant_method": "fp8"}}', "fp8"),
        ('{"quantization_config": {"quant_method": "awq", "bits": 4}}', "awq, 4 bits"),
        ('{"quantization_config": {}}', "quantised"),
        ('{"quantization_config": null}', None),
        ("[]", None),
        ("no JSON", None),
    ):
        config.write_text(content)
        assert declared_format(tmp_path) == found
    assert declared_format(tmp_path / "none") is None

    layer = '<layer id="{}" type="{}"><data element_type="{}" size="{}"/><output><port/></output></layer>'
    kinds = [("Const", "u4", 500), ("Const", "f16", 300), ("Const", "f16", 100), ("Parameter", "i64", 900)]
    layers = "".join(layer.format(number, *kind) for number, kind in enumerate(kinds))
    (tmp_path / "openvino_model.xml").write_text(f"<net><layers>{layers}<layer type='Const'/></layers></net>")
    assert ir_format(tmp_path) == "u4"
    (tmp_path / "openvino_model.xml").write_text("<net><layers>")
    assert ir_format(tmp_path) is None
    assert ir_format(tmp_path / "none") is None


def test_numbers_of_their_own_are_no_quantised_weights() -> None:
    assert not any(map(is_quantised, (None, "f16", "BF16", "all F32", "float32")))
    assert all(map(is_quantised, ("u4", "i8", "Q4_1", "fp8", "gptq, 4 bits")))


@pytest.mark.parametrize(
    ("size", "special"),
    [
        (128_256, range(128_000, 128_256)),  # Llama 3
        (151_936, range(151_643, 151_665)),  # Qwen2.5; no token has the ids behind them
        (201_088, range(199_998, 201_088)),  # gpt-oss
        (102_400, range(100_000, 100_016)),  # DeepSeek
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_prompts_hold_ordinary_tokens(tmp_path: Path, size: int, special: range, told: bool) -> None:
    """Where no tokenizer tells of special tokens, a margin leaves out those of most models."""
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
    if told:
        added = [{"id": each, "content": f"<{each}>"} for each in (5, 2000, *special)]
        (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (ids,) = Prompts(tmp_path, 0).ids(PeerTest("prompt", 1, 200_000, 1), 1)
    assert min(ids) >= 1000
    if told or size - special.start < 1024:
        assert max(ids) < special.start
    assert not told or 2000 not in ids
    assert len(set(ids)) > size // 2


def test_what_engines_tell_of_themselves_is_no_markup() -> None:
    test, odd = PeerTest.parse("decode-8"), "[/nothing] [red]1[/red]"
    turns = {name: Turn(1.0, [1.0], 0.0, False, 1) for name in ("far", "sleb-bf16")}
    result: dict[str, Any] = {
        "rows": [
            asdict(row) for row in compare({test: [Repetition({"far": turns}, [])]}, [Own("bf16")], ["far"])
        ],
        "engines": {"far": {"version": odd, "dtype": "[int8]", "attention": odd, "transport": "HTTP"}},
        "memory": {"far": {"peak_rss": 1 << 20, "pss": 0, "processes": 1}},
        "failures": {"other": odd},
        "conditions": {"notices": []},
        "floor_shares": {},
        "complete": True,
    }
    text = io.StringIO()
    print_peers(result, Console(file=text, width=200))
    assert text.getvalue().count(odd) == 3 and "[int8]" in text.getvalue()


def test_transformers_runs_nothing_of_the_model_s_own_generation_config(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    num_threads, grad = torch.get_num_threads(), torch.is_grad_enabled()

    def answer(folder: Path) -> list[int]:
        found = TransformersEngine(str(folder), num_threads, 64, 1, 1).run([[65, 66, 67]], 12)
        assert found["num_tokens"] == 12
        return found["token_ids"]

    try:
        plain = answer(tiny_model_dir)
        folder = tmp_path / "model"
        shutil.copytree(tiny_model_dir, folder)
        own = {"suppress_tokens": [plain[0]], "repetition_penalty": 5.0, "eos_token_id": plain[1]}
        (folder / "generation_config.json").write_text(json.dumps(own))
        assert answer(folder) == plain
    finally:
        torch.set_grad_enabled(grad)
        torch.set_num_threads(num_threads)


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Handlers that a test may change."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals")
def test_the_end_of_the_terminal_is_as_ctrl_c() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    command._end_on_signals()
    assert signal.getsignal(signal.SIGHUP) != signal.SIG_DFL  # which would end the tests
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)  # told once more: nothing
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    command._end_on_signals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # as nohup wants it


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize(
    "shown", ["sleb.benchmarks.peer_tables.print_peers", "sleb.cli.bench.shared.RunsBar.__exit__"]
)
def test_files_are_written_before_anything_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    def gone(*args: object) -> None:
        raise OSError("the terminal is gone")

    result = {"rows": [1], "complete": True}
    monkeypatch.setattr("sleb.benchmarks.peers.run_peers", lambda *args: result)
    monkeypatch.setattr(shown, gone)
    with pytest.raises(OSError, match="terminal"):
        command._measure(None, Outputs(tmp_path / "result.json", None))
    assert json.loads((tmp_path / "result.json").read_text()) == result


@pytest.mark.usefixtures("own_signals")
def test_tables_are_shown_though_files_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def write(*args: object) -> None:
        order.append("write")
        raise ConfigError("the disk is full")

    monkeypatch.setattr("sleb.benchmarks.peers.run_peers", lambda *args: {"rows": [1], "complete": True})
    monkeypatch.setattr("sleb.benchmarks.peer_tables.print_peers", lambda *args: order.append("print"))
    monkeypatch.setattr(Outputs, "write", write)
    with pytest.raises(ConfigError, match="full"):
        command._measure(None, Outputs(None, None))
    assert order == ["write", "print"]


def test_the_cache_is_whole_gibibytes() -> None:
    done = CliRunner().invoke(app, ["peers", "m", "--kv-gib", "1.5"])
    assert done.exit_code == 2 and "--kv-gib" in done.output and "integer" in done.output


def test_how_is_what_messages_name() -> None:
    done = CliRunner().invoke(app, ["peers", "--how"])
    assert done.exit_code == 0 and "Nothing is installed for you" in done.output
