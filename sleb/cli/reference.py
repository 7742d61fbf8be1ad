"""The page of all commands and their options, for the documentation."""

from __future__ import annotations

from typing import Any

from rich.markup import render

from sleb.cli import COMMANDS, load_command

_INTRO = """\
# Options

Every command, as `sleb COMMAND --help` tells it. A list may be given as `0,3,6`, as `0-3`, or by the flag several
times. Each option of `sleb serve` can also be a variable of the environment (`SLEB_PORT` for `--port`) or a line below
`[serve]` in the TOML file of `--config-file`: flags go before variables, those before the file. The engine's options
of `sleb serve` are arguments of `LLM`, those of `sleb prune` of `prune`: `--max-model-len` is `max_model_len`.
"""


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
