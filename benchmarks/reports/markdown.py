"""Blocks as Markdown, as GitHub and CommonMark read it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sleb.benchmarks.reports.document import Block, Bullets, Code, Figure, Heading, Paragraph, Table

# An underscore inside a word, as in avx512_bf16, means nothing.
_SPECIAL = re.compile(r"[\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w)")
_LINE_START = re.compile(r"^(#{1,6}(?=\s|$)|[-+=](?=[\s=-]|$)|\d+(?=[.)](\s|$)))")


def escape(text: str) -> str:
    """Text that stands in a line, with nothing in it that Markdown would take for its own."""
    return _SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))


def escape_line(text: str) -> str:
    """As `escape`, for text that a line begins with."""
    shown = escape(text)
    found = _LINE_START.match(shown)
    if found is None:
        return shown
    end = found.end() if found[0].isdigit() else 0
    return f"{shown[:end]}\\{shown[end:]}"


def table_lines(table: Table) -> list[str]:
    """Heading, rule, and a line a row."""
    rule = ["---"] * len(table.left) + ["---:"] * len(table.right)
    lines = [[escape(cell) for cell in row] for row in (table.headings, *table.rows)]
    # An empty cell takes one space, not two.
    shown = ["|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines]
    return [shown[0], f"|{'|'.join(rule)}|", *shown[1:]]


def render(blocks: Sequence[Block]) -> str:
    """The whole document, a newline at its end."""
    return "\n\n".join(_block(block) for block in blocks) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {escape(text)}"
        case Paragraph(text):
            return escape_line(text)
        case Bullets(items):
            return "\n".join(f"- {escape_line(item)}" for item in items)
        case Code(text):  # indented: no fence that the text could end
            return "\n".join(f"    {line}" for line in text.splitlines() or [""])
        case Table():
            return "\n".join(table_lines(block))
        case Figure(stem, caption):
            return f"![{escape(caption)}]({stem}.png)\n\n{escape_line(caption)}"
