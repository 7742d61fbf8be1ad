"""`sleb patch`: what it writes, by the engine's word, what it says, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from sleb.cli.options import OptionsCommand
from sleb.cli.patch import patch as patch_command
from sleb.engine.llm import LLM
from sleb.errors import ConfigError, SlebError
from sleb.layer_map.layer_map import LayerMap, TextLosses, Unit
from sleb.pruning import patch
from sleb.pruning.patching import Patcher

TEXT = "Patches stand where blocks stood, and mend what their absence tears; nothing is trained. "


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    paths = folder / "fit.txt", folder / "other.txt"
    for path, letters in zip(paths, (TEXT * 12, TEXT.swapcase() * 4), strict=True):
        path.write_text(letters)
    return paths


@pytest.fixture
def map_file(tiny_chain: LayerMap, tmp_path: Path) -> Path:
    path = tmp_path / "map.json"
    tiny_chain.save(path)
    return path


def run(*arguments: Any) -> Any:
    app = typer.Typer()
    app.command(cls=OptionsCommand)(patch_command)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(each) for each in arguments])


def served_loss(model: Path, layer_map: LayerMap, depth: int, text: Path, num_windows: int) -> float:
    """The sum over windows of 64 bytes of mean cross-entropy × 64, by the engine that serves the map."""
    llm = LLM(model, layer_map, (depth,), dtype="float32", device="cpu", kernels="torch")
    windows = torch.tensor(list(text.read_bytes()))[: 64 * num_windows].view(-1, 64)
    return sum(-float(llm.score(window.tolist()).double().mean()) * 64 for window in windows)


def test_the_map_has_the_losses_that_the_engine_serves(
    tiny_model_dir: Path, map_file: Path, texts: tuple[Path, Path], tiny_chain: LayerMap
) -> None:
    fitted, other = texts
    options = (
        "--calibration",
        fitted,
        "--windows",
        12,
        "--seqlen",
        64,
        "--held-out",
        other,
        "--patch",
        "low-rank=5",
    )
    result = run(tiny_model_dir, map_file, *options)
    assert result.exit_code == 0, result.output
    path = map_file.with_name("map-patched.json")
    made = LayerMap.load(path)
    assert made.removed == tiny_chain.removed and made.depth == 3 and LayerMap.load(map_file) == tiny_chain
    assert made.patches is not None and made.losses is not None and made.unpatched is not None
    record = made.patches.record
    assert (record.form, record.rank, record.ridge) == ("low-rank", 5, 0.3)
    assert record.calibration == made.calibration and made.calibration is not None
    assert (made.calibration.source, made.calibration.windows, made.calibration.dtype) == (
        "fit.txt",
        12,
        "float32",
    )
    [held_out] = made.held_out
    assert held_out.record == made.unpatched.record and held_out.record.windows == 5
    bare = replace(made, patches=None)
    for depth in (0, 2, 5):
        assert made.losses[depth] == pytest.approx(
            served_loss(tiny_model_dir, made, depth, fitted, 12), rel=1e-5
        )
        assert held_out.losses[depth] == pytest.approx(
            served_loss(tiny_model_dir, made, depth, other, 5), rel=1e-5
        )
        without = served_loss(tiny_model_dir, bare, depth, other, 5)
        assert made.unpatched.losses[depth] == pytest.approx(without, rel=1e-5)
    assert held_out.losses[1:] != made.unpatched.losses[1:] and held_out.losses[0] == made.unpatched.losses[0]
    assert "parameters of patches" in result.output and "other.txt perplexity without" in result.output
    runs = {(each.first, each.last, each.first_depth, each.last_depth) for each in made.patches.load()}
    assert runs == {
        ((3, "attention"), (3, "mlp"), 1, 2),
        ((1, "attention"), (1, "mlp"), 2, 3),
        ((3, "attention"), (4, "attention"), 3, 3),
        ((1, "attention"), (4, "attention"), 4, 4),
        ((1, "attention"), (4, "mlp"), 5, None),
    }
    again = run(tiny_model_dir, map_file, *options)
    assert again.exit_code == 1 and "replace it with --force" in str(again.exception)


def test_some_depths_alone(tiny_model_dir: Path, tiny_chain: LayerMap, texts: tuple[Path, Path]) -> None:
    made = patch(tiny_model_dir, tiny_chain, "scale", [2, 4], texts[0], windows=10, seqlen=64)
    assert made.patches is not None and made.losses is not None and made.unpatched is not None
    assert [bool(made.patches.at(depth)) for depth in range(6)] == [False, False, True, False, True, False]
    same = [one == other for one, other in zip(made.losses, made.unpatched.losses, strict=True)]
    assert same == [True, True, False, True, False, True]
    assert not made.held_out and made.unpatched.record == made.calibration


def test_losses_may_be_left_for_later(
    tiny_model_dir: Path, tiny_chain: LayerMap, texts: tuple[Path, Path]
) -> None:
    searched = replace(tiny_chain, losses=(1.0,) * 6)
    made = patch(tiny_model_dir, searched, calibration=texts[0], windows=10, seqlen=64, losses=False)
    assert (made.losses, made.held_out, made.unpatched) == (None, (), None)
    assert made.patches is not None and made.patches.at(5)


def test_earlier_losses_and_patches_go(
    tiny_model_dir: Path, tiny_chain: LayerMap, texts: tuple[Path, Path]
) -> None:
    """What a search measured without patches never stands beside them."""
    searched = replace(
        tiny_chain,
        losses=(1.0,) * 6,
        held_out=(TextLosses(replace(tiny_chain).calibration_losses.record, (1.0,) * 6),),
        candidate_losses=({Unit(1): 2.0},) * 5,
    )
    made = patch(tiny_model_dir, searched, depths=[5], calibration=texts[0], windows=10, seqlen=64)
    assert made.losses is not None and min(made.losses) > 64 and made.candidate_losses is None
    assert not made.held_out


def test_an_interrupt_leaves_what_was_there(
    tiny_model_dir: Path, map_file: Path, texts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Patcher, removed: Any, depth: int, patched: bool = True) -> Any:
        raise KeyboardInterrupt

    before = sorted(map_file.parent.iterdir()), map_file.read_bytes()
    monkeypatch.setattr(Patcher, "steps", interrupt)
    result = run(
        tiny_model_dir, map_file, "-o", map_file, "--force", "--calibration", texts[0], "--seqlen", 64
    )
    assert result.exit_code == 130 and "map.json is as it was" in " ".join(result.output.split())
    assert (sorted(map_file.parent.iterdir()), map_file.read_bytes()) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": "none"}, "nothing to fit: choose scale"),
        ({"patch": "low-rank=0"}, "patch 'low-rank=0' is not known"),
        ({"patch": "low-rank=33"}, "more than the hidden size 32: take full"),
        ({"depths": [6]}, "depth 6 is not there: the layer map has depths 0 to 5"),
        ({"depths": [0]}, "depths is 0; it must be"),
        ({"layer_map": "nowhere.json"}, "nowhere.json does not exist"),
        ({"layer_map": LayerMap.dense("tiny-llama", 6)}, "removes nothing that a patch could mend"),
        ({"layer_map": LayerMap("other", None, 7, (Unit(2),))}, "other with 7 blocks"),
        ({"layer_map": LayerMap("other", "sha256:x", 6, (Unit(2),))}, "has another shape"),
        ({"calibration": "nowhere.txt"}, "nowhere.txt"),
        ({"held_out": "nowhere.txt"}, "nowhere.txt"),
        ({"held_out": "nowhere.txt", "losses": False}, "are not wanted: leave it out"),
        ({"seqlen": 1000}, "seqlen 1000 is longer than the context"),
        ({"output": "/nowhere/map.json"}, "cannot be written"),
    ],
)
def test_what_cannot_be_patched(
    changes: dict[str, Any],
    message: str,
    tiny_model_dir: Path,
    tiny_chain: LayerMap,
    texts: tuple[Path, Path],
) -> None:
    options = {"layer_map": tiny_chain, "calibration": texts[0], "seqlen": 64} | changes
    with pytest.raises(SlebError, match=message):
        patch(tiny_model_dir, **options)


def test_a_shipped_map_needs_a_name_for_the_new_one(tiny_model_dir: Path) -> None:
    result = run(tiny_model_dir, "llama-2-7b")
    assert isinstance(result.exception, ConfigError) and "--output" in str(result.exception)


def test_a_map_that_is_not_there_is_no_shipped_one(tiny_model_dir: Path) -> None:
    assert "does not exist" in str(run(tiny_model_dir, "nope.json").exception)
