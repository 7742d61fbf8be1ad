"""Finding the units that a model can do without, and patches for them; what it offers loads torch when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleb.pruning.patch_map import patch, run_patching
    from sleb.pruning.run import prune, run_pruning

__all__ = ["patch", "prune", "run_patching", "run_pruning"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    from sleb.pruning import patch_map, run

    return getattr(patch_map if name in patch_map.__all__ else run, name)
