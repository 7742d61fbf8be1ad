"""A model folder's tokenizer, chat template and generation config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sleb.errors import ModelError, RequestError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TextProcessor:
    """Strings to token ids and conversations to prompts.

    A folder without tokenizer files gives a processor that only knows the generation config: prompts must then
    be token ids and answers have no text.
    """

    def __init__(self, path: Path) -> None:
        self.generation_config = _read_generation_config(path)
        self.tokenizer: Tokenizer | None = None
        self.chat_template: str | None = None
        self.named_tokens: dict[str, str] = {}
        if any((path / name).is_file() for name in _TOKENIZER_FILES):
            self._load(path)

    def _load(self, path: Path) -> None:
        from transformers import AutoTokenizer

        try:
            fast = AutoTokenizer.from_pretrained(path, trust_remote_code=False, use_fast=True)
            self.tokenizer = fast.backend_tokenizer
        except Exception as error:
            raise ModelError(f"the tokenizer in {path} cannot be loaded: {error}") from error
        template = fast.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        self.chat_template = template
        for name in _NAMED_TOKENS:
            token = getattr(fast, name, None)
            if token is not None:
                self.named_tokens[name] = str(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises RequestError when the model has no tokenizer."""
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer; send token ids", param="prompt")
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> list[int]:
        """The prompt of a conversation, by the model's own chat template.

        Raises RequestError when the model has no template or the template refuses the messages (its own words).
        """
        if self.chat_template is None:
            raise RequestError("this model has no chat template; use completions instead", param="messages")
        from transformers.utils.chat_template_utils import render_jinja_template

        reserved = {"tools", "documents", "chat_template", "conversations", "add_generation_prompt"}
        variables = {name: value for name, value in template_kwargs.items() if name not in reserved}
        try:
            rendered = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=[dict(tool) for tool in tools] if tools else None,
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                **(self.named_tokens | variables),
            )
        except Exception as error:
            raise RequestError(
                f"the chat template refuses the messages: {error}", param="messages"
            ) from error
        return self.encode(rendered[0][0], add_special_tokens=False)

    def eos_token_ids(self, of_config: Sequence[int]) -> frozenset[int]:
        """End-of-sequence ids: the generation config's, else those of config.json."""
        value = self.generation_config.get("eos_token_id")
        if value is None:
            return frozenset(of_config)
        return frozenset([value] if isinstance(value, int) else value)


def _read_generation_config(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error}); remove it or download it again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds no JSON object; remove it or download it again")
    if config.get("do_sample") is False:  # then the file's sampling values are not in use
        return {
            name: value for name, value in config.items() if name not in ("temperature", "top_p", "top_k")
        }
    return config
