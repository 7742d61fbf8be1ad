"""sleb against transformers' generate() on a CPU, with a tiny shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sleb.benchmarks import transformers_generate
from sleb.benchmarks.transformers_generate import (
    GenerateOptions,
    TransformersModel,
    run_generate,
    summarise,
)
from sleb.benchmarks.workloads import Workload
from sleb.errors import ConfigError


@pytest.fixture
def options(tiny_model_dir: Path) -> GenerateOptions:
    return GenerateOptions(
        model=str(tiny_model_dir),
        batch=2,
        prompt_tokens=6,
        output_tokens=4,
        repetitions=2,
        dtype="float32",
        device="cpu",
        compile=False,
    )


def test_both_sides_take_turns(options: GenerateOptions) -> None:
    said: list[str] = []
    result = run_generate(options, ["python"], said.append)
    assert result["complete"] and result["together"] and not result["compiled"]
    for side in ("ours", "transformers"):
        assert len(result[side]["seconds_samples"]) == 2
    assert len(result["ratio_samples"]) == 2
    assert [each.split(",")[0] for each in said] == ["sleb", "transformers"] * 2 + [
        *("transformers", "sleb"),
        *("sleb", "transformers"),
    ]
    json.dumps(result)


def test_one_after_the_other_where_both_do_not_fit(
    options: GenerateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_generate, "_free_bytes", lambda device: 0)
    said: list[str] = []
    result = run_generate(options, ["python"], said.append)
    assert result["together"] is False
    assert "do not fit" in said[0]
    assert [each.split(",")[0] for each in said[1:]] == ["sleb"] * 4 + ["transformers"] * 4
    assert len(result["ratio_samples"]) == 2


def test_an_interrupt_keeps_complete_repetitions(
    options: GenerateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, num_calls = TransformersModel.generate, 0

    def interrupted(self: TransformersModel, prompts: Any) -> float:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 3:
            raise KeyboardInterrupt
        return generate(self, prompts)

    monkeypatch.setattr(TransformersModel, "generate", interrupted)
    result = run_generate(options)
    assert not result["complete"]
    assert [len(result[side]["seconds_samples"]) for side in ("ours", "transformers")] == [1, 1]


def test_the_ratio_is_of_one_repetition() -> None:
    found = summarise(Workload("generate", 2, 6, 4), [1.0, 2.0, 4.0], [4.0, 6.0, 8.0])
    assert (found["ratio"], found["ratio_low"], found["ratio_high"]) == (3.0, 2.0, 4.0)
    assert found["ours"]["tokens_per_second"] == 4.0
    assert "ratio" not in summarise(Workload("generate", 2, 6, 4), [1.0], [])


def test_random_weights_are_distributed_as_ours(options: GenerateOptions) -> None:
    model = TransformersModel(Path(options.model), torch.float32, torch.device("cpu"), options)._model
    parameters = dict(model.named_parameters())
    assert all(bool((value == 1).all()) for name, value in parameters.items() if name.endswith("norm.weight"))
    assert float(parameters["lm_head.weight"].detach().std()) == pytest.approx(0.02, rel=0.05)


def test_model_or_config() -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        run_generate(GenerateOptions())


def test_the_command_names_a_wrong_shape() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sleb.benchmarks.transformers_generate", "--config", "llama-9"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "llama-2-7b" in done.stderr
