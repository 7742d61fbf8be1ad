"""Columns of .jsonl and .parquet files: packed as WikiText's lines are, read no further than needed."""

from __future__ import annotations

import json
import random
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sleb.errors import ConfigError, RequestError
from sleb.pruning.calibration import calibration_windows
from sleb.pruning.calibration.chats import as_messages
from sleb.pruning.calibration.samplers import first_tokens

DOCUMENTS = [f"document {number} says {'x' * (number % 17)}" for number in range(400)] + [
    "",
    "é\u2028€\n",
    "end",
]


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [{"id": number, "text": text, "other": text[::-1]} for number, text in enumerate(DOCUMENTS)]
    return write_jsonl(tmp_path / "data.jsonl", rows)


def test_documents_are_packed_like_lines_of_wikitext(table: Path) -> None:
    for source, documents in ((table, DOCUMENTS), (f"{table}:other", [text[::-1] for text in DOCUMENTS])):
        whole = encode("\n\n".join(documents))
        found = calibration_windows(source, encode, seqlen=100)
        assert found.windows.flatten().tolist() == whole[: len(whole) // 100 * 100][: 128 * 100]
        assert found.record.source == str(source).rpartition("/")[2]
    every = calibration_windows(table, encode, seqlen=100, windows=len(encode("\n\n".join(DOCUMENTS))) // 100)
    assert every.windows.flatten().tolist() == encode("\n\n".join(DOCUMENTS))[: every.windows.numel()]


def test_a_seed_draws_from_all_windows(table: Path) -> None:
    whole = encode("\n\n".join(DOCUMENTS))
    order = np.random.default_rng(4).permutation(len(whole) // 100)[:9]
    found = calibration_windows(table, encode, seqlen=100, windows=9, seed=4)
    assert found.windows.tolist() == [whole[at * 100 : at * 100 + 100] for at in order]


def test_rows_are_the_documents(table: Path) -> None:
    order = np.random.default_rng(2).permutation(len(DOCUMENTS))[:128]
    expected = encode("\n\n".join(DOCUMENTS[at] for at in order))
    found = calibration_windows(table, encode, sampler="rows", seqlen=64, seed=2)
    assert found.windows.flatten().tolist() == expected[: found.windows.numel()]
    assert len(found.windows) == len(expected) // 64


def test_no_more_is_read_than_the_windows_need(table: Path) -> None:
    """What stands far behind the windows may be anything."""
    expected = calibration_windows(table, encode, seqlen=50, windows=4).windows.tolist()
    with table.open("a") as file:
        file.write("{ not JSON\n")
    assert calibration_windows(table, encode, seqlen=50, windows=4).windows.tolist() == expected
    with pytest.raises(
        ConfigError, match=rf"{table.name} line {len(DOCUMENTS) + 1} is not JSON \(.*\): mend"
    ):
        calibration_windows(table, encode, seqlen=50, windows=4, seed=0)


def test_the_first_tokens_are_those_of_the_whole_text(merged_tokenizer: Any) -> None:
    rng = random.Random(0)
    documents = ["".join(rng.choice("abc €") for _ in range(rng.randrange(30))) for _ in range(300)]

    def merged(text: str) -> list[int]:
        return list(merged_tokenizer.encode(text).ids)

    def words(text: str) -> list[int]:
        """Longer tokens than is guessed at first; a word is one token with the separator after it."""
        return [zlib.crc32(token.encode()) for token in re.findall(r"[abc]+\n\n|[abc]+|.", text, re.DOTALL)]

    long = ["".join(rng.choice("abc") for _ in range(rng.randrange(1, 30))) for _ in range(2000)]
    for tokens, read in ((merged, documents), (words, long)):
        whole = tokens("\n\n".join(read))
        for wanted in (*range(1, 600, 3), 1501, len(whole), len(whole) + 5):
            left = iter(read)
            assert list(first_tokens(left, tokens, "\n\n", wanted)) == whole[:wanted]
            assert wanted > 500 or next(left, None) is not None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"data.jsonl line 3 is not JSON \(.*, column 13\): mend or remove that line"),
        ('["text"]', r"line 3 is no JSON object: .*on every line"),
        ('{"body": "a"}', r"line 3 has no column 'text'; it has: body. Name one .*as data.jsonl:body"),
        ("{}", "line 3 has no column 'text'; it has: none"),
        ('{"text": null}', "line 3 has null in column 'text'; it must be text"),
        ('{"text": 7}', "line 3 has int in column 'text'"),
        ('{"text": ["a"]}', "line 3 has list in column 'text'"),
        ('{"text": "\\ud83d"}', r"line 3 has half a character, \\ud83d"),
        ('{"text": ' + "[" * 100_000, "line 3 is not JSON"),
        (b'{"text": "\xff"}', "line 3 is not UTF-8"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b'{"text": "a good row"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n"
    )
    with pytest.raises(ConfigError, match=message):
        calibration_windows(path, encode, seqlen=2)


def test_bad_files(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", "\n \n"), ("b.jsonl", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match="has no rows"):
            calibration_windows(tmp_path / name, encode)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"folder.jsonl cannot be read: Is a directory"):
        calibration_windows(tmp_path / "folder.jsonl", encode)
    write_jsonl(tmp_path / "c.jsonl", [{"text": ""}] * 3)
    with pytest.raises(ConfigError, match="has 4 tokens, fewer than one window of 9"):
        calibration_windows(tmp_path / "c.jsonl", encode, seqlen=9)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "ab"}\r\n{"text": "cd"}')
    assert calibration_windows(path, encode, seqlen=6).windows.tolist() == [encode("ab\n\ncd")]


# Conversations. A template that can be followed by hand: role's first letter, content, full stop.
def render(messages: Sequence[Any]) -> list[int]:
    if any("REFUSE" in message["content"] for message in messages):
        raise RequestError("the chat template refuses the messages: no")
    return encode("<" + "".join(f"{message['role'][0]}{message['content']}." for message in messages) + ">")


CHATS = [
    [
        {"role": "system", "content": "Be."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
    ],
    [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me"}],
    [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "x" * 40},
        {"from": "gpt", "value": "y" * 40},
    ],
]
RENDERED = ["<sBe..uHi.aYo.>", "<uWho?.aMe.>", f"<sS.u{'x' * 40}.a{'y' * 40}.>"]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat, "text": "no"} for chat in CHATS])


def test_conversations_are_rendered_and_packed(chats: Path) -> None:
    expected = encode("".join(RENDERED))
    found = calibration_windows(f"{chats}:messages", encode, seqlen=25, render=render)
    assert found.windows.flatten().tolist() == expected[:100]
    assert found.record.source == "chats.jsonl:messages"
    order = np.random.default_rng(0).permutation(3)
    rows = calibration_windows(f"{chats}:messages", encode, sampler="rows", seqlen=25, render=render)
    assert rows.windows.flatten().tolist() == encode("".join(RENDERED[at] for at in order))[:100]
    first = calibration_windows(f"{chats}:messages", encode, seqlen=12, windows=1, render=render)
    assert first.windows.tolist() == [expected[:12]]


def test_a_conversation_needs_a_template(chats: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"chats.jsonl line 1 holds a conversation, but .* no chat template: name"
    ):
        calibration_windows(f"{chats}:messages", encode, seqlen=8)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "line 2 is a conversation without messages"),
        ("text", "line 2 has str in column 'messages'; it must be a list of messages, as in the first row"),
        ([{"role": "user", "content": "REFUSE"}], "line 2: the chat template refuses"),
        (
            [{"role": "user", "content": "a"}, "b"],
            "line 2, message 2 is no message: it needs role and content",
        ),
        ([{"content": "a"}], "message 1 is no message"),
        (
            [{"role": "bing", "content": "a"}],
            "the role 'bing'; it must be one of system, user, human, assistant",
        ),
        ([{"role": ["user"], "content": "a"}], r"the role \['user'\]"),
        ([{"role": "user"}], "has a content that is NoneType, not text"),
        ([{"from": "gpt", "value": [1]}], "has a value that is list, not text"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path: Path, row: Any, message: str) -> None:
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHATS[0]}, {"messages": row}])
    with pytest.raises(ConfigError, match=message):
        calibration_windows(f"{path}:messages", encode, seqlen=2, render=render)


def test_what_else_a_message_has_is_kept() -> None:
    calls = [{"name": "f"}]
    message = {"role": "assistant", "content": None, "tool_calls": calls, "name": None}
    answer = {"role": "tool", "content": "7", "tool_call_id": "1"}
    assert as_messages([message, answer], "here") == [
        {"role": "assistant", "content": "", "tool_calls": calls}, answer,
    ]  # fmt: skip


# Parquet.
@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[[str, dict[str, list[Any]]], Path]:
    pyarrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")

    def write(name: str, columns: dict[str, list[Any]]) -> Path:
        parquet.write_table(pyarrow.table(columns), tmp_path / name, row_group_size=50)
        return tmp_path / name

    return write


def test_parquet_gives_what_jsonl_gives(table: Path, chats: Path, write_parquet: Callable[..., Path]) -> None:
    texts = write_parquet("data.parquet", {"id": list(range(len(DOCUMENTS))), "text": DOCUMENTS})
    for options in ({"windows": 40}, {"windows": 9, "seed": 4}, {"sampler": "rows", "windows": 20}):
        found = calibration_windows(texts, encode, seqlen=100, **options)
        assert (
            found.record.token_hash
            == calibration_windows(table, encode, seqlen=100, **options).record.token_hash
        )
    for part in (CHATS[:1], CHATS[1:]):  # a column has one type
        path = write_parquet("chats.parquet", {"messages": part})
        rendered = encode("".join(RENDERED[CHATS.index(chat)] for chat in part))
        found = calibration_windows(f"{path}:messages", encode, seqlen=7, render=render)
        assert found.windows.flatten().tolist() == rendered[: len(rendered) // 7 * 7]


def test_bad_parquet(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    path = write_parquet("data.parquet", {"id": [1], "body": ["a"]})
    with pytest.raises(ConfigError, match=r"data.parquet has no column 'text'; it has: id, body. Name one"):
        calibration_windows(path, encode)
    path = write_parquet("nulls.parquet", {"text": ["a", None]})
    with pytest.raises(ConfigError, match=r"nulls.parquet row 2 has null in column 'text'"):
        calibration_windows(path, encode)
    path = write_parquet("empty.parquet", {"text": []})
    with pytest.raises(ConfigError, match="has no rows"):
        calibration_windows(path, encode)
    (tmp_path / "broken.parquet").write_text("PAR1 but nothing else")
    with pytest.raises(ConfigError, match=r"broken.parquet cannot be read as Parquet \(.+\): write it anew"):
        calibration_windows(tmp_path / "broken.parquet", encode)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.parquet").write_text("")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ConfigError, match=r"needs the package pyarrow: pip install 'sleb\[eval\]', or give a .jsonl"
    ):
        calibration_windows(tmp_path / "data.parquet", encode)
