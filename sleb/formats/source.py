"""The model that is exported, and the map that says what goes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sleb.engine.model.architecture import DecoderSpec, resolve_spec
from sleb.errors import ConfigError
from sleb.formats.removal import Removal
from sleb.layer_map.layer_map import LayerMap
from sleb.models.aliases import ALIASES
from sleb.models.config import is_known, model_fingerprint, read_config
from sleb.models.resolve import gguf_file, resolve_config, resolve_model
from sleb.pruning.transformers_scorer import read_architecture


@dataclass(frozen=True)
class Source:
    """`path`: its folder. `hub_id`: of a hub repository. `gguf`: the file that MODEL is. `shipped`: its own map."""

    path: Path
    name: str
    hub_id: str | None = None
    gguf: Path | None = None
    shipped: Path | None = None

    @cached_property
    def known(self) -> bool:
        """Whether the engine knows the architecture."""
        return is_known(read_config(self.path))

    @cached_property
    def spec(self) -> DecoderSpec:
        """Raises ModelError where the engine does not know the architecture."""
        return resolve_spec(self.path)

    @cached_property
    def fingerprint(self) -> str:
        return self.spec.fingerprint if self.known else model_fingerprint(read_config(self.path))

    @cached_property
    def num_blocks(self) -> int:
        return self.spec.num_blocks if self.known else int(read_architecture(self.path).num_hidden_layers)

    @property
    def reference(self) -> str:
        """What another tool on this machine opens it by."""
        return self.hub_id or str(self.path.resolve())


def open_source(model: str, *, weights: bool = True, progress: bool = True) -> Source:
    """MODEL as for every command; without `weights` only the config.json of a hub repository is fetched.

    Raises ModelError, also for a config.json that is wrong.
    """
    resolved = (
        resolve_model(model, progress=progress) if weights else resolve_config(model, progress=progress)
    )
    given = Path(model).expanduser()
    source = Source(
        resolved.path,
        resolved.name,
        hub_id=None if model in ALIASES or given.exists() else model,
        gguf=None if model in ALIASES else gguf_file(given),
        shipped=resolved.layer_map,
    )
    assert source.num_blocks  # a configuration that is wrong is told of before all else
    return source


def choose_removal(
    source: Source, layer_map: LayerMap | str | os.PathLike[str] | None, depth: int | None
) -> Removal:
    """The map at `depth`, by default the alias's own map and the depth that it recommends.

    Raises ConfigError without a map, LayerMapError for one of a model of another shape.
    """
    chosen = source.shipped if layer_map is None else layer_map
    if chosen is None:
        raise ConfigError(
            f"{source.name} comes with no layer map: name one with --layer-map, or make one with `sleb prune`"
        )
    loaded = chosen if isinstance(chosen, LayerMap) else LayerMap.find(chosen)
    loaded.check_model(
        num_blocks=source.num_blocks,
        fingerprint=source.fingerprint,
        model=source.name,
        parallel=source.known and source.spec.parallel,
    )
    return Removal(loaded, loaded.depth if depth is None else depth)
