"""Tokenizers as folders bring them: what a file carries of its training, what the model lacks, and files that lie."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sleb.errors import ModelError
from sleb.models.tokenizer import load_tokenizer

TEXT = "The answer to 1+1 is… <|im_end|> <tool> two, äλ漢🙂" * 8


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The text files of tiny_model_dir: 256 bytes and four special tokens."""
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(tiny_model_dir / name, tmp_path)
    return tmp_path


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def ids(path: Path, vocab_size: int | None = None, text: str = TEXT) -> list[int]:
    tokenizer = load_tokenizer(path, vocab_size).tokenizer
    assert tokenizer is not None
    found: list[int] = tokenizer.encode(text).ids
    return found


def reference(path: Path, text: str = TEXT) -> list[int]:
    from transformers import AutoTokenizer

    found: list[int] = AutoTokenizer.from_pretrained(path)(text)[
        "input_ids"
    ]  # it, too, resets what it is not asked
    return found


def test_a_length_that_texts_were_cut_and_filled_to_is_not_obeyed(folder: Path) -> None:
    before = ids(folder)
    change(
        folder / "tokenizer.json",
        truncation={"max_length": 8, "direction": "Right", "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 500},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 259,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
    )
    assert ids(folder) == before == reference(folder)


def test_merges_are_not_left_out_at_random(folder: Path, merged_tokenizer: Any) -> None:
    merged_tokenizer.save(str(folder / "tokenizer.json"))
    before = ids(folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["dropout"] = 0.9
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert [ids(folder) for _ in range(3)] == [before] * 3


def template(*names: str) -> dict[str, Any]:
    """A post-processor that puts tokens of these names before a text."""
    pieces = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
    known = {
        name: {"id": name, "ids": [{"<|im_start|>": 257, "<new>": 260}[name]], "tokens": [name]}
        for name in names
    }
    single = [*pieces, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}


@pytest.mark.parametrize("num_extra", [1, 52])
def test_tokens_that_the_model_lacks_are_plain_text(
    folder: Path, num_extra: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    plain = ids(folder, text="<new>a<new1>")
    names = ["<new>", *(f"<new{number}>" for number in range(1, num_extra))]
    data["added_tokens"] += [
        data["added_tokens"][-1] | {"id": 260 + at, "content": name} for at, name in enumerate(names)
    ]
    data["post_processor"] = template("<|im_start|>", "<new>")
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert max(ids(folder, text="<new>a")) == 260
    assert ids(folder, 260, text="<new>a<new1>") == [257, *plain]
    [message] = [record.getMessage() for record in caplog.records if record.name == "sleb.models"]
    assert f"{num_extra} tokens more than the model, which has 260" in message and '"<new>"' in message
    caplog.clear()
    ids(folder, 260 + num_extra)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_every_kind_of_vocabulary_is_cut_to_the_model(tmp_path: Path, kind: str) -> None:
    """The same texts in terms of what is left, by a tokenizer that never knew more."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    def make(size: int) -> Tokenizer:
        pieces = ["[u]", "a", "b", "c", "ab", "abc", "bc"][:size]
        if kind == "unigram":
            model = models.Unigram([(piece, -float(at)) for at, piece in enumerate(pieces)], unk_id=0)
        elif kind == "wordpiece":
            model = models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[u]")
        else:
            merges = [pair for pair in (("a", "b"), ("ab", "c"), ("b", "c")) if "".join(pair) in pieces]
            model = models.BPE({piece: at for at, piece in enumerate(pieces)}, merges, unk_token="[u]")
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return tokenizer

    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    make(7).save(str(tmp_path / "tokenizer.json"))
    text = "abc ab bc cab x a"
    assert ids(tmp_path, text=text) == make(7).encode(text).ids
    for size in (4, 5, 6):
        assert ids(tmp_path, size, text=text) == make(size).encode(text).ids


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path).tokenizer is None


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", "{", "tokenizer .* cannot be loaded"),
        ("tokenizer.json", "[]", "tokenizer .* cannot be loaded"),
        ("tokenizer.json", '{"model": ' * 5000, "tokenizer .* cannot be loaded"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json is .1.; it must be a JSON object"),
        ("tokenizer_config.json", "nonsense", "tokenizer_config.json cannot be read as JSON"),
        ("tokenizer_config.json", '{"eos_token": 7}', "eos_token is 7; it must be a token"),
        (
            "tokenizer_config.json",
            '{"chat_template": 7}',
            "chat_template is 7; it must be a string, or a list",
        ),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "x"}]}',
            "chat_template is .*; it must be a string",
        ),
        ("tokenizer_config.json", '{"tokenizer_class": []}', "tokenizer_class is .*; it must be a string"),
    ],
)
def test_files_that_lie_are_told_in_one_line(folder: Path, name: str, content: str, says: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=says) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_code_and_templates_that_cannot_be_read_are_told_as_what_they_are(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"chat_template\.jinja is no text in UTF-8"):
        load_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    expected, config = ids(folder), folder / "tokenizer_config.json"
    change(config, tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    (folder / "own.py").write_text("raise SystemExit")
    with pytest.raises(ModelError, match="names code") as caught:
        load_tokenizer(folder)
    assert "trust_remote_code" not in str(caught.value)
    change(config, tokenizer_class="PreTrainedTokenizerFast", auto_map={})  # what the message says
    assert ids(folder) == expected


def test_a_sentencepiece_file_alone_names_what_it_takes(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x05junk")
    with pytest.raises(ModelError, match=r"tokenizer\.model cannot be read: .*sentencepiece and protobuf"):
        load_tokenizer(folder)


def test_what_transformers_refuses_in_config_json_is_no_fault_of_the_tokenizer(folder: Path) -> None:
    expected = ids(folder)
    rotation = {
        "type": "su",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }  # as Phi-3's first files have it
    for changes in (
        {"use_cache": "yes"},
        {
            "use_cache": True,
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "rope_scaling": rotation,
        },
    ):
        change(folder / "config.json", **changes)
        with pytest.raises(Exception, match=r"use_cache|required keys"):
            reference(folder)
        assert ids(folder) == expected


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/x.jinja"],
)
def test_a_pipe_in_the_folder_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=f"{Path(name).name} is no regular file"):
        load_tokenizer(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FIELDS = (
    "tokenizer_class", "chat_template", "extra_special_tokens", "additional_special_tokens", "eos_token", "image_token",
    "model_max_length", "added_tokens_decoder", "add_bos_token", "padding_side", "truncation_side", "init_inputs",
    "fast_tokenizer_files", "auto_map", "clean_up_tokenization_spaces", "model_input_names", "name_or_path",
    "model_specific_special_tokens", "backend", "legacy", "split_special_tokens", "max_len", "tokenizer_file",
)  # fmt: skip


def loads_or_says_why(folder: Path) -> None:
    logging.disable(logging.WARNING)
    said = ""
    try:
        load_tokenizer(folder, 264)
    except ModelError as error:
        said = str(error)
    finally:
        logging.disable(logging.NOTSET)
    assert "\n" not in said and len(said) < 800


def fuzz(examples: int) -> Any:
    return settings(
        max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )


@fuzz(50)
@given(name=st.sampled_from(FIELDS), value=JSON)
def test_any_value_of_any_field_of_the_tokenizer_s_config(folder: Path, name: str, value: Any) -> None:
    original = (folder / "tokenizer_config.json").read_text()
    change(folder / "tokenizer_config.json", **{name: value})
    loads_or_says_why(folder)
    (folder / "tokenizer_config.json").write_text(original)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inside for place in places(each, (*path, key)))][:400]


def put(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    target = data
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return data


@fuzz(50)
@given(draw=st.data(), value=JSON)
def test_any_value_anywhere_in_the_tokenizer(folder: Path, draw: st.DataObject, value: Any) -> None:
    original = (folder / "tokenizer.json").read_text()
    data = json.loads(original)
    data["post_processor"] = template("<|im_start|>")
    place = draw.draw(st.sampled_from(places(data)))
    (folder / "tokenizer.json").write_text(json.dumps(put(data, place, value)))
    loads_or_says_why(folder)
    (folder / "tokenizer.json").write_text(original)


@pytest.mark.slow
@fuzz(5000)
@given(name=st.sampled_from(FIELDS), value=JSON)
def test_many_values_of_the_tokenizer_s_config(folder: Path, name: str, value: Any) -> None:
    test_any_value_of_any_field_of_the_tokenizer_s_config.hypothesis.inner_test(folder, name, value)


@pytest.mark.slow
@fuzz(5000)
@given(draw=st.data(), value=JSON)
def test_many_values_in_the_tokenizer(folder: Path, draw: st.DataObject, value: Any) -> None:
    test_any_value_anywhere_in_the_tokenizer.hypothesis.inner_test(folder, draw, value)


@pytest.mark.parametrize("named", ["Gemma3ForCausalLM", "LlamaForCausalLM"])
def test_windows_of_gemma_begin_with_the_token_that_texts_begin_with(folder: Path, named: str) -> None:
    """Those of others are cut as in the paper, whatever the tokenizer puts before a text."""
    change(folder / "config.json", architectures=[named], model_type=None)
    change(folder / "tokenizer_config.json", bos_token="<|im_start|>")
    assert load_tokenizer(folder).window_start is None  # this tokenizer puts nothing there
    change(folder / "tokenizer.json", post_processor=template("<|im_start|>"))
    assert load_tokenizer(folder).window_start == (257 if named == "Gemma3ForCausalLM" else None)
