"""A model folder's tokenizer and chat templates: strings to token ids, conversations to prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb.engine.chat_template import ChatTemplates
from sleb.engine.encoding import MAX_TOKENS, encode_text
from sleb.engine.response_template import AnswerTemplate, read_response_template
from sleb.errors import ConfigError, ModelError, RequestError
from sleb.fields import read_bytes, shown_path
from sleb.models.tokenizer import is_panic, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MAX_TEMPLATE = 2**20  # bytes


class TextProcessor:
    """Strings to token ids and conversations to prompts.

    A folder without tokenizer files gives a processor that knows nothing: prompts must then be token ids and answers
    have no text. `window_start`: the token that windows of a text begin with, or None (`LoadedTokenizer`).

    Args:
        vocab_size: of the model; tokens of the tokenizer past it are left out, with a warning.
        chat_template: a file with the template to use in place of the folder's own.
        max_tokens: of a text that is encoded (`encode_text`).

    Raises ModelError for a folder's file, ConfigError for `chat_template`.
    """

    def __init__(
        self,
        path: Path,
        vocab_size: int | None = None,
        chat_template: str | Path | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        self.max_tokens = max_tokens
        loaded = load_tokenizer(path, vocab_size)
        self.tokenizer: Tokenizer | None = loaded.tokenizer
        self.named_tokens = loaded.named_tokens
        self.window_start = loaded.window_start
        templates, source = loaded.templates, shown_path(path)
        self.response_template: AnswerTemplate | None = None  # of the folder's own chat template
        if chat_template is None and loaded.response_template is not None:
            config = shown_path(path / "tokenizer_config.json")
            self.response_template = read_response_template(loaded.response_template, str(config))
        if chat_template is not None:
            templates, source = {"default": _read_template(Path(chat_template))}, shown_path(chat_template)
        self._templates = ChatTemplates(templates, source, self.named_tokens)

    @property
    def chat_template(self) -> str | None:
        """The chat template of conversations without tools; None if the model has none. Setting it replaces all."""
        return self._templates.choose(with_tools=False)

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        templates = {} if template is None else {"default": template}
        self._templates = ChatTemplates(templates, "this model", self.named_tokens)

    def chat_template_for(self, with_tools: bool) -> str | None:
        """The chat template of conversations with or without tools, or None."""
        return self._templates.choose(with_tools)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`.

        Raises RequestError when the model has no tokenizer, or for far too long a text; ModelError when that fails.
        """
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer; send token ids", param="prompt")
        try:
            return encode_text(self.tokenizer, text, add_special_tokens, self.max_tokens)
        except (TypeError, UnicodeError):
            raise RequestError("the text is no Unicode: it holds half of a surrogate pair") from None
        except BaseException as error:
            if not is_panic(error):
                raise
            raise ModelError("the model's tokenizer fails at this text") from error

    def empty_prompt(self) -> list[int]:
        """What stands for a text without tokens: the token that texts begin with, else the one that ends them."""
        for name in ("bos_token", "eos_token"):
            token = self.named_tokens.get(name)
            token_id = None if token is None or self.tokenizer is None else self.tokenizer.token_to_id(token)
            if token_id is not None:
                return [token_id]
        return []

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The prompt of a conversation, by the model's own chat template: `ChatTemplates.render`, as token ids."""
        return self.encode(self._templates.render(messages, **options), add_special_tokens=False)

    def end_token_ids(self) -> set[int]:
        """The tokenizer's end of text, and the special token with which the chat template ends a turn."""
        if self.tokenizer is None:
            return set()
        behind = self._templates.after_answer()
        special = (
            (token.content, token_id)
            for token_id, token in self.tokenizer.get_added_tokens_decoder().items()
            if token.special and token.content and behind.startswith(token.content)
        )
        ends = {max(special, key=lambda each: len(each[0]), default=("", None))[1]}
        ends.add(self.tokenizer.token_to_id(self.named_tokens.get("eos_token", "")))
        return {token_id for token_id in ends if token_id is not None}


def _read_template(path: Path) -> str:
    try:
        return read_bytes(path, ConfigError, _MAX_TEMPLATE).decode()
    except FileNotFoundError:
        raise ConfigError(f"--chat-template {shown_path(path)} does not exist; name a Jinja file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--chat-template {shown_path(path)} is not text in UTF-8") from None
