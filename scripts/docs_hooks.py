"""What the documentation site is made of besides docs/: the reference of all options, and the code's docstrings."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from rich.markup import render

from sleb.cli import COMMANDS, load_command

ROOT = Path(__file__).resolve().parent.parent
_copy = tempfile.TemporaryDirectory(prefix="sleb-docs-")
_INTRO = """\
# Options

Every command, as `sleb COMMAND --help` tells it. A list may be given as `0,3,6`, as `0-3`, or by the flag several
times. Each option of `sleb serve` can also be a variable of the environment (`SLEB_PORT` for `--port`) or a line below
`[serve]` in the TOML file of `--config-file`: flags go before variables, those before the file. The engine's options
of `sleb serve` are arguments of `LLM`, those of `sleb prune` of `prune`: `--max-model-len` is `max_model_len`.
"""


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Points mkdocstrings at a copy of the package: its reader follows no links and skips folders without __init__."""
    package = Path(_copy.name, "sleb")
    ignore = shutil.ignore_patterns("results", "page", "__pycache__", "*.so")
    shutil.copytree(ROOT / "sleb", package, symlinks=False, ignore=ignore, dirs_exist_ok=True)
    for folder in (package, *(path for path in package.rglob("*") if path.is_dir())):
        folder.joinpath("__init__.py").touch()
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_copy.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page that is made of the options' own dataclasses."""
    files.append(File.generated(config, "reference/options.md", content=options_page()))
    return files


def options_page() -> str:
    """The page in Markdown, made from the commands as they are now."""
    parts = [_INTRO]
    for name in COMMANDS:
        parts += _sections(f"sleb {name}", load_command(name))
    return "\n".join(parts)


def _sections(name: str, command: Any) -> list[str]:
    """The command's section, or those of the commands that it has."""
    if hasattr(command, "commands"):
        return [
            part for each in command.commands for part in _sections(f"{name} {each}", command.commands[each])
        ]
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    usage = " ".join([name, *(each.metavar or each.name.upper() for each in arguments), "[OPTIONS]"])
    parts = [f"## {name}\n", f"{render(command.help or '').plain}\n", f"    {usage}\n"]
    panels: dict[str, list[str]] = {}
    for each in command.params:
        panel = getattr(each, "rich_help_panel", None) or ""
        panels.setdefault(panel, []).append(_row(each))
    for panel, rows in panels.items():
        heading = [f"### {panel}\n"] if panel else []
        parts += [*heading, "| | |", "|---|---|", *rows, ""]
    return parts


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        names = f"`{parameter.metavar or parameter.name.upper()}`"
    else:
        value = f" {parameter.metavar}" if parameter.metavar else ""
        names = ", ".join(f"`{name}{value}`" for name in (*parameter.opts, *parameter.secondary_opts))
    text = render(parameter.help or "").plain.replace("|", "\\|")
    return f"| {names} | {' '.join(text.split())}{' **Required.**' if parameter.required else ''} |"
