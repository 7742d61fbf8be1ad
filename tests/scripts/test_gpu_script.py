"""`scripts/gpu`: collects and imports where a GPU machine lacks the rest, ends in time, keeps what was written."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/gpu"
sys.path.append(str(ROOT / "scripts"))

from gpu_parts import plan, report  # noqa: E402
from gpu_parts.process import Process, finish  # noqa: E402

THERE = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pytest",
    "pytest-xdist",
    "hypothesis",
)
NOT_THERE = {
    "typer",
    "rich",
    "typer-slim",
    "click",
    "shellingham",
}  # some of THERE name them, for their own commands

# Only the modules named on the command line are found outside of the standard library and this repository.
ABSENT = """
import sys
from importlib.machinery import PathFinder
absent = set(sys.argv.pop(1).split(","))
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
sys.path[:0] = ["", "scripts"]
"""
COLLECT = """
import gpu_parts.jobs, gpu_parts.report
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "xdist.plugin"]))
"""


def _name(distribution: str) -> str:
    return re.sub("[-_.]+", "-", distribution).lower()


def absent_modules() -> set[str]:
    """What is installed here and comes with none of THERE."""
    packages = importlib.metadata.packages_distributions()
    kept, found = set(), [_name(name) for name in THERE]
    while found:
        name = found.pop()
        if name in kept or name in NOT_THERE:
            continue
        kept.add(name)
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found += [_name(re.split(r"[^\w.-]", each)[0]) for each in wanted if "extra ==" not in each]
    return {
        module
        for module, owners in packages.items()
        if not any(_name(owner) in kept | {"sleb"} for owner in owners) and module.isidentifier()
    }


def test_gpu_tests_collect_and_every_part_imports_without_the_packages_of_the_server() -> None:
    absent = absent_modules()
    assert {
        "fastapi",
        "starlette",
        "pydantic",
        "uvicorn",
        "orjson",
        "gguf",
        "llguidance",
        "typer",
        "rich",
    } <= absent
    assert {"httpx_sse", "httptools", "prometheus_client", "openai", "jsonschema", "matplotlib"} <= absent
    command = [sys.executable, "-c", ABSENT + COLLECT, ",".join(absent)]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # schemathesis brings one
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.search(r"(\d+)/\d+ tests collected", done.stdout)
    assert found is not None and int(found[1]) > 1000 and "error" not in done.stdout.lower().splitlines()[-1]


@pytest.mark.parametrize("total", [800.0, 100.0, -1.0])
def test_the_parts_share_the_time(total: float) -> None:
    limits = plan.limits(plan.PARTS, total)
    assert sum(limits) == pytest.approx(max(0.0, total)) and len(limits) == len(plan.NAMES)
    if total == 800.0:
        assert limits == [part.seconds for part in plan.PARTS]
        # The first took no time: its share went to all others.
        assert plan.limits(plan.PARTS[1:], total)[0] == pytest.approx(190 * 800 / 710)


def start(folder: Path, program: str) -> Process:
    command = [sys.executable, "-c", program, str(folder / "found.json")]
    return Process(command, folder / "log", dict(os.environ))


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("", None),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 11)", "ended by signal 11"),
        # It writes what it has when it is asked to end, and is in time.
        (
            "import sys, time\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n open(sys.argv[1], 'w').write('part')",
            None,
        ),
        # It does not listen, and has a child that does not either.
        (
            "import signal, subprocess, sys, time\nsignal.signal(2, signal.SIG_IGN)\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
            "open(sys.argv[1], 'w').write(str(child.pid)); time.sleep(60)",
            "not done in 2 s",
        ),
    ],
)
def test_processes_end_in_time(tmp_path: Path, program: str, why: str | None) -> None:
    began = time.monotonic()
    assert finish([start(tmp_path, program)], 2.0) == [why]
    assert time.monotonic() - began < 5
    if "Popen" in program:
        child = int((tmp_path / "found.json").read_text())
        state = Path(f"/proc/{child}/stat")
        assert not state.exists() or state.read_text().rsplit(") ", 1)[1][0] == "Z"
    elif "sleep" in program:
        assert (tmp_path / "found.json").read_text() == "part"


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        **options,
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sevenb"], "choose from: smoke, tests"),
        (["--seconds", "0"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], told: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and told in done.stderr


DOCUMENT = {
    "kind": "throughput",
    "environment": {"gpu": "NVIDIA H200", "date": "2030-01-02T03:04:05+00:00", "command": "scripts/gpu 7b"},
    "settings": {"dry_run": False},
    "notes": [],
    "complete": True,
    "rows": [
        {"case": "decode 1 × 128 after 64", "subject": "depth 0", "metric": "tokens/s", "value": 200.0}
        | dict.fromkeys(("low", "high", "ratio", "ratio_low", "ratio_high", "verdict"))
    ],
}


def test_a_dry_run_and_an_empty_folder_make_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.report([str(tmp_path)]) == 2
    assert "holds no result" in capsys.readouterr().err
    for change in ({"settings": {"dry_run": True}}, {"settings": {}}, {"environment": {"gpu": None}}):
        (tmp_path / "7b.json").write_text(json.dumps(DOCUMENT | change))
        assert report.report([str(tmp_path)]) == 2
        assert "nothing in it was measured" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_written(tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), "kernels", "mixed", "--dry-run", "--out", str(tmp_path)]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        ends = time.monotonic() + 120
        while not (tmp_path / "kernels.json").exists() and time.monotonic() < ends and running.poll() is None:
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=30)
    finally:
        running.kill()
    assert running.returncode == 130 and "interrupted" in errors
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["rows"] and not found["complete"] and found["settings"]["dry_run"] is True


@pytest.mark.slow
def test_the_dry_run_runs_to_its_end(tmp_path: Path) -> None:
    done = run("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "run.json").read_text())
    assert told["dry_run"] is True and list(told["parts"]) == list(plan.NAMES)
    for part in plan.PARTS:
        for name in part.jobs:
            found = json.loads((tmp_path / f"{name}.json").read_text())
            assert found["rows"] and found["complete"] and found["settings"]["dry_run"] is True
    refused = run("report", str(tmp_path))
    assert refused.returncode == 2 and "dry run" in refused.stderr
