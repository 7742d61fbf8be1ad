"""What is done where a request says nothing: whose word counts, which tokens end an answer, and files that lie."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sleb import LLM, SamplingParams
from sleb.engine.config import EngineConfig
from sleb.engine.generation import SAMPLING, GenerationDefaults, load_defaults
from sleb.engine.text import TextProcessor
from sleb.errors import ConfigError, ModelError, SlebError

VOCAB = 264
FAST = {"device": "cpu", "dtype": "float32", "kv_cache_memory": 0.01, "kernels": "torch"}


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(tiny_model_dir / name, tmp_path)
    change(tmp_path / "config.json", eos_token_id=None)
    return tmp_path


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


def defaults(
    path: Path, own: Any = None, *, by_class: Any = None, of_alias: Any = None, **options: Any
) -> GenerationDefaults:
    if own is not None:
        (path / "generation_config.json").write_text(json.dumps(own))
    config = EngineConfig(path, **options)
    config.check()
    stated = json.loads((path / "config.json").read_text())["eos_token_id"]
    of_config = by_class if stated is None else stated
    spec: Any = SimpleNamespace(
        vocab_size=VOCAB, special_token_ids={"eos": () if of_config is None else (of_config,)}
    )
    return load_defaults(path, config, spec, TextProcessor(path, VOCAB), of_alias or {})


def values(found: GenerationDefaults) -> dict[str, Any]:
    return {name: getattr(found, name) for name in SAMPLING}


OFF = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
GIVEN = {"temperature": 0.6, "top_p": 0.9, "top_k": 50.0, "min_p": 0.1, "repetition_penalty": 1.1}


def test_request_then_flag_then_file_then_off(folder: Path) -> None:
    assert values(defaults(folder)) == OFF
    found = defaults(folder, GIVEN, temperature=0.0, top_k=3)
    assert values(found) == GIVEN | {"temperature": 0.0, "top_k": 3}
    assert type(defaults(folder).top_k) is int  # 50.0 is 50
    resolved = found.resolve(SamplingParams(top_p=0.5, top_k=-1))
    assert (resolved.temperature, resolved.top_p, resolved.top_k, resolved.min_p) == (0.0, 0.5, -1, 0.1)


def test_an_alias_stands_below_the_model_s_own_file(folder: Path, tmp_path: Path) -> None:
    of_alias = {"temperature": 0.2, "top_p": 0.8}
    assert values(defaults(folder, of_alias=of_alias)) == OFF | of_alias
    assert values(defaults(folder, of_alias=of_alias, top_p=1.0)) == OFF | {"temperature": 0.2}
    assert values(defaults(folder, of_alias=of_alias, generation_config="none")) == OFF
    assert values(defaults(folder, {"top_p": 0.5}, of_alias=of_alias)) == OFF | {
        "temperature": 0.2,
        "top_p": 0.5,
    }
    other = tmp_path / "other.json"
    other.write_text('{"top_k": 7}')
    assert values(defaults(folder, of_alias=of_alias, generation_config=other)) == OFF | {"top_k": 7}


def test_the_operator_s_own_file_or_none(folder: Path, tmp_path: Path) -> None:
    own = GIVEN | {"eos_token_id": 65}
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"temperature": 0.2, "eos_token_id": 66}))
    found = defaults(folder, own, generation_config=other)
    assert values(found) == OFF | {"temperature": 0.2}
    assert found.end_token_ids == {
        65,
        66,
        258,
    }  # where the model says that it ends is true whatever is sampled
    found = defaults(folder, own, generation_config="none")
    assert values(found) == OFF and found.end_token_ids == {65, 258}
    with pytest.raises(ConfigError, match=r"--generation-config .*absent.json does not exist"):
        defaults(folder, generation_config=tmp_path / "absent.json")
    other.write_text("{")
    with pytest.raises(ConfigError, match=r"other.json cannot be read as JSON"):
        defaults(folder, generation_config=other)


def test_a_share_of_nothing_is_the_most_probable_token(folder: Path) -> None:
    resolved = defaults(folder, {"top_p": 0}).resolve(SamplingParams())
    assert (resolved.temperature, resolved.top_p) == (0.0, 1.0)
    resolved = defaults(folder, top_p=0.0).resolve(SamplingParams(top_p=0.5))
    assert (resolved.temperature, resolved.top_p) == (1.0, 0.5)


def test_a_file_that_is_greedy_has_no_sampling_values(folder: Path) -> None:
    found = defaults(folder, GIVEN | {"do_sample": False})
    assert values(found) == OFF | {"repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("top_p", -0.5, "a number from 0 to 1"),
        ("top_p", float("inf"), "a number from 0 to 1"),
        ("temperature", "0.7", "a number from 0 to 100"),
        ("temperature", float("nan"), "a number from 0 to 100"),
        ("top_k", 2.5, "an integer from -1"),
        ("top_k", True, "an integer from -1"),
        ("min_p", 2, "a number from 0 to 1"),
        ("repetition_penalty", 0, "a number from 0.01 to 100"),
        ("do_sample", "no", "true or false"),
        ("eos_token_id", "2", "a token id or a list"),
        ("eos_token_id", [2, None], "a token id or a list"),
        ("eos_token_id", 2.5, "a token id or a list"),
        ("eos_token_id", [1] * 5000, "a token id or a list of at most 1024"),
    ],
)
def test_a_value_that_cannot_be_is_refused_at_start(
    folder: Path, field: str, value: Any, allowed: str
) -> None:
    with pytest.raises(
        ModelError, match=rf"generation_config.json: {field} is .*; it must be {allowed}"
    ) as caught:
        defaults(folder, {field: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"top_p": 1.5}, "top_p is 1.5"), ({"top_k": -2}, "top_k is -2"), ({"temperature": "hot"}, "temperature"),
     ({"default_max_tokens": 0}, "default_max_tokens is 0"), ({"repetition_penalty": 0}, "repetition_penalty")],
)  # fmt: skip
def test_flags_have_the_ranges_of_requests(folder: Path, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        defaults(folder, **flags)


def test_what_shapes_answers_elsewhere_and_not_here_is_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    defaults(
        folder, {"no_repeat_ngram_size": 3, "num_beams": 1, "suppress_tokens": [], "stop_strings": ["x"]}
    )
    [message] = [record.getMessage() for record in caplog.records]
    assert message.endswith(
        "generation_config.json: not supported, ignored: stop_strings, no_repeat_ngram_size"
    )


# Ends.


def test_every_file_s_end_is_an_end(folder: Path) -> None:
    change(folder / "config.json", eos_token_id=10)
    assert defaults(folder, {"eos_token_id": [0, 1.0]}).end_token_ids == {0, 1, 10, 258}


def test_the_architecture_s_own_end_only_where_no_file_names_one(folder: Path) -> None:
    """A LlamaConfig without one says 2, which is a token like any other to most tokenizers."""
    assert defaults(folder, by_class=2).end_token_ids == {258}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert defaults(folder, by_class=2).end_token_ids == {2}
    assert defaults(folder, by_class=VOCAB).end_token_ids == frozenset()


def test_ids_that_the_model_does_not_have_are_left_out_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = defaults(folder, {"eos_token_id": [2, 60000, -1], "bos_token_id": 2**40})
    assert found.end_token_ids == {2, 258} and found.begin_token_id is None
    messages = [record.getMessage() for record in caplog.records]
    assert any(
        "eos_token_id 60000 is no token of the model, which has 264" in message for message in messages
    )
    assert len(messages) == 3


@pytest.mark.parametrize(
    ("turn", "tokenizer_end", "ends"),
    [
        ("<|im_end|>\n", "<|endoftext|>", {256, 258}),
        ("\n<|im_end|>", None, {258}),
        ("\n", "<|endoftext|>", {256}),
        ("", None, {7}),  # 7 is what the architecture says
        ("{{ raise_exception('no') }}", "<|endoftext|>", {256}),
    ],
)
def test_the_end_of_a_turn_in_the_template(
    folder: Path, turn: str, tokenizer_end: str | None, ends: set[int]
) -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] }}" + turn + "{% endfor %}"
    )
    change(folder / "tokenizer_config.json", chat_template=source, eos_token=tokenizer_end)
    assert defaults(folder, by_class=7).end_token_ids == ends


def test_an_answer_ends_where_its_turn_does(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The files name token 0 alone; the tokenizer and the template name 258."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    change(folder / "config.json", eos_token_id=0)
    change(folder / "generation_config.json", eos_token_id=0)
    llm = LLM(folder, **FAST)
    params = SamplingParams(max_tokens=8, logit_bias={258: 100.0}, temperature=0.0)
    [output] = llm.generate("Hi", params)
    assert output.finish_reason == "stop" and list(output.token_ids) == [258]


def test_an_end_that_is_no_token_kills_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    change(folder / "generation_config.json", eos_token_id=[2, 60000])
    llm = LLM(folder, **FAST)
    [output] = llm.generate("Hi", SamplingParams(max_tokens=5, min_tokens=3, temperature=0.0))
    assert len(output.token_ids) >= 3


def test_the_operator_s_limit_is_for_answers_without_one(tiny_model_dir: Path) -> None:
    llm = LLM(tiny_model_dir, default_max_tokens=3, **FAST)
    free = SamplingParams(max_tokens=None, ignore_eos=True)
    outputs = llm.generate(["Hi", "Hi"], [free, replace(free, max_tokens=5)])
    assert [len(output.token_ids) for output in outputs] == [3, 5]
    assert outputs[0].finish_reason == "length"


def test_flags_are_arguments_of_llm(tiny_model_dir: Path) -> None:
    greedy = LLM(tiny_model_dir, temperature=0.0, **FAST).generate("Hi", SamplingParams(max_tokens=6))[0]
    asked = LLM(tiny_model_dir, **FAST).generate("Hi", SamplingParams(max_tokens=6, temperature=0.0))[0]
    assert greedy.token_ids == asked.token_ids


# Any value of any field.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FILES = st.dictionaries(
    st.sampled_from([*SAMPLING, "do_sample", "eos_token_id", "bos_token_id", "stop_strings", "num_beams"]),
    JSON,
)


def check_any(folder: Path, content: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(content))
    config = EngineConfig(folder)
    spec: Any = SimpleNamespace(vocab_size=VOCAB, special_token_ids={"eos": (2,)})
    text: Any = SimpleNamespace(end_token_ids=set)
    logging.disable(logging.WARNING)
    try:
        found = load_defaults(folder, config, spec, text, {})
    except SlebError as error:
        said = str(error)
    else:
        said = ""
    finally:
        logging.disable(logging.NOTSET)
    if said:
        assert "generation_config.json" in said and "\n" not in said and len(said) < 500
        return
    assert all(0 <= token_id < VOCAB for token_id in found.end_token_ids)
    found.resolve(SamplingParams())  # a request's own checks pass


def fuzz(examples: int) -> Any:
    return settings(
        max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )


@fuzz(100)
@given(content=FILES | JSON)
def test_any_generation_config_is_read_or_refused_in_a_line(folder: Path, content: Any) -> None:
    check_any(folder, content)


@pytest.mark.slow
@fuzz(5000)
@given(content=FILES | JSON)
def test_many_generation_configs_are_read_or_refused_in_a_line(folder: Path, content: Any) -> None:
    check_any(folder, content)
