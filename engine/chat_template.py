"""Chat templates: which of a model's is meant, what a request may pass to it, and the text that it makes.

Chosen and rendered as transformers does (`PreTrainedTokenizerBase.get_chat_template`, `apply_chat_template`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sleb.errors import ModelError, RequestError
from sleb.fields import shown_text

# What a request has fields for, or the server decides.
OWN_NAMES = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "conversations",
    "chat_template",
    "return_assistant_tokens_mask",
    # Jinja's own, and what transformers adds to them.
    "self",
    "super",
    "caller",
    "varargs",
    "kwargs",
    "loop",
    "range",
    "dict",
    "namespace",
    "lipsum",
    "cycler",
    "joiner",
    "raise_exception",
    "strftime_now",
)
_MAX_REASON = 500  # characters of what a template says
_ANSWER = "Yes."


def check_variables(variables: Mapping[str, Any]) -> None:
    """Raises RequestError for a name in `chat_template_kwargs` that is the template's own, or a field's."""
    for name in variables:
        if name in OWN_NAMES:
            raise RequestError(
                f"'{name}' cannot be given in chat_template_kwargs; it is a field of the request, or the template "
                "language's own name",
                param="chat_template_kwargs",
            )


class ChatTemplates:
    """A model's chat templates by name; mostly there is one, "default".

    Args:
        templates: Jinja sources. source: where they are from, for messages.
        variables: what every template may read: the special tokens, by their names.

    Raises ModelError for one that is no Jinja.
    """

    def __init__(self, templates: Mapping[str, str], source: object, variables: Mapping[str, str]) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._templates = templates
        self._variables = variables
        for name, template in templates.items():
            try:
                _compile_jinja_template(template)
            except Exception as error:
                raise ModelError(
                    f"the chat template '{shown_text(name)}' of {source} is no Jinja template "
                    f"({_reason(error)}): mend it, or give another by --chat-template"
                ) from None

    def choose(self, with_tools: bool) -> str | None:
        """The template for a conversation: "tool_use" when there are tools, if the model has it, else "default"."""
        found = self._templates.get("tool_use") if with_tools else None
        return self._templates.get("default") if found is None else found

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The text of a conversation.

        variables: what the request passes to the template. Raises RequestError when there is no template, the template
        refuses the messages (its own words), or a variable hides a name of the template's own.
        """
        template = self.choose(bool(tools))
        if template is None:
            raise RequestError("this model has no chat template; use completions instead", param="messages")
        check_variables(variables)
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[[_as_known(message, template) for message in messages]],
                tools=[dict(tool) for tool in tools] if tools else None,
                chat_template=template,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                **{**self._variables, **variables},
            )
        except Exception as error:
            raise RequestError(
                f"the chat template refuses the messages: {_reason(error)}", param="messages"
            ) from error
        return str(rendered[0][0])

    def after_answer(self) -> str:
        """What the default template writes behind the last answer, without space before it; empty if unknown."""
        messages = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = self.render(messages, add_generation_prompt=False)
        except RequestError:
            return ""
        return text.rpartition(_ANSWER)[2].lstrip() if _ANSWER in text else ""


def _as_known(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """OpenAI's "developer" is what older templates know as "system"."""
    if message.get("role") == "developer" and "developer" not in template:
        return {**message, "role": "system"}
    return dict(message)


def _reason(error: Exception) -> str:
    text = shown_text(str(error) or type(error).__name__)
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}…"
