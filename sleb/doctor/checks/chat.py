"""Whole answers of /chat/completions."""

from __future__ import annotations

from sleb.doctor.check import Group
from sleb.doctor.outcome import expect
from sleb.doctor.target import CHAT, GREEDY, QUESTION, Target, ok, shown

GROUP = Group("chat")

FINISH_REASONS = ("stop", "length", "tool_calls", "content_filter", "function_call")


@GROUP.required
def an_answer_has_its_shape(target: Target) -> None:
    """id, object "chat.completion", created, model, and one choice with a message. Source: OpenAI API."""
    answer = target.chat(**GREEDY)
    expect(isinstance(answer["id"], str) and answer["id"], f"id is {shown(answer['id'])}")
    expect(answer["object"] == "chat.completion", f"object is {shown(answer['object'])}")
    expect(type(answer["created"]) is int, f"created is {shown(answer['created'])}")
    expect(isinstance(answer["model"], str), f"model is {shown(answer['model'])}")
    expect(len(answer["choices"]) == 1, f"there are {len(answer['choices'])} choices")
    [choice] = answer["choices"]
    expect(choice["index"] == 0, f"index is {shown(choice['index'])}")
    expect(choice["message"]["role"] == "assistant", f"role is {shown(choice['message']['role'])}")
    content = choice["message"].get("content")
    expect(isinstance(content, str | None), f"content is {shown(content)}")
    expect(choice["finish_reason"] in FINISH_REASONS, f"finish_reason is {shown(choice['finish_reason'])}")


@GROUP.required
def an_answer_has_text(target: Target) -> None:
    """Some question of a few gets a text that is not empty. Source: OpenAI API."""
    for question in (QUESTION, "Hello!", "Count from one to ten."):
        message = target.chat(question, **GREEDY)["choices"][0]["message"]
        if message.get("content") or message.get("reasoning_content") or message.get("reasoning"):
            return
    expect(False, "three questions got empty answers")


@GROUP.required
def empty_keys_are_null(target: Target) -> None:
    """message.refusal and choice.logprobs are there, and null. Source: OpenAI API (required keys)."""
    [choice] = target.chat(**GREEDY)["choices"]
    for name, holder in (("refusal", choice["message"]), ("logprobs", choice)):
        expect(name in holder, f"{name} is missing")
        expect(holder[name] is None, f"{name} is {shown(holder[name])}")


@GROUP.required
def usage_adds_up(target: Target) -> None:
    """usage has prompt_tokens and completion_tokens, and total_tokens is their sum. Source: OpenAI API."""
    usage = target.chat(**GREEDY)["usage"]
    prompt, completion, total = (usage[f"{name}_tokens"] for name in ("prompt", "completion", "total"))
    expect(prompt > 0, f"prompt_tokens is {prompt}")
    expect(0 <= completion <= 24, f"completion_tokens is {completion}, max_tokens was 24")
    expect(total == prompt + completion, f"{prompt} + {completion} tokens are {total}")


@GROUP.sleb_only
def cached_tokens_are_counted(target: Target) -> None:
    """usage.prompt_tokens_details.cached_tokens is a number, 0 too, of at most prompt_tokens. Source: sleb, vLLM."""
    for _ in range(2):
        usage = target.chat(**GREEDY)["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        expect(type(cached) is int and 0 <= cached <= usage["prompt_tokens"], f"it is {shown(cached)}")


@GROUP.required
def max_tokens_ends_an_answer(target: Target) -> None:
    """max_tokens 3 gives at most three tokens, and finish_reason "length" if it cut. Source: OpenAI API."""
    _expect_cut(target, 3, max_tokens=3)


@GROUP.required
def max_completion_tokens_ends_an_answer(target: Target) -> None:
    """max_completion_tokens does what max_tokens does. Source: OpenAI API."""
    _expect_cut(target, 3, max_completion_tokens=3)


@GROUP.sleb_only
def max_completion_tokens_wins(target: Target) -> None:
    """Of both limits max_completion_tokens counts. Source: sleb, vLLM."""
    _expect_cut(target, 2, max_tokens=8, max_completion_tokens=2)


def _expect_cut(target: Target, limit: int, **fields: int) -> None:
    answer = target.chat(temperature=0, **fields)
    number, reason = answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]
    expect(number <= limit, f"there are {number} tokens")
    if target.chat(**GREEDY)["usage"]["completion_tokens"] > limit:
        expect(number == limit, f"there are {number} tokens, though the answer goes on")
        expect(reason == "length", f"it ended by {reason}, though the answer goes on")


@GROUP.required
def a_system_message_is_read(target: Target) -> None:
    """A system message adds to the prompt's tokens. Source: OpenAI API."""
    user = {"role": "user", "content": "Hello!"}
    system = {"role": "system", "content": "You are a pirate who answers in one short sentence."}
    without = target.chat(messages=[user], max_tokens=1)["usage"]["prompt_tokens"]
    with_it = target.chat(messages=[system, user], max_tokens=1)["usage"]["prompt_tokens"]
    # Some templates have a system message of their own, which this one replaces.
    expect(with_it != without, f"the prompt has {without} tokens with and without it")


@GROUP.required
def earlier_turns_are_read(target: Target) -> None:
    """Earlier turns of user and assistant add to the prompt's tokens. Source: OpenAI API."""
    question = {"role": "user", "content": "And my name is?"}
    turns = [{"role": "user", "content": "My name is Ada."}, {"role": "assistant", "content": "Hello, Ada."}]
    short = target.chat(messages=[question], max_tokens=1)["usage"]["prompt_tokens"]
    long = target.chat(messages=[*turns, question], max_tokens=1)["usage"]["prompt_tokens"]
    expect(long > short, f"the prompt has {short} tokens without earlier turns and {long} with them")


@GROUP.required
def content_may_be_parts(target: Target) -> None:
    """content as a list of one text part means the same as the string. Source: OpenAI API."""
    parts = [{"type": "text", "text": QUESTION}]
    string = target.chat(**GREEDY)["usage"]["prompt_tokens"]
    listed = target.chat(parts, **GREEDY)["usage"]["prompt_tokens"]
    expect(string == listed, f"the string is a prompt of {string} tokens, the parts one of {listed}")


@GROUP.required
def null_means_missing(target: Target) -> None:
    """Optional fields may be null. Source: OpenAI API (nullable fields)."""
    names = "top_p n stop seed logprobs top_logprobs logit_bias presence_penalty frequency_penalty stream"
    target.chat(**GREEDY, **dict.fromkeys([*names.split(), "stream_options", "max_completion_tokens"]))


@GROUP.required
def answers_have_their_own_ids(target: Target) -> None:
    """Two answers never share an id. Source: OpenAI API (unique identifier)."""
    first, second = (target.chat(max_tokens=1)["id"] for _ in range(2))
    expect(first != second, f"both are {shown(first)}")


@GROUP.sleb_only
def the_model_may_be_left_out(target: Target) -> None:
    """Without model the default one answers. Source: sleb, llama.cpp, vLLM."""
    body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1}
    expect(ok(target.http.post(CHAT, json=body))["model"], "the answer names no model")


@GROUP.sleb_only
def the_answer_names_its_model(target: Target) -> None:
    """model of an answer is the id that was asked for. Source: sleb, vLLM."""
    name = target.chat(max_tokens=1)["model"]
    expect(
        target.model is None or name == target.model, f"{target.model} was asked for, the answer says {name}"
    )


@GROUP.sleb_only
def timings_are_told(target: Target) -> None:
    """timings has prompt_ms, predicted_n and predicted_per_second. Source: llama.cpp, sleb."""
    answer = target.chat(**GREEDY)
    timings = answer["timings"]
    expect(timings["prompt_ms"] >= 0, f"prompt_ms is {shown(timings['prompt_ms'])}")
    expect(timings["predicted_per_second"] >= 0, "predicted_per_second is negative")
    expect(
        timings["predicted_n"] == answer["usage"]["completion_tokens"], "predicted_n is not completion_tokens"
    )


@GROUP.sleb_only
def request_metrics_are_told(target: Target) -> None:
    """metrics has times and tokens a second of the request, all numbers or null. Source: sleb."""
    metrics = target.chat(**GREEDY)["metrics"]
    expect(metrics, "metrics is empty")
    for name, value in metrics.items():
        expect(isinstance(value, int | float | None), f"{name} is {shown(value)}")


@GROUP.sleb_only
def the_last_message_can_be_continued(target: Target) -> None:
    """continue_final_message makes the prompt end in the assistant's words. Source: vLLM, sleb."""
    turns = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "A colour is"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    continued = target.chat(messages=turns, max_tokens=1, **options)["usage"]["prompt_tokens"]
    closed = target.chat(messages=turns, max_tokens=1)["usage"]["prompt_tokens"]
    expect(continued < closed, f"the prompt has {continued} tokens, and {closed} with a turn begun after it")
