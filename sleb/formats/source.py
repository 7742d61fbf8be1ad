"""The model that is exported, and the map that says what goes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sleb.engine.model.architecture import DecoderSpec, resolve_spec
from sleb.errors import ConfigError
from sleb.formats.removal import Removal
from sleb.layer_map.layer_map import LayerMap
from sleb.models.aliases import ALIASES
from sleb.models.resolve import resolve_config, resolve_model


@dataclass(frozen=True)
class Source:
    """`path`: its folder. `hub_id`: of a hub repository. `gguf`: the file that MODEL names. `shipped`: its own map."""

    path: Path
    name: str
    spec: DecoderSpec
    hub_id: str | None = None
    gguf: Path | None = None
    shipped: Path | None = None

    @property
    def reference(self) -> str:
        """What another tool on this machine opens it by."""
        return self.hub_id or str(self.path.resolve())


def open_source(model: str, *, weights: bool = True, progress: bool = True) -> Source:
    """MODEL as for every command; without `weights` only the config.json of a hub repository is fetched."""
    resolved = (
        resolve_model(model, progress=progress) if weights else resolve_config(model, progress=progress)
    )
    given = Path(model).expanduser()
    return Source(
        resolved.path,
        resolved.name,
        resolve_spec(resolved.path),
        hub_id=None if model in ALIASES or given.exists() else model,
        gguf=given if given.is_file() and model not in ALIASES else None,
        shipped=resolved.layer_map,
    )


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
    loaded = chosen if isinstance(chosen, LayerMap) else LayerMap.load(chosen)
    loaded.check_model(
        num_blocks=source.spec.num_blocks, fingerprint=source.spec.fingerprint, model=source.name
    )
    return Removal(loaded, loaded.depth if depth is None else depth)
