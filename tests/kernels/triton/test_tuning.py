"""The table of tuned configurations, on a stand-in for a GPU and its clock."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from sleb.kernels.triton import tuning
from sleb.kernels.triton.tuning import Config, Launch, tuned

CONFIGS = (Config(block=1), Config(block=2), Config(block=3))
KEY = ("an operator", "torch.bfloat16", 128)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU called "Fake", on which block b takes times[b] ms; measured: the blocks that were timed."""
    gpu = type("FakeGpu", (), {"times": {1: 3.0, 2: 1.0, 3: 2.0}, "measured": [], "folder": tmp_path})()

    def do_bench(run, **options):
        assert options["return_mode"] == "median"
        block = run()
        gpu.measured.append(block)
        return gpu.times[block]

    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "_state", tuning._State())
    monkeypatch.setattr(tuning.triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Fake")
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path))
    return gpu


def run(key=KEY, configs=CONFIGS, launch=None):
    """The block that `tuned` runs last."""
    ran = []

    def record(config):
        ran.append(config["block"])
        return config["block"]

    tuned(key, configs, Launch(launch or record))
    return ran[-1] if ran else None


def restart(monkeypatch):
    monkeypatch.setattr(tuning, "_state", tuning._State())


def test_an_unknown_key_runs_the_first_while_serving(gpu):
    assert run() == 1
    assert gpu.measured == [] and not list(gpu.folder.rglob("*.json"))


def test_the_fastest_is_kept_for_the_next_start(gpu, monkeypatch):
    names = []
    with tuning.tuning(names.append):
        assert run() == 2
        assert run(("another", 1)) == 2
        assert run() == 2
    assert names == ["an operator", "another"] and gpu.measured == [1, 2, 3, 1, 2, 3]
    restart(monkeypatch)
    assert run() == 2 and run(("a third", 1)) == 1
    assert len(gpu.measured) == 6
    [file] = gpu.folder.rglob("*.json")
    assert json.loads(file.read_text())["gpu"].startswith("Fake, triton")


def test_another_gpu_has_its_own_table(gpu, monkeypatch):
    with tuning.tuning():
        run()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Other")
    assert run() == 1


def test_configurations_that_do_not_fit_are_left_out(gpu):
    def launch(config):
        if config["block"] == 2:
            raise OutOfResources(300_000, 200_000, "shared memory")
        return config["block"]

    with tuning.tuning():
        tuned(KEY, CONFIGS, Launch(launch))
    assert tuning._state.table[json.dumps(KEY)] == {"block": 3}


def test_nothing_that_fits_is_an_error(gpu):
    def launch(config):
        raise OutOfResources(300_000, 200_000, "shared memory")

    with tuning.tuning(), pytest.raises(RuntimeError, match="no configuration of an operator"):
        tuned(KEY, CONFIGS, Launch(launch))


@pytest.mark.parametrize("content", ["{", "[]", '{"configs": 3}', '{"configs": {"a": 1}}'])
def test_a_broken_table_is_made_anew(gpu, monkeypatch, caplog, content):
    with tuning.tuning():
        run()
    [file] = gpu.folder.rglob("*.json")
    file.write_text(content)
    restart(monkeypatch)
    assert run() == 1
    assert "not readable" in caplog.text
    with tuning.tuning():
        assert run() == 2
    assert json.loads(file.read_text())["configs"]


def test_a_configuration_that_is_no_more_is_chosen_anew(gpu):
    with tuning.tuning():
        run()
    assert run(configs=CONFIGS[2:]) == 3


def test_a_folder_that_cannot_be_written_only_warns(gpu, monkeypatch, caplog):
    (gpu.folder / "tuning").write_text("a file where the folder would be")
    with tuning.tuning():
        assert run() == 2
    assert "cannot be written" in caplog.text


def test_the_interpreter_has_one_configuration(gpu, monkeypatch):
    monkeypatch.setattr(tuning, "INTERPRETED", True)
    with tuning.tuning():
        assert run() == 1
    assert gpu.measured == []
