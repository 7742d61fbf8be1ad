"""`sleb serve`: a server for every depth of a pruned model, by the APIs of OpenAI, Anthropic and Ollama."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from sleb.cli.options import DEMO, DemoModel
from sleb.cli.settings import with_settings
from sleb.engine.config import EngineConfig
from sleb.engine.requests.tier import choose_default, make_tiers
from sleb.layer_map.layer_map import LayerMap
from sleb.models.resolve import model_name, shipped_map
from sleb.server.names import ServedName, name_tiers
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
    _check_names(engine, options.names)
    from sleb.server.run import listen
    from sleb.server.run import serve as run_server

    sock = listen(options)  # before torch, which takes seconds to import
    code = run_server(
        sock, engine, options, make_engine=_load_engine if options.log_format == "text" else None
    )
    if code:
        raise typer.Exit(code)


def _check_names(config: EngineConfig, names: Sequence[ServedName]) -> None:
    """A bad map, a depth that it lacks and a name that cannot be given are told before torch, which takes seconds to
    import, and the model, which may take minutes to fetch. Raises as the engine and the server do."""
    model = str(config.model)
    chosen = shipped_map(model) if config.layer_map is None else config.layer_map
    if chosen is None or chosen == "none":
        layer_map = LayerMap.dense("", 1, None)
    else:
        layer_map = chosen if isinstance(chosen, LayerMap) else LayerMap.find(chosen)
    shipped = config.layer_map is None and chosen is not None
    tiers = make_tiers(layer_map, model_name(model).lower(), config.tiers, shipped)
    name_tiers(tiers, choose_default(tiers, layer_map), names)


def _load_engine(config: EngineConfig) -> Engine:
    """The engine of `config`, under a progress bar on standard error."""
    from sleb.cli.progress import LoadingBar
    from sleb.engine.engine import Engine

    with LoadingBar() as bar:
        return Engine(
            replace(config, on_progress=bar.update, on_tuning=bar.show_tuning, on_capture=bar.update_capture)
        )
