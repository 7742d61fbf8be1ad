"""The vocabulary of a GGUF file, checked: lists as long as each other, ids inside it.

What stands for an absent key is as in llama.cpp (src/llama-vocab.cpp), except where a line says otherwise.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sleb.errors import ModelError
from sleb.fields import Fields, shown, shown_path

logger = logging.getLogger("sleb.models")

# The kinds in `tokenizer.ggml.token_type`: text that is always one token, shown to people or not.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_KEYS = "tokenizer.ggml."
_MAX_TOKENS, _MAX_MERGES = 1 << 20, 1 << 21
_MAX_TOKEN = 1024  # characters; a sentencepiece token is tried cut at each of them
_SPECIAL = ("bos", "eos", "eot", "eom", "unknown", "padding")
# Byte-level files without a key get none: llama.cpp's 11 and 11 are Falcon's, a comma in most of them.
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
# Tokens that end a turn of a chat although the file may name another as the end of the text.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|eom_id|>", "<end_of_turn>")


@dataclass(frozen=True)
class Vocabulary:
    """What a file says about its tokens.

    `model`: gpt2 (byte-level BPE) or llama (sentencepiece). `kinds`: none, or one for each token; `scores`: one for
    each token of a sentencepiece vocabulary. `ids`: special tokens, all in the vocabulary. `add_bos`, `add_eos`: None
    where the file does not say.
    """

    source: object
    architecture: str
    model: str
    pre: str | None
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    ids: dict[str, int]
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool
    template: str | None
    tool_template: str | None  # for conversations with tools

    @cached_property
    def index(self) -> dict[str, int]:
        """The id of each token."""
        return {token: index for index, token in enumerate(self.tokens)}

    def ends(self) -> list[int]:
        """The ids that end an answer. Where no template tells which of them end turns, the control tokens do."""
        named = [self.ids[name] for name in ("eos", "eot", "eom") if name in self.ids]
        control = {token for token, kind in zip(self.tokens, self.kinds, strict=False) if kind == CONTROL}
        turns = [
            token for token in _TURN_ENDS if token in (control if self.template is None else self.template)
        ]
        return list(dict.fromkeys([*named, *(self.index[token] for token in turns if token in self.index)]))


def read_vocabulary(fields: Fields) -> Vocabulary:
    """Raises ModelError for a kind of vocabulary that is not known here, or one that contradicts itself."""
    model = fields.string(f"{_KEYS}model", ("gpt2", "llama"))
    tokens = _list(fields, "tokens", str, "strings", _MAX_TOKENS)
    if not tokens:
        raise fields.wrong(f"{_KEYS}tokens", "a list of at least one token")
    if repeated := len(tokens) - len(set(tokens)):
        raise ModelError(f"{shown_path(fields.source)}: its vocabulary names {repeated} tokens twice")
    if long := next((token for token in tokens if len(token) > _MAX_TOKEN), None):
        raise ModelError(
            f"{shown_path(fields.source)}: {_KEYS}tokens holds {shown(long)} of {len(long)} characters; "
            f"a token must have at most {_MAX_TOKEN}"
        )
    sentencepiece = model == "llama"
    kinds = _list(fields, "token_type", int, "integers", _MAX_TOKENS, None if sentencepiece else [])
    scores = _list(fields, "scores", float, "finite numbers", _MAX_TOKENS) if sentencepiece else []
    for name, values in (("token_type", kinds), ("scores", scores)):
        if values and len(values) != len(tokens):
            raise fields.wrong(f"{_KEYS}{name}", f"as long as the list of tokens, {len(tokens)}")
    return Vocabulary(
        source=fields.source,
        architecture=fields.string("general.architecture"),
        model=model,
        pre=fields.string(f"{_KEYS}pre", default=None),
        tokens=tokens,
        kinds=kinds,
        scores=scores,
        merges=[] if sentencepiece else _merges(fields),
        ids=_special_ids(fields, len(tokens), _SENTENCEPIECE_IDS if sentencepiece else {}),
        add_bos=fields.boolean(f"{_KEYS}add_bos_token", None),
        add_eos=fields.boolean(f"{_KEYS}add_eos_token", None),
        add_space_prefix=fields.boolean(f"{_KEYS}add_space_prefix", True),
        template=fields.string("tokenizer.chat_template", default=None),
        tool_template=fields.string("tokenizer.chat_template.tool_use", default=None),
    )


def _list(
    fields: Fields, name: str, kind: type, wanted: str, most: int, default: list[Any] | None = None
) -> list[Any]:
    key = f"{_KEYS}{name}"
    if default is not None and key not in fields:
        return default
    values: list[Any] = fields.items(key, most)
    if not all(type(value) is kind for value in values) or (
        kind is float and not all(map(math.isfinite, values))
    ):
        raise fields.wrong(key, f"a list of {wanted}")
    return values


def _merges(fields: Fields) -> list[tuple[str, str]]:
    """The alphabet has no space, but older writers let one begin a token."""
    merges = []
    for entry in _list(fields, "merges", str, "strings", _MAX_MERGES):
        cut = entry.find(" ", 1)
        if cut < 0:
            raise ModelError(
                f"{shown_path(fields.source)}: {_KEYS}merges holds {shown(entry)}; it must be two tokens and a space"
            )
        merges.append((entry[:cut], entry[cut + 1 :]))
    return merges


def _special_ids(fields: Fields, num_tokens: int, defaults: dict[str, int]) -> dict[str, int]:
    """As llama.cpp: one that is not in the vocabulary is left out, with a warning, and its default stands for it."""
    ids = {name: index for name, index in defaults.items() if index < num_tokens}
    for name in _SPECIAL:
        key = f"{_KEYS}{name}_token_id"
        index = fields.integer(key, -(1 << 31), (1 << 32) - 1, None)
        if index is not None and 0 <= index < num_tokens:
            ids[name] = index
        elif index is not None:
            logger.warning(
                "%s: %s is %d; it is left out, for the vocabulary's ids are 0 to %d",
                *(shown_path(fields.source), key, index, num_tokens - 1),
            )
    return ids
