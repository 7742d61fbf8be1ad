"""What `sleb bench kernels` is asked to measure; importing it takes no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sleb.benchmarks.turns import TurnOptions
from sleb.errors import ConfigError
from sleb.kernels.names import DTYPE_ALIASES, DTYPES, check_device
from sleb.options import option, option_of

OPS = (
    *("add_norm", "rope_store", "gated_activate", "activate", "decode_attention", "prefill_attention"),
    *("greedy", "log_softmax_gather", "sample", "linear"),
    *("linear_activate", "linear_add", "linear_rope_store"),
)
BACKENDS = ("torch", "triton", "flash", "varlen")


@dataclass(frozen=True)
class KernelsOptions(TurnOptions):
    """Which operators, on what. Few turns: a sample is many launches already."""

    repetitions: int = option_of(TurnOptions, "repetitions", 7)
    max_repetitions: int | None = option_of(TurnOptions, "max_repetitions", unset="as --repetitions")
    ops: Sequence[str] = option((), "Operators.", choices=OPS, unset="all")
    backends: Sequence[str] = option(
        (), "flash and varlen are attention alone.", choices=BACKENDS, unset="all that the device may run"
    )
    dtype: str = option(
        "auto",
        "auto: bfloat16; float32 on a CPU.",
        choices=("auto", *DTYPES),
        aliases=tuple(DTYPE_ALIASES),
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")

    @property
    def most(self) -> int:
        return self.max_repetitions or self.repetitions

    def check(self) -> None:
        """Raises ConfigError for the first value that cannot be."""
        super().check()
        check_device(self.device)
        for name, values in (("--ops", self.ops), ("--backends", self.backends)):
            if len(set(values)) < len(values):
                raise ConfigError(f"{name} names one twice ({', '.join(values)}); name each once")
