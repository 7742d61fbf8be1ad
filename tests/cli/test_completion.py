"""What a shell completes: commands, options, choices and models, by the script that users install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_and_choices(tmp_path: Path) -> None:
    shim = tmp_path / "sleb"
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m sleb "$@"\n')
    shim.chmod(0o755)
    cases = {
        "sleb pr": {"prune"},
        "sleb serve --dty": {"--dtype"},
        "sleb serve --no-pre": {"--no-prefix-caching"},
        "sleb serve --dtype b": {"bfloat16"},
        "sleb serve smol": {"smollm2"},
        "sleb bench thr": {"throughput"},
        "sleb show opt": {"opt-13b"},
    }
    script = ["source <(sleb --show-completion)"]
    for line in cases:
        words = line.split()
        script.append(f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMPREPLY=()")
        script.append('_sleb_completion sleb; echo "${COMPREPLY[@]}"')
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    assert [set(line.split()) for line in done.stdout.splitlines()] == list(cases.values())


def test_completion_can_be_installed(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m sleb --install-completion; exit $?"
    done = subprocess.run(
        [shutil.which("bash") or "bash", "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert any("_sleb_completion" in file.read_text() for file in tmp_path.rglob("*") if file.is_file())
