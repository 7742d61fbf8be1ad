"""What a calibration is made of: `wiki.txt`, `chats.jsonl:messages`, `wiki.txt=0.7,self=0.3`.

A source is a data set, "self" (text that the model writes) or a file, of which a table has a column after a colon.
Several, with commas between them, are a mix; a number after "=" is a source's weight, 1 where there is none. Whatever
exists as a file under its whole name is that file, commas, colons and equals signs included.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from sleb.errors import ConfigError

DATASETS = ("wikitext2", "c4")
GENERATED = "self"
TABLES = (".jsonl", ".parquet")
DEFAULT_COLUMN = "text"


@dataclass(frozen=True)
class SourceSpec:
    """One source.

    Attributes:
        name: a data set, "self" or the path of a file.
        column: of a table; None for what has no columns.
        label: as it was asked for, but of a path only the last name: what records and messages call it.
        weight: its share of a mix is in proportion to it.
    """

    name: str
    column: str | None
    label: str
    weight: Fraction = Fraction(1)

    @property
    def is_file(self) -> bool:
        return self.name not in (*DATASETS, GENERATED)


def parse_source(source: str | Path) -> tuple[SourceSpec, ...]:
    """The sources of a mix, or the only one. Raises ConfigError for what does not exist or is malformed."""
    whole = _find_whole(str(source))
    if whole is not None:
        return (whole,)
    specs = tuple(_parse_part(part.strip(), str(source)) for part in str(source).split(","))
    seen: set[tuple[str, str | None]] = set()
    for spec in specs:
        key = (os.path.realpath(spec.name) if spec.is_file else spec.name, spec.column)
        if key in seen:
            raise ConfigError(
                f"calibration {str(source)!r} names {spec.name} twice: name it once, with a larger weight"
            )
        seen.add(key)
    return specs


def is_generated(source: str | Path) -> bool:
    """Whether the model writes the text, or some of it."""
    return any(spec.name == GENERATED for spec in parse_source(source))


def label(specs: Sequence[SourceSpec]) -> str:
    """The whole source as it was asked for, without folders."""
    return ",".join(spec.label for spec in specs)


def shares(specs: Sequence[SourceSpec], num_windows: int) -> list[int]:
    """`num_windows` shared out in proportion to the weights, by largest remainder; the first wins a tie."""
    total = sum(spec.weight for spec in specs)
    quotas = [spec.weight * num_windows / total for spec in specs]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(specs)), key=lambda at: counts[at] - quotas[at])
    for at in by_remainder[: num_windows - sum(counts)]:
        counts[at] += 1
    return counts


def _parse_part(part: str, source: str) -> SourceSpec:
    if not part:
        raise ConfigError(f"calibration {source!r} names an empty source: leave the comma out")
    name, _, weight = part.rpartition("=")
    weighted = None if _find_whole(part) else _find(name.strip())
    if weighted is not None:
        weight = weight.strip()
        return replace(weighted, weight=_parse_weight(weight, part), label=f"{weighted.label}={weight}")
    found = _find(part)
    if found is None:
        raise ConfigError(
            f"calibration {part!r} is neither a data set ({', '.join(DATASETS)}) nor a file that exists, nor "
            f"{GENERATED} (text that the model writes); a column follows a colon, as chats.jsonl:messages, "
            "and a weight an equals sign, as wiki.txt=0.7"
        )
    return found


def _parse_weight(text: str, part: str) -> Fraction:
    try:
        # float first: 1e999999999 must not become a fraction
        weight = Fraction(text) if 0 < float(text) < math.inf else Fraction(0)
    except ValueError:
        weight = Fraction(0)
    if not weight:
        raise ConfigError(f"weight {text!r} of calibration {part!r} must be a number above 0, like 0.7")
    return weight


def _find_whole(text: str) -> SourceSpec | None:
    """The data set or file whose whole name is `text`, if there is one."""
    if text in (*DATASETS, GENERATED):
        return SourceSpec(text, None, text)
    if not os.path.exists(text):
        return None
    return SourceSpec(text, DEFAULT_COLUMN if _is_table(text) else None, Path(text).name)


def _find(text: str) -> SourceSpec | None:
    """The source called `text`, a column after its name included, if there is one."""
    path, colon, column = text.rpartition(":")
    whole = _find_whole(text)
    if whole is not None or not (colon and os.path.exists(path)):
        return whole
    if not _is_table(path):
        raise ConfigError(
            f"calibration {text!r} names a column of a file that has none: "
            f"leave :{column} out, or give a {' or '.join(TABLES)} file"
        )
    return SourceSpec(path, column, f"{Path(path).name}:{column}")


def _is_table(path: str) -> bool:
    return path.lower().endswith(TABLES)
