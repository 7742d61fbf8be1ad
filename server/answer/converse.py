"""From a conversation to a generation: the checks, the prompt, the grammar and the reading that every format shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import Request

from sleb.engine.requests.sampling_params import SamplingParams
from sleb.server.answer.generation import Generation, Prompt
from sleb.server.context import ServerContext, get_context
from sleb.server.conversation import Conversation
from sleb.server.conversation_key import conversation_keys
from sleb.server.grammar.token_rules import grammar_source
from sleb.server.json_input import num_characters
from sleb.server.message.incoming import normalise_messages
from sleb.server.message.parser import MessageShape
from sleb.server.message.reading import AnswerReading
from sleb.server.message.tool_formats import knows_tools
from sleb.server.message.tool_prompt import offer_in_text
from sleb.server.text_threads import run

_NUM_LAST_TOKENS = 64  # of a prompt, in which what a template begins an answer with has room


@dataclass(frozen=True)
class Begun:
    """An answer that nothing is known to be wrong with: `generation` is not started; `shape` reads what it makes."""

    context: ServerContext
    generation: Generation
    shape: MessageShape


async def begin(request: Request, conversation: Conversation) -> Begun:
    """Checks and renders a conversation, and compiles its grammar.

    Raises RequestError for what cannot be honoured, EngineDeadError, ShuttingDownError.
    """
    context = get_context(request)
    context.engine.check()
    served, selection = (
        context.engine.model,
        context.select(conversation.model, fixed=conversation.fixed_depth),
    )
    fields: dict[str, Any] = {"max_tokens": None} | dict(conversation.sampling)
    fields["logprobs"] = conversation.num_logprobs
    fields["prompt_logprobs"] = conversation.num_prompt_logprobs
    SamplingParams(**fields)  # a value out of range is told before anything is computed
    prompt = Prompt(await _render(request, conversation)).cut(
        conversation.truncate_prompt_tokens, fields["max_tokens"], served.max_model_len
    )
    reading = _reading(context, conversation, prompt)
    fields["grammar"] = await grammar_source(
        context.engine, conversation.allowed_token_ids, conversation.bad_words, reading.grammar()
    )
    fields["shown_special_ids"] = reading.shown_special_ids
    params = SamplingParams(**fields)
    keys = conversation_keys(request.state.key, conversation.messages) if selection.is_auto else ()
    generation = Generation(context, request.state.request_id, selection, [prompt], params, keys)
    legacy = conversation.tools is not None and conversation.tools.legacy
    return Begun(context, generation, MessageShape(reading.make_parser, legacy))


async def count_tokens(request: Request, conversation: Conversation) -> int:
    """How many tokens the prompt of a conversation has. Raises RequestError as `begin` does."""
    get_context(request).tier(conversation.model)
    return len(await _render(request, conversation))


def _reading(context: ServerContext, conversation: Conversation, prompt: Prompt) -> AnswerReading:
    served, continued = context.engine.model, None
    if conversation.continue_final_message:
        continued = str(conversation.messages[-1].get("content") or "")
    end = prompt.token_ids[-_NUM_LAST_TOKENS:]
    return AnswerReading(
        template=served.chat_template_for(conversation.tools is not None),
        response_template=served.response_template,
        tokenizer=served.tokenizer,
        tools=conversation.tools,
        answer=conversation.answer,
        tool_format=context.options.tool_format,
        prompt_end=""
        if served.tokenizer is None
        else served.tokenizer.decode(end, skip_special_tokens=False),
        continued=continued,
    )


async def _render(request: Request, conversation: Conversation) -> list[int]:
    num_bytes = request.state.num_bytes
    return await run(lambda: _render_now(get_context(request), conversation, num_bytes), num_bytes)


def _render_now(context: ServerContext, conversation: Conversation, num_bytes: int) -> list[int]:
    tools = conversation.tools
    template = context.engine.model.chat_template_for(tools is not None)
    messages = normalise_messages(conversation.messages, template)
    options: dict[str, Any] = {
        "add_generation_prompt": conversation.add_generation_prompt,
        "continue_final_message": conversation.continue_final_message,
        "variables": dict(conversation.template_variables),
    }
    if not knows_tools(template):
        messages = offer_in_text(messages, [] if tools is None else tools.tools)
    elif tools is not None:
        options["tools"] = tools.tools
    if num_bytes > context.max_characters:  # they may be escapes and names
        context.check_length(num_characters([messages, options]))
    return context.engine.model.render_chat(messages, **options)
