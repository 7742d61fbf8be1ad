"""A request for an answer to a conversation, whatever wire format it came in: what every chat endpoint maps to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleb.server.grammar.grammar_spec import GrammarSpec
    from sleb.server.message.tools import ToolUse


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages, and what their answer shall be.

    Attributes:
        messages: as chat.completions takes them; checked where they are rendered, by `normalise_messages`.
        model: the name that was asked for; None: the default tier.
        stream: whether the answer comes in pieces.
        sampling: fields of SamplingParams that were given, but for those that have a name of their own here; the others
            are the server's defaults, and without max_tokens an answer may take the rest of the context.
        tools: what the model may or must call.
        answer: the grammar of an answer that is no call.
        allowed_token_ids, bad_words: vLLM's rules about tokens, which exclude a grammar.
        template_variables: arguments of the chat template.
        continue_final_message: whether the answer goes on with the last message.
        truncate_prompt_tokens: how many of the prompt's last tokens to keep; None: all, -1: as many as fit.
        fixed_depth: whether the depth is the shallowest even of a model whose depth the server chooses.
        num_logprobs, num_prompt_logprobs: alternatives told with each token, None: no log-probabilities.
    """

    messages: list[dict[str, Any]]
    model: str | None = None
    stream: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    tools: ToolUse | None = None
    answer: GrammarSpec | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    truncate_prompt_tokens: int | None = None
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    fixed_depth: bool = False
