"""`scripts/gpu`: collects and imports where a GPU machine lacks the rest, ends in time, keeps what was written."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/gpu"
sys.path.append(str(ROOT / "scripts"))

from gpu_parts import report  # noqa: E402
from gpu_parts.run import NAMES, PARTS, Part, limit, perform  # noqa: E402
from gpu_parts.run import run as begin  # noqa: E402
from gpu_parts.speed import TooLargeError, fitting_weights  # noqa: E402

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
import gpu_parts.report, gpu_parts.run, gpu_parts.smoke, gpu_parts.speed, gpu_parts.suite
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
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.search(r"(\d+)/\d+ tests collected", done.stdout)
    assert found is not None and int(found[1]) > 1000 and "error" not in done.stdout.lower().splitlines()[-1]


def test_the_parts_share_the_time() -> None:
    for total in (800.0, 100.0):
        left, given = total, []
        for place in range(len(PARTS)):  # if each takes all of its time
            given.append(limit(PARTS[place:], left))
            left -= given[-1]
        assert given == pytest.approx([part.seconds * total / 800 for part in PARTS])
    # The first took no time: its share went to all others.
    assert limit(PARTS[1:], 800) == pytest.approx(PARTS[1].seconds * 800 / (800 - PARTS[0].seconds))
    assert limit(PARTS, -1.0) == 0


def ended(folder: Path, *programs: str) -> list[str]:
    """What `perform` says of these programs, with four seconds for all; each may write a file."""
    names = [f"job{number}" for number in range(len(programs))]
    commands = [
        [sys.executable, "-c", program, str(folder / name)]
        for name, program in zip(names, programs, strict=True)
    ]
    return perform(Part("part", 1, names), commands, 4.0, folder, dict(os.environ))


def state_of(stat: Path) -> str:
    """A process's letter; none for one that is gone."""
    try:
        return stat.read_text().rsplit(") ", 1)[1][0]
    except OSError:
        return ""


def test_processes_end_in_time(tmp_path: Path) -> None:
    began = time.monotonic()
    good = "open(sys.argv[1], 'w').write('whole')"
    # It writes what it has when it is asked to end.
    listens = (
        "try:\n time.sleep(60)\nexcept KeyboardInterrupt:\n open(sys.argv[1], 'w').write('part'); sys.exit(1)"
    )
    # It does not listen, nor does its child.
    deaf = (
        "signal.signal(2, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open(sys.argv[1], 'w').write(str(child.pid)); time.sleep(60)"
    )
    programs = [f"import signal, subprocess, sys, time\n{each}" for each in (good, listens, deaf)]
    assert ended(tmp_path, *programs) == [f"job{number}: not done in 4 s" for number in (1, 2)]
    assert time.monotonic() - began < 15
    assert (tmp_path / "job0").read_text() == "whole" and (tmp_path / "job1").read_text() == "part"
    child, ends = Path(f"/proc/{(tmp_path / 'job2').read_text()}/stat"), time.monotonic() + 20
    while (
        state_of(child) not in ("", "Z") and time.monotonic() < ends
    ):  # a kill takes effect when it is scheduled
        time.sleep(0.05)
    assert state_of(child) in ("", "Z")


def test_a_crash_is_told_and_the_others_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    programs = (
        "import os; os.kill(os.getpid(), 11)",
        "import sys; print('no memory'); sys.exit(3)",
        "import sys, time; time.sleep(0.3); open(sys.argv[1], 'w').write('whole')",
    )
    assert ended(tmp_path, *programs) == ["job0: ended by signal 11", "job1: exit status 3"]
    assert (tmp_path / "job2").read_text() == "whole" and "no memory" in capfd.readouterr().out


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


def test_a_folder_is_refused_that_cannot_be_written_or_that_another_run_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    assert begin(PARTS, 1.0, file, True) == 2
    assert "error: " in (told := capsys.readouterr().err) and str(file) in told and "--out" in told
    kept = tmp_path / "smoke-int8.json"
    kept.touch()
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert begin(PARTS, 1.0, tmp_path, True) == 2
    assert "another scripts/gpu" in capsys.readouterr().err and kept.exists()


def test_a_lost_connection_leaves_no_process(tmp_path: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, str(SCRIPT), "mixed", "--dry-run", "--out", str(tmp_path)], stderr=subprocess.PIPE
    )
    ends, child = time.monotonic() + 60, Path(f"/proc/{running.pid}/task/{running.pid}/children")
    while not (found := child.read_text().split()) and time.monotonic() < ends:
        time.sleep(0.05)
    running.send_signal(signal.SIGHUP)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130 and b"interrupted" in errors
    assert found and not Path(f"/proc/{found[0]}").exists()


def test_a_shape_is_int8_or_left_out_where_the_gpu_is_small(tmp_path: Path) -> None:
    cases = {("llama-2-7b", 22): "auto", ("llama-2-7b", 15): "int8"}
    cases |= {("llama-2-70b", 139): "auto", ("llama-2-70b", 79): "int8"}
    for (config, memory), weights in cases.items():
        assert fitting_weights(config, memory << 30) == weights
    with pytest.raises(TooLargeError, match="left out: llama-2-70b in int8 takes") as error:
        fitting_weights("llama-2-70b", 22 << 30)
    (tmp_path / "70b.log").write_text(f"{error.value}\n")
    assert report.summary(tmp_path, ["70b"]) == str(error.value)


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
    assert report.report(tmp_path) == 2
    assert "holds no result" in capsys.readouterr().err
    for change in ({"settings": {"dry_run": True}}, {"settings": {}}, {"environment": {"gpu": None}}):
        (tmp_path / "7b.json").write_text(json.dumps(DOCUMENT | change))
        assert report.report(tmp_path) == 2
        assert "nothing in it was measured" in capsys.readouterr().err


def test_what_was_measured_becomes_results_and_tables(tmp_path: Path) -> None:
    root, folder = tmp_path / "root", tmp_path / "gpu"
    for name in ("scripts", "docs", "benchmarks/results"):
        shutil.copytree(ROOT / name, root / name)
    (root / "sleb").symlink_to(ROOT / "sleb")
    old = root / "benchmarks/results/2029-01-01-gpu-7b-h200.json"
    old.write_text(json.dumps(DOCUMENT))
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "7b.json").write_text(json.dumps(DOCUMENT))
    for name in ("smoke-int8", "smoke-int4"):
        rows = [{**DOCUMENT["rows"][0], "case": name}]
        (folder / f"{name}.json").write_text(json.dumps(DOCUMENT | {"kind": "gpu smoke", "rows": rows}))
    command = [sys.executable, str(root / "scripts/gpu"), "report", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.name: json.loads(path.read_text()) for path in old.parent.glob("*-gpu-*.json")}
    assert set(made) == {"2030-01-02-gpu-7b-h200.json", "2030-01-02-gpu-smoke-h200.json"}
    assert [row["case"] for row in made["2030-01-02-gpu-smoke-h200.json"]["rows"]] == [
        "smoke-int4",
        "smoke-int8",
    ]
    page = (root / "docs/hardware.md").read_text()
    assert "| decode 1 × 128 after 64 | depth 0 | 200 |" in page and "NVIDIA H200" in page
    assert "gpu-70b" not in page.replace("*-gpu-70b-*", "")  # nothing is shown where nothing was measured


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_was_written(tmp_path: Path, number: signal.Signals) -> None:
    words = [sys.executable, str(SCRIPT), "kernels", "mixed", "--dry-run", "--out", str(tmp_path)]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        ends = time.monotonic() + 120
        while not (tmp_path / "kernels.json").exists() and time.monotonic() < ends and running.poll() is None:
            time.sleep(0.1)
        running.send_signal(number)
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
    assert told["dry_run"] is True and list(told["parts"]) == list(NAMES)
    for part in PARTS:
        for name in (name for name in part.jobs if not name.startswith("warm-")):
            found = json.loads((tmp_path / f"{name}.json").read_text())
            assert found["rows"] and found["complete"] and found["settings"]["dry_run"] is True
    refused = run("report", str(tmp_path))
    assert refused.returncode == 2 and "dry run" in refused.stderr
