"""`sleb serve`: a server for every depth of a pruned model, by the APIs of OpenAI, Anthropic and Ollama."""

from __future__ import annotations

import typer

from sleb.cli.options import DEMO, DemoModel
from sleb.cli.progress import load_engine
from sleb.cli.settings import with_settings
from sleb.engine.config import EngineConfig
from sleb.server.names import planned_names
from sleb.server.options import ServeOptions


@with_settings("serve")
def serve(model: DemoModel = DEMO, *, engine: EngineConfig, options: ServeOptions) -> None:
    """Serve a model, at one depth or several, by the APIs of OpenAI, Anthropic and Ollama.

    With no arguments: the demo, SmolLM2-135M-Instruct with its own map at depths 0, 3 and 6; the first time it is
    fetched, under a progress bar.
    """
    from sleb.server.logs import unblock_stderr

    unblock_stderr()
    planned_names(engine, options.names, options.depth_policy)
    from sleb.server.run import listen
    from sleb.server.run import serve as run_server

    sock = listen(options)  # before torch, which takes seconds to import
    code = run_server(
        sock, engine, options, make_engine=load_engine if options.log_format == "text" else None
    )
    if code:
        raise typer.Exit(code)
