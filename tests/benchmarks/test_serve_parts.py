"""The parts of `sleb bench serve` that send nothing: arrivals, prompts, datasets, events, metrics, options."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sleb.benchmarks.load.client import EventSplitter, Outcome
from sleb.benchmarks.load.load import arrival_times, failures, is_good, measure
from sleb.benchmarks.load.options import Level, ServeLoadOptions
from sleb.benchmarks.load.server import public_text, shown_url
from sleb.benchmarks.prompts import DatasetPrompts, TokenPrompts, Vocabulary, calibrate
from sleb.benchmarks.serve import mix
from sleb.cli.bench import app
from sleb.client.connection import base_url
from sleb.errors import ConfigError

URL = "http://127.0.0.1:1/v1"
TWO = (URL, "http://127.0.0.1:2/v1")


def outcome(
    start: float, chunks: list[float], end: float, tokens: int | None = None, error: str = ""
) -> Outcome:
    usage = {} if tokens is None else {"prompt_tokens": 10, "completion_tokens": tokens}
    return Outcome("m", 8, 4, start, chunks, end, usage, error)


# Two whole answers and a failed one, in numbers that a person can add.
OUTCOMES = [
    outcome(0.0, [0.1, 0.2, 0.4], 0.5, tokens=5),
    outcome(0.25, [0.5], 0.5, tokens=1),
    outcome(0.5, [1.0], 2.0, error="broken"),
]


def test_metrics_by_hand() -> None:
    found = measure(OUTCOMES, 2.0, {"ttft": 200.0})
    assert found["requests/s"] == 1 and found["goodput requests/s"] == 0.5 and found["tokens/s"] == 3
    assert found["TTFT p50 ms"] == pytest.approx((100 + 250) / 2)
    assert found["TPOT p50 ms"] == pytest.approx(400 / 4)  # an answer of one token has none
    assert found["ITL p99 ms"] == pytest.approx(199)
    assert found["latency p50 ms"] == pytest.approx((500 + 250) / 2)
    assert failures(OUTCOMES) == {"broken": 1}


def test_nothing_is_null_and_json() -> None:
    found = measure(OUTCOMES[2:], 2.0, {})
    assert found["tokens/s"] == 0 and found["TTFT p50 ms"] is None and found["goodput requests/s"] is None
    json.dumps(found, allow_nan=False)


def test_percentiles_are_interpolated() -> None:
    """Of 0, 1, … 10 ms the median is 5, the 99th percentile 9.9."""
    values = [index / 1000 for index in range(11)]
    Random(3).shuffle(values)
    found = measure([outcome(0.0, [value], value) for value in values], 1.0)
    assert found["TTFT p50 ms"] == pytest.approx(5) and found["TTFT p99 ms"] == pytest.approx(9.9)


def test_goodput_by_hand() -> None:
    answer = outcome(0.0, [0.1, 0.3], 0.5, tokens=5)  # TTFT 100 ms, TPOT 100 ms, E2EL 500 ms
    assert is_good(answer, {"ttft": 100.001, "tpot": 100.001, "e2el": 500})
    assert not is_good(answer, {"ttft": 99})
    assert not is_good(answer, {"ttft": 1000, "tpot": 99})
    assert not is_good(answer, {"e2el": 499})


def test_arrivals_are_a_poisson_process() -> None:
    times = list(itertools.islice(arrival_times(4.0, "seed"), 20_000))
    gaps = np.diff([0.0, *times])
    assert gaps.min() >= 0 and gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.04)  # an exponential's deviation is its mean
    for share in (0.1, 0.5, 0.9, 0.99):
        assert np.quantile(gaps, share) == pytest.approx(-math.log(1 - share) / 4, rel=0.06)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03
    assert times[:9] == list(itertools.islice(arrival_times(4.0, "seed"), 9))
    assert times[:9] != list(itertools.islice(arrival_times(4.0, "other"), 9))
    assert list(itertools.islice(arrival_times(math.inf, "seed"), 3)) == [0, 0, 0]


def test_calibration_of_common_words_takes_five_requests() -> None:
    asked: list[str] = []

    async def count(text: str) -> int:
        asked.append(text)
        return 11 + sum(3 if word == "government" else 1 for word in text.split())

    vocabulary = asyncio.run(calibrate(count))
    assert vocabulary is not None
    assert len(asked) == 5 and vocabulary.overhead == 12
    assert set(vocabulary.costs.values()) == {1} and "government" not in vocabulary.costs
    assert len(vocabulary.costs) == 48


def test_words_of_several_tokens_add_up() -> None:
    vocabulary = Vocabulary({"x": 3, "yy": 5, "zzz": 4}, 0)
    for num_tokens in (3, 7, 8, 50, 51, 52):
        words = vocabulary.sample(num_tokens, Random(num_tokens))
        assert sum(vocabulary.costs[word] for word in words) == num_tokens
    assert vocabulary.sample(2, Random(0)) == []
    even = Vocabulary({"x": 2, "yy": 4}, 0)
    assert sum(even.costs[word] for word in even.sample(9, Random(1))) == 8


@pytest.mark.parametrize("told", [None, 0])
def test_a_server_without_counts_cannot_be_calibrated(told: int | None) -> None:
    async def count(text: str) -> int | None:
        return told

    assert asyncio.run(calibrate(count)) is None


def test_events_come_in_any_pieces() -> None:
    stream = b': note\n\ndata: {"a": 1}\r\n\r\nevent: x\ndata:two\ndata: lines\n\n\ndata: last'
    for size in (1, 2, 3, 7, 1000):
        splitter = EventSplitter()
        found = [data for at in range(0, len(stream), size) for data in splitter.feed(stream[at : at + size])]
        assert found == [b'{"a": 1}', b"two\nlines"]
        assert list(splitter.feed(b"\n\n")) == [b"last"]


def test_only_text_is_a_token() -> None:
    answer = Outcome("m")
    chunks = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"reasoning_content": "hm"}}], "usage": None},
        {"choices": [{"delta": {"content": "yes"}}]},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}},
    ]
    texts = [answer.take(json.dumps(chunk).encode(), now) for now, chunk in enumerate(chunks)]
    assert texts == [False, True, True, False, False]
    assert not answer.take(b"[DONE]", 7.0)
    assert answer.chunk_times == [1, 2] and answer.end == 7 and answer.has_ended and not answer.error
    assert (answer.num_prompt_tokens, answer.num_output_tokens) == (3, 9)


def test_datasets(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"prompt": "two", "id": 3}')
    prompts = DatasetPrompts(path, 9)
    assert [prompts.make(number).text for number in range(3)] == ["one", "two", "one"]
    assert prompts.make(0).output_tokens == 9


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '[{"prompt": "x"}]',
        "[",
        '{"text": "x"}',
        '{"prompt": ""}',
        '{"prompt": 3}',
        '{"prompt": "\\ud800"}',
        '{"messages": [{"role": "user", "content": "x"}]}',
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "\\ud83d\\ude00"}}\n{line}')
    with pytest.raises(ConfigError, match=r"line 2 is not .*prompt.*, as each line is to be"):
        DatasetPrompts(path, 9)


def test_other_wrong_datasets(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ConfigError, match="cannot be read"):
        DatasetPrompts(path, 9)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="has no rows"):
        DatasetPrompts(path, 9)
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ConfigError, match="line 1 is not"):
        DatasetPrompts(path, 9)


def test_levels() -> None:
    assert ServeLoadOptions(concurrency=(1, 8)).levels == [Level(1), Level(8)]
    assert [level.concurrency for level in ServeLoadOptions().levels] == [1, 8, 32]
    assert ServeLoadOptions(rate=(0.5, math.inf)).levels == [Level(rate=0.5), Level()]
    assert list(map(str, (Level(8), Level(rate=0.5), Level()))) == [
        "8 at once",
        "0.5 requests/s",
        "all at once",
    ]
    requests = [level.default_requests for level in (Level(1), Level(8), Level(rate=0.5), Level(rate=2))]
    assert requests == [20, 80, 20, 60]


def test_goodput_in_vllms_ways() -> None:
    assert ServeLoadOptions(goodput=["ttft:200", "tpot:50"]).limits == {"ttft": 200, "tpot": 50}
    for wrong in ("ttft", "ttft:x", "itl:3", "ttft:-1", "ttft:nan"):
        with pytest.raises(ConfigError, match="--goodput has"):
            refused(goodput=[wrong])


def refused(**changes: Any) -> ServeLoadOptions:
    options = ServeLoadOptions(**{"url": None if "compare" in changes else URL, **changes})
    options.check()
    return options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endpoint": "embeddings"}, "endpoint 'embeddings' is not known; choose one of: chat, completions"),
        ({"num_requests": 0}, "num_requests is 0; it must be an integer from 1 to"),
        ({"num_requests": 10**9}, "num_requests is 1000000000"),
        ({"concurrency": [2], "rate": [2.0]}, "--concurrency and --rate are both given"),
        ({"concurrency": [0]}, "concurrency is 0"),
        ({"concurrency": [10_001]}, "concurrency is 10001"),
        ({"concurrency": [8, 8]}, "name a level once"),
        ({"rate": [1e-9]}, "rate is 1e-09"),
        ({"rate": [math.nan]}, "rate is nan"),
        ({"timeout": math.inf}, "timeout is inf"),
        ({"timeout": math.nan}, "timeout is nan"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"prompt_tokens": 10**12}, "prompt_tokens is"),
        ({"output_tokens": 10**12}, "output_tokens is"),
        ({"length_spread": 1.0}, "length_spread is 1"),
        ({"dataset": Path("x"), "prompt_tokens": 64}, "--dataset and --prompt-tokens are both given"),
        ({"dataset": Path("x"), "length_spread": 0.1}, "--dataset and --length-spread are both given"),
        ({"compare": TWO, "url": URL}, "--compare and --url are both given"),
        ({"compare": TWO, "model": ["x", "y", "z"]}, "--compare takes one model"),
        ({"compare": TWO, "in_turns": True}, "--compare and --in-turns are both given"),
        ({"in_turns": True, "model": ["x"]}, "--in-turns takes two models or more"),
        ({"in_turns": True, "model": ["x", "x"]}, "--in-turns takes two models or more"),
        ({"url": "https://user:secret@gw.corp/v1"}, "--api-key"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        refused(**changes)
    assert "\n" not in str(caught.value)


def test_a_wrong_option_is_told_by_its_flag() -> None:
    done = CliRunner().invoke(app, ["serve", "--num-requests", "0"])
    assert isinstance(done.exception, ConfigError) and "--num-requests is 0" in str(done.exception)


def test_settings_hold_what_had_an_effect() -> None:
    found = refused(dataset=Path("/a/rows.jsonl"), api_key="secret", rate=[2.0]).settings()
    assert found["dataset"] == "rows.jsonl" and found["levels"] == ["2 requests/s"] and found["urls"] == [URL]
    assert "secret" not in json.dumps(found)


@pytest.mark.parametrize(
    ("changes", "case"),
    [
        ({}, "8 at once, 64 → 128"),
        ({"length_spread": 0.2}, "8 at once, 64 → 128 ± 20%"),
        ({"dataset": Path("/a/rows.jsonl")}, "8 at once, rows.jsonl → 128"),
    ],
)
def test_a_case_names_its_sizes(changes: dict[str, Any], case: str) -> None:
    assert refused(concurrency=[8], **changes).case(Level(8)) == case


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
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("http://box-17.corp:8000/v1", "http://server:8000/v1"),
        ("https://box-17.corp/v1", "https://server/v1"),
        ("http://[2001:db8::1]/v1", "http://server/v1"),
        ("http://[2001:db8::1]:8000/v1", "http://server:8000/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("https://user:secret@gw.corp:8443/a/v1", "https://server:8443/a/v1"),
    ],
)
def test_names_of_machines_are_not_shown(url: str, shown: str) -> None:
    assert shown_url(url) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no server at http://user:secret@host:8000/v1 (why)", "no server at http://server:8000/v1 (why)"),
        ("(http://host:80), 'http://host'.", "(http://server:80), 'http://server'."),
        ("Connect call failed ('10.0.0.7', 8000)", "Connect call failed (server:8000)"),
        ("Connect call failed ('fe80::1', 8000, 0, 0)", "Connect call failed (server:8000)"),
        ("there is no file /a/b/c.gguf; see /d", "there is no file c.gguf; see d"),
        ("llamacpp=/b/bin:bf16=/c/x.gguf,q8_0=/c/y.gguf", "llamacpp=bin:bf16=x.gguf,q8_0=y.gguf"),
        ("vllm=/a/python:/b/m", "vllm=python:m"),
    ],
)
def test_what_is_published_names_no_place_and_no_password(text: str, shown: str) -> None:
    assert public_text(text) == shown


@pytest.mark.parametrize(
    ("size", "special"),
    [
        (128_256, range(128_000, 128_256)),  # Llama 3
        (151_936, range(151_643, 151_665)),  # Qwen2.5; no token has the ids behind them
        (201_088, range(199_998, 201_088)),  # gpt-oss
        (102_400, range(100_000, 100_016)),  # DeepSeek
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_prompts_hold_ordinary_tokens(tmp_path: Path, size: int, special: range, told: bool) -> None:
    """Where no tokenizer tells of special tokens, a margin leaves out those of most models."""
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
    if told:
        added = [{"id": each, "content": f"<{each}>"} for each in (5, 2000, *special)]
        (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    prompts = TokenPrompts(tmp_path, 0)
    (ids,) = prompts.make(1, 200_000, 1)
    assert min(ids) >= 1000
    if told or size - special.start < 1024:
        assert max(ids) < special.start
    assert not told or 2000 not in ids
    assert len(set(ids)) > size // 2
    assert prompts.make(2, 9, 1) == TokenPrompts(tmp_path, 0).make(2, 9, 1) != prompts.make(2, 9, 2)


def test_token_prompts_need_a_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        TokenPrompts(tmp_path, 0)


def test_the_quality_of_a_mix_is_a_mean_by_tokens_of_what_ran():
    def answer(model, num_tokens, error=""):
        return Outcome("m:auto", usage={"completion_tokens": num_tokens}, answered_by=model, error=error)

    losses = {"m": 1.0, "m:sleb-3": 2.0}
    told = mix([answer("m", 30), answer("m:sleb-3", 10), answer("", 0, "HTTP 429")], losses)
    assert told["answered %"] == pytest.approx(200 / 3)
    assert told["times depth 0's perplexity"] == pytest.approx(2 ** (10 / 40))
    assert "times depth 0's perplexity" not in mix([answer("m:sleb-9", 10)], losses)
    assert mix([], losses) == {}
