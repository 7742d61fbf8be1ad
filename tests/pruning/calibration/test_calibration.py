"""Calibration windows against a naive cut of the same text, with invented data sets in place of downloads."""

from __future__ import annotations

import hashlib
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleb.errors import ConfigError, SlebError
from sleb.pruning.calibration import calibration_windows, cut_windows, sample_rows, text_rows

LINES = [f"line {number} says {'x' * (number % 17)}" for number in range(400)]


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES))
    return path


@given(st.lists(st.integers(0, 10**6), max_size=60), st.integers(1, 9))
def test_windows_are_consecutive_and_the_tail_is_dropped(token_ids: list[int], seqlen: int) -> None:
    expected = [token_ids[at : at + seqlen] for at in range(0, len(token_ids), seqlen)]
    expected = [window for window in expected if len(window) == seqlen]
    if expected:
        assert cut_windows(token_ids, seqlen).tolist() == expected
    else:
        with pytest.raises(ConfigError, match=f"{len(token_ids)} tokens, fewer than one window of {seqlen}"):
            cut_windows(token_ids, seqlen)


@given(st.lists(st.integers(0, 9), min_size=12, max_size=60), st.integers(2, 9))
def test_a_token_that_windows_begin_with_takes_no_text(token_ids: list[int], seqlen: int) -> None:
    windows = cut_windows(token_ids, seqlen, start=7)
    assert {window[0] for window in windows.tolist()} == {7} and windows.shape[1] == seqlen
    text = token_ids[1:] if token_ids[0] == 7 else token_ids  # which the tokenizer has put there
    rest = [token for window in windows.tolist() for token in window[1:]]
    assert rest == text[: len(rest)] and len(text) - len(rest) < seqlen - 1


def test_a_file_is_packed_whole_from_its_first_token(text_file: Path) -> None:
    token_ids = encode(text_file.read_text())
    found = calibration_windows(text_file, encode, seqlen=100, windows=7)
    assert found.windows.tolist() == [token_ids[at : at + 100] for at in range(0, 700, 100)]
    record = found.record
    assert (record.source, record.sampler, record.seed) == ("text.txt", "packed", None)
    assert (record.seqlen, record.windows, record.special_tokens) == (100, 7, False)
    digest = hashlib.sha256(b"".join(struct.pack("<q", each) for each in token_ids[:700])).hexdigest()
    assert record.token_hash == f"sha256:{digest}"
    assert found.note is None


def test_the_default_is_128_windows_or_what_there_is(text_file: Path) -> None:
    total = len(encode(text_file.read_text()))
    few = calibration_windows(text_file, encode, seqlen=1000)
    assert len(few.windows) == total // 1000 < 128
    assert few.note is not None and f"{total // 1000} windows of 1000" in few.note
    many = calibration_windows(text_file, encode, seqlen=10)
    assert (len(many.windows), many.note) == (128, None)


def test_a_seed_shuffles_the_windows(text_file: Path) -> None:
    straight = calibration_windows(text_file, encode, seqlen=50, windows=100).windows.tolist()
    every = cut_windows(encode(text_file.read_text()), 50).tolist()
    drawn = [calibration_windows(text_file, encode, seqlen=50, windows=100, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (each.windows.tolist() for each in drawn)
    assert first == again != other
    assert first != straight
    assert all(window in every for window in first)
    assert len({tuple(window) for window in first}) == 100
    assert (drawn[0].record.seed, drawn[2].record.seed) == (0, 1)


def test_rows_are_the_first_128_of_the_shuffled_lines(text_file: Path) -> None:
    kept = text_file.read_text().splitlines(keepends=True)
    order = np.random.default_rng(0).permutation(len(kept))[:128]
    token_ids = encode("\n\n".join(kept[index] for index in order))
    found = calibration_windows(text_file, encode, sampler="rows", seqlen=64)
    assert found.windows.tolist() == [token_ids[at : at + 64] for at in range(0, len(token_ids) - 63, 64)]
    assert (found.record.sampler, found.record.seed, found.record.special_tokens) == ("rows", 0, True)
    seeded = calibration_windows(text_file, encode, sampler="rows", seqlen=64, seed=3)
    assert seeded.record.seed == 3 and seeded.windows.tolist() != found.windows.tolist()


def test_rows_are_shuffled_as_the_package_datasets_does() -> None:
    datasets: Any = pytest.importorskip("datasets")
    shuffled = datasets.Dataset.from_dict({"text": LINES}).shuffle(seed=5)[:128]["text"]
    assert sample_rows(LINES, 5) == "\n\n".join(shuffled)


def test_lines_are_those_of_the_wikitext_data_set() -> None:
    """Its loader keeps the newline of a line, empties a blank one, and breaks at newlines only."""
    assert text_rows(" \n = Title = \n\nsome\x0btext\u2028more\nend") == [
        "", " = Title = \n", "", "some\x0btext\u2028more\n", "end",
    ]  # fmt: skip


def stub_datasets(monkeypatch: pytest.MonkeyPatch, load: Any) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*path: str, **options: Any) -> Any:
        calls.append((path, options))
        return load(options)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_wikitext2(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stub_datasets(monkeypatch, lambda options: {"text": LINES})
    packed = calibration_windows("wikitext2", encode, seqlen=32, windows=20)
    token_ids = encode("\n\n".join(LINES))
    assert packed.windows.flatten().tolist() == token_ids[: 32 * 20]
    rows = calibration_windows("wikitext2", encode, sampler="rows", seqlen=32)
    token_ids = encode(sample_rows(LINES, 0, "\n\n"))
    assert rows.windows.flatten().tolist() == token_ids[: rows.windows.numel()]
    assert calls[0] == (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"})


def test_c4(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(options: dict[str, Any]) -> Any:
        return iter([{"text": line} for line in LINES]) if options.get("streaming") else {"text": LINES}

    stub_datasets(monkeypatch, load)
    packed = calibration_windows("c4", encode, seqlen=32, windows=20)
    assert packed.windows.flatten().tolist() == encode(" ".join(LINES))[: 32 * 20]
    rows = calibration_windows("c4", encode, sampler="rows", seqlen=32)
    assert rows.windows.flatten().tolist() == encode(sample_rows(LINES, 0, " "))[: rows.windows.numel()]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'sleb\[eval\]'.*--calibration FILE"):
        calibration_windows("wikitext2", encode)


def test_without_a_network_the_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: dict[str, Any]) -> Any:
        raise ConnectionError("Couldn't reach the hub\nand a page of detail")

    stub_datasets(monkeypatch, fail)
    with pytest.raises(SlebError, match=r"Couldn't reach the hub\).*--calibration FILE") as caught:
        calibration_windows("c4", encode)
    assert "detail" not in str(caught.value)

    def broken_stream(options: dict[str, Any]) -> Any:
        def documents() -> Any:
            yield {"text": "one"}
            raise ConnectionError

        return documents()

    stub_datasets(monkeypatch, broken_stream)
    with pytest.raises(SlebError, match=r"\(ConnectionError\).*--calibration FILE"):
        calibration_windows("c4", encode)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": 500}, r"gives \d+ windows of 100 tokens, not 500: ask for --windows \d+ or fewer"),
        ({"seqlen": 10**6}, r"has \d+ tokens, fewer than one window of 1000000.*--seqlen"),
        ({"seqlen": 1}, "seqlen 1 is too short"),
        ({"windows": 0}, "windows 0 must be 1 or more"),
        ({"seed": -1}, "seed -1"),
        ({"sampler": "random"}, "sampler 'random' does not exist: choose packed or rows"),
    ],
)
def test_bad_options(text_file: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        calibration_windows(text_file, encode, **{"seqlen": 100, **options})


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'wikitext3' is neither a data set \(wikitext2, c4\) nor a file"):
        calibration_windows("wikitext3", encode)
    with pytest.raises(ConfigError, match="cannot be read"):
        calibration_windows(tmp_path, encode)
    (tmp_path / "empty.txt").write_text("")
    for sampler in ("packed", "rows"):
        with pytest.raises(ConfigError, match="has 0 tokens"):
            calibration_windows(tmp_path / "empty.txt", encode, sampler=sampler)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        calibration_windows(tmp_path / "latin.txt", encode)
