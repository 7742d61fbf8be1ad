"""The command's frame: what it prints, how it exits, what it does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

import sleb
from sleb import cli
from sleb.errors import LayerMapError

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `sleb` with the arguments in this process; returns its exit code."""

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["sleb", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return call


def stand_in(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Makes `sleb show` call `action`."""
    command = typer.Typer(add_completion=False)
    command.command(name="show")(action)
    monkeypatch.setattr(cli, "load_command", lambda name: typer.main.get_command(command))


def test_version(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"sleb {sleb.__version__}\n"


def test_help_lists_every_command(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert name in out
        assert command.summary.split()[0] in out


def test_help_imports_no_command() -> None:
    program = (
        "import sys\nsys.argv = ['sleb', '--help']\nfrom sleb.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'pydantic', 'numpy', 'huggingface_hub'}\n"
        "heavy |= {name for name in sys.modules if name.startswith('sleb.cli.')}\n"
        "print(*(heavy & set(sys.modules)), file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == []


@pytest.mark.parametrize(
    "arguments",
    [
        "prune --help",
        "serve --help",
        "prune smollm2 -o x --dtype float64",
        "prune smollm3 -o x",
        "serve smollm2 --tiers 0,x",
        "serve smollm2 --tiers 0,0",
        "serve smollm2 --tiers 0,99",
        "serve smollm2 --layer-map nowhere.json",
        "serve smollm2 --device tpu",
        "serve smollm3",
        "eval smollm3",
        "export smollm2 --format x",
        "show smollm2",
        "show smollm3",
    ],
)
def test_help_and_what_is_wrong_take_no_torch(arguments: str) -> None:
    program = (
        f"import sys\nsys.argv = ['sleb', *{arguments.split()!r}]\nfrom sleb.cli import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules, 'torch'"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    is_right = "--help" in arguments or arguments == "show smollm2"
    assert done.returncode == (0 if is_right else 2), done.stderr
    assert done.stderr.count("\n") == (0 if is_right else 1), done.stderr


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_loads_and_has_help(name: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name, "--help") == 0
    assert f"sleb {name}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("nonesuch",), ("--nonesuch",)])
def test_usage_errors_exit_2(
    arguments: tuple[str, ...], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert arguments[0] in capsys.readouterr().err


def test_an_error_of_ours_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise LayerMapError("depth 9 is not in the chain;\n  choose 0 to 8, [bold]or prune further")

    stand_in(monkeypatch, fail)
    assert run("show") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: depth 9 is not in the chain; choose 0 to 8, [bold]or prune further\n"


def test_an_interrupt_exits_130_without_a_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    stand_in(monkeypatch, interrupt)
    assert run("show") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    stand_in(monkeypatch, fail)
    monkeypatch.setattr(sys, "argv", ["sleb", "show"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_a_closed_pipe_is_quiet() -> None:
    """`sleb … | head -1` must not end in a traceback, whatever the reader leaves unread."""
    program = (
        "import typer\nfrom sleb import cli\n"
        "command = typer.Typer(add_completion=False)\n"
        "@command.command(name='show')\n"
        "def show() -> None:\n    for line in range(100_000): print(line)\n"
        "cli.load_command = lambda name: typer.main.get_command(command)\n"
        "import sys\nsys.argv = ['sleb', 'show']\ncli.main()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 1
    process.stderr.close()


def test_a_loading_bar_appears_with_the_first_weights_and_stays_off_standard_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sleb.cli.progress import LoadingBar

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with LoadingBar():
        pass
    assert capsys.readouterr() == ("", "")
    with LoadingBar() as bar:
        bar.update(0, 10)
        bar.update(10, 10)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "loading weights" in captured.err and "100%" in captured.err
