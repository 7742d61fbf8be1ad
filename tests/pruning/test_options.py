"""Options of prune name the words that the search and the calibration know."""

from __future__ import annotations

from typing import get_args

from sleb.options import options_of
from sleb.pruning.calibration import Sampler
from sleb.pruning.options import PruneOptions
from sleb.pruning.search import MODES, OBJECTIVES, UNIT_KINDS


def test_choices_are_what_there_is() -> None:
    choices = {name: set(about.choices) for name, (_, about) in options_of(PruneOptions).items()}
    assert choices["units"] == set(UNIT_KINDS)
    assert choices["objective"] == set(OBJECTIVES)
    assert choices["sampler"] == set(get_args(Sampler))
    assert {"exact", *choices["screen"]} == set(MODES)
