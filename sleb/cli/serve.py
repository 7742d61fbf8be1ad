"""`sleb serve`: a server for every depth of a pruned model, by the APIs of OpenAI, Anthropic and Ollama."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from sleb.cli.options import DEMO, DemoModel
from sleb.cli.settings import with_settings
from sleb.engine.config import EngineConfig
from sleb.engine.requests.tier import make_tiers
from sleb.layer_map.layer_map import LayerMap
from sleb.models.resolve import shipped_map
from sleb.server.names import check_depths
from sleb.server.options import ServeOptions

if TYPE_CHECKING:
    from sleb.engine.engine import Engine


@with_settings("serve")
def serve(model: DemoModel = DEMO, *, engine: EngineConfig, options: ServeOptions) -> None:
    """Serve a model, at one depth or several, by the APIs of OpenAI, Anthropic and Ollama.

    With no arguments: the demo, SmolLM2-135M-Instruct with its own map at depths 0, 3 and 6; the first time it is
    fetched, under a progress bar.
    """
    from sleb.server.logs import unblock_stderr

    unblock_stderr()
    check_depths(options.names, _tiers(engine))
    from sleb.server.run import listen
    from sleb.server.run import serve as run_server

    sock = listen(options)  # before torch, which takes seconds to import
    code = run_server(
        sock, engine, options, make_engine=_load_engine if options.log_format == "text" else None
    )
    if code:
        raise typer.Exit(code)


def _tiers(config: EngineConfig) -> list[int]:
    """The depths that will be served: a bad map, or a depth that it lacks, is told before torch, which takes seconds to
    import. Raises as the engine does."""
    chosen = shipped_map(str(config.model)) if config.layer_map is None else config.layer_map
    if chosen is None or chosen == "none":
        return list(config.tiers or (0,))
    layer_map = chosen if isinstance(chosen, LayerMap) else LayerMap.find(chosen)
    tiers = make_tiers(layer_map, "", config.tiers, shipped=config.layer_map is None)
    return [tier.depth for tier in tiers]


def _load_engine(config: EngineConfig) -> Engine:
    """The engine of `config`, under a progress bar on standard error."""
    from sleb.cli.progress import LoadingBar
    from sleb.engine.engine import Engine

    with LoadingBar() as bar:
        return Engine(
            replace(config, on_progress=bar.update, on_tuning=bar.show_tuning, on_capture=bar.update_capture)
        )
