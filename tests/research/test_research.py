"""The scripts of research/ on a tiny model, as commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sleb.benchmarks.old import load
from sleb.layer_map.layer_map import CalibrationRecord, LayerMap
from sleb.layer_map.units import Unit

pytestmark = pytest.mark.slow  # each is a process that searches; lint and types cover them by default

ROOT = Path(__file__).resolve().parents[2]


def run_script(name: str, *arguments: object, status: int = 0) -> str:
    """What a script says on both outputs."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "research" / f"{name}.py"), *map(str, arguments)],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "160", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def texts(tmp_path):
    paths = (tmp_path / "one.txt", tmp_path / "two.txt")
    for number, path in enumerate(paths):
        codes = torch.randint(97, 123, (600,), generator=torch.Generator().manual_seed(number)).tolist()
        path.write_text("".join(map(chr, codes)))
    return paths


def test_which_blocks(tiny_model_dir, texts, tmp_path):
    path = tmp_path / "methods.json"
    shown = run_script(
        "which_blocks", tiny_model_dir, "--calibration", texts[0], "--held-out", texts[1], "--counts", "1,2",
        "--seqlen", "100", "--windows", "3", "--random-seeds", "1", "--answer-tokens", "3", "--device", "cpu",
        "--json", path,
    )  # fmt: skip
    assert "held-out perplexity" in shown
    result = load(path)
    rows = {(each.case, each.subject): each for each in result.measurements}
    rules = ("sleb", "one-shot", "shortgpt", "run", "last", "even", "random 0")
    assert set(rows) == {("0 blocks", "dense")} | {(f"{n} blocks", rule) for rule in rules for n in (1, 2)}
    assert all(
        each.facts["blocks"].count(",") == int(case[0]) - 1
        for (case, _), each in rows.items()
        if case[0] > "0"
    )
    # Of single removals SLEB's is the best by definition, and one-shot's the same.
    one = {rule: rows["1 blocks", rule] for rule in rules}
    assert one["sleb"].facts["blocks"] == one["one-shot"].facts["blocks"]
    middle = [each.facts["calibration text"] for each in one.values() if each.facts["blocks"] != "0"]
    assert one["sleb"].facts["calibration text"] <= min(middle) * (1 + 1e-6)
    assert 0 <= rows["2 blocks", "sleb"].facts["identical"] <= 1
    assert str(tmp_path) not in path.read_text()


def test_counts_are_different(tiny_model_dir, texts):
    arguments = (tiny_model_dir, "--calibration", texts[0], "--held-out", texts[1], "--counts", "2,2")
    assert "different numbers" in run_script("which_blocks", *arguments, status=2)


def test_search_cost(tiny_model_dir, texts, tmp_path):
    path = tmp_path / "search.json"
    run_script(
        "search_cost", tiny_model_dir, "--calibration", texts[0], "--remove", "3", "--seqlen", "100",
        "--windows", "3", "--draws", "2", "--device", "cpu", "--json", path,
    )  # fmt: skip
    rows = {each.subject: each for each in load(path).measurements}
    assert set(rows) == {"reference", "exact", "race", "gradient"}
    assert rows["reference"].facts["removed"][0] == rows["exact"].facts["removed"][0]
    assert len(rows["exact"].facts["removed"]) == 2 and len(rows["reference"].facts["removed"]) == 1
    assert rows["reference"].facts["loss over exact's"] == pytest.approx(1, rel=1e-6)
    assert rows["exact"].facts["same blocks"] == rows["exact"].facts["over exact"] == 1
    assert rows["exact"].ratio is not None and rows["reference"].ratio is None
    assert all(each.value > 0 for each in rows.values())
    assert "'heads' is not known" in run_script("search_cost", tiny_model_dir, "--units", "heads", status=2)


BLOCKS = LayerMap(
    "tiny-llama", None, 6, (Unit(2), Unit(3)), losses=(40.0, 41.0, 43.0),
    calibration=CalibrationRecord("text", seqlen=8, windows=1, token_hash="sha256:" + 64 * "0"),
)  # fmt: skip


def test_front(tiny_model_dir, tmp_path):
    path = tmp_path / "fronts.json"
    BLOCKS.save(tmp_path / "blocks.json")
    attention = LayerMap(
        "tiny-llama", None, 6, (Unit(1, "attention"), Unit(2, "attention")), losses=(40.0, 40.5, 42.0),
        calibration=BLOCKS.calibration,
    )  # fmt: skip
    attention.save(tmp_path / "attention.json")
    maps = f"{tmp_path / 'blocks.json'},{tmp_path / 'attention.json'}"
    run_script(
        "front", tiny_model_dir, "--maps", maps, "--device", "cpu", "--json", path, "--plot", tmp_path / "plot",
    )  # fmt: skip
    found = load(path).measurements
    rows = {each.key[:2]: each for each in found}
    assert all(each.metric == "calibration perplexity" and each.facts["predicted ×"] >= 1 for each in found)
    assert set(rows) == {(name, f"depth {depth}") for name in ("blocks", "attention") for depth in range(3)}
    assert rows["blocks", "depth 2"].facts["of parameters removed"] == pytest.approx(1 / 3)
    assert rows["attention", "depth 2"].facts["of KV removed"] == pytest.approx(1 / 3)
    assert rows["blocks", "depth 1"].value == pytest.approx(2.718281828 ** (41 / 8))
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert str(tmp_path) not in json.dumps(json.loads(path.read_text()))
