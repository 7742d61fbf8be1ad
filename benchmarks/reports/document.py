"""A report before it is written down: blocks of plain text, which the writers of Markdown and HTML escape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """level: 1 is the document's own."""

    text: str
    level: int


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """A line as it is typed."""

    text: str


@dataclass(frozen=True)
class Table:
    """left, right: headings of columns, by how they are aligned; those on the left come first."""

    left: Sequence[str]
    right: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def headings(self) -> list[str]:
        """Of all columns."""
        return [*self.left, *self.right]

    def without_empty(self) -> Table:
        """Without the columns in which no row says anything."""
        kept = [at for at in range(len(self.headings)) if any(row[at] for row in self.rows)]
        left = [self.left[at] for at in kept if at < len(self.left)]
        right = [self.headings[at] for at in kept if at >= len(self.left)]
        return Table(left, right, [[row[at] for at in kept] for row in self.rows])


@dataclass(frozen=True)
class Figure:
    """A plot that lies beside the report as `stem`.png and `stem`.svg; caption: what it shows."""

    stem: str
    caption: str


Block = Heading | Paragraph | Bullets | Code | Table | Figure


@dataclass(frozen=True)
class Section:
    """What a report says of one result: summary, sentences for its top; blocks, what follows the heading."""

    summary: Sequence[str]
    blocks: Sequence[Block]


def unrepeated(rows: Sequence[Sequence[str]], num_columns: int = 1) -> list[Sequence[str]]:
    """Rows in which the first columns are blank where they say what the row above says."""
    shown: list[Sequence[str]] = []
    previous: Sequence[str] = ()
    for row in rows:
        same = list(row[:num_columns]) == list(previous[:num_columns])
        shown.append([*([""] * num_columns), *row[num_columns:]] if same else row)
        previous = row
    return shown
