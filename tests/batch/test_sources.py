"""Blocks of an input: each line in one of them, read again by itself as it was, or told."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleb.batch.lines import LineReader
from sleb.batch.options import BatchOptions
from sleb.batch.plan import make_plan
from sleb.batch.sources import JsonLines, cut, read_block
from sleb.errors import ConfigError

LIMIT = 6
LINES = st.lists(st.binary(max_size=12).filter(lambda line: not set(line) & {10, 13}), max_size=20)


@given(LINES, st.integers(1, 5), st.sampled_from([b"\n", b"\r\n"]), st.booleans())
def test_blocks_hold_every_line_once(tmp_path_factory, lines, block_size, newline, ends):
    path = tmp_path_factory.mktemp("lines") / "in.jsonl"
    path.write_bytes(newline.join(lines) + (newline if ends else b""))
    source = JsonLines(path, LIMIT)
    wanted = []
    for number, line in enumerate(lines, 1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if text.strip():
            wanted.append((number, text[: LIMIT + 1]))
    blocks = [block for block, _ in cut(source.rows(), block_size)]
    again = [read_block(source, block) for block in reversed(blocks)][::-1]
    assert [len(rows) for rows in again[:-1]] == [block_size] * (len(blocks) - 1)
    found = [(row.number, row.text[: LIMIT + 1]) for row in itertools.chain(*again)]
    assert [number for number, _ in found] == [number for number, _ in wanted]
    for (_, text), (_, line) in zip(found, wanted, strict=True):
        assert text == line or (len(line) > LIMIT < len(text) and line.startswith(text))
    assert len({block.name for block in blocks}) == len(blocks)


@pytest.mark.parametrize("change", [b'{"prompt": "x"}\n', b"", b'{"prompt": "a"}\n{"prompt": "c"}\n'])
def test_an_input_that_changes_is_told(tmp_path, change):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "b"}\n')
    options = BatchOptions(endpoint="/v1/completions")
    source = JsonLines(path, options.max_line_bytes)
    plan = make_plan(source, LineReader(options), 2, ["m"])
    path.write_bytes(change)
    with pytest.raises(ConfigError, match="the input changed"):
        read_block(source, plan.blocks[0])
