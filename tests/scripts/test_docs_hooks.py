"""The reference of options holds every command and every flag."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from sleb.engine.config import EngineConfig
from sleb.pruning.options import PruneOptions
from sleb.server.options import ServeOptions

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from docs_hooks import options_page


def test_every_option_has_a_row_with_its_help() -> None:
    page = options_page()
    sections = {part.split("\n")[0]: part for part in page.split("\n## ")}
    assert {"sleb fetch", "sleb serve", "sleb prune", "sleb bench throughput"} <= set(sections)
    for command, kinds in {"sleb serve": (EngineConfig, ServeOptions), "sleb prune": (PruneOptions,)}.items():
        for kind in kinds:
            for field in fields(kind):
                about = field.metadata.get("option")
                if about is None:
                    continue
                names = [flag for flag in about.flags if flag.startswith("--")]
                name = names[0] if names else f"--{field.name.replace('_', '-')}"
                starts = (f"| `{name}`", f"| `{name} ")
                (row,) = [line for line in sections[command].splitlines() if line.startswith(starts)]
                assert about.help in row
    assert "(auto, float32, bfloat16, float16) [auto]" in page
    assert "[/" not in page and "\\[" not in page
