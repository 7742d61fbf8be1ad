"""Algorithm 1 of SLEB (Song et al., ICML 2024, arXiv:2402.09025): remove the unit missed least, repeat.

Block passes a window of a round over `a` blocks, all candidates computed on all windows: (a-1)(a-2)/2 for what runs
after each candidate, and at most a-2 for the trunk before them; the first round takes two more, for the loss of the
dense model. The reference implementation runs the a-1 other blocks for each of the a-2 candidates, (a-2)(a-1) passes.
With patches half of the windows are passed so; on the others, which fit, the passes are those of two trunks.
"""

from sleb.pruning.search.criterion import (
    UNIT_KINDS,
    candidate_units,
    check_num_remove,
    check_units,
    num_units,
)
from sleb.pruning.search.loop import search, search_rounds, total_loss
from sleb.pruning.search.model import (
    MODES,
    OBJECTIVES,
    Margin,
    PatchFit,
    ScoringModel,
    SearchCost,
    SearchProgress,
    SearchResult,
    SearchSettings,
)

__all__ = [
    "MODES", "OBJECTIVES", "UNIT_KINDS", "Margin", "PatchFit", "ScoringModel", "SearchCost", "SearchProgress",
    "SearchResult", "SearchSettings", "candidate_units", "check_num_remove", "check_units", "num_units", "search",
    "search_rounds", "total_loss",
]  # fmt: skip
