"""What README and docs/ show exists: make targets, commands and flags, public names, files."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import sleb
from sleb import cli
from sleb.benchmarks.old import load
from sleb.benchmarks.quality.questions import QUESTIONS
from sleb.layer_map.layer_map import LayerMap, shipped_maps
from sleb.models.aliases import ALIASES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = {
    path: path.read_text("utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
TEXT = "\n".join(PAGES.values())
BLOCKS = re.findall(r"^ *```(\w+)\n(.*?)^ *```", TEXT, re.MULTILINE | re.DOTALL)
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", TEXT, flags=re.MULTILINE | re.DOTALL))


def shell_lines() -> list[str]:
    """Every command of the shell blocks, comments and leading variables off, continued lines joined."""
    text = "\n".join(body for language, body in BLOCKS if language == "sh").replace("\\\n", " ")
    lines = [re.sub(r"\s#.*", "", line).strip() for line in text.splitlines()]
    return [re.sub(r"^([A-Z_]+=\S+\s+)+", "", line) for line in lines if line]


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The click command that `sleb WORDS…` reaches, and the words left for it."""
    command, rest = cli.build(), words
    while rest and hasattr(command, "get_command"):
        found = command.get_command(command.make_context("sleb", [], resilient_parsing=True), rest[0])
        assert found is not None, (
            f"README shows 'sleb {' '.join(words)}', but there is no command '{rest[0]}'"
        )
        command, rest = found, rest[1:]
    return command, rest


def options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    shown = [line for line in (*shell_lines(), *SPANS) if line.startswith("make ")]
    assert {"make serve", "make test"} <= set(shown)
    for line in shown:
        named = [word for word in shlex.split(line)[1:] if "=" not in word]
        assert named, line
        assert set(named) <= targets, line


def test_make_variables_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for line in (*shell_lines(), *SPANS):
        if line.startswith("make "):
            for name in re.findall(r"\b([A-Z]+)=", line):
                assert re.search(rf"^{name}\s*\?=", makefile, re.MULTILINE), line


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("sleb ")])
def test_shown_commands_parse(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.json").write_text("{}")  # an argument that must exist
    command, rest = find_command(shlex.split(line.replace("MODEL", "smollm2"))[1:])
    with contextlib.suppress(typer.Exit), command.make_context("sleb", rest):  # --how answers and ends
        pass


@pytest.mark.parametrize("span", [span for span in SPANS if span.startswith("sleb ")])
def test_named_commands_exist(span: str) -> None:
    words = shlex.split(span)[1:]
    if words[0] == "COMMAND":
        return
    command, rest = find_command(words)
    flags = {word for word in rest if word.startswith("-")}
    assert flags <= options(command), f"{span}: {command.name} has {sorted(options(command))}"


def test_the_readme_is_a_door() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1000


def test_the_readme_names_every_command() -> None:
    table = re.search(r"^\| command \|.*?\n\n", README, re.MULTILINE | re.DOTALL)
    assert table is not None
    assert set(re.findall(r"`sleb (\w+)`", table[0])) == set(cli.COMMANDS)


def test_flags_in_the_text_exist() -> None:
    """A flag belongs to some command, or to a tool that is named with it."""
    known = {"--extra-index-url", "--no-build-isolation"}  # of pip
    known |= {"--install-completion"}  # of every command that typer makes
    for name in cli.COMMANDS:
        command = cli.load_command(name)
        below = getattr(command, "commands", {"": command})
        known |= set().union(*(options(each) for each in below.values())) | {"--help"}
    for span in SPANS:
        if span.startswith(("scripts/", "aider ", "aiperf ", "curl ", "docker ")):  # theirs are their own
            continue
        for flag in re.findall(r"(?<!\S)(--[a-z][a-z-]*)", span):
            assert flag in known, f"{span}: no command has {flag}"


def test_python_examples_use_public_names() -> None:
    examples = [body for language, body in BLOCKS if language == "python"]
    assert examples
    for body in examples:
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module == "sleb":
                names = {alias.name for alias in node.names}
                assert names <= set(sleb.__all__)
                assert all(hasattr(sleb, name) for name in names)


def test_files_and_links_exist() -> None:
    for page, text in PAGES.items():
        links = re.findall(r"\]\(([^)#\s]+)", text)
        for link in (each for each in links if "://" not in each and each != "reference/options.md"):
            assert (page.parent / link).is_file(), f"{page.name} links to {link}, which is not there"
    for path in re.findall(r"benchmarks/results/[\w./-]*\w\.\w+", TEXT):
        assert (ROOT / path).is_file(), f"{path} is named, and is not there"


def test_extras_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for extra in re.findall(r'\."?\[(\w+)\]', TEXT):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


# A row of the README's table -> what was measured, and which of ours.
PEERS = {
    "vLLM": "vllm",
    "llama.cpp": "llamacpp-bf16",
    "OpenVINO GenAI": "openvino",
    "transformers": "transformers",
}
LOADS = {
    "1 stream": ("decode 1 × 128 after 64", "sleb bf16"),
    "8 streams": ("generate 8 × 128 after 64", "sleb bf16"),
    "8 streams, 6 of 30 blocks removed, no patches": ("generate 8 × 128 after 64", "sleb bf16 depth 6"),
}


def test_the_figures_of_the_table_are_measured() -> None:
    """Each ratio in the README is that of the newest result against other engines, rounded."""
    newest = max((ROOT / "benchmarks/results").glob("*-peers-smollm2-*.json"))
    measured = {(each.case, each.subject): each.ratio for each in load(newest).measurements}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in README.splitlines()
        if line.startswith("|") and re.search(r"\d\.\d", line)
    ]
    [heads] = [line for line in README.splitlines() if line.startswith("|") and "vLLM" in line]
    engines = [cell.strip() for cell in heads.strip("|").split("|")][1:]
    assert set(engines) == set(PEERS) and {row[0] for row in rows} == set(LOADS)
    for label, *cells in rows:
        case, ours = LOADS[label]
        for engine, cell in zip(engines, cells, strict=True):
            ratio = measured[f"{case} beside {PEERS[engine]}", ours]
            figure = re.search(r"\d+\.\d+", cell)
            assert figure is not None and ratio is not None
            decimals = len(figure[0].partition(".")[2])
            assert figure[0] == f"{ratio.estimate:.{decimals}f}", f"{label}, {engine}: {ratio.estimate}"


def test_the_first_example_is_one_that_is_answered_rightly() -> None:
    """By the tier that answers without a model's name, with the sampling that is served."""
    found = re.search(r"-d '(\{.*?\})'", README, re.DOTALL)
    assert found is not None
    body = json.loads(found[1])
    assert body.keys() == {"model", "messages", "max_tokens"} and body["model"] == "smollm2"
    assert LayerMap.load(shipped_maps()["smollm2-135m-instruct"]).depth == 0
    [message] = body["messages"]
    result = load(ROOT / "benchmarks/results/2026-11-30-questions-smollm2-demo.json")
    [sampled] = [each for each in result.measurements if each.metric == "right sampled"]
    served = result.settings["sampling"]
    assert sampled.facts["depth"] == 0 and served == {**served, **ALIASES["smollm2"].sampling}
    missed = [row["question"] for row in sampled.facts["wrong"]]
    page = (ROOT / "server/page/app.js").read_text("utf-8")
    suggested = json.loads(re.findall(r"^const EXAMPLES = (\[.*?\]);", page, re.MULTILINE | re.DOTALL)[0])
    for question in (message["content"], *suggested):
        assert question in QUESTIONS and question not in missed
    assert f"{result.settings['question_samples']} of 100" in README


def test_the_tables_of_the_benchmarks_page_are_those_of_the_results() -> None:
    command = [sys.executable, str(ROOT / "scripts/benchmark-docs"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
