"""`prune` and its command with an invented model: what is checked before, saved during, shown after."""

from __future__ import annotations

import functools
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from typer.testing import CliRunner

from sleb.cli.prune import prune as prune_command
from sleb.errors import ConfigError, LayerMapError, SlebError
from sleb.layer_map.layer_map import LayerMap, Unit
from sleb.pruning.options import PruneOptions as AnyOptions
from sleb.pruning.options import parse_remove
from sleb.pruning.run import prune as prune_with_patches
from sleb.pruning.run import run_pruning

# The invented model takes no patches; `search/test_patches.py` has one that does.
PruneOptions = functools.partial(AnyOptions, patch="none")
prune = functools.partial(prune_with_patches, patch="none")
WORDS = [f"w{number}" for number in range(40)]


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(
        models.WordLevel({"<s>": 0, **{word: at for at, word in enumerate(WORDS, 1)}}, "<s>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(3)
    return tokenizer


class StubModel:
    """A model of invented blocks; raises `stop_at` at a given block pass."""

    model_name, num_blocks, max_length, parallel = "stub", 10, 16, False
    fingerprint: str | None = "sha256:stub"

    def __init__(self, stop_after: int | None = None) -> None:
        self.tokenizer = word_tokenizer()
        self.passes_left = math.inf if stop_after is None else stop_after
        self.scale = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))

    def embed(self, token_ids: Tensor) -> Tensor:
        return torch.sin(token_ids[..., None] * torch.arange(1.0, 5.0))

    def run(self, unit: Unit, hidden: Tensor) -> Tensor:
        self.passes_left -= 1
        if self.passes_left < 0:
            raise KeyboardInterrupt
        return hidden + torch.sin(hidden * (unit.block + 1) + self.scale[unit.block])

    def token_losses(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        return hidden[:, :-1].cos().mean(-1) + 3


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS[at * at % 40] for at in range(200)) + "\n")
    return path


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the engine's scorer; "stop_after" interrupts the next search, "loaded" has the arguments."""
    state: dict[str, Any] = {"stop_after": None, "loaded": []}

    def load(model: str, dtype: str, device: str, check: Callable[[Any], object]) -> StubModel:
        check(StubModel)
        state["loaded"].append((model, dtype, device))
        return StubModel(state["stop_after"])

    module = types.ModuleType("sleb.engine.model.scoring")
    module.DecoderScorer = types.SimpleNamespace(load=load)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sleb.engine.model.scoring", module)
    return state


def run_command(*arguments: Any) -> Any:
    app = typer.Typer()
    app.command()(prune_command)
    plain = [] if "--speedup" in arguments else ["--no-speedup"]  # the stub is no model of the engine's
    return CliRunner(env={"COLUMNS": "200"}).invoke(
        app, [*plain, "--patch", "none", *(str(each) for each in arguments)]
    )


def test_the_map_records_the_search(text_file: Path, tmp_path: Path, stub: dict[str, Any]) -> None:
    path = tmp_path / "map.json"
    layer_map = prune(Path("folder/stub"), "30%", text_file, output=path, windows=5)
    assert LayerMap.load(path) == layer_map
    assert stub["loaded"] == [("folder/stub", "float32", "auto")]
    assert (layer_map.model, layer_map.fingerprint, layer_map.num_blocks) == ("stub", "sha256:stub", 10)
    assert (layer_map.max_depth, layer_map.depth) == (3, 3)
    assert layer_map.losses is not None and layer_map.candidate_losses is not None
    for depth, tried in enumerate(layer_map.candidate_losses):
        assert set(tried) <= {Unit(block) for block in range(1, 9)} - set(layer_map.removed[:depth])
        assert min(tried, key=lambda unit: tried[unit]) == layer_map.removed[depth]
        assert tried[layer_map.removed[depth]] == layer_map.losses[depth + 1]
    record = layer_map.calibration
    assert record is not None
    assert (record.source, record.sampler, record.seed) == ("text.txt", "packed", None)
    # The window is the model's context, and the tokenizer's own truncation to 3 tokens is lifted.
    assert (record.seqlen, record.windows, record.dtype) == (16, 5, "float32")


def test_special_tokens_are_added_by_the_rows_sampler_alone(text_file: Path) -> None:
    first: list[int] = []

    class Listening(StubModel):
        def embed(self, token_ids: Tensor) -> Tensor:
            first.append(int(token_ids[0, 0]))
            return super().embed(token_ids)

    prune(Listening(), 1, text_file, windows=2)
    assert first[0] == 1 and 0 not in first
    first.clear()
    prune(Listening(), 1, text_file, windows=1, sampler="rows")
    assert set(first) == {0}


def test_each_window_of_a_model_that_needs_it_begins_with_its_token(text_file: Path) -> None:
    class Beginning(StubModel):
        text = SimpleNamespace(window_start=0, chat_template=None)

        def embed(self, token_ids: Tensor) -> Tensor:
            assert token_ids[:, 0].tolist() == [0] * len(token_ids) and (token_ids[:, 1:] > 0).all()
            return super().embed(token_ids)

    calibration = prune(Beginning(), 1, text_file, windows=2, held_out=text_file).calibration
    assert calibration is not None and calibration.special_tokens


@pytest.mark.parametrize("units", ["sublayers", "attention"])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_finer_units_and_fast_modes(units: str, mode: str, text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    layer_map = prune(StubModel(), "20%", text_file, output=path, units=units, mode=mode)
    assert layer_map.max_depth == (4 if units == "sublayers" else 2)  # of 20 and of 10
    assert all(unit.part != "block" and 1 <= unit.block <= 8 for unit in layer_map.removed)
    assert units == "sublayers" or all(unit.part == "attention" for unit in layer_map.removed)
    assert LayerMap.load(path) == layer_map


def test_the_recommended_depth_may_be_less(text_file: Path, tmp_path: Path) -> None:
    layer_map = prune(StubModel(), 4, text_file, depth=2, output=tmp_path / "map.json")
    assert (layer_map.max_depth, layer_map.depth, LayerMap.load(tmp_path / "map.json").depth) == (4, 2, 2)
    with pytest.raises(ConfigError, match="depth 5 to recommend must be 0 to 4"):
        prune(StubModel(), 4, text_file, depth=5)


@pytest.mark.parametrize(
    ("remove", "num_blocks", "expected"),
    [(6, 30, 6), ("6", 30, 6), ("20%", 30, 6), ("20%", 32, 6), ("20%", 33, 7), ("25%", 10, 3),
     ("0.1%", 30, 1), (" 12.5% ", 32, 4), ("100%", 30, 30), ("10%", 26, 3), ("6.0", 30, 6)],
)  # fmt: skip
def test_a_share_is_rounded_to_the_nearest_block(remove: int | str, num_blocks: int, expected: int) -> None:
    assert parse_remove(remove, num_blocks) == expected


@pytest.mark.parametrize(
    "remove", [0, -1, "0%", "-5%", "101%", "six", "", "%", "1.5", "nan", "inf%", True, "1e400x"]
)
def test_a_remove_that_makes_no_sense(remove: int | str) -> None:
    with pytest.raises(ConfigError, match="remove"):
        parse_remove(remove, 30)


def test_slips_are_found_before_the_model_is_loaded(
    text_file: Path, tmp_path: Path, stub: dict[str, Any]
) -> None:
    there = tmp_path / "there.json"
    there.write_text("precious")
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9 " * 9)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (there, {}, "exists: continue it with --resume, replace it with --force"),
        (tmp_path, {}, "is a folder"),
        (tmp_path / "none" / "map.json", {}, "cannot be written"),
        (tmp_path / "a.json", {"remove": "lots"}, "remove 'lots'"),
        (tmp_path / "a.json", {"remove": 200}, "200"),
        (tmp_path / "a.json", {"calibration": latin}, "latin.txt is not UTF-8 text"),
        (tmp_path / "a.json", {"dtype": "int8"}, "choose one of: float32, bfloat16, float16"),
        (tmp_path / "a.json", {"sampler": "best"}, "choose one of: packed, rows"),
        (tmp_path / "a.json", {"calibration": "nowhere.txt"}, "nowhere.txt"),
        (there, {"resume": True}, "there.json cannot be read as JSON"),
    ]
    for output, changes, message in cases:
        options: dict[str, Any] = {"remove": 2, "calibration": text_file, "output": output, **changes}
        with pytest.raises(SlebError, match=message):
            run_pruning("m", PruneOptions(**options))
    assert stub["loaded"] == []
    assert there.read_text() == "precious"


def test_what_the_model_cannot_do(text_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"9 of 10 blocks.*1 to 8"):
        prune(StubModel(), 9, text_file)
    with pytest.raises(ConfigError, match="seqlen 17 is longer than the context of stub: 16 at most"):
        prune(StubModel(), 2, text_file, seqlen=17)


@pytest.mark.parametrize("stop_after", [0, 20, 70, 110, 130])
def test_an_interrupted_command_keeps_what_is_decided_and_goes_on(
    stop_after: int, text_file: Path, tmp_path: Path, stub: dict[str, Any]
) -> None:
    whole = prune(StubModel(), 5, text_file)
    path = tmp_path / "map.json"
    stub["stop_after"] = stop_after
    arguments = ("owner/m", "--remove", 5, "--calibration", text_file, "-o", path)
    first = run_command(*arguments)
    assert first.exit_code == 130, first.output
    if path.exists():
        partial = LayerMap.load(path)
        assert 0 < partial.max_depth < 5
        assert partial.depth == partial.max_depth
        assert partial.removed == whole.removed[: partial.max_depth]
        assert f"{partial.max_depth} of the removals decided" in first.output
        assert f"round {partial.max_depth}: {partial.removed[-1]} goes; saved in {path}" in first.output
        assert "map.json" in first.output and "--resume" in first.output
    else:
        assert "before the first new removal" in first.output
    stub["stop_after"] = None
    second = run_command(*arguments, "--resume")
    assert second.exit_code == 0, second.output
    found = LayerMap.load(path)
    assert (found.removed, found.losses, found.depth) == (whole.removed, whole.losses, whole.depth)


def test_a_longer_search_continues_and_a_shorter_one_loses_nothing(text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    notes: list[str] = []
    run_pruning(StubModel(), PruneOptions(2, text_file, path, resume=True), note=notes.append)
    assert any("does not exist yet" in note for note in notes)
    longer = run_pruning(StubModel(), PruneOptions(4, text_file, path, resume=True), note=notes.append)
    whole = prune(StubModel(), 4, text_file)
    assert (longer.layer_map.removed, longer.layer_map.losses) == (whole.removed, whole.losses)
    assert any("2 of 4 removals" in note for note in notes)
    cost = longer.result.cost
    assert cost.reference_passes == 42 + 30  # 8 and 7 blocks were alive
    assert 0.4 * 72 < cost.num_passes <= 21 + 6 + 15 + 5
    shorter = run_pruning(StubModel(), PruneOptions(3, text_file, path, resume=True))
    assert (shorter.layer_map.max_depth, shorter.layer_map.depth, shorter.result.cost.num_passes) == (4, 3, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 4}, "number of windows is 12, this run's is 4"),
        ({"seqlen": 8, "windows": 12}, "seqlen is 16, this run's is 8"),
        ({"seed": 1}, "hash of the calibration tokens"),
        ({"dtype": "bfloat16"}, "dtype is float32, this run's is bfloat16"),
    ],
)
def test_another_calibration_is_not_continued(
    options: dict[str, Any], message: str, text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "map.json"
    prune(StubModel(), 2, text_file, output=path)
    before = path.read_bytes()
    with pytest.raises(LayerMapError, match=message):
        prune(StubModel(), 3, text_file, output=path, resume=True, **options)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model_name", "other", "model is stub, this run's is other"),
        ("fingerprint", "sha256:other", "fingerprint is sha256:stub"),
        ("num_blocks", 9, "number of blocks is 10"),
    ],
)
def test_another_model_is_not_continued(
    name: str, value: Any, message: str, text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "map.json"
    prune(StubModel(), 2, text_file, output=path)
    other = StubModel()
    setattr(other, name, value)
    with pytest.raises(LayerMapError, match=message):
        prune(other, 3, text_file, output=path, resume=True)


def test_a_published_list_cannot_be_continued(text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    LayerMap("stub", None, 10, (Unit(3),)).save(path)
    with pytest.raises(LayerMapError, match="no calibration record or no losses"):
        prune(StubModel(), 2, text_file, output=path, resume=True)


def test_a_forced_search_replaces_the_file_only_when_it_has_something(
    text_file: Path, tmp_path: Path, stub: dict[str, Any]
) -> None:
    path = tmp_path / "map.json"
    path.write_text("an older one")
    arguments = ("owner/m", "--remove", 2, "--calibration", text_file, "-o", path, "--force")
    stub["stop_after"] = 3
    assert run_command(*arguments).exit_code == 130
    assert path.read_text() == "an older one"
    stub["stop_after"] = None
    assert run_command(*arguments).exit_code == 0
    assert LayerMap.load(path).max_depth == 2


def test_the_command_reports_rounds_passes_and_place(
    text_file: Path, tmp_path: Path, stub: dict[str, Any]
) -> None:
    path = tmp_path / "map.json"
    done = run_command(
        "owner/m", "--remove", "20%", "--calibration", text_file, "--seqlen", 8, "--windows", 3,
        "--dtype", "bfloat16", "--device", "cpu", "-o", path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert stub["loaded"] == [("owner/m", "bfloat16", "cpu")]
    layer_map = LayerMap.load(path)
    assert layer_map.losses is not None
    assert f"{layer_map.losses[2] / 24:.4f}" in done.output  # nats a token
    assert f"{math.exp(layer_map.losses[2] / 24):.3f}" in done.output
    # 10 and 9 blocks alive: 72 + 56 passes of the other 9 and 8.
    assert "block passes and" in done.output and "takes 128 block passes and 15 heads" in done.output
    assert "map.json" in done.output and "depth 2" in done.output
    assert json.loads(path.read_text())["calibration"]["dtype"] == "bfloat16"
