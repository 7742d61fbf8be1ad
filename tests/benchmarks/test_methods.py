"""Rules that choose blocks, against their formulas written out with transformers; the comparison as a whole."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sleb.benchmarks import method_speed, methods
from sleb.benchmarks.method_speed import (
    VARIANTS,
    MethodSpeedOptions,
    _narrow_folder,
    run_method_speed,
    two_of_four,
)
from sleb.benchmarks.methods import MethodsOptions, run_methods
from sleb.benchmarks.selection import (
    angular_distances,
    block_influence,
    contiguous_run,
    evenly_spaced,
    last_blocks,
    one_shot,
    random_blocks,
    shortgpt,
    spread_units,
)
from sleb.cli.bench import app
from sleb.engine.model.scoring import DecoderScorer
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.layer_map.units import Unit


@pytest.fixture(scope="module")
def scorer(tiny_model_dir):
    return DecoderScorer.load(str(tiny_model_dir), device="cpu")


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, 250, (3, 20), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def hidden_states(tiny_model_dir, windows):
    """For each window, transformers' hidden states [7, 20, E], the last before the final norm."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    last = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0]))
    with torch.no_grad():
        states = [model(window[None], output_hidden_states=True).hidden_states for window in windows]
    return [torch.cat([*each[:-1], end]) for each, end in zip(states, last, strict=True)]


def blocks(units):
    return [unit.block for unit in units]


def test_block_influence_is_that_of_the_paper(scorer, windows, hidden_states):
    expected = [
        sum(
            1 - float(torch.dot(a, b) / a.norm() / b.norm())
            for states in hidden_states
            for a, b in zip(states[block], states[block + 1], strict=True)
        )
        / windows.numel()
        for block in range(6)
    ]
    assert block_influence(scorer, windows) == pytest.approx(expected, abs=1e-5)
    order = sorted(range(6), key=lambda block: expected[block])
    assert blocks(shortgpt(scorer, windows)(3)) == order[:3]


def test_the_run_is_that_of_least_angular_distance(scorer, windows, hidden_states):
    def distance(start, end):
        angles = []
        for states in hidden_states:
            one, other = states[start, -1].double(), states[end, -1].double()
            angles.append(math.acos(float(torch.dot(one, other) / one.norm() / other.norm())) / math.pi)
        return sum(angles) / len(angles)

    found = angular_distances(scorer, windows)
    for start, end in itertools.combinations(range(7), 2):
        assert float(found[start, end]) == pytest.approx(distance(start, end), abs=1e-5)
    for count in (1, 2, 4):
        best = min(range(6 - count + 1), key=lambda start: distance(start, start + count))
        assert blocks(contiguous_run(scorer, windows)(count)) == list(range(best, best + count))


def test_one_shot_orders_single_removals(scorer, windows, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    layers = list(model.model.layers)
    losses = {}
    for gone in range(1, 5):
        model.model.layers = torch.nn.ModuleList(layers[:gone] + layers[gone + 1 :])
        with torch.no_grad():
            losses[gone] = sum(
                float(model(each[None], labels=each[None], use_cache=False).loss) for each in windows
            )
    assert blocks(one_shot(scorer, windows)(4)) == sorted(losses, key=losses.__getitem__)


def test_rules_that_look_at_nothing(scorer):
    assert blocks(last_blocks(scorer)(3)) == [2, 3, 4]
    assert blocks(evenly_spaced(scorer)(2)) == [2, 4]
    assert blocks(spread_units(30, 6)) == [3, 8, 12, 17, 22, 26]
    first, longer = random_blocks(scorer, 1)(2), random_blocks(scorer, 1)(4)
    assert longer[:2] == first and set(longer) == set(map(Unit, range(1, 5)))
    assert len({tuple(random_blocks(scorer, seed)(4)) for seed in range(9)}) > 1


def test_two_of_four_keeps_the_largest():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 4.0, -5.0, 6.0, -7.0], [0.1, 0.2, 0.3, 0.4, 1, 1, 0, 2]])
    assert two_of_four(weight)[0].tolist() == [0, -3, 2, 0, 0, 0, 6, -7]
    assert (two_of_four(weight) != 0).sum(1).tolist() == [4, 4]
    odd = two_of_four(torch.arange(1.0, 7.0)[None])  # a last group of two is kept
    assert odd.tolist() == [[0, 0, 3, 4, 5, 6]]


def test_the_narrow_model_has_as_many_parameters_less(tiny_model_dir, tmp_path):
    folder, share = _narrow_folder(tiny_model_dir, tmp_path / "narrow", 1, 6)
    config = json.loads((folder / "config.json").read_text())
    wide = json.loads((tiny_model_dir / "config.json").read_text())
    assert config["intermediate_size"] % 32 == 0
    assert config | {"intermediate_size": wide["intermediate_size"]} == wide

    def parameters(settings):
        from transformers import AutoConfig

        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
        layer = model.model.layers[0]
        return sum(each.numel() for each in layer.parameters() if each.dim() == 2)

    assert share == pytest.approx(1 - parameters(config) / parameters(wide))
    with pytest.raises(ConfigError, match="more parameters than the MLPs have"):
        _narrow_folder(tiny_model_dir, tmp_path / "none", 5, 6)


def test_speed_takes_turns_and_tells_what_2_of_4_is(tiny_model_dir):
    options = MethodSpeedOptions(
        str(tiny_model_dir), count=1, batches=(1, 2), prompt_tokens=32, output_tokens=3, repetitions=2,
        dtype="float32", device="cpu",
    )  # fmt: skip
    result = run_method_speed(options)
    assert [row["variant"] for row in result["rows"]] == [*VARIANTS] * 3
    assert all(row["speedup"] == 1 for row in result["rows"] if row["variant"] == "dense")
    assert result["parameters_removed"]["blocks"] == pytest.approx(1 / 6)
    assert "no 2:4 kernels" in result["note_2:4"]


@pytest.fixture
def texts(tmp_path):
    paths = (tmp_path / "one.txt", tmp_path / "two.txt")
    for number, path in enumerate(paths):
        codes = torch.randint(97, 123, (600,), generator=torch.Generator().manual_seed(number)).tolist()
        path.write_text("".join(map(chr, codes)))
    return paths


def test_the_comparison(tiny_model_dir, texts, monkeypatch, tmp_path):
    monkeypatch.setattr(methods, "_ANSWER_TOKENS", 3)
    path = tmp_path / "methods.json"
    done = CliRunner(env={"COLUMNS": "160"}).invoke(
        app,
        ["methods", str(tiny_model_dir), "--calibration", str(texts[0]), "--held-out", str(texts[1]), "--counts",
         "1,2", "--seqlen", "100", "--windows", "3", "--random-seeds", "1", "--device", "cpu",
         "--json", str(path), "--plot", str(tmp_path / "plot")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(path.read_text())
    rows = {(row["method"], row["count"]): row for row in result["rows"]}
    names = ("sleb", "one-shot", "shortgpt", "run", "last", "even", "random")
    assert set(rows) == {("dense", 0)} | {(name, count) for name in names for count in (1, 2)}
    assert all(len(row["removed"]) == count for (_, count), row in rows.items())
    # Of single removals SLEB's is the best by definition, and one-shot's the same.
    assert rows["sleb", 1]["removed"] == rows["one-shot", 1]["removed"]
    middle = [row["perplexity"] for (_, count), row in rows.items() if count == 1 and row["removed"] != [0]]
    assert rows["sleb", 1]["perplexity"] <= min(middle) * (1 + 1e-6)
    assert rows["dense", 0]["answers"]["identical"] is None
    assert 0 <= rows["sleb", 2]["answers"]["identical"] <= 1
    assert (tmp_path / "plot.png").stat().st_size > 5000 and (tmp_path / "plot.svg").exists()
    assert str(tmp_path) not in path.read_text()


def test_an_order_that_is_known_is_not_searched_for(texts, tiny_model_dir):
    order = LayerMap("tiny-llama", None, 6, (Unit(4), Unit(2)))
    options = MethodsOptions(
        str(tiny_model_dir), str(texts[0]), str(texts[1]), (2,), order, 100, 2, 1, answers=False, device="cpu"
    )
    result = run_methods(options)
    [row] = [row for row in result["rows"] if row["method"] == "sleb"]
    assert row["removed"] == [2, 4]
    assert json.loads(json.dumps(result))["settings"]["counts"] == [2]


def test_options_that_are_no_use(texts, tiny_model_dir, tiny_chain):
    base = {"model": str(tiny_model_dir), "calibration": str(texts[0]), "held_out": str(texts[1])}
    for options, message in (
        ({"counts": ()}, "different numbers"),
        ({"counts": (2, 2)}, "different numbers"),
        ({"random_seeds": 0}, "random seeds 0"),
        ({"dtype": "int8"}, "'int8'"),
        ({"held_out": "nowhere"}, "nowhere"),
    ):
        with pytest.raises(ConfigError, match=message):
            MethodsOptions(**(base | options)).check()
    with pytest.raises(ConfigError, match="removes 3 blocks, fewer than 4"):
        run_methods(
            MethodsOptions(**base, counts=(4,), layer_map=tiny_chain, seqlen=100, windows=2, device="cpu")
        )


def test_speed_alone_needs_no_texts(tiny_model_dir, monkeypatch, tmp_path):
    asked = []

    def measured(options, command, on_progress):
        asked.append(options)
        return {"kind": "method-speed", "rows": [{"load": "prompt"}], "complete": True}

    monkeypatch.setattr(method_speed, "run_method_speed", measured)
    monkeypatch.setattr(method_speed, "print_method_speed", lambda result, console: None)
    path = tmp_path / "speed.json"
    arguments = ["methods", str(tiny_model_dir), "--no-quality", "--json", str(path)]
    done = CliRunner().invoke(app, [*arguments, "--speed", "2", "--repetitions", "3"])
    assert done.exit_code == 0, done.output
    assert (asked[0].count, asked[0].repetitions) == (2, 3)
    assert json.loads(path.read_text())["kind"] == "method-speed"
    for wrong, message in ((arguments, "--speed 6"), (["methods", str(tiny_model_dir)], "--calibration")):
        done = CliRunner().invoke(app, wrong)
        assert isinstance(done.exception, ConfigError) and message in str(done.exception)
