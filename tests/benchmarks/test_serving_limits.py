"""What `sleb bench serve` refuses before it sends anything, and what it never writes down."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from sleb.benchmarks.command import write_result
from sleb.benchmarks.load_dataset import DatasetPrompts
from sleb.benchmarks.load_prompts import Lengths
from sleb.benchmarks.serving_options import Level, ServeOptions, make_lengths, make_levels, shown_url
from sleb.cli.bench.serve import serve
from sleb.client.connection import base_url
from sleb.errors import ConfigError

URLS = ["http://127.0.0.1:1/v1"]
TWO = [*URLS, "http://127.0.0.1:2/v1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"levels": [Level(2), Level()], "duration": 10.0},
            "--rate inf sends all at once; give --num-requests",
        ),
        (
            {"levels": [Level(rate=1e5)], "duration": 11.0},
            "--rate 100000 for --duration 11 are 1,100,000 requests",
        ),
        ({"num_requests": 10**9}, "--num-requests is 1,000,000,000; it must be from 1 to 1,000,000"),
        ({"warmup": 10**7}, "--warmup is 10,000,000; it must be from 0 to"),
        ({"urls": TWO, "rounds": 10**9}, "--rounds is 1,000,000,000; it must be from 1 to 1,000"),
        (
            {"lengths": Lengths(10**12, 1)},
            "--prompt-tokens is 1,000,000,000,000; it must be from 1 to 1,048,576",
        ),
        ({"lengths": Lengths(8, 10**12)}, "--output-tokens is"),
        ({"lengths": Lengths(8, 1, 0.0, 10**12)}, "--prefix-tokens is"),
        (
            {"lengths": Lengths(8, 1, 0.0, 1, 10**9)},
            "--num-prefixes is 1,000,000,000; it must be from 1 to 10,000",
        ),
        ({"lengths": Lengths(8, 1, 0.0, 10**6, 10**4)}, "--num-prefixes times --prefix-tokens is"),
        ({"timeout": 1e10}, "--timeout is 10,000,000,000.0; it must be from 0.001 to 86,400 seconds"),
        ({"timeout": math.nan}, "--timeout is nan"),
        ({"duration": 1e5}, "--duration is 100,000.0"),
        ({"rounds": 3}, "--rounds are those of --compare"),
        ({"urls": TWO, "label": "x"}, "leave --label out"),
        ({"label": "x\udcff"}, r"--label 'x\\udcff' is no text in UTF-8"),
        ({"models": ["good", "\udcff"]}, r"--model '\\udcff' is no text in UTF-8"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ServeOptions(**{"urls": URLS, **changes})
    assert "\n" not in str(caught.value)


def test_the_most_that_is_taken() -> None:
    ServeOptions(
        TWO, rounds=1000, num_requests=1_000_000, lengths=Lengths(1 << 20, 1 << 20), timeout=86_400, warmup=0
    )
    ServeOptions(URLS, levels=[Level(10_000), Level(rate=1.0)], duration=86_400)
    assert make_levels(None, "0.001,100000,inf", 10_000)[1].default_requests == 1_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1e19", None, None), "--concurrency is '1e19'; it must be whole numbers from 1 to 10,000"),
        (("10001", None, None), "--concurrency is '10001'"),
        (
            (None, "1e308", None),
            "--rate is '1e308'; it must be requests a second from 0.001 to 100,000, or inf",
        ),
        ((None, "1e-9", None), "--rate is '1e-9'"),
        ((None, "1", 10**9), "--max-concurrency is 1,000,000,000; it must be from 1 to 10,000"),
    ],
)
def test_levels_have_bounds(arguments: tuple[str | None, str | None, int | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_levels(*arguments)


def lengths_of(output_tokens: int = 9, **given: Any) -> Lengths:
    asked = dict.fromkeys(("prompt_tokens", "spread", "prefix_tokens", "num_prefixes")) | {
        "has_dataset": False
    }
    return make_lengths(output_tokens, **(asked | given))


def test_lengths_that_are_not_given() -> None:
    assert lengths_of() == Lengths(output_tokens=9)
    assert lengths_of(spread=0.5, prompt_tokens=3) == Lengths(3, 9, 0.5)
    assert lengths_of(has_dataset=True) == Lengths(output_tokens=9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_tokens": 64, "has_dataset": True}, "so --prompt-tokens would do nothing"),
        (
            {"spread": 0.0, "prefix_tokens": 0, "has_dataset": True},
            "so --length-spread and --prefix-tokens would do",
        ),
        ({"num_prefixes": 1, "has_dataset": True}, "--num-prefixes would do nothing"),
        ({"num_prefixes": 2}, "--num-prefixes needs --prefix-tokens"),
    ],
)
def test_lengths_without_effect(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lengths_of(**given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", *TWO, "--url", URLS[0]], "--url would do nothing"),
        (["--compare", *TWO, "--label", "x"], "leave --label out"),
        (["--rounds", "6"], "--rounds are those of --compare"),
        (["--dataset", "rows.jsonl", "--prompt-tokens", "64"], "--prompt-tokens would do nothing"),
        (["--rate", "inf", "--duration", "10"], "--rate inf sends all at once"),
        (["--url", "https://user:secret@gw.corp/v1"], "--api-key"),
    ],
)
def test_options_of_the_command_line_without_effect(arguments: list[str], message: str) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(serve)
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ConfigError) and message in str(done.exception)


def test_settings_hold_what_had_an_effect(tmp_path: Path) -> None:
    of_dataset = ServeOptions(URLS, dataset=tmp_path / "rows.jsonl").settings()
    names = ("prompt_tokens", "length_spread", "prefix_tokens", "num_prefixes", "rounds")
    assert [of_dataset[name] for name in names] == [None] * 5 and of_dataset["dataset"] == "rows.jsonl"
    assert [ServeOptions(URLS).settings()[name] for name in names] == [64, 0.0, 0, None, None]
    shared = ServeOptions(TWO, lengths=Lengths(prefix_tokens=30, num_prefixes=2)).settings()
    assert [shared[name] for name in names] == [64, 0.0, 30, 2, 6]


@pytest.mark.parametrize(
    "url",
    [
        "https://user:secret@gw.corp/v1",
        "user:secret@gw.corp",
        "http://secret@gw.corp/v1",
        "https://user:sec/ret@gw.corp/v1",
        "https://user:secret@gw.corp:port/v1",
    ],
)
def test_an_address_holds_no_password(url: str) -> None:
    """It would be in results, and no request under load would send it."""
    with pytest.raises(ConfigError, match="--api-key") as caught:
        base_url(url)
    assert "sec" not in str(caught.value) and "gw.corp" not in str(caught.value)


def test_an_at_sign_in_a_path_is_no_password() -> None:
    assert base_url("http://gw.corp/@cf/v1") == "http://gw.corp/@cf/v1"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://[2001:db8::1]/v1", "http://server/v1"),
        ("http://[2001:db8::1]:8000/v1", "http://server:8000/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("https://user:secret@gw.corp:8443/a/v1", "https://server:8443/a/v1"),
    ],
)
def test_shown_addresses(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def test_half_a_character_in_a_dataset_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude00"}\n{"prompt": "\\ud800"}\n')
    with pytest.raises(ConfigError, match="line 2: prompt holds half of a pair"):
        DatasetPrompts(path, "chat", 9)


def test_names_that_are_no_utf8_are_written_as_escapes(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_result(path, {"command": "sleb --dataset d\udcff.jsonl", "größe": "😀"})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "command": "sleb --dataset d\udcff.jsonl",
        "größe": "😀",
    }
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]
