"""`sleb doctor`: checks of any OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sleb.errors import ConfigError

NOT_PASSED = 1


def doctor(
    url: Annotated[str, typer.Argument(help="The server's address, such as http://127.0.0.1:8000/v1.")],
    api_key: Annotated[
        str | None, typer.Option(help="The server's key.", envvar=["SLEB_API_KEY", "OPENAI_API_KEY"])
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Id of the model to ask.", show_default="the server's first")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A group of checks; repeatable.", show_default="all")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for all results.", show_default="none")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Count also what sleb promises beyond OpenAI's description.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds of silence that a request may take.")] = 120.0,
) -> None:
    """Check how a server keeps the OpenAI-compatible contract.

    Exit status: 0 if all required checks pass, 1 if not, 2 if the server cannot be reached. A check of what only
    sleb promises "differs" where another server does otherwise; that fails nothing without --strict.
    """
    if not 0 < timeout <= 86400:
        raise ConfigError(f"--timeout is {timeout:g}; it must be above 0 and at most 86400 seconds")

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from sleb.client.connection import base_url, open_client
    from sleb.doctor.check import Check
    from sleb.doctor.report import print_report, write_json
    from sleb.doctor.run import choose_checks, connect, examine
    from sleb.files import check_writable
    from sleb.terminal import Console

    checks = choose_checks(only or ())
    if json_file is not None:
        check_writable(json_file)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with open_client(base_url(url), api_key, timeout) as http:
        target = connect(http, model, api_key)
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("", total=len(checks))
            done = -1

            def show(check: Check) -> None:
                nonlocal done
                done += 1
                bar.update(task, completed=done, description=f"{check.group}: {check.name}")

            examination = examine(target, checks, show, strict=strict)
    print_report(examination, Console(highlight=False))
    if json_file is not None:
        write_json(examination, json_file)
    if examination.problems:
        raise typer.Exit(NOT_PASSED)
