"""What a result says about where it was measured, and what it must not say."""

from __future__ import annotations

import getpass
import json
import platform
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from sleb.benchmarks.environment import (
    describe_environment,
    describe_machine,
    shown_command,
    source_commit,
)
from sleb.engine.llm import LLM


def test_environment(tiny_model_dir: Path) -> None:
    engine = LLM(tiny_model_dir, kv_cache_memory=0.01, kernels="torch").engine
    found = describe_environment(engine, ["sleb", "bench"])
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert (found["dtype"], found["device"], found["kernels"], found["gpu"]) == (
        "float32",
        "cpu",
        "torch",
        None,
    )
    assert found["memory_bytes"] > 2**28
    assert found["command"] == "sleb bench"
    wanted = {"date", "sleb", "commit", "python", "transformers", "cpu", "cores"}
    assert wanted <= set(found)
    text = json.dumps(found)
    assert str(Path.home()) not in text and str(tiny_model_dir) not in text
    if len(platform.node()) > 3:
        assert platform.node() not in text


def test_a_command_is_shown_without_the_paths_of_the_machine(tmp_path: Path) -> None:
    model = tmp_path / "some-model"
    model.mkdir()
    home = str(tmp_path / "home" / getpass.getuser())
    arguments = [
        f"{home}/bin/sleb",
        "bench",
        str(model) + "/",
        f"--json={home}/r.json",
        "--layer-map",
        "../x/map.json",
    ]
    shown = shown_command([*arguments, "--depths", "0,6"], str(model) + "/")
    expected = ["sleb", "bench", "some-model", "--json=r.json", "--layer-map", "map.json", "--depths", "0,6"]
    assert shown == expected


def test_a_command_is_recorded_as_a_shell_takes_it() -> None:
    machine = describe_machine(torch.device("cpu"), torch.float32, "", ["sleb", "my model", "größe…", ""])
    assert shlex.split(machine["command"]) == ["sleb", "my model", "größe…", ""]


def test_a_hub_id_is_no_path() -> None:
    assert shown_command(["sleb", "owner/a-model"], "owner/a-model") == ["sleb", "owner/a-model"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.org")
    root = tmp_path / "checkout"
    (root / "inside").mkdir(parents=True)
    (root / "file").write_text("one")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(root), *arguments], check=True)
    return root


def test_the_commit_of_a_checkout_but_not_of_one_around_it(checkout: Path, tmp_path: Path) -> None:
    commit = source_commit(checkout)
    assert commit is not None and len(commit) == 40
    assert source_commit(checkout / "inside") is None
    assert source_commit(tmp_path) is None
    (checkout / "file").write_text("two")
    assert source_commit(checkout) == f"{commit}-dirty"


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="the system tells its processor elsewhere")
def test_the_flags_are_the_system_s():
    """A figure of a processor says little without the instruction sets that its kernels may use."""
    told = set(Path("/proc/cpuinfo").read_text().split())
    flags = describe_machine(torch.device("cpu"), torch.float32, "torch", ["sleb"])["cpu_flags"]
    assert set(flags) <= told
    assert ("avx2" in flags) == ("avx2" in told)
