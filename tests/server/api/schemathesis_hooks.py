"""Loaded by schemathesis: which answers to requests that fit the description may be refusals all the same.

The description is exact but for what a JSON schema cannot say. Each such rule is named here by its message, with a
test on the request that it really applied: any other refusal of a request that fits is a failure.
"""

from __future__ import annotations

import os
import re

import schemathesis
from schemathesis.openapi.checks import RejectedPositiveData

GRAMMARS = (
    "response_format",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "json_schema",
    "regex",
    "grammar",
    "ebnf",
    "format",
    "output_config",
    "output_format",
)
TOOLS = ("tools", "functions")
STREAMS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/api/chat",
    "/api/generate",
)
RULES_OF_TOKENS = ("allowed_token_ids", "bad_words")
LIMITS = (
    "max_tokens",
    "max_completion_tokens",
    "n_predict",
    "num_predict",
    "max_new_tokens",
    "max_output_tokens",
)


def as_chat(body):
    """The fields of a request for a Response that are as a chat's, but for their shape, as a chat has them."""
    tools = [{"function": tool} for tool in body.get("tools") or [] if tool["type"] == "function"]
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice["type"] == "function":
        choice = {"function": choice}
    elif isinstance(choice, dict):
        choice = {
            "function": {"name": next(iter({each["name"] for each in choice["tools"]} - names(tools)), None)}
        }
    return body | {
        "tools": tools,
        "tool_choice": choice,
        "response_format": (body.get("text") or {}).get("format"),
    }


def names(tools):
    return {tool["function"]["name"] for tool in tools}


def item_types(body):
    items = body.get("input")
    return [each.get("type") for each in items] if isinstance(items, list) else []


def refers(body):
    """An item_reference may do without its type."""
    items = body["input"]
    return any("id" in each and each.get("type") in (None, "item_reference") for each in items)


def names_of(body, field):
    """Of the tools of any format, but for those of Anthropic's own, which are passed over."""
    given = [each for each in body.get(field) or [] if each.get("type") in (None, "function", "custom")]
    return [each.get("function", each)["name"] for each in given]


def named_tools(body):
    """The names that a choice must find among the tools."""
    choice = body.get("tool_choice")
    if not isinstance(choice, dict):
        return set()
    allowed = []
    if choice.get("type") == "allowed_tools":  # chats have them in an object of their own
        allowed = choice.get("allowed_tools", choice)["tools"]
    elif choice.get("type", "function") in ("function", "tool"):
        allowed = [choice]
    functions = (
        each.get("function") for each in allowed
    )  # of chats; Responses and Messages name the tool at once
    return {
        (inner if isinstance(inner, dict) else each).get("name")
        for each, inner in zip(allowed, functions, strict=True)
    } - {None}


def has_grammar(body):
    return any(body.get(name) is not None for name in (*GRAMMARS, "tools", "functions"))


def has_empty_prompt(body):
    """An empty text makes no token; a conversation makes some, but with the fake engine's empty template none."""
    return "messages" in body or "input" in body or "" in (body["prompt"], *body["prompt"])


def options_of(body):
    """Ollama's options are fields of the request."""
    return body | (body.get("options") or {})


def names_unknown_tool(body):
    function = body.get("function_call")
    return bool(named_tools(body) - set(names_of(body, "tools"))) or (
        isinstance(function, dict) and function["name"] not in names_of(body, "functions")
    )


def has_same_names(body):
    return any(len(set(names := names_of(body, field))) < len(names) for field in ("tools", "functions"))


def asks_for_too_few(body):
    body = options_of(body)
    limits = [body[name] for name in LIMITS if body.get(name) not in (None, -1, -2)]
    wanted = max(body.get(name) or 0 for name in ("min_tokens", "min_new_tokens"))
    return any(limit < wanted for limit in [*limits, *([16] if "prompt" in body else [])])


def forces_what_is_not_there(body):
    choice = body.get("tool_choice")
    kind = choice.get("type", "function") if isinstance(choice, dict) else choice
    forced = kind not in (None, "none", "auto") and not names_of(body, "tools")
    return forced or (body.get("function_call") not in (None, "none", "auto") and not body.get("functions"))


def has_rounded(body):
    """Whether a count that 64 bits hold is written as a number that may be another one, rounded."""
    values = [*body.values(), *options_of(body).values()]
    return any(isinstance(each, float) and 2**53 <= abs(each) < 2**64 for each in values)


# The beginning of a message, and whether the body breaks the rule that it tells of.
RULES = [
    (r"the prompt has \d+ tokens( or more)?, but the context holds", lambda body: True),
    (r"the text has more than \d+ tokens", lambda body: True),
    (r"the prompt is empty", has_empty_prompt),
    (r"there are 0 messages", lambda body: {each["role"] for each in body["messages"]} == {"assistant"}),
    (r"the chat template refuses the messages", lambda body: {"messages", "input", "system"} & body.keys()),
    (r"input\[\d+\]\.id is .*, which is no item that is kept", refers),
    (r"'input' has no message", lambda body: set(item_types(body)) == {"reasoning"}),
    (r"no function_call stands before", lambda body: "function_call_output" in item_types(body)),
    (r"min_tokens is \d+; it must be at most max_tokens", asks_for_too_few),
    (r"best_of other than n is", lambda body: body["best_of"] != (body.get("n") or body.get("n_cmpl") or 1)),
    (r"\S+ and \S+ are the same field", lambda body: True),
    (r"bad value \S+ for '\S+': it must be an integer of at most 64 bits, in digits", has_rounded),
    (r"two (tools|functions) are named", has_same_names),
    (r"(tool_choice|function_call) names .*, which is none of the", names_unknown_tool),
    (r"(tool_choice|function_call) is .*, but there are no", forces_what_is_not_there),
    (r"tools and functions exclude each other", lambda body: body["tools"] and body["functions"]),
    (r"repetition_detection has patterns", lambda body: options_of(body)["repetition_detection"]),
    (r"prompt_logprobs are not of a stream", lambda body: body["stream"]),
    (r"top_logprobs needs logprobs", lambda body: body["top_logprobs"] and not body.get("logprobs")),
    (
        r"continue_final_message and add_generation_prompt exclude",
        lambda body: body["continue_final_message"] and body["add_generation_prompt"],
    ),
    (r"\d+ in logit_bias is not a token id", lambda body: body["logit_bias"]),
    (r".* does not support thinking", lambda body: body["think"] not in (None, False)),
    (r"a raw prompt has no template", lambda body: body["raw"] and (body.get("system") or body.get("think"))),
    (
        r"\S+ and \S+ exclude each other",
        lambda body: sum(body.get(name) is not None for name in (*GRAMMARS, *RULES_OF_TOKENS, *TOOLS)) > 1,
    ),
    (r"\S+ takes longer than \S+ s to compile", has_grammar),  # as it can beside other work
    (r"bad_words has .*, which makes no token", lambda body: not all(map(str.strip, body["bad_words"]))),
    (r"structured_outputs and structured_outputs exclude", lambda body: len(body["structured_outputs"]) > 1),
    (
        rf"(tools or )?({'|'.join(GRAMMARS)}|text.format.schema|tools) "
        r"(cannot be used|is not valid JSON|is .*; it must be a JSON schema)",
        has_grammar,
    ),
]


@schemathesis.hook
def filter_failure(context, failure, case, response):
    """False drops a failure."""
    if not isinstance(failure, RejectedPositiveData) or failure.status_code != 400:
        return True
    error = response.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    body = as_chat(case.body) if case.path.startswith("/v1/responses") else case.body
    return not any(re.match(pattern, message) and applies(body) for pattern, applies in RULES)


@schemathesis.hook
def before_call(context, case, **options):
    """A text is no id of an answer that is kept: requests go without one, or nothing else of them would be tried.

    Every request that may ask for a stream does, where streams are asked for: few that are generated would.
    """
    body = case.body
    if not isinstance(body, dict):
        return
    if case.path == "/v1/responses" and isinstance(body.get("previous_response_id"), str):
        body = {name: value for name, value in body.items() if name != "previous_response_id"}
        if body.get("input") in (None, "", []):  # it may be missing beside that
            body["input"] = "x"
    may_stream = os.environ.get("SLEB_SCHEMATHESIS_STREAM") and case.path in STREAMS
    if may_stream and body.get("stream") in (None, False):
        body = body | {"stream": True}
    case.body = body
