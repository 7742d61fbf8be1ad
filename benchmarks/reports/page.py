"""Blocks as one HTML file: styles and plots inside, no script, nothing fetched."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from sleb.benchmarks.reports.document import Block, Bullets, Code, Figure, Heading, Paragraph, Table

_STYLE = """\
:root { color-scheme: light dark; --text: #1b1e23; --soft: #5a626d; --line: #d8dce2; --back: #ffffff;
  --raised: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --soft: #a2abb6; --line: #3a4048; --back: #15181c; --raised: #1e2227; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 64rem; color: var(--text); background: var(--back);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p, ul { max-width: 46rem; }
ul { padding-left: 1.25rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem .3rem 0; text-align: left; vertical-align: top; white-space: nowrap; }
td.long { white-space: normal; min-width: 16rem; }
th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line); }
th.right, td.right { text-align: right; padding: .3rem 0 .3rem .75rem; }
tbody tr + tr td { border-top: 1px solid var(--line); }
tbody tr.same td { border-top: 0; }
pre { overflow-x: auto; padding: .75rem 1rem; background: var(--raised); border-radius: 6px; font-size: .85rem; }
figure { margin: 1.5rem 0; }
figure svg { display: block; width: 100%; max-width: 46rem; min-width: 27rem; height: auto; }
figure text { fill: currentColor; }
figcaption { color: var(--soft); font-size: .875rem; max-width: 46rem; }
@media print { h2, figure, tr { break-inside: avoid; } body { max-width: none; } }
"""
_LONG = 60  # characters of a cell that may break into lines


def render(title: str, blocks: Sequence[Block], plots: Mapping[str, str]) -> str:
    """The file's text. plots: SVG files by the stem of their figure."""
    body = []
    for index, block in enumerate(blocks):
        body.append(
            _figure(block, plots[block.stem], f"p{index}-") if isinstance(block, Figure) else _block(block)
        )
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}</style>"
    )
    inside = "\n".join(body)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{inside}\n</body>\n</html>\n'


def _block(block: Heading | Paragraph | Bullets | Code | Table) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>"
        case Code(text):
            return f"<pre><code>{escape(text)}</code></pre>"
        case Table():
            return _table(block)


def _table(table: Table) -> str:
    num_left = len(table.left)
    head = "".join(_cell("th", text, at >= num_left) for at, text in enumerate(table.headings))
    lines = []
    for row in table.rows:
        cells = "".join(_cell("td", text, at >= num_left) for at, text in enumerate(row))
        # A blank first cell means: the same as above.
        lines.append(f"<tr>{cells}</tr>" if row[0] else f'<tr class="same">{cells}</tr>')
    inside = f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>"
    # Focusable, so that a keyboard can scroll it.
    return f'<div class="scroll" tabindex="0"><table>\n{inside}\n</table></div>'


def _cell(tag: str, text: str, right: bool) -> str:
    names = [
        name for name, wanted in (("right", right), ("long", tag == "td" and len(text) > _LONG)) if wanted
    ]
    attribute = f' class="{" ".join(names)}"' if names else ""
    return f"<{tag}{attribute}>{escape(text)}</{tag}>"


def _figure(figure: Figure, svg: str, prefix: str) -> str:
    caption = escape(figure.caption)
    return (
        f'<figure><div class="scroll" tabindex="0">{inline_svg(svg, prefix, figure.caption)}</div>\n'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def inline_svg(svg: str, prefix: str, label: str) -> str:
    """A plot of `sleb.benchmarks.plots` for the inside of a page: no names of its own outside, colours of the page.

    prefix: goes before every id, since a page has several plots. label: what it shows, for those who cannot see it.
    """
    inside = svg[svg.index("<svg") :]
    inside = re.sub(r"<metadata>.*?</metadata>\s*", "", inside, flags=re.DOTALL)
    inside = re.sub(r"\sxmlns(:\w+)?=\"[^\"]*\"", "", inside)
    inside = inside.replace("xlink:href=", "href=")
    inside = re.sub(r"(\sid=\"|\shref=\"#|url\(#)", rf"\g<1>{prefix}", inside)
    inside = inside.replace("fill: #ffffff", "fill: none")
    inside = re.sub(r"#(000000|444444)\b", "currentColor", inside)
    return inside.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1).strip()
