"""From options dataclasses to commands: values, help, completion, and what is told of a wrong one."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import pytest
import typer

from sleb import cli
from sleb.cli.options import Model, OptionsCommand, with_options
from sleb.errors import ConfigError
from sleb.options import check_values, option, option_of


@dataclass(frozen=True)
class Engine:
    model: str
    dtype: str = option(
        "auto", "Of activations.", choices=("auto", "float32"), aliases=("fp32",), group="Weights"
    )
    threads: int | None = option(
        None, "CPU threads.", unset="one a physical core", minimum=1, group="Weights"
    )
    share: float = option(0.9, "Of the memory.", minimum=0.01, maximum=1)
    overlap: bool | None = option(None, "Launch early.", unset="on a GPU")
    tiers: Sequence[int] | None = option(None, "Depths to serve.", minimum=0)


@dataclass(frozen=True)
class Output:
    json_path: Path = option(MISSING, "Where it goes.", flags=("--json",))
    tests: tuple[str, ...] = option(("prompt",), "What runs.", choices=("prompt", "decode"))
    text: tuple[str, ...] = option((), "Texts [in brackets].", flags=("-t",))
    tasks: tuple[str, ...] = option((), "Tasks.", commas=True)
    increase: float | str | None = option(None, "5% or 0.05.")
    dtype: str = "not an option"

    def check(self) -> None:
        if self.text and not self.tasks:
            raise ConfigError("text needs tasks")


@pytest.fixture
def run(monkeypatch, capsys):
    """run(words) -> the options that the command got, or (exit code, standard error)."""
    got = []

    @with_options
    def measure(model: Model, engine: Engine, output: Output, depth: int = 3) -> None:
        """Measure it.

        A second paragraph, which goes over
        two lines.
        """
        got.append((model, engine, output, depth))

    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    single.command(name="show", cls=OptionsCommand)(measure)
    monkeypatch.setattr(cli, "load_command", lambda name: typer.main.get_command(single))

    def call(words):
        monkeypatch.setattr(sys, "argv", ["sleb", "show", *words.split()])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return got.pop() if got else (int(stopped.value.code or 0), capsys.readouterr())

    return call


def test_every_kind_of_value(run):
    model, engine, output, depth = run(
        "smollm2 --json out/a.json --dtype fp32 --threads 2 --share 1 --no-overlap --tiers 0-2,6 --tiers 9 "
        "--tests decode,prompt -t a,b --text c --tasks x,y --increase 5% --depth 4"
    )
    assert model == "smollm2"
    assert depth == 4
    assert engine == Engine("smollm2", "fp32", 2, 1.0, False, (0, 1, 2, 6, 9))
    assert output == Output(Path("out/a.json"), ("decode", "prompt"), ("a,b", "c"), ("x", "y"), "5%")
    assert output.dtype == "not an option"


def test_what_is_not_given_has_the_default_of_the_dataclass(run):
    assert run("smollm2 --json x")[1:] == (Engine("smollm2"), Output(Path("x")), 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dtype float64", "--dtype 'float64' is not known; choose one of: auto, float32 (or fp32)"),
        ("--tests x", "--tests 'x' is not known; choose one of: prompt, decode"),
        ("--threads 0", "--threads is 0; it must be an integer of at least 1"),
        ("--threads two", "--threads is 'two'; it must be an integer of at least 1"),
        ("--threads 1.5", "--threads is '1.5'; it must be an integer"),
        ("--share nan", "--share is nan; it must be a number from 0.01 to 1"),
        ("--share 2", "--share is 2.0; it must be a number from 0.01 to 1"),
        ("--tiers 0,x", "--tiers is 'x'; it must be a list of integers of at least 0, such as 0,3,6"),
        ("--tiers 3-0", "--tiers is '3-0'"),
        ("--tiers=-1", "--tiers is -1; it must be an integer of at least 0"),
        ("--text x", "text needs tasks"),
        ("--nonesuch", "No such option: --nonesuch; `sleb show --help` lists what there is"),
    ],
)
def test_what_is_wrong_is_one_line(run, words, message):
    code, captured = run(f"smollm2 --json x {words}")
    assert (code, captured.out) == (2, "")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Missing argument 'MODEL'"),
        ("smollm2", "Missing option '--json'"),
        ("smollm3 --json x", "'smollm3' is no model: give a folder that exists, a .gguf file, a hub id"),
        ("./nowhere --json x", "there is no file or folder './nowhere': check the path"),
    ],
)
def test_what_is_missing_is_one_line(run, words, message):
    code, captured = run(words)
    assert code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_help_fits_80_columns_in_panels_with_choices_and_defaults(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    _, captured = run("--help")
    assert max(map(len, captured.out.splitlines())) <= 80
    assert "─ Weights ─" in captured.out and "A second paragraph, which goes over two lines." in captured.out
    text = " ".join(captured.out.replace("│", " ").split())
    for part in (
        "--dtype NAME Of activations. (auto, float32) [auto]",
        "--threads N CPU threads. [one a physical core]",
        "--[no-]overlap Launch early. [on a GPU]",
        "--tiers N,… Depths",
        "Texts [in brackets].",
        "* --json PATH Where it goes. [required]",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "x"}, "dtype 'x' is not known"),
        ({"threads": True}, "threads is True; it must be an integer of at least 1"),
        ({"threads": 2.0}, "threads is 2.0"),
        ({"threads": "2"}, "threads is '2'"),
        ({"share": math.inf}, "share is inf"),
        ({"overlap": 1}, "overlap is 1; it must be true or false"),
        ({"tiers": 3}, "tiers is 3; it must be a list of integers of at least 0"),
        ({"tiers": "0,3"}, "tiers is '0,3'"),
        ({"tiers": [0, 1.5]}, "tiers is 1.5"),
    ],
)
def test_python_gets_the_same_checks(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_values(Engine("m", **changes))
    check_values(Engine("m", threads=2, share=1, overlap=True, tiers=[0, 3]))


def test_an_option_of_another_dataclass_is_the_same_but_for_what_is_changed():
    @dataclass
    class Mine:
        dtype: str = option_of(Engine, "dtype", "float32", group="Model")

    (mine,) = fields(Mine)
    assert mine.default == "float32"
    assert mine.metadata["option"].choices == ("auto", "float32")
    assert mine.metadata["option"].group == "Model"


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("json_path is 9; ask for less", "--json is 9; ask for less"),
        ("threads is 9, but json_path holds 4", "--threads is 9, but --json holds 4"),
        ("overlap needs a GPU", "--overlap needs a GPU"),
        ("dtype 'x' is not known", "--dtype 'x' is not known"),
        ("threads of others are many; share is no word here", None),
        ("/tmp/json_path/a and json_path.txt cannot be read", None),
        ("--json is 9", None),
    ],
)
def test_an_error_from_inside_names_the_flag(monkeypatch, capsys, told, shown):
    @with_options
    def measure(engine: Engine, output: Output, model: Model = "m") -> None:
        raise ConfigError(told)

    single = typer.Typer(add_completion=False)
    single.command(name="show", cls=OptionsCommand)(measure)
    monkeypatch.setattr(cli, "load_command", lambda name: typer.main.get_command(single))
    monkeypatch.setattr(sys, "argv", ["sleb", "show", "smollm2", "--json", "a"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {shown or told}\n"
