"""Finding the units that a model can do without; `prune` and `run_pruning` load torch when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleb.pruning.run import prune, run_pruning

__all__ = ["prune", "run_pruning"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    from sleb.pruning import run

    return getattr(run, name)
