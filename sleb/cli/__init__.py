"""The command `sleb`: one module a command, imported only when that command runs, so that help is instant."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sleb.errors import SlebError
from sleb.terminal import LineFormatter, tell
from sleb.version import __version__

_UsageError: Any = typer.BadParameter.__mro__[1]  # typer has its own copy of click, whose names are private

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


@dataclass(frozen=True)
class Command:
    """A command before its module is imported.

    `target` is the module's function of that name, or, for a command with commands of its own, its
    `typer.Typer` called `app`.
    """

    module: str
    target: str
    summary: str


COMMANDS = {
    "fetch": Command("sleb.cli.fetch", "fetch", "Fetch a model and print its folder."),
    "prune": Command("sleb.cli.prune", "prune", "Search for the blocks to remove and write a layer map."),
    "patch": Command("sleb.cli.patch", "patch", "Fit patches to the removals of a layer map."),
    "show": Command("sleb.cli.show", "show", "Show which units a layer map keeps and removes."),
    "export": Command(
        "sleb.cli.export", "export", "Write a pruned model, or what it lacks, for other tools."
    ),
    "import": Command("sleb.cli.import_map", "import_file", "Turn another tool's list into a layer map."),
    "serve": Command("sleb.cli.serve", "serve", "Serve a model at one or more depths, to any client."),
    "batch": Command("sleb.cli.batch", "batch", "Answer many requests from a file into a folder."),
    "chat": Command("sleb.cli.chat", "chat", "Chat with a model behind any OpenAI-compatible server."),
    "doctor": Command("sleb.cli.doctor", "doctor", "Check a server against the OpenAI-compatible contract."),
    "bench": Command("sleb.cli.bench", "app", "Measure speed, dense against pruned."),
    "eval": Command("sleb.cli.eval", "evaluate", "Measure what each depth costs in quality."),
}


class LazyGroup(TyperGroup):
    """A click group that imports a command's module when the command is asked for, not when help lists it."""

    _only_names = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = COMMANDS.get(cmd_name)
        if command is None:
            return None
        if self._only_names:
            return _summary_only(cmd_name, command)
        return load_command(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._only_names = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._only_names = False


def _summary_only(name: str, command: Command) -> Any:
    stand_in = typer.Typer(add_completion=False)
    stand_in.command(name=name, help=command.summary)(lambda: None)
    return typer.main.get_command(stand_in)


def load_command(name: str) -> Any:
    """The click command called `name`, its module imported."""
    command = COMMANDS[name]
    target = getattr(import_module(command.module), command.target)
    if isinstance(target, typer.Typer):
        target.info.name = name
        target.info.help = target.info.help or command.summary
        return typer.main.get_group(target)
    from sleb.cli.options import OptionsCommand

    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command(name=name, cls=OptionsCommand)(target)
    return typer.main.get_command(single)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sleb {__version__}")
        raise typer.Exit


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Find a chain of shallower models in one search; serve every depth from one copy of the weights."""


def build() -> Any:
    """The click command of the whole tree."""
    return typer.main.get_command(app)  # which, other than get_group, completes in a shell


def main() -> None:
    """Runs `sleb` on the arguments of the process and exits.

    Exit codes: 0; 2 for what the user can mend (one line on standard error); 130 when interrupted. Anything else that
    is raised is a bug and keeps its traceback.
    """
    # Of handlers without one: Python's last resort where no logging is set up, those of transformers and the hub.
    logging._defaultFormatter = LineFormatter()  # type: ignore[attr-defined]
    try:
        sys.exit(build()(prog_name="sleb", standalone_mode=False))
    except _UsageError as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # help has been printed
            command = error.ctx.command_path if error.ctx else "sleb"
            _print_error(f"{error.format_message().rstrip('.')}; `{command} --help` lists what there is")
        sys.exit(USER_ERROR)
    except SlebError as error:
        _print_error(str(error))
        sys.exit(USER_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader, `head` say, has gone: nothing more to say, and no complaint at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _print_error(message: str) -> None:
    tell(f"error: {' '.join(message.split())}", "red")
