"""How a calibration is asked for, and how a mix shares out its windows."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleb.errors import ConfigError
from sleb.pruning.calibration import calibration_windows, check_options, is_generated
from sleb.pruning.calibration.spec import SourceSpec, label, parse_source, shares


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `a.txt` (300 tokens), `b.jsonl` (columns body and text), `sub/c.txt` (100 tokens)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("".join(chr(1000 + at) for at in range(300)))
    (tmp_path / "sub" / "c.txt").write_text("".join(chr(3000 + at) for at in range(100)))
    rows = [{"body": chr(2000 + at) * 98, "text": "x"} for at in range(3)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def parts(source: str) -> list[tuple[str, str | None, float]]:
    return [(spec.name, spec.column, float(spec.weight)) for spec in parse_source(source)]


def test_sources_columns_and_weights(folder: Path) -> None:
    assert parts("wikitext2") == [("wikitext2", None, 1)]
    assert parts("self") == [("self", None, 1)]
    assert parts("a.txt") == [("a.txt", None, 1)]
    assert parts("b.jsonl") == [("b.jsonl", "text", 1)]
    assert parts("b.jsonl:body") == [("b.jsonl", "body", 1)]
    assert parts("a.txt=0.7, b.jsonl:body = 3e-1 ,c4") == [
        ("a.txt", None, 0.7), ("b.jsonl", "body", 0.3), ("c4", None, 1),
    ]  # fmt: skip
    assert [is_generated(each) for each in ("a.txt", "self", "a.txt,self=2")] == [False, True, True]


def test_the_label_has_no_folders(folder: Path) -> None:
    source = f"{folder}/sub/c.txt=0.50,./b.jsonl:body,self=2"
    assert label(parse_source(source)) == "c.txt=0.50,b.jsonl:body,self=2"


@pytest.mark.parametrize("name", ["x=1.txt", "x,y.txt", "x:y.txt", "run=3/x.txt", "a b:c=2,d.txt"])
def test_a_file_that_exists_is_that_file(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("text")
    assert parts(name) == [(name, None, 1)]
    if "," not in name:
        assert parts(f"{name}=2,a.txt") == [(name, None, 2), ("a.txt", None, 1)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("none.txt", r"'none.txt' is neither a data set \(wikitext2, c4\) nor a file that exists, nor self"),
        ("a.txt,none.txt=1", "'none.txt=1' is neither"),
        ("wikitext2:text", "'wikitext2:text' is neither"),
        ("a.txt=", "weight '' of calibration 'a.txt=' must be a number above 0, like 0.7"),
        ("a.txt=0", "weight '0' of calibration"),
        ("a.txt=-1", "weight '-1'"),
        ("a.txt=nan", "weight 'nan'"),
        ("a.txt=1e999999999", "weight '1e999999999'"),
        ("a.txt=half", "weight 'half'"),
        ("a.txt,", "names an empty source"),
        ("a.txt,./a.txt=2", r"names ./a.txt twice: name it once, with a larger weight"),
        ("self,self", "names self twice"),
        ("a.txt:text", r"leave :text out, or give a .jsonl or .parquet file"),
        ("b.jsonl:none", r"b.jsonl line 1 has no column 'none'; it has: body, text. .*as b.jsonl:body"),
    ],
)
def test_slips_are_seen_before_anything_is_loaded(folder: Path, source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(source, "packed", None, None, None)


def test_more_slips(folder: Path) -> None:
    with pytest.raises(ConfigError, match="self has no rows to draw: leave --sampler rows out"):
        check_options("a.txt,self", "rows", None, None, None)
    with pytest.raises(ConfigError, match=r"windows 2 .* mix a.txt=9,b.jsonl:body: none is left for b.jsonl"):
        check_options("a.txt=9,b.jsonl:body", "packed", None, 2, None)
    with pytest.raises(ConfigError, match="self needs a model that generates"):
        calibration_windows("self", encode, seqlen=8, windows=1)


def specs(*weights: float | Fraction) -> list[SourceSpec]:
    return [SourceSpec(str(at), None, str(at), Fraction(weight)) for at, weight in enumerate(weights)]


def test_windows_are_shared_out_by_largest_remainder() -> None:
    # Quotas worked out by hand: 3.5 and 1.5 tie, so the first gets the odd one.
    assert shares(specs(0.5, 0.5), 5) == [3, 2]
    assert shares(specs(Fraction("0.7"), Fraction("0.3")), 10) == [7, 3]
    assert shares(specs(Fraction("0.7"), Fraction("0.3")), 128) == [90, 38]  # 89.6 and 38.4
    # The example of the method in the literature on elections: 100,000 votes, 10 seats.
    assert shares(specs(47000, 16000, 15800, 12000, 6100, 3100), 10) == [5, 2, 1, 1, 1, 0]
    assert shares(specs(1, 1, 1), 2) == [1, 1, 0]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(0, 500))
def test_a_share_is_its_quota_rounded_down_or_up(weights: list[int], total: int) -> None:
    counts = shares(specs(*weights), total)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - Fraction(weight * total, sum(weights))) < 1


def test_a_mix_has_exactly_the_windows_of_its_sources(folder: Path) -> None:
    found = calibration_windows("a.txt=0.7,b.jsonl:body=0.3", encode, seqlen=20, windows=10)
    expected = [[1000 + at for at in range(begin, begin + 20)] for begin in range(0, 140, 20)]
    body = [2000] * 98 + [10, 10] + [2001] * 98
    expected += [body[begin : begin + 20] for begin in range(0, 60, 20)]
    assert found.windows.tolist() == expected
    record = found.record
    assert (record.source, record.sampler) == ("a.txt=0.7,b.jsonl:body=0.3", "packed")
    assert (record.seed, record.windows, found.note) == (None, 10, None)
    other = calibration_windows("b.jsonl:body=0.3,a.txt=0.7", encode, seqlen=20, windows=10)
    assert other.windows.tolist() == expected[7:] + expected[:7]


def test_a_seed_shuffles_each_source(folder: Path) -> None:
    found = calibration_windows("a.txt,sub/c.txt", encode, seqlen=20, windows=8, seed=3)
    alone = [
        calibration_windows(each, encode, seqlen=20, windows=4, seed=3) for each in ("a.txt", "sub/c.txt")
    ]
    assert found.windows.tolist() == alone[0].windows.tolist() + alone[1].windows.tolist()
    assert found.record.seed == 3


def test_a_source_without_its_share_says_what_it_has_and_what_would_do(folder: Path) -> None:
    source = "a.txt=0.5,sub/c.txt=0.5"  # 15 and 5 windows of 20 tokens
    with pytest.raises(ConfigError, match=r"c.txt=0.5 must give 7 of the 14 windows .* has 5: ask") as caught:
        calibration_windows(source, encode, seqlen=20, windows=14)
    [fewer] = re.findall(r"--windows (\d+) or fewer", str(caught.value))
    assert int(fewer) == 11  # 6 and 5: the first has the odd one
    assert len(calibration_windows(source, encode, seqlen=20, windows=int(fewer)).windows) == 11
    with pytest.raises(ConfigError, match="must give 64 of the 128 windows of 20 tokens"):
        calibration_windows(source, encode, seqlen=20)
    assert len(calibration_windows(source, encode, seqlen=20, most=6).windows) == 6


def test_rows_of_a_mix(folder: Path) -> None:
    found = calibration_windows("a.txt,b.jsonl:body", encode, sampler="rows", seqlen=50, windows=4)
    alone = [
        calibration_windows(each, encode, sampler="rows", seqlen=50, windows=2)
        for each in ("a.txt", "b.jsonl:body")
    ]
    assert found.windows.tolist() == alone[0].windows.tolist() + alone[1].windows.tolist()
    assert (found.record.sampler, found.record.seed) == ("rows", 0)
