"""Windows of tokens for the search: from public data sets, files, conversations, and text that the model writes.

`spec` reads what was asked for (a source, or a mix of them with weights), `sources` opens it, `samplers` cut its
tokens into windows, and `windows` shares the windows out. What needs a model comes in as functions.
"""

from sleb.pruning.calibration.generated import Generate
from sleb.pruning.calibration.samplers import (
    DEFAULT_WINDOWS,
    NUM_ROWS,
    Sampler,
    adds_special_tokens,
    cut_windows,
    sample_rows,
    text_rows,
)
from sleb.pruning.calibration.sources import Render
from sleb.pruning.calibration.spec import DATASETS, GENERATED, is_generated
from sleb.pruning.calibration.windows import Calibration, calibration_windows, check_options, token_hash

__all__ = [
    "DATASETS",
    "DEFAULT_WINDOWS",
    "GENERATED",
    "NUM_ROWS",
    "Calibration",
    "Generate",
    "Render",
    "Sampler",
    "adds_special_tokens",
    "calibration_windows",
    "check_options",
    "cut_windows",
    "is_generated",
    "sample_rows",
    "text_rows",
    "token_hash",
]
