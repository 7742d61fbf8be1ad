"""What the documentation site is made of besides docs/: the reference of all options, and the code's docstrings."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

from sleb.cli.reference import options_page

ROOT = Path(__file__).resolve().parent.parent
_copy = tempfile.TemporaryDirectory(prefix="sleb-docs-")


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Points mkdocstrings at a copy of the package: its reader follows no links and skips folders without __init__."""
    package = Path(_copy.name, "sleb")
    ignore = shutil.ignore_patterns("results", "page", "__pycache__", "*.so")
    shutil.copytree(ROOT / "sleb", package, symlinks=False, ignore=ignore, dirs_exist_ok=True)
    for folder in (package, *(path for path in package.rglob("*") if path.is_dir())):
        folder.joinpath("__init__.py").touch()
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_copy.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page that is made of the options' own dataclasses."""
    files.append(File.generated(config, "reference/options.md", content=options_page()))
    return files
