"""Writes a report of results: Markdown, one HTML file, plots, and the results themselves."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sleb.benchmarks.reports import markdown, page
from sleb.benchmarks.reports.choosing import (
    fronts_section,
    method_speed_section,
    methods_section,
    search_section,
)
from sleb.benchmarks.reports.document import Block, Bullets, Code, Figure, Heading, Paragraph, Section
from sleb.benchmarks.reports.engines import kernels_section, peers_section
from sleb.benchmarks.reports.facts import environment_tables, notices
from sleb.benchmarks.reports.figures import draw_figures, draw_tradeoffs, slug
from sleb.benchmarks.reports.kinds import TITLES, Result
from sleb.benchmarks.reports.quality import formats_section, prune_section, quality_section
from sleb.benchmarks.reports.serving import serve_section
from sleb.benchmarks.reports.shown import plural
from sleb.benchmarks.reports.speed import (
    http_section,
    mixed_section,
    throughput_section,
    transformers_section,
)
from sleb.benchmarks.reports.summary import depth_sentences, is_about
from sleb.errors import ConfigError
from sleb.files import check_writable, write_text

_SECTIONS: dict[str, Callable[[Result], Section]] = {
    "throughput": throughput_section,
    "serve": serve_section,
    "peers": peers_section,
    "transformers": transformers_section,
    "mixed": mixed_section,
    "http-overhead": http_section,
    "quality": quality_section,
    "weight-formats": formats_section,
    "fronts": fronts_section,
    "methods": methods_section,
    "method-speed": method_speed_section,
    "search": search_section,
    "prune": prune_section,
    "kernels": kernels_section,
}


@dataclass(frozen=True)
class _Part:
    """What a report has of one result.

    Attributes:
        title: of its section, which no other has. stem: what the names of its plots begin with, as distinct.
        section: with notices of the run before all else.
    """

    title: str
    stem: str
    result: Result
    section: Section

    @property
    def label(self) -> str:
        """Model and weights, as distinct as the title; that itself where there are none."""
        return self.title.removeprefix(f"{TITLES[self.result.kind]}: ")


def check_report(directory: Path) -> None:
    """Raises ConfigError, before hours are spent, if a report cannot be written into `directory`; makes the folder."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        check_writable(directory / "report.html")
    except OSError as error:
        # Path.is_file raises where the system does not let it look.
        reason = "it is a file" if os.path.isfile(directory) else error.strerror
        raise ConfigError(
            f"report folder {directory} cannot be made ({reason}); name a folder that is yours"
        ) from None


def write_report(directory: Path, results: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Writes report.md, report.html, results.json and plots into `directory`, and says so.

    results: as the benchmarks' --json writes them, of any kinds. The same results give the same files. Raises
    ConfigError for what is no result, and where the folder cannot be written.
    """
    write_results(
        directory, [Result.of(data, f"result {at + 1}") for at, data in enumerate(results)], console
    )


def write_results(directory: Path, results: Sequence[Result], console: Console) -> None:
    """As `write_report`, for results whose kind is known and that have the names of their files."""
    if not results:
        raise ConfigError("no result is given; name at least one")
    # Whatever is wrong with a result is to be told before anything is written.
    parts = _parts(sorted(results, key=lambda result: list(TITLES).index(result.kind)))
    title = _title([part.result for part in parts])
    before, after = _beginning(title, parts), _ending(parts)
    check_report(directory)
    blocks: list[Block] = [*before, *_tradeoffs(directory, parts)]
    for part in parts:
        blocks += [Heading(part.title, 2), *part.section.blocks, *_figures(directory, part)]
    blocks += after
    plots = {
        block.stem: (directory / f"{block.stem}.svg").read_text(encoding="utf-8")
        for block in blocks
        if isinstance(block, Figure)
    }
    write_text(directory / "report.md", markdown.render(blocks))
    write_text(directory / "report.html", page.render(title, blocks, plots))
    write_text(directory / "results.json", _all_results(results))
    written = "report.html, report.md, results.json"
    if plots:
        written += f" and {plural(len(plots), 'plot')} (.png, .svg)"
    console.print(
        f"Report of {plural(len(results), 'result')} in {directory}: {written}.",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _all_results(results: Sequence[Result]) -> str:
    """A list with a result a line: samples may be many."""
    lines = [json.dumps(result.data, allow_nan=False, ensure_ascii=False) for result in results]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def _parts(results: Sequence[Result]) -> list[_Part]:
    titles = _distinct([result.title for result in results], "{} ({})")
    # Titles that differ may be the same when they are cut and written small.
    stems = _distinct([slug(title) for title in titles], "{}-{}")
    return [
        _Part(title, stem, result, _section(result))
        for title, stem, result in zip(titles, stems, results, strict=True)
    ]


def _section(result: Result) -> Section:
    with result.reading():
        section, lines = _SECTIONS[result.kind](result), notices(result)
    return Section(section.summary, [Bullets(lines), *section.blocks]) if lines else section


def _distinct(names: Sequence[str], numbered: str) -> list[str]:
    """The names; one that is there already gets the next number that makes it another, in the form of `numbered`."""
    found: list[str] = []
    for name in names:
        number, free = 1, name
        while free in found:
            number += 1
            free = numbered.format(name, number)
        found.append(free)
    return found


def _title(results: Sequence[Result]) -> str:
    models = list(dict.fromkeys(result.model for result in results if result.model))
    return f"Benchmark report: {', '.join(models)}" if models else "Benchmark report"


def _beginning(title: str, parts: Sequence[_Part]) -> list[Block]:
    """The heading, and in a sentence each what was found: whose it is, where there are several of a kind."""
    summary = depth_sentences([(part.label, part.result) for part in parts])
    kinds = Counter(part.result.kind for part in parts)
    for part in parts:
        whose = f"{part.label}: " if kinds[part.result.kind] > 1 else ""
        summary += [f"{whose}{line}" for line in part.section.summary]
    return [Heading(title, 1), *([Bullets(summary)] if summary else [])]


def _ending(parts: Sequence[_Part]) -> list[Block]:
    """What was measured on what, by which commands."""
    blocks: list[Block] = [Heading("Environment", 2)]
    blocks += environment_tables([(part.title, part.result) for part in parts])
    blocks.append(Heading("Commands", 2))
    for part in parts:
        blocks.append(Paragraph(f"{part.title}:"))
        command = part.result.command
        blocks.append(Code(command) if command else Paragraph("The command was not recorded."))
    blocks.append(Paragraph("results.json, beside this file, holds the results whole, with every sample."))
    return blocks


def _figures(directory: Path, part: _Part) -> list[Figure]:
    with part.result.reading():
        return draw_figures(part.result, directory, part.stem)


def _tradeoffs(directory: Path, parts: Sequence[_Part]) -> Iterator[Figure]:
    """Speedup against perplexity, for every pair of results of one model."""
    qualities = [part.result for part in parts if part.result.kind == "quality"]
    for part in parts:
        matching = [each for each in qualities if is_about(each, part.result)]
        for number, quality in enumerate(matching if part.result.kind == "throughput" else (), start=1):
            # The number is in the middle: at the end it may be one that makes stems distinct.
            name = "tradeoff" if number == 1 else f"tradeoff-{number}"
            with part.result.reading():
                found = draw_tradeoffs(part.result, quality, directory / f"{name}-{part.stem}")
            if found is not None:
                yield found
