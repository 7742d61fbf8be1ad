"""Writes a report of results: Markdown, one HTML file, plots, and the results themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sleb.benchmarks.report import check_writable, write_text
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


def check_report(directory: Path) -> None:
    """Raises ConfigError, before hours are spent, if a report cannot be written into `directory`; makes the folder."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if directory.is_file() else error.strerror
        raise ConfigError(
            f"report folder {directory} cannot be made ({reason}); name a folder that is yours"
        ) from None
    check_writable(directory / "report.html")


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
    ordered = sorted(results, key=lambda result: list(TITLES).index(result.kind))
    titled = list(zip(_distinct([result.title for result in ordered]), ordered, strict=True))
    sections = [_section(result) for result in ordered]  # before anything is written
    check_report(directory)
    blocks = list(_document(directory, titled, sections))
    plots = {
        block.stem: (directory / f"{block.stem}.svg").read_text(encoding="utf-8")
        for block in blocks
        if isinstance(block, Figure)
    }
    write_text(directory / "report.md", markdown.render(blocks))
    write_text(directory / "report.html", page.render(_title(ordered), blocks, plots))
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


def _section(result: Result) -> Section:
    with result.reading():
        return _SECTIONS[result.kind](result)


def _distinct(titles: Sequence[str]) -> list[str]:
    """The titles, with a number after those that are not the first of their name."""
    seen: dict[str, int] = {}
    found = []
    for title in titles:
        seen[title] = seen.get(title, 0) + 1
        found.append(title if seen[title] == 1 else f"{title} ({seen[title]})")
    return found


def _title(results: Sequence[Result]) -> str:
    models = list(dict.fromkeys(result.model for result in results if result.model))
    return f"Benchmark report: {', '.join(models)}" if models else "Benchmark report"


def _document(
    directory: Path, titled: Sequence[tuple[str, Result]], sections: Sequence[Section]
) -> Iterator[Block]:
    results = [result for _, result in titled]
    yield Heading(_title(results), 1)
    summary = [*depth_sentences(results), *(line for section in sections for line in section.summary)]
    if summary:
        yield Bullets(summary)
    yield from _tradeoffs(directory, titled)
    for (title, result), section in zip(titled, sections, strict=True):
        yield Heading(title, 2)
        with result.reading():
            if lines := notices(result):
                yield Bullets(lines)
            yield from section.blocks
            yield from draw_figures(result, directory, slug(title))
    yield Heading("Environment", 2)
    yield from environment_tables(titled)
    yield Heading("Commands", 2)
    for title, result in titled:
        yield Paragraph(f"{title}:")
        yield Code(result.command) if result.command else Paragraph("The command was not recorded.")
    yield Paragraph("results.json, beside this file, holds the results whole, with every sample.")


def _tradeoffs(directory: Path, titled: Sequence[tuple[str, Result]]) -> Iterator[Figure]:
    """Speedup against perplexity, for every pair of results of one model."""
    qualities = [result for _, result in titled if result.kind == "quality"]
    for title, speed in titled:
        matching = [each for each in qualities if is_about(each, speed)]
        for number, quality in enumerate(matching if speed.kind == "throughput" else ()):
            suffix = f"-{number + 1}" if number else ""
            stem = directory / f"tradeoff-{slug(title)}{suffix}"
            with speed.reading():
                found = draw_tradeoffs(speed, quality, stem)
            if found is not None:
                yield found
