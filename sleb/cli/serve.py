"""`sleb serve`: an OpenAI-compatible server for every depth of a pruned model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from sleb.cli.options import Model
from sleb.cli.settings import with_settings
from sleb.engine.config import EngineConfig
from sleb.server.options import ServeOptions

if TYPE_CHECKING:
    from sleb.engine.engine import Engine


@with_settings("serve")
def serve(model: Model, engine: EngineConfig, options: ServeOptions) -> None:
    """Serve a model, at one depth or several, behind an OpenAI-compatible API."""
    from sleb.server.run import bind_socket
    from sleb.server.run import serve as run_server

    sock = bind_socket(options.host, options.port)  # before torch, which takes seconds to import
    code = run_server(
        sock, engine, options, make_engine=_load_engine if options.log_format == "text" else None
    )
    if code:
        raise typer.Exit(code)


def _load_engine(config: EngineConfig) -> Engine:
    """The engine of `config`, under a progress bar on standard error."""
    from sleb.cli.progress import LoadingBar
    from sleb.engine.engine import Engine

    with LoadingBar() as bar:
        return Engine(
            replace(config, on_progress=bar.update, on_tuning=bar.show_tuning, on_capture=bar.update_capture)
        )
