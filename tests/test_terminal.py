"""What a file, a model or a server wrote reaches a terminal without the characters that command it."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from sleb.cli import main
from sleb.layer_map.layer_map import LayerMap, Unit
from sleb.terminal import Console, escaped, tell

HOSTILE = "a\x1b]0;title\x07\x1b[2J\x9b31m\x7f\x00b"
SHOWN = r"a\x1b]0;title\x07\x1b[2J\x9b31m\x7f\x00b"


def commands(text):
    """The characters in it that a terminal obeys, tabs and line ends apart (ECMA-48: C0, DEL and C1)."""
    return [char for char in text if char not in "\t\n" and (ord(char) < 32 or 127 <= ord(char) < 160)]


def run(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sleb", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_escapes_are_python_s():
    assert escaped(HOSTILE) == SHOWN
    assert escaped("ä\tb\r\nc 世界 👩‍👩‍👧 \u202eعربي") == "ä\tb\nc 世界 👩‍👩‍👧 \u202eعربي"
    assert escaped("name\udcff\r") == r"name\udcff\r"


@pytest.mark.parametrize("make", [str, Text, lambda text: Text(text, style="bold red"), Table])
def test_a_console_sends_only_its_own_sequences(make):
    """On a terminal, with colours: what is left without rich's own styles has no control character."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor", width=200)
    shown = make(HOSTILE)
    if isinstance(shown, Table):
        shown = Table(title=Text(HOSTILE))
        shown.add_column(HOSTILE)
        shown.add_row(Text(HOSTILE))
    console.print(shown, markup=False, highlight=False)
    plain = file.getvalue().replace("\x1b[0m", "").replace("\x1b[1;31m", "").replace("\x1b[3m", "")
    assert commands(plain.replace("\x1b[1m", "")) == []
    assert r"\x1b]0;title" in plain  # shown, not left out


def test_a_bar_too():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system=None, width=200)
    with Progress(TextColumn("{task.description}", markup=False), console=console) as bar:
        bar.add_task(HOSTILE)
    assert r"a\x1b]0;title" in file.getvalue()
    assert "\x1b]0" not in file.getvalue() and "\x9b" not in file.getvalue()


def test_show_of_a_map_whose_names_hold_escapes(tmp_path, capsys, monkeypatch):
    path = tmp_path / "map.json"
    LayerMap(model="tiny", fingerprint=None, num_blocks=4, removed=(Unit(1),), depth=1).save(path)
    content = json.loads(path.read_text()) | {"model": HOSTILE}
    path.write_text(json.dumps(content))
    _, out, err = run(capsys, monkeypatch, "show", path)
    assert commands(out + err) == []
    assert r"\x1b[2J" in out


@pytest.mark.parametrize("command", ["show", "fetch", "serve", "prune", "eval", "export"])
def test_errors_that_name_what_was_given(capsys, monkeypatch, command):
    code, out, err = run(capsys, monkeypatch, command, "./no\x1b[2J\x9b/model")
    assert code == 2
    assert commands(out + err) == []
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_warning_of_a_command_without_a_log(capsys, monkeypatch):
    """Python's own last resort prints it; libraries have handlers of their own."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging, "_defaultFormatter", logging._defaultFormatter)
    run(capsys, monkeypatch, "--version")
    logging.getLogger("sleb.models").warning("left out: %s", HOSTILE)
    library = logging.getLogger("a library's")
    monkeypatch.setattr(library, "handlers", [logging.StreamHandler()])
    monkeypatch.setattr(library, "propagate", False)
    library.warning(HOSTILE)
    assert capsys.readouterr().err == f"left out: {SHOWN}\n{SHOWN}\n"


def test_a_reader_that_has_gone_ends_no_command(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    console = Console(stderr=True)
    console.print("said to nobody")  # rich's own console raises SystemExit
    assert console.quiet
    tell("nor this")
