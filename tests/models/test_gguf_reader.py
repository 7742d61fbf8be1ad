"""GGUF files that lie: each is one line that names the file, the key or tensor, its value and what is allowed.

The files are written here byte by byte, as github.com/ggml-org/ggml/blob/master/docs/gguf.md has them, because the
`gguf` package's writer writes no wrong ones.
"""

from __future__ import annotations

import json
import math
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleb.errors import ModelError
from sleb.models.gguf.convert import convert_gguf
from sleb.models.resolve import resolve_model

U8, I8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 1, 4, 5, 6, 7, 8, 9, 10
CODES = {U8: "B", I8: "b", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q"}
TOKENS = [*(chr(48 + index) for index in range(30)), "01", "<|end|>"]
Typed = tuple[
    int, Any
]  # a type and its value; of an array the inner type, its length as told, and the values


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def encoded(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        inner, length, values = value
        return struct.pack("<IQ", inner, length) + b"".join(encoded(inner, each) for each in values)
    return struct.pack(f"<{CODES[kind]}", value)


def array(inner: int, values: list[Any]) -> Typed:
    return (ARRAY, (inner, len(values), values))


def good_keys() -> dict[str, Typed]:
    return {
        "general.architecture": (STRING, "llama"),
        "llama.block_count": (U32, 1),
        "llama.context_length": (U32, 64),
        "llama.embedding_length": (U32, 8),
        "llama.feed_forward_length": (U32, 16),
        "llama.attention.head_count": (U32, 2),
        "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "gpt-2"),
        "tokenizer.ggml.tokens": array(STRING, TOKENS),
        "tokenizer.ggml.token_type": array(I32, [1] * 31 + [3]),
        "tokenizer.ggml.merges": array(STRING, ["0 1"]),
        "tokenizer.ggml.bos_token_id": (U32, 31),
        "tokenizer.ggml.eos_token_id": (U32, 31),
        "tokenizer.chat_template": (STRING, "{{ messages }}"),
    }


TENSORS: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (32, 8),
    "output_norm.weight": (8,),
    **{f"blk.0.{name}_norm.weight": (8,) for name in ("attn", "ffn")},
    **{f"blk.0.attn_{name}.weight": (8, 8) for name in ("q", "k", "v", "output")},
    **{f"blk.0.ffn_{name}.weight": (16, 8) for name in ("gate", "up")},
    "blk.0.ffn_down.weight": (8, 16),
}


def good_tensors() -> list[dict[str, Any]]:
    tensors, offset = [], 0
    for name, shape in TENSORS.items():
        tensors.append({"name": name, "dims": shape[::-1], "kind": 0, "offset": offset})
        offset += -(-4 * math.prod(shape) // 32) * 32
    return tensors


def gguf_bytes(
    keys: list[tuple[str, Typed]],
    tensors: list[dict[str, Any]],
    counts: tuple[int | None, int | None] = (None, None),
    version: int = 3,
    data_bytes: int = 4096,
) -> bytes:
    """`counts`: of tensors and of keys as the header tells them."""
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        *(len(all_) if told is None else told for all_, told in zip((tensors, keys), counts, strict=True)),
    )
    head += b"".join(
        text(key) + struct.pack("<I", kind) + encoded(kind, value) for key, (kind, value) in keys
    )
    for tensor in tensors:
        dims = tensor["dims"]
        told = tensor.get("num_dims", len(dims))
        head += text(tensor["name"]) + struct.pack(f"<I{len(dims)}Q", told, *dims)
        head += struct.pack("<IQ", tensor["kind"], tensor["offset"])
    head += b"\0" * (-len(head) % 32)
    return head + np.linspace(-1, 1, data_bytes // 4, dtype=np.float32).tobytes()


@pytest.fixture
def convert(tmp_path: Path) -> Callable[[bytes], Path]:
    def converted(content: bytes) -> Path:
        (folder := tmp_path / "out").mkdir(exist_ok=True)
        (path := tmp_path / "m.gguf").write_bytes(content)
        convert_gguf(path, folder)
        return folder

    return converted


def refusal(convert: Callable[[bytes], Path], content: bytes) -> str:
    """The message, of one line, that begins with the file. What Python allocates on the way is bounded."""
    tracemalloc.start()
    try:
        with pytest.raises(ModelError) as refused:
            convert(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20
    message = str(refused.value)
    assert "\n" not in message and "m.gguf" in message and len(message) < 900
    return message.split("m.gguf", 1)[1].lstrip(": ")


def test_the_file_that_the_others_are_made_from_is_whole(convert: Callable[[bytes], Path]) -> None:
    folder = convert(gguf_bytes(list(good_keys().items()), good_tensors()))
    assert (folder / "model.safetensors").is_file()


A = "llama.attention."
T = "tokenizer.ggml."
WRONG: list[tuple[str, Typed | None, str]] = [
    ("llama.block_count", (U32, 2**32 - 1), "llama.block_count is 4294967295; it must be an integer from 1 to 11"),
    ("llama.block_count", (U32, 0), "llama.block_count is 0; it must be an integer from 1 to 11"),
    ("llama.block_count", None, "llama.block_count is missing; it must be an integer"),
    ("llama.block_count", (STRING, "1"), 'llama.block_count is "1"; it must be an integer'),
    ("llama.embedding_length", (U64, 2**64 - 1), "llama.embedding_length is 18446744073709551615; it must be an"),
    ("llama.embedding_length", (U32, 16), "token_embd.weight has shape [32, 8]; by the metadata it must be [32, 16]"),
    ("llama.embedding_length", array(U32, [8]), "llama.embedding_length is [8]; it must be an integer"),
    ("llama.context_length", (I32, -1), "llama.context_length is -1; it must be an integer from 1"),
    ("llama.feed_forward_length", array(U32, [16, 16]), "llama.feed_forward_length is [16, 16]; it must be one number"),
    ("llama.feed_forward_length", array(U32, []), "llama.feed_forward_length is []; it must be one number"),
    ("llama.feed_forward_length", (BOOL, True), "llama.feed_forward_length is true; it must be an integer"),
    (f"{A}head_count", (F32, 1.5), f"{A}head_count is 1.5; it must be an integer from 1 to 8"),
    (f"{A}head_count_kv", (U32, 3), f"{A}head_count_kv is 3; it must be an integer from 1 to 2"),
    (f"{A}key_length", (U32, 6), "has shape [8, 8]; by the metadata it must be [12, 8]"),
    (f"{A}value_length", (U32, 8), f"{A}value_length is 8; it must be that of a key, 4"),
    (f"{A}layer_norm_rms_epsilon", (F32, math.nan), f"{A}layer_norm_rms_epsilon is NaN; it must be a number from 0"),
    ("llama.expert_count", (U32, 8), "llama.expert_used_count is missing; it must be an integer"),
    ("llama.expert_count", (U32, 1025), "llama.expert_count is 1025; it must be an integer from 0 to 1024"),
    ("llama.expert_count", (STRING, "x"), 'llama.expert_count is "x"; it must be an integer'),
    ("split.count", (U32, 3), "is one part of several"),
    ("general.architecture", None, "general.architecture is missing; it must be a string"),
    ("general.architecture", (U32, 7), "general.architecture is 7; it must be a string"),
    ("general.architecture", (STRING, "x\x1b[31m"), r'architecture "x\u001b[31m" is not supported'),
    ("general.alignment", (U32, 0), "general.alignment is 0; it must be an integer from 1"),
    ("general.alignment", (I32, -32), "general.alignment is -32; it must be an integer from 1"),
    ("general.alignment", (U32, 48), "general.alignment is 48; it must be a power of two"),
    ("general.alignment", (STRING, "32"), 'general.alignment is "32"; it must be an integer'),
    ("general.sampling.top_p", (F32, 2.0), "general.sampling.top_p is 2.0; it must be a number from 0 to 1"),
    ("general.sampling.top_k", (STRING, "40"), 'general.sampling.top_k is "40"; it must be an integer'),
    (f"{T}model", (STRING, "bert"), f'{T}model is "bert"; it must be one of gpt2, llama'),
    (f"{T}tokens", (STRING, "abc"), f'{T}tokens is "abc"; it must be a list of'),
    (f"{T}tokens", array(U32, [1, 2]), f"{T}tokens is [1, 2]; it must be a list of strings"),
    (f"{T}tokens", array(STRING, []), f"{T}tokens is []; it must be a list of at least one token"),
    (f"{T}tokens", array(STRING, ["a", "a"]), "its vocabulary names 1 tokens twice"),
    (f"{T}tokens", array(STRING, [*TOKENS[1:], "x" * 1025]), "of 1025 characters; a token must have at most 1024"),
    (f"{T}tokens", (ARRAY, (ARRAY, 1, [(STRING, 1, ["a"])])), "is an array of arrays; it must be one of numbers or"),
    (f"{T}tokens", (ARRAY, (STRING, 2**63, [])), "has 9223372036854775808 values; all arrays may have"),
    (f"{T}tokens", (ARRAY, (STRING, 1 << 21, [])), "cut short: "),
    (f"{T}tokens", (ARRAY, (STRING, 2, ["a", "b"])), f"{T}token_type is [1, 1, 1"),
    (f"{T}token_type", (ARRAY, (U64, 1 << 20, [])), "cut short: "),
    (f"{T}token_type", array(F32, [1.0] * 32), f"{T}token_type is [1.0, 1.0"),
    (f"{T}token_type", array(I32, [1] * 31), "it must be as long as the list of tokens, 32"),
    (f"{T}merges", None, f"{T}merges is missing; it must be a list"),
    (f"{T}merges", array(STRING, ["ab"]), f'{T}merges holds "ab"; it must be two tokens and a space'),
    (f"{T}merges", array(STRING, ["a zz"]), "its vocabulary cannot be made a tokenizer"),
    (f"{T}eos_token_id", array(U32, [2, 3]), f"{T}eos_token_id is [2, 3]; it must be an integer"),
    (f"{T}bos_token_id", (STRING, "<s>"), f'{T}bos_token_id is "<s>"; it must be an integer'),
    (f"{T}add_bos_token", (U32, 1), f"{T}add_bos_token is 1; it must be true or false"),
    (f"{T}pre", (U32, 1), f"{T}pre is 1; it must be a string"),
    ("tokenizer.chat_template", array(STRING, ["x"]), 'tokenizer.chat_template is ["x"]; it must be a string'),
    ("x", (STRING, b"\xff"), 'the value of "x" is not UTF-8'),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_wrong_value_is_named(
    key: str, value: Typed | None, message: str, convert: Callable[[bytes], Path]
) -> None:
    keys = good_keys()
    if value is None:
        del keys[key]
    else:
        keys[key] = value
    assert message in refusal(convert, gguf_bytes(list(keys.items()), good_tensors()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": (8, 31)}, "its vocabulary has 32 tokens, and token_embd.weight has 31 rows: one for each"),
        ({"dims": (0, 32)}, 'tensor "token_embd.weight" has shape [32, 0]; its sizes must be 1 or more'),
        ({"dims": (2**32, 2**32)}, "cut short: "),
        ({"dims": (2**63, 2**63)}, "cut short: "),
        ({"dims": (8, 32, 1, 1, 1)}, "has 5 dimensions; it must have 1 to 4"),
        ({"dims": ()}, "has 0 dimensions; it must have 1 to 4"),
        ({"num_dims": 2**32 - 1}, "has 4294967295 dimensions"),
        ({"kind": 999}, "is of type 999; the installed package gguf knows "),
        ({"kind": 2}, "has shape [32, 8]; its sizes must be 1 or more, the last a multiple of 32"),
        ({"kind": 24}, "token_embd.weight cannot be dequantised"),  # I8
        ({"offset": 2**64 - 32}, "cut short: "),
        ({"offset": 7}, "has offset 7; it must be a multiple of 32"),
        ({"offset": 1024}, "has offset 1024; it must be a multiple of 32 that is not below 2048"),
        ({"name": "output_norm.weight"}, 'tensor "output_norm.weight" is there twice'),
        ({"name": "x"}, "holds no language model (token_embd.weight"),
        ({"name": b"\xff"}, "a tensor's name is not UTF-8"),
    ],
)  # fmt: skip
def test_a_tensor_that_lies_is_named(
    change: dict[str, Any], message: str, convert: Callable[[bytes], Path]
) -> None:
    tensors = good_tensors()
    tensors[0] |= change
    assert message in refusal(convert, gguf_bytes(list(good_keys().items()), tensors))


def test_heads_of_a_fused_module_cannot_share_keys(convert: Callable[[bytes], Path]) -> None:
    keys = {key.replace("llama.", "gptneox."): value for key, value in good_keys().items()}
    keys |= {"general.architecture": (STRING, "gptneox"), "gptneox.attention.head_count_kv": (U32, 1)}
    wanted = "gptneox.attention.head_count_kv is 1; it must be head_count, 2"
    assert wanted in refusal(convert, gguf_bytes(list(keys.items()), good_tensors()))


def test_headers_that_lie(convert: Callable[[bytes], Path]) -> None:
    keys, tensors = list(good_keys().items()), good_tensors()
    for counts, version, message in [
        ((2**64 - 1, None), 3, "18446744073709551615 tensors; a file of its size has at most "),
        ((None, 2**63), 3, "9223372036854775808 keys; a file of its size has at most "),
        ((12, None), 3, 'tensor "" has '),
        ((None, 16), 3, ""),
        ((None, None), 1, "GGUF version 1; 2 and 3 are read"),
        (
            (None, None),
            3 << 24,
            "a big-endian file, and this machine is little-endian: convert it, in place, with",
        ),
    ]:
        assert message in refusal(convert, gguf_bytes(keys, tensors, counts, version))  # type: ignore[arg-type]
    assert "is there twice" in refusal(convert, gguf_bytes([*keys, keys[3]], tensors))
    more = [*tensors, {"name": "x\n\x1b" * 40, "dims": (8,), "kind": 0, "offset": 3680}]
    assert r'model has no place for: "x\n\u001b' in refusal(convert, gguf_bytes(keys, more))
    assert "no GGUF file" in refusal(convert, b"GGML" + b"\0" * 64)
    assert "no GGUF file" in refusal(convert, b"")


def test_the_architecture_is_looked_at_before_what_follows_it(convert: Callable[[bytes], Path]) -> None:
    keys = good_keys() | {"general.architecture": (STRING, "mamba"), "x": (STRING, b"\xff" * 9)}
    assert 'architecture "mamba" is not supported' in refusal(convert, gguf_bytes(list(keys.items()), []))


@pytest.mark.parametrize("index", [32, 2**32 - 1])
def test_a_special_token_outside_the_vocabulary_is_left_out(
    index: int, convert: Callable[[bytes], Path], caplog: pytest.LogCaptureFixture
) -> None:
    """As llama.cpp; byte-level vocabularies have no default for it, sentencepiece ones have 1, 2 and 0."""
    keys = good_keys() | {f"{T}bos_token_id": (U32, index), f"{T}add_bos_token": (BOOL, True)}
    folder = convert(gguf_bytes(list(keys.items()), good_tensors()))
    assert json.loads((folder / "config.json").read_text())["bos_token_id"] is None
    assert "bos_token" not in (folder / "tokenizer_config.json").read_text()
    assert f"{T}bos_token_id is {index}; it is left out" in caplog.text
    del keys[f"{T}merges"], keys[f"{T}eos_token_id"]
    keys |= {f"{T}model": (STRING, "llama"), f"{T}scores": array(F32, [0.0] * 32)}
    folder = convert(gguf_bytes(list(keys.items()), good_tensors()))
    assert re.search(
        r'"bos_token_id": 1,\s*"eos_token_id": 2', (folder / "generation_config.json").read_text()
    )


def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    os = pytest.importorskip("os")
    os.mkfifo(tmp_path / "a.gguf")
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


VALUES = st.one_of(
    st.tuples(st.just(U32), st.integers(0, 2**32 - 1)),
    st.tuples(st.just(I32), st.integers(-(2**31), 2**31 - 1)),
    st.tuples(st.just(U64), st.integers(0, 2**64 - 1)),
    st.tuples(st.just(F32), st.floats(width=32)),
    st.tuples(st.just(BOOL), st.booleans()),
    st.tuples(st.just(STRING), st.text(max_size=9) | st.binary(max_size=9)),
    st.lists(st.integers(0, 255), max_size=40).map(lambda values: array(U8, values)),
    st.lists(st.text(max_size=3), max_size=40).map(lambda values: array(STRING, values)),
    st.integers(0, 2**64 - 1).map(lambda length: (ARRAY, (STRING, length, ["a"]))),
    st.sampled_from([4, 5, 8, 9, 77]).map(lambda inner: (ARRAY, (inner, 3, []))),
)
KEYS = [*good_keys(), *(key for key, *_ in WRONG), f"{T}scores", "llama.rope.freq_base"]
KEYS += [f"llama.rope.{key}" for key in ("scale_linear", "scaling.type", "scaling.factor", "dimension_count")]
CHANGES = st.dictionaries(
    st.sampled_from(["dims", "kind", "offset", "num_dims", "name"]),
    st.integers(0, 2**64 - 1),
    max_size=2,
)


def convert_or_refuse(folder: Path, content: bytes) -> None:
    (path := folder / "m.gguf").write_bytes(content)
    (out := folder / "out").mkdir(exist_ok=True)
    try:
        convert_gguf(path, out)
        return
    except ModelError as error:
        message = str(error)
    assert "\n" not in message and "m.gguf" in message


def fuzz_metadata(changed: dict[str, Typed | None], model: str, folder: Path) -> None:
    keys: dict[str, Any] = good_keys() | {f"{T}model": (STRING, model)}
    if model == "llama":
        keys[f"{T}scores"] = array(F32, [0.0] * 32)
    keys |= changed
    convert_or_refuse(
        folder, gguf_bytes([(key, value) for key, value in keys.items() if value is not None], good_tensors())
    )


def fuzz_bytes(position: int, inserted: bytes, removed: int, folder: Path) -> None:
    whole = gguf_bytes(list(good_keys().items()), good_tensors())
    position %= len(whole)
    convert_or_refuse(folder, whole[:position] + inserted + whole[position + removed :])


METADATA = given(
    st.dictionaries(st.sampled_from(KEYS), st.none() | VALUES, min_size=1, max_size=4),
    st.sampled_from(["gpt2", "llama"]),
)
BYTES = given(st.integers(0, 2000), st.binary(max_size=12), st.integers(0, 12))


@METADATA
@settings(max_examples=200)
def test_any_metadata_converts_or_is_one_line(
    tmp_path_factory: pytest.TempPathFactory, changed: dict[str, Typed | None], model: str
) -> None:
    fuzz_metadata(changed, model, tmp_path_factory.getbasetemp())


@BYTES
@settings(max_examples=200)
def test_any_bytes_convert_or_are_one_line(
    tmp_path_factory: pytest.TempPathFactory, position: int, inserted: bytes, removed: int
) -> None:
    fuzz_bytes(position, inserted, removed, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@METADATA
@settings(max_examples=5000)
def test_any_metadata_converts_or_is_one_line_at_length(
    tmp_path_factory: pytest.TempPathFactory, changed: dict[str, Typed | None], model: str
) -> None:
    fuzz_metadata(changed, model, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@BYTES
@settings(max_examples=5000)
def test_any_bytes_convert_or_are_one_line_at_length(
    tmp_path_factory: pytest.TempPathFactory, position: int, inserted: bytes, removed: int
) -> None:
    fuzz_bytes(position, inserted, removed, tmp_path_factory.getbasetemp())
