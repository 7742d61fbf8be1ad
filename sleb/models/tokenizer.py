"""A folder's tokenizer, made fit for the model beside it: the one place that loads one.

What transformers makes of the files, less what they carry of somebody's training: a length that every text is cut or
filled to, merges that are left out at random, tokens that the model has no row for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb.errors import ModelError
from sleb.fields import MAX_BYTES, read_bytes, read_json, shown, shown_path, shown_text
from sleb.models.config import family_of, read_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger("sleb.models")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_BESIDE = ("config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
_TEMPLATE_FOLDER = "additional_chat_templates"
_PROBE = "Hello, 1 world!\n äλ漢🙂\t</s> <|x|>"  # every kind of character, and what looks like a mark
_MAX_REASON = 300


@dataclass(frozen=True)
class LoadedTokenizer:
    """tokenizer: None if the folder has none. named_tokens: the special ones, by the names that templates know.

    templates: chat templates by name, "default" among them. window_start: the token that every window of a text begins
    with, wherever it is cut from: see `Family.needs_bos`. None: windows are the text's tokens alone.
    response_template: transformers' way to read an answer, as tokenizer_config.json has it; nothing of it is checked.
    """

    tokenizer: Tokenizer | None = None
    named_tokens: dict[str, str] = field(default_factory=dict)
    templates: dict[str, str] = field(default_factory=dict)
    window_start: int | None = None
    response_template: Any = None


def load_tokenizer(path: Path, vocab_size: int | None = None) -> LoadedTokenizer:
    """The tokenizer of the folder `path`; without tokenizer files an empty record.

    vocab_size: of the model; tokens past it are left out, with a warning. Raises ModelError.
    """
    files = [path / name for name in TOKENIZER_FILES if (path / name).exists()]
    if not files:
        return LoadedTokenizer()
    for name in (*TOKENIZER_FILES, *_BESIDE):
        _check_file(path / name)
    for file in [path / "chat_template.jinja", *(path / _TEMPLATE_FOLDER).glob("*.jinja")]:
        _check_file(file)
        _check_text(file)
    settings = _read_settings(path / "tokenizer_config.json")
    from transformers import AutoTokenizer

    try:
        config = _model_config(path, settings)
        fast = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False, use_fast=True)
        tokenizer = _cleaned(fast.backend_tokenizer, path, vocab_size)
        named = {str(name): str(token) for name, token in fast.special_tokens_map.items()}
        template, answers = (
            fast.chat_template,
            getattr(fast, "response_template", None),
        )  # older ones have none
        ids = tokenizer.encode(_PROBE).ids
        tokenizer.decode(ids)
        start = (
            ids[0]
            if _needs_bos(path) and ids[0] == tokenizer.token_to_id(named.get("bos_token", ""))
            else None
        )
    except ModelError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        if "trust_remote_code" in str(error):  # transformers offers an option that sleb does not have
            raise ModelError(
                f"{shown_path(path)}: tokenizer_config.json names code for its tokenizer, which sleb does not run; "
                "where tokenizer.json is there, take auto_map out and set tokenizer_class to PreTrainedTokenizerFast"
            ) from None
        if "tiktoken" in str(error) and not (path / "tokenizer.json").exists():  # what it tries last
            raise ModelError(
                f"{shown_path(path / 'tokenizer.model')} cannot be read: it takes the packages sentencepiece and "
                "protobuf (pip install sentencepiece protobuf), or the model's tokenizer.json beside it"
            ) from error
        raise ModelError(
            f"the tokenizer in {shown_path(path)} cannot be loaded: {_reason(error)}; mend tokenizer.json and "
            "tokenizer_config.json, or take them from the model's own repository"
        ) from error
    templates = template if isinstance(template, dict) else {"default": template} if template else {}
    return LoadedTokenizer(tokenizer, named, templates, start, answers)


def is_panic(error: BaseException) -> bool:
    """Whether `error` is a panic of a library in Rust, which Python's bindings raise as no Exception."""
    return type(error).__name__ == "PanicException"


def _model_config(path: Path, settings: Mapping[str, Any]) -> Any:
    """What transformers looks at in config.json to choose a tokenizer's class, and nothing that it would check besides:
    it refuses the rotation of Phi-3's own files, say. None: it is to look itself.
    """
    from transformers import AutoConfig, PretrainedConfig

    try:
        fields = read_config(path)
        model_type = family_of(fields).model_type
    except ModelError:
        return None
    if settings.get("tokenizer_class") and "auto_map" not in settings:
        # Nothing asks for the class of the configuration then, whose import takes more than a second.
        config: Any = PretrainedConfig()
        config.model_type = model_type
    else:
        config = AutoConfig.for_model(model_type)
    config.name_or_path = str(path)
    config.tokenizer_class = fields.string("tokenizer_class", default=None)
    return config


def _needs_bos(path: Path) -> bool:
    try:
        return family_of(read_config(path)).needs_bos
    except ModelError:
        return False


def _check_file(path: Path) -> None:
    """Raises ModelError for what is there and would be waited for, or fill the memory."""
    if not path.exists():
        return
    if not path.is_file():
        raise ModelError(f"{shown_path(path)} is no regular file; it must be one")
    if path.stat().st_size > MAX_BYTES:
        raise ModelError(f"{shown_path(path)} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read")


def _check_text(path: Path) -> None:
    if not path.exists():
        return
    try:
        read_bytes(path).decode()
    except UnicodeDecodeError:
        raise ModelError(f"{shown_path(path)} is no text in UTF-8; it must be a chat template") from None


def _read_settings(path: Path) -> Mapping[str, Any]:
    """tokenizer_config.json, if it is there. Raises ModelError for fields that transformers would stumble over."""
    if not path.exists():
        return {}
    fields = read_json(path)
    for name in ("tokenizer_class", "chat_template_file"):
        fields.string(name, default=None)
    template = fields.values.get("chat_template")
    wanted = 'a string, or a list of {"name": …, "template": …}, each a string'
    if isinstance(template, list):
        if not all(_is_template(each) for each in template):
            raise fields.wrong("chat_template", wanted)
    elif isinstance(template, dict):
        if not all(isinstance(text, str) for text in template.values()):
            raise fields.wrong("chat_template", wanted)
    elif template is not None and not isinstance(template, str):
        raise fields.wrong("chat_template", wanted)
    for name, value in fields.values.items():
        if name.endswith("_token") and not _is_token(value):
            raise fields.wrong(name, "a token: a string, or an object with its content")
    return fields.values


def _is_template(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("name", "template"))


def _is_token(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, str | bool)  # add_bos_token and such are switches
        or (isinstance(value, dict) and isinstance(value.get("content"), str))
    )


def _reason(error: BaseException) -> str:
    text = shown_text(" ".join(str(error).split()) or type(error).__name__)
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}…"


def _cleaned(tokenizer: Tokenizer, path: Path, vocab_size: int | None) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    if vocab_size is None:
        return tokenizer
    past = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ >= vocab_size)
    if past:
        from tokenizers import Tokenizer

        logger.warning(
            "%s: the tokenizer has %d tokens more than the model, which has %d; they are read as plain text: %s",
            shown_path(path),
            len(past),
            vocab_size,
            ", ".join(shown(token) for _, token in past[:3]) + (", …" if len(past) > 3 else ""),
        )
        marks_are_text = tokenizer.encode_special_tokens  # what no JSON has: `split_special_tokens`
        tokenizer = Tokenizer.from_str(json.dumps(_cut(json.loads(tokenizer.to_str()), vocab_size)))
        tokenizer.encode_special_tokens = marks_are_text
    return tokenizer


def _cut(data: dict[str, Any], size: int) -> dict[str, Any]:
    """The JSON of a tokenizer without the tokens from id `size` on, and without what would make one."""
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < size]
    model = data["model"]
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: a token's id is its place
        model["vocab"] = vocab[:size]
        if (model.get("unk_id") or 0) >= size:
            model["unk_id"] = None
    else:
        model["vocab"] = vocab = {token: id_ for token, id_ in vocab.items() if id_ < size}
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if {left, right, left + right.removeprefix(prefix)} <= vocab.keys()
        ]
    if data.get("post_processor"):
        data["post_processor"] = _cut_processor(data["post_processor"], size)
    return data


def _cut_processor(processor: dict[str, Any], size: int) -> dict[str, Any] | None:
    """What adds special tokens around a text, without those that the model lacks."""
    kind = processor["type"]
    if kind == "Sequence":
        parts = [_cut_processor(part, size) for part in processor["processors"]]
        return processor | {"processors": [part for part in parts if part is not None]}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return None if max(processor["cls"][1], processor["sep"][1]) >= size else processor
    if kind != "TemplateProcessing":
        return processor
    known = {name: token for name, token in processor["special_tokens"].items() if max(token["ids"]) < size}
    pieces = {
        name: [
            piece
            for piece in processor[name]
            if "SpecialToken" not in piece or piece["SpecialToken"]["id"] in known
        ]
        for name in ("single", "pair")
    }
    return processor | pieces | {"special_tokens": known}
