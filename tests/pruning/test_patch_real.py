"""What patches give back of what removals cost, on SmolLM2: the figures of the result file, and `sleb patch` itself.

One order, patches fitted on the first 16 windows of 1,024 tokens of Wikipedia, judged on the first 4 of other pages.
The slow tests fit anew and take minutes; `SLEB_TEXTS` is the folder of wiki-calibration.txt and wiki-test.txt.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sleb.benchmarks.quality.evaluate import run_eval
from sleb.benchmarks.quality.options import EvalOptions
from sleb.benchmarks.record import Result, read_json
from sleb.engine.llm import LLM
from sleb.layer_map.layer_map import LayerMap, Unit
from sleb.pruning import patch

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "2026-11-30-patches-smollm2.json"
ORDER = tuple(map(Unit, (17, 5, 18, 16, 15, 14, 13, 26, 12, 7)))
DEPTHS = (3, 6, 8, 10)
# Perplexity over the dense model's by an implementation of the method in plain torch, which scored every second token:
# of the order without patches, and with a full one a run.
BARE = {3: 33.2 / 22.3, 6: 48.7 / 22.3, 8: 66.6 / 22.3, 10: 103 / 22.3}
FULL = {3: 29.5 / 22.3, 6: 34.1 / 22.3, 8: 42.4 / 22.3, 10: 51.2 / 22.3}
LOW_RANK = {
    64: {3: 30.0 / 22.3, 6: 36.2 / 22.3, 8: 46.8 / 22.3, 10: 57.9 / 22.3},
    16: {6: 39.6 / 22.3, 10: 67.5 / 22.3},
}


def ratios(result: Result, case: str, form: str = "", depths: Iterable[int] = DEPTHS) -> dict[int, float]:
    """Perplexity of each depth over the dense model's."""
    values = {
        each.subject: each.value or math.inf
        for each in result.measurements
        if each.key[::2] == (case, "perplexity")
    }
    return {depth: values[f"depth {depth}{form}"] / values["depth 0"] for depth in depths}


def assert_close(found: dict[int, float], wanted: dict[int, float]) -> None:
    assert found == {depth: pytest.approx(ratio, rel=0.03) for depth, ratio in wanted.items()}


def test_what_the_result_file_says() -> None:
    result = Result.of_document(read_json(RESULT))
    wiki = "wiki-test.txt"
    assert_close(ratios(result, wiki), BARE)
    full = ratios(result, wiki, ", full")
    assert_close(full, FULL)
    assert full[6] <= 1.57 and full[10] <= 2.35
    for rank, wanted in LOW_RANK.items():
        assert_close(ratios(result, wiki, f", low-rank={rank}", wanted), wanted)
    other = ratios(result, "debian-faq.txt", ", full")
    assert other[6] <= 1.70 and other[10] <= 2.85


@pytest.fixture(scope="module")
def all_threads() -> Iterator[None]:
    """The other tests run on one thread; this model is worth all of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def patched(all_threads: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A map with full patches, and the folder of texts."""
    if "SLEB_TEXTS" not in os.environ:
        pytest.skip("SLEB_TEXTS names no folder of texts")
    texts, path = Path(os.environ["SLEB_TEXTS"]), tmp_path_factory.mktemp("maps") / "map.json"
    patch(
        "smollm2",
        LayerMap("smollm2", None, 30, ORDER),
        calibration=texts / "wiki-calibration.txt",
        windows=16,
        seqlen=1024,
        depths=DEPTHS,
        losses=False,
        output=path,
    )
    return path, texts


@pytest.mark.slow
def test_full_patches_anew(patched: tuple[Path, Path]) -> None:
    path, texts = patched
    text = str(texts / "wiki-test.txt")
    options = EvalOptions(
        "smollm2", path, DEPTHS, text=[text], windows=4, seqlen=1024, generate=False, dtype="float32"
    )
    found = ratios(run_eval(options), "wiki-test.txt")
    assert_close(found, FULL)
    assert found[6] <= 1.57 and found[10] <= 2.35


@pytest.mark.slow
def test_patched_depths_by_every_executor_and_weight_format(patched: tuple[Path, Path]) -> None:
    """The C kernels are the reference; other formats lose no more at a patched depth than they lose at depth 0."""
    path, texts = patched
    text = (texts / "wiki-test.txt").read_text("utf-8")[:4000]
    cases: dict[str, dict[str, Any]] = {
        "torch": {"dtype": "float32", "kernels": "torch"},
        "cpu": {"dtype": "float32", "kernels": "cpu"},
        "bfloat16": {"dtype": "bfloat16"},
        "int8": {"dtype": "bfloat16", "weights": "int8"},
        "int4": {"dtype": "bfloat16", "weights": "int4"},
    }
    scores: dict[str, list[torch.Tensor]] = {}
    for name, options in cases.items():
        llm = LLM("smollm2", path, (0, 6, 10), device="cpu", max_model_len=1024, **options)
        token_ids = llm.engine.text.encode(text)[:512]
        scores[name] = [llm.score(token_ids, depth) for depth in (0, 6, 10)]
    for one, other in zip(scores["torch"], scores["cpu"], strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)
    for name in ("bfloat16", "int8", "int4"):
        dense, *pruned = (
            float((one - other).mean()) for one, other in zip(scores["torch"], scores[name], strict=True)
        )
        for added in pruned:
            assert added <= 1.5 * abs(dense) + 0.02, name
