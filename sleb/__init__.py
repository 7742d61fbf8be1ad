"""Find the blocks that a language model can do without, and serve every depth from one copy of the weights.

The public names are loaded when they are first used, so that `import sleb` stays quick and needs neither
torch nor a web framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sleb.version import __version__

if TYPE_CHECKING:
    from sleb.engine.llm import LLM
    from sleb.engine.requests.sampling_params import SamplingParams
    from sleb.layer_map.layer_map import LayerMap
    from sleb.pruning.run import prune

__all__ = ["LLM", "LayerMap", "SamplingParams", "__version__", "prune"]

# No module of the package may carry one of these names: importing `sleb.prune` would set the attribute
# `prune` of this package to the module and hide the function. Hence `sleb/pruning/run.py`.
_HOMES = {
    "LLM": "sleb.engine.llm",
    "LayerMap": "sleb.layer_map.layer_map",
    "SamplingParams": "sleb.engine.requests.sampling_params",
    "prune": "sleb.pruning.run",
}


def __getattr__(name: str) -> Any:
    """The public object called `name`, imported from its home on first use (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'sleb' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
