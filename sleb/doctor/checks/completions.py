"""Whole answers of /completions."""

from __future__ import annotations

from sleb.doctor.check import Group
from sleb.doctor.outcome import expect, skip
from sleb.doctor.target import COMPLETIONS, GREEDY, PROMPT, Target, ok, shown

GROUP = Group("completions")


@GROUP.required
def a_completion_has_its_shape(target: Target) -> None:
    """id, object "text_completion", created, model, a choice with text, logprobs null, usage. Source: OpenAI API."""
    answer = target.complete(**GREEDY)
    expect(answer["object"] == "text_completion", f"object is {shown(answer['object'])}")
    expect(
        isinstance(answer["id"], str) and type(answer["created"]) is int, "id or created is of another type"
    )
    expect(isinstance(answer["model"], str), f"model is {shown(answer['model'])}")
    [choice] = answer["choices"]
    expect(choice["index"] == 0, f"index is {shown(choice['index'])}")
    expect(isinstance(choice["text"], str), f"text is {shown(choice['text'])}")
    expect(
        choice["finish_reason"] in ("stop", "length"), f"finish_reason is {shown(choice['finish_reason'])}"
    )
    expect(choice["logprobs"] is None, f"logprobs is {shown(choice['logprobs'])}")
    usage = answer["usage"]
    total = usage["prompt_tokens"] + usage["completion_tokens"]
    expect(usage["total_tokens"] == total, f"total_tokens is {usage['total_tokens']}, not {total}")


@GROUP.required
def prompts_may_be_a_list(target: Target) -> None:
    """A list of strings gets a choice each, in their order. Source: OpenAI API."""
    prompts = [PROMPT, "Once upon a time", "1, 2, 3,"]
    alone = [target.complete(prompt, **GREEDY)["choices"][0]["text"] for prompt in prompts]
    choices = target.complete(prompts, **GREEDY)["choices"]
    expect([c["index"] for c in choices] == [0, 1, 2], f"the indices are {[c['index'] for c in choices]}")
    for prompt, text, choice in zip(prompts, alone, choices, strict=True):
        same = choice["text"][:4] == text[:4]  # rounding in a batch may change a later token
        expect(same, f"{shown(prompt)} got {shown(choice['text'])}, but alone {shown(text)}")


@GROUP.required
def a_prompt_may_be_token_ids(target: Target) -> None:
    """A list of integers is one prompt of that many tokens. Source: OpenAI API."""
    number = target.complete([40, 41, 42, 43, 44], max_tokens=1)["usage"]["prompt_tokens"]
    expect(number == 5, f"five ids are a prompt of {number} tokens")


@GROUP.required
def prompts_may_be_lists_of_token_ids(target: Target) -> None:
    """A list of lists of integers is a prompt each. Source: OpenAI API."""
    answer = target.complete([[40, 41, 42], [43, 44]], max_tokens=1)
    expect(len(answer["choices"]) == 2, f"there are {len(answer['choices'])} choices")
    number = answer["usage"]["prompt_tokens"]
    expect(number == 5, f"three and two ids are {number} tokens")


@GROUP.required
def sixteen_tokens_by_default(target: Target) -> None:
    """Without max_tokens a completion has at most 16 tokens. Source: OpenAI API."""
    number = target.complete(temperature=0)["usage"]["completion_tokens"]
    expect(number <= 16, f"it has {number}")


@GROUP.required
def n_is_per_prompt(target: Target) -> None:
    """Two prompts and n 2 give four choices, the first prompt's before the second's. Source: OpenAI API."""
    prompts = ["1, 2, 3,", PROMPT]
    body = target.fields(prompt=prompts, n=2, max_tokens=2, temperature=1, echo=True)
    response = target.http.post(COMPLETIONS, json=body)
    has_echo = response.status_code == 200
    choices = (ok(response) if has_echo else target.complete(prompts, n=2, max_tokens=2))["choices"]
    indices = [choice["index"] for choice in choices]
    expect(sorted(indices) == [0, 1, 2, 3], f"the indices are {indices}")
    for choice in choices if has_echo else ():
        prompt = prompts[choice["index"] // 2]
        expect(choice["text"].startswith(prompt), f"choice {choice['index']} is {shown(choice['text'])}")


@GROUP.required
def echo_puts_the_prompt_first(target: Target) -> None:
    """With echo the text is the prompt and then the answer. Source: OpenAI API (legacy), for lm-eval."""
    text = target.complete(echo=True, **GREEDY)["choices"][0]["text"]
    expect(text.startswith(PROMPT), f"the text is {shown(text)}")
    expect(len(text) > len(PROMPT) or not target.sample, "nothing follows the prompt")


@GROUP.sleb_only
def token_ids_are_returned(target: Target) -> None:
    """return_token_ids adds prompt_token_ids and token_ids, as many as usage says. Source: vLLM, sleb."""
    answer = target.complete(return_token_ids=True, **GREEDY)
    [choice], usage = answer["choices"], answer["usage"]
    expect(
        len(choice["prompt_token_ids"]) == usage["prompt_tokens"],
        "prompt_token_ids are not prompt_tokens many",
    )
    expect(len(choice["token_ids"]) == usage["completion_tokens"], "token_ids are not completion_tokens many")


@GROUP.sleb_only
def the_context_is_filled_at_most(target: Target) -> None:
    """max_tokens beyond the context is cut to what is left of it. Source: sleb."""
    length = target.max_model_len
    if length > 1024:
        skip(f"an answer over the whole context of {length} tokens would take long")
    answer = target.complete(max_tokens=length + 1000, temperature=1, ignore_eos=True)
    total = answer["usage"]["total_tokens"]
    expect(total <= length, f"prompt and answer have {total} tokens, the context {length}")
