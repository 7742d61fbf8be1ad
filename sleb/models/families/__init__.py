"""Families of models as data: one entry says what a decoder computes, how its tensors are named, in a checkpoint and in
a GGUF file, and which fields of its config.json are read.

A family that computes what another one does is one more entry in the file of its norms, and a line of
`tests/conftest.py`.
"""

from __future__ import annotations

from sleb.models.families.experts import EXPERTS
from sleb.models.families.family import Experts, Family, Formula, Gguf, TensorNames
from sleb.models.families.layer_norm import LAYER_NORM
from sleb.models.families.rms_norm import RMS_NORM

FAMILIES: dict[str, Family] = {family.architecture: family for family in (*RMS_NORM, *LAYER_NORM, *EXPERTS)}

__all__ = ["FAMILIES", "Experts", "Family", "Formula", "Gguf", "TensorNames"]
