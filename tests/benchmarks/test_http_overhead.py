"""The overhead benchmark on a tiny model: both sides give what was asked; the sums of its ratio."""

from __future__ import annotations

import pytest

from sleb.benchmarks.http_overhead import OverheadOptions, run_overhead, summarise


def test_both_sides_run_on_a_tiny_model(tiny_model_dir):
    options = OverheadOptions(str(tiny_model_dir), 3, 5, 4, repetitions=2, dtype="float32")
    result = run_overhead(options, ["python", "-m", "x", str(tiny_model_dir)])
    assert result["complete"] and len(result["repetitions"]) == 2
    assert all(each["direct"] > 0 and each["http"] > 0 for each in result["repetitions"])
    assert str(tiny_model_dir.parent) not in str(result)


def test_the_ratio_is_of_times_within_a_repetition():
    options = OverheadOptions("m", streams=2, output_tokens=10)
    found = summarise(
        options, [{"direct": 1.0, "http": 2.0}, {"direct": 3.0, "http": 3.0}, {"direct": 4.0, "http": 5.0}]
    )
    assert (found["ratio"], found["ratio_low"], found["ratio_high"]) == pytest.approx((0.8, 0.5, 1.0))
    assert found["tokens_per_second"] == pytest.approx({"direct": 20 / 3, "http": 20 / 3})
    assert found["met"] is False
    assert summarise(options, []) == {"repetitions": []}
