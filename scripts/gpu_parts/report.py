"""From the JSON files of a run to files of benchmarks/results, tables of the documentation, and lines for people."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
_MAY_BE_ABSENT = ("flash", "varlen")  # attention of others
_SHOWN = 12


def report(folder: Path) -> int:
    """Copies what was measured, under the names that results have; exit status 2 where nothing was."""
    from sleb.benchmarks.old import load
    from sleb.benchmarks.record import Result, write_result
    from sleb.errors import ConfigError

    found: dict[str, Result] = {}
    try:
        for path in sorted(folder.glob("*.json")):
            if path.name == "run.json":
                continue
            result = load(path)
            if result.settings.get("dry_run") is not False or not all(
                map(result.environment.get, ("gpu", "date"))
            ):
                raise ConfigError(f"{path} is of a dry run, or of no GPU: nothing in it was measured")
            name = path.stem.split("-")[0]
            if name in found:  # the processes of one part
                result.measurements = [*found[name].measurements, *result.measurements]
            found[name] = result
        if not found:
            raise ConfigError(f"{folder} holds no result; run scripts/gpu first, or name its --out folder")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, result in found.items():
        card = _slug(str(result.environment["gpu"]))
        for old in RESULTS.glob(f"*-gpu-{name}-{card}.json"):
            old.unlink()
        path = RESULTS / f"{result.environment['date'][:10]}-gpu-{name}-{card}.json"
        write_result(path, result)
        print(path.relative_to(ROOT))
    tables = [sys.executable, str(ROOT / "scripts/benchmark-docs"), "--tables"]
    if importlib.util.find_spec("rich") is None:
        print(f"the tables of docs/hardware.md need the package rich: install it, and run {' '.join(tables)}")
        return 1
    return subprocess.run(tables, check=False).returncode


def model() -> int:
    """What decode steps launch, and a model of their time: counted, on no GPU."""
    script = ROOT / "tests/engine/execute/nodes_model.py"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.json"
        done = subprocess.run([sys.executable, str(script), str(file)], check=False)
        if done.returncode:
            return done.returncode
        found = json.loads(file.read_text("utf-8"))
    for case, rows in itertools.groupby(found["rows"], key=lambda row: row["case"]):
        shown = [f"{row['value']:,.4g} {row['metric']}" for row in rows if row["value"] is not None]
        print(f"{case}: {', '.join(shown)}")
    print("\n".join(found["notes"]))
    return 0


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def summary(folder: Path, names: Sequence[str]) -> str:
    """What the results of these processes say, in a line: how many checks hold, what does not, how fast it is."""
    held, bad, speeds = 0, [], []
    for name in names:
        if name.startswith("warm-"):
            continue
        try:
            rows = json.loads((folder / f"{name}.json").read_text("utf-8"))["rows"]
        except (OSError, ValueError, KeyError):
            log = (folder / f"{name}.log").read_text("utf-8", "replace").splitlines()
            last = log[-1] if log else ""
            bad.append(last if last.startswith("left out") else f"{name} left no result")
            continue
        for row in rows:
            what = f"{row['case']}, {row['subject']}"
            if row["value"] is None and row["subject"] not in _MAY_BE_ABSENT:
                bad.append(f"{what}: {row.get('failed', 'failed')}"[:200])
            elif row.get("roofline_share") and row["subject"] not in ("torch", "control"):
                share = f"{row['roofline_share']:.0%} of roofline"
                speeds.append(f"{what} {row['value']:,.4g} {row['metric']} ({share})")
            else:
                held += row["value"] is not None
    return "; ".join([*([f"{held} figures"] if held else []), *bad, *speeds[:_SHOWN]])
