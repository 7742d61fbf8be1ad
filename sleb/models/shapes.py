"""Shapes of well-known models that come with the package: their configs alone, for measuring with random weights.

The values are those of the config.json that the makers published on the Hugging Face hub.
"""

from __future__ import annotations

from pathlib import Path

from sleb.errors import ConfigError

_FOLDER = Path(__file__).parents[1] / "configs"


def shape_names() -> tuple[str, ...]:
    """The names of the shapes, in alphabetical order."""
    return tuple(sorted(path.parent.name for path in _FOLDER.glob("*/config.json")))


def shape_folder(name: str) -> Path:
    """The folder that holds the config.json of the shape `name`. Raises ConfigError that lists the names."""
    names = shape_names()
    if name not in names:
        raise ConfigError(f"shape '{name}' does not come with sleb; choose one of: {', '.join(names)}")
    return _FOLDER / name
