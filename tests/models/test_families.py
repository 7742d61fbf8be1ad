"""Families as data: each reads its own fields, and one entry is enough for a model that computes what exists."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sleb.engine.llm import LLM
from sleb.engine.model.architecture import resolve_spec
from sleb.models import families
from sleb.models.families import FAMILIES


def folder_with(source, target, **changes):
    """A copy of a model's folder whose config.json says something else."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


@pytest.mark.parametrize(
    "changes", [{"sliding_window": 4}, {"no_rope_layers": [0] * 6}, {"do_layer_norm_before": False}]
)
def test_a_field_that_the_family_does_not_name_is_not_read(tiny_model_dir, tmp_path, changes):
    """Nor does transformers' class of it."""
    spec = resolve_spec(folder_with(tiny_model_dir, tmp_path / "model", **changes))
    assert spec == replace(resolve_spec(tiny_model_dir), fingerprint=spec.fingerprint)


def test_one_entry_makes_a_family(tiny_model_dir, tmp_path, monkeypatch):
    """The weights of a Llama under the name and the config class of another architecture."""
    llama = FAMILIES["LlamaForCausalLM"]
    added = replace(llama, architecture="ArceeForCausalLM", model_type="arcee", gguf=None)
    folder = folder_with(
        tiny_model_dir,
        tmp_path / "model",
        architectures=["ArceeForCausalLM"],
        model_type="arcee",
        hidden_act="silu",
    )
    monkeypatch.setitem(families.FAMILIES, added.architecture, added)
    prompt = [5, 6, 7, 8, 9, 10]
    expected, found = (
        LLM(path, "none", dtype="float32", device="cpu", kernels="torch").score(prompt)
        for path in (tiny_model_dir, folder)
    )
    assert (expected == found).all()


def test_the_page_of_models_lists_every_architecture():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    assert {name for name in FAMILIES if f"`{name}`" not in page} == set()
