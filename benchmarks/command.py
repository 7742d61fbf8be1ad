"""What the benchmarks that are modules of their own share: `python -m sleb.benchmarks.NAME`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from sleb.errors import SlebError
from sleb.files import write_text


def run_command(main: Callable[..., None]) -> None:
    """Runs `main` with the command line's arguments; what a user can mend is one line and exit status 2."""
    try:
        typer.run(main)
    except SlebError as problem:
        typer.secho(f"error: {problem}", fg=typer.colors.RED, err=True)
        sys.exit(2)


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result file atomically. Raises ConfigError."""
    write_text(path, json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
