"""Chat templates: the same text as transformers makes of the same folder, and what a request may pass to one."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from sleb.engine.chat_template import OWN_NAMES
from sleb.engine.config import EngineConfig
from sleb.engine.text import TextProcessor
from sleb.errors import ConfigError, ModelError, RequestError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé?"}]
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
]


def marked(mark: str) -> str:
    """A template that tells which it is, and everything that it may read."""
    return (
        mark + "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ image_token }}{{ boi_token }}"
        "{% for m in messages %}[{{ m['role'] }}:{{ m['content'] }}]{% endfor %}"
        "{% if tools %}{{ tools | tojson }}{% endif %}{% if documents %}{{ documents | tojson }}{% endif %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(tiny_model_dir / name, tmp_path)
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def rendered(processor: TextProcessor, messages: Any = MESSAGES, **options: Any) -> str:
    assert processor.tokenizer is not None
    text: str = processor.tokenizer.decode(
        processor.render_chat(messages, **options), skip_special_tokens=False
    )
    return text


def in_config(folder: Path) -> None:
    change(folder, chat_template=marked("A"))


def as_list(folder: Path) -> None:
    names = {"tool_use": "T", "default": "D", "rag": "R"}
    change(folder, chat_template=[{"name": name, "template": marked(mark)} for name, mark in names.items()])


def as_file(folder: Path) -> None:
    change(folder, chat_template=marked("A"))
    (folder / "chat_template.jinja").write_text(marked("F"))


def as_more_files(folder: Path) -> None:
    as_file(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(marked("U"))
    (folder / "additional_chat_templates" / "rag.jinja").write_text(marked("R"))


def with_extra_tokens(folder: Path) -> None:
    change(
        folder,
        chat_template=marked("A"),
        extra_special_tokens={"image_token": "<|im_start|>", "boi_token": "<x>"},
    )


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("make", [in_config, as_list, as_file, as_more_files, with_extra_tokens])
def test_the_same_text_as_transformers(folder: Path, make: Any, tools: Any) -> None:
    make(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    for options in ({}, {"add_generation_prompt": False}):
        wanted = theirs.apply_chat_template(
            MESSAGES, tools=tools, tokenize=False, **{"add_generation_prompt": True} | options
        )
        assert rendered(TextProcessor(folder), tools=tools, **options) == wanted
    assert "[user:" in wanted
    if make is with_extra_tokens:
        assert "<|im_start|><x>" in wanted


def test_documents_reach_the_template(folder: Path) -> None:
    in_config(folder)
    documents = [{"title": "a", "text": "b"}]
    wanted = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        MESSAGES, documents=documents, tokenize=False, add_generation_prompt=True
    )
    assert rendered(TextProcessor(folder), variables={"documents": documents}) == wanted


def test_the_template_that_is_asked_about_is_the_one_that_is_used(folder: Path) -> None:
    as_list(folder)
    processor = TextProcessor(folder)
    assert processor.chat_template == processor.chat_template_for(False) == marked("D")
    assert processor.chat_template_for(True) == marked("T")
    in_config(folder)
    assert TextProcessor(folder).chat_template_for(True) == marked("A")


def test_a_list_without_a_default(folder: Path) -> None:
    change(folder, chat_template=[{"name": "tool_use", "template": marked("T")}])
    processor = TextProcessor(folder)
    assert processor.chat_template is None
    assert rendered(processor, tools=TOOLS).startswith("T")
    with pytest.raises(RequestError, match="no chat template"):
        processor.render_chat(MESSAGES)


@pytest.mark.parametrize(
    ("source", "role"),
    [("{{ messages[0]['role'] }}", "system"), ("{{ messages[0]['role'] }}{# developer #}", "developer")],
)
def test_a_developer_is_the_system_to_templates_that_do_not_know_one(
    folder: Path, source: str, role: str
) -> None:
    change(folder, chat_template=source)
    assert rendered(TextProcessor(folder), [{"role": "developer", "content": "x"}]) == role


# The operator's template.


def test_a_template_of_the_operator_s(folder: Path, tmp_path: Path) -> None:
    change(folder, chat_template=None)
    file = tmp_path / "mine.jinja"
    file.write_text(marked("M"), encoding="utf-8")
    with pytest.raises(RequestError, match="no chat template"):
        TextProcessor(folder).render_chat(MESSAGES)
    wanted = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        MESSAGES, chat_template=marked("M"), tokenize=False, add_generation_prompt=True
    )
    assert rendered(TextProcessor(folder, chat_template=file)) == wanted
    as_more_files(folder)  # replaces them all
    assert rendered(TextProcessor(folder, chat_template=str(file)), tools=TOOLS).startswith("M")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"--chat-template .*mine.jinja does not exist; name a Jinja file"),
        (b"\xff\xfe", r"--chat-template .*mine.jinja is not text in UTF-8"),
        (b"x" * (2**20 + 1), r"mine.jinja has 1048577 bytes; at most 1048576 are read"),
    ],
)
def test_a_file_that_is_no_template(folder: Path, tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "mine.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        TextProcessor(folder, chat_template=file)


def test_a_template_that_is_no_jinja_is_refused_at_start(folder: Path) -> None:
    change(folder, chat_template="{% for x in %}")
    with pytest.raises(
        ModelError, match=r"the chat template 'default' of .* is no Jinja template \(.*--chat-template"
    ):
        TextProcessor(folder)


def test_it_is_an_option_in_one_place() -> None:
    assert EngineConfig("x", chat_template="y").chat_template == "y"


# What a request may pass.


def test_no_name_of_the_template_language_or_of_transformers_is_left_out() -> None:
    theirs = {name for name, _ in inspect.signature(render_jinja_template).parameters.items()}
    jinja = set(_compile_jinja_template("").environment.globals)
    jinja |= set(inspect.signature(jinja2.Template.render).parameters) - {"args"}
    assert theirs - {"documents", "kwargs"} | jinja | {"messages", "loop", "caller", "super"} <= set(
        OWN_NAMES
    )


@pytest.mark.parametrize("name", OWN_NAMES)
def test_no_own_name_can_be_hidden(folder: Path, name: str) -> None:
    in_config(folder)
    with pytest.raises(RequestError, match=f"'{name}' cannot be given in chat_template_kwargs") as caught:
        TextProcessor(folder).render_chat(MESSAGES, variables={name: 1})
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize(
    "name", ["", "a b", "__class__", "true", "args", "environment", "template", "name", "0"]
)
def test_any_other_name_does_no_harm(folder: Path, name: str) -> None:
    in_config(folder)
    processor = TextProcessor(folder)
    assert rendered(processor, variables={name: [{"x": 1}]}) == rendered(processor)


def test_what_a_template_says_is_kept_short(folder: Path) -> None:
    change(folder, chat_template="{{ raise_exception(messages[0]['content']) }}")
    with pytest.raises(RequestError, match=r"the chat template refuses the messages: x+…") as caught:
        TextProcessor(folder).render_chat([{"role": "user", "content": "x" * 10**6}])
    assert len(str(caught.value)) < 600


def test_a_tokenizer_that_panics_is_no_fault_of_the_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rust's panics come as an exception that is no Exception, which would end the process."""

    class PanicException(BaseException):
        pass

    def panic(*_: Any, **__: Any) -> None:
        raise PanicException("index out of bounds")

    processor = TextProcessor(folder)
    processor.tokenizer = SimpleNamespace(encode=panic)  # type: ignore[assignment]
    with pytest.raises(ModelError, match="the model's tokenizer fails at this text"):
        processor.encode("Hi")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", panic)
    with pytest.raises(ModelError, match=r"tokenizer in .* cannot be loaded: index out of bounds; mend"):
        TextProcessor(folder)


def test_half_a_surrogate_pair_is_no_text(folder: Path) -> None:
    with pytest.raises(RequestError, match="no Unicode"):
        TextProcessor(folder).encode("a\ud800")
