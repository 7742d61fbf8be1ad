"""Which units a search may remove, and how losses of units that save different amounts compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

from sleb.errors import ConfigError
from sleb.layer_map.units import Sublayer, Unit

Units = Literal["blocks", "sublayers", "attention"]
UNIT_KINDS: tuple[str, ...] = get_args(Units)
# Sums are compared with this much room, so that rounding never abandons a candidate that would have tied.
_ROUNDING = 1e-12


def check_units(units: str) -> None:
    """ConfigError for a kind of unit that does not exist."""
    if units not in UNIT_KINDS:
        raise ConfigError(f"units {units!r} do not exist: choose {', '.join(UNIT_KINDS)}")


def model_units(units: str, num_blocks: int) -> list[Unit]:
    """What runs, in order: blocks, or for the finer kinds the attention and the MLP of each."""
    if units == "blocks":
        return [Unit(block) for block in range(num_blocks)]
    return [Unit(block, part) for block in range(num_blocks) for part in ("attention", "mlp")]


def alive_units(units: str, num_blocks: int, removed: Iterable[Unit]) -> list[Unit]:
    """`model_units` without what is removed. Raises ConfigError for removed parts where whole blocks are units."""
    gone: set[Sublayer] = set()
    for unit in removed:
        if unit.block >= num_blocks or (units == "blocks" and unit.part != "block"):
            kind = "whole blocks" if units == "blocks" else units
            raise ConfigError(
                f"cannot continue after removing {unit}: the search removes {kind} of the model"
            )
        gone |= set(unit.sublayers)
    return [unit for unit in model_units(units, num_blocks) if not gone & set(unit.sublayers)]


def is_candidate(unit: Unit, units: str, num_blocks: int) -> bool:
    """Whether a unit may be removed: the first and the last block always stay, as in the paper."""
    return 0 < unit.block < num_blocks - 1 and (units != "attention" or unit.part == "attention")


def candidate_units(units: str, num_blocks: int) -> list[Unit]:
    """All that may be removed, in order."""
    return [unit for unit in model_units(units, num_blocks) if is_candidate(unit, units, num_blocks)]


def num_units(units: str, num_blocks: int) -> int:
    """How many units of that kind the model has; what a share like 20% is of."""
    return num_blocks * (2 if units == "sublayers" else 1)


def check_num_remove(num_remove: int, num_blocks: int, units: str = "blocks") -> None:
    """ConfigError unless there are that many candidates: the first and the last block always stay."""
    most = len(candidate_units(units, num_blocks))
    names = {"blocks": "blocks", "sublayers": "sublayers", "attention": "attention sublayers"}
    if not 1 <= num_remove <= most:
        whose = "the first and the last" if units == "blocks" else "those of the first and the last block"
        raise ConfigError(
            f"cannot remove {num_remove} of {num_units(units, num_blocks)} {names[units]}: {whose} always stay, "
            + (f"so ask for 1 to {most}" if most > 0 else "so a model needs at least 3 blocks")
        )


class Criterion:
    """Orders the candidates of a round: by the loss that a removal adds for what it saves.

    The score of a candidate is Δ / saving, with Δ its loss less the loss of the model as it stands; where the loss
    *falls* it is Δ · saving, so that saving more is better there too. With equal savings the order is that of the
    losses: Algorithm 1 of the paper.
    """

    def __init__(self, current_loss: float, savings: Mapping[Unit, float] | None = None) -> None:
        self.current_loss = current_loss
        self._savings = savings

    def saving(self, unit: Unit) -> float:
        return 1.0 if self._savings is None else self._savings[unit]

    def score(self, unit: Unit, loss: float) -> float:
        """Smaller is better. loss: of the whole calibration without `unit`."""
        if self._savings is None:
            return loss
        return self.weigh(unit, loss - self.current_loss)

    def weigh(self, unit: Unit, difference: float) -> float:
        """The score of a loss that is `difference` above the present one's."""
        saving = self.saving(unit)
        return difference / saving if difference > 0 else difference * saving

    def key(self, unit: Unit, loss: float) -> tuple[float, Unit]:
        """Sorts candidates: of equal scores the shallower goes first."""
        return self.score(unit, loss), unit

    def bound(self, unit: Unit, best_score: float) -> float:
        """The loss above which `unit` can no longer have the best score."""
        if self._savings is None:
            loss = best_score
        else:
            saving = self.saving(unit)
            loss = self.current_loss + (best_score * saving if best_score > 0 else best_score / saving)
        return loss + abs(loss) * _ROUNDING
