"""What clients are told of a model, and how their texts become prompts: all that a server's front needs of an engine.

Plain data without torch, so that a process that only speaks HTTP can hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sleb.engine.requests.tier import Tier, find_tier

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

    from sleb.engine.generation import GenerationDefaults
    from sleb.engine.response_template import AnswerTemplate
    from sleb.engine.text import TextProcessor
    from sleb.layer_map.layer_map import LayerMap


class PromptMaker:
    """Texts and conversations to prompts, by a model's own tokenizer and templates."""

    text: TextProcessor
    eos_token_ids: frozenset[int]

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None if the model has none."""
        return self.text.tokenizer

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; see `TextProcessor.encode`."""
        return self.text.encode(text, add_special_tokens)

    def encode_prompt(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids to continue: of an empty text the token that texts begin with, else the one that ends them."""
        return (
            self.encode(text, add_special_tokens)
            or self.text.empty_prompt()
            or sorted(self.eos_token_ids)[:1]
        )

    def render_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """The prompt of a conversation; see `ChatTemplates.render`."""
        return self.text.render_chat(messages, **options)

    @property
    def chat_template(self) -> str | None:
        """The chat template of conversations without tools; None if the model has none."""
        return self.text.chat_template

    def chat_template_for(self, with_tools: bool) -> str | None:
        """The chat template of conversations with or without tools; None if the model has none."""
        return self.text.chat_template_for(with_tools)

    @property
    def response_template(self) -> AnswerTemplate | None:
        """How the checkpoint has its answers read; None if it does not say."""
        return self.text.response_template


@dataclass(frozen=True)
class DecoderShape:
    """The numbers of a decoder that clients are told, and the name of its architecture."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int


@dataclass(frozen=True)
class DepthSize:
    """num_parameters: patches left out. weight_bytes: of the weights that a request uses. kv_bytes_per_token: of K
    and V."""

    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True, eq=False)
class ServedModel(PromptMaker):
    """A model and its depths as an engine serves them. It may be pickled; the text side is then read anew.

    Attributes:
        page_size, num_pages: tokens in a page of the KV cache, and how many pages there are.
        description: what computes, with which weights, in one line.
        sizes: by depth.
        load_text: reads tokenizer and templates from the files that the engine's are from.
    """

    model_name: str
    layer_map: LayerMap
    shipped_results: tuple[Path, ...]
    tiers: tuple[Tier, ...]
    default_tier: Tier
    defaults: GenerationDefaults
    eos_token_ids: frozenset[int]
    max_model_len: int
    page_size: int
    num_pages: int
    description: str
    weights_name: str
    spec: DecoderShape
    sizes: Mapping[int, DepthSize]
    load_text: Callable[[], TextProcessor] = field(repr=False)

    @cached_property
    def text(self) -> TextProcessor:  # type: ignore[override]  # one that is made when it is asked for
        return self.load_text()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "text"}

    def tier(self, name: str | int | None) -> Tier:
        """The tier with that id or depth; None is the default one. Raises RequestError listing those served."""
        return self.default_tier if name is None else find_tier(self.tiers, name)

    def num_parameters(self, depth: int) -> int:
        return self.sizes[depth].num_parameters

    def weight_bytes(self, depth: int) -> int:
        return self.sizes[depth].weight_bytes

    def kv_bytes_per_token(self, depth: int) -> int:
        return self.sizes[depth].kv_bytes_per_token
