"""Drawing of tokens, and where answers end."""

from __future__ import annotations

from typing import Any

from sleb.doctor.check import Group
from sleb.doctor.outcome import expect
from sleb.doctor.target import GREEDY, Json, Target, shown

GROUP = Group("sampling")

WILD: Json = {"temperature": 1.5, "max_tokens": 24}
# Two tokens that every vocabulary has, and that show as text in all common ones.
_FIRST, _SECOND = 42, 77


def _text(target: Target, **fields: Any) -> str:
    return str(target.complete(**fields)["choices"][0]["text"])


@GROUP.required
def temperature_0_repeats(target: Target) -> None:
    """The same greedy request gives the same text. Source: OpenAI API."""
    again = _text(target, **GREEDY)
    expect(again == target.sample, f"first {shown(target.sample)}, then {shown(again)}")


@GROUP.required
def a_seed_repeats(target: Target) -> None:
    """The same seed gives the same text at a temperature of 1.5. Source: OpenAI API."""
    first, second = (_text(target, seed=7, **WILD) for _ in range(2))
    expect(first == second, f"first {shown(first)}, then {shown(second)}")


@GROUP.required
def seeds_differ(target: Target) -> None:
    """Four seeds do not all give the same text at a temperature of 1.5. Source: OpenAI API."""
    texts = {_text(target, seed=seed, **WILD) for seed in range(4)}
    expect(len(texts) > 1, f"all four say {shown(texts.pop())}")


@GROUP.required
def a_tiny_top_p_is_greedy(target: Target) -> None:
    """top_p 1e-6 leaves one token to draw from. Source: OpenAI API."""
    _expect_greedy(target, top_p=1e-6)


@GROUP.sleb_only
def top_k_1_is_greedy(target: Target) -> None:
    """top_k 1 leaves one token to draw from. Source: vLLM, llama.cpp, sleb."""
    _expect_greedy(target, top_k=1)


@GROUP.sleb_only
def min_p_1_is_greedy(target: Target) -> None:
    """min_p 1 leaves one token to draw from. Source: vLLM, llama.cpp, sleb."""
    _expect_greedy(target, min_p=1.0)


def _expect_greedy(target: Target, **fields: Any) -> None:
    text = _text(target, **WILD, **fields)
    expect(text == target.sample, f"it says {shown(text)}, temperature 0 {shown(target.sample)}")


@GROUP.required
def a_stop_string_ends_an_answer(target: Target) -> None:
    """stop ends the answer before the first of these strings, finish_reason is "stop". Source: OpenAI API."""
    stop = target.stop_string()
    _expect_stopped(target, stop, target.sample.partition(stop)[0])


@GROUP.required
def the_first_of_several_stops_counts(target: Target) -> None:
    """Of a list of stop strings the one that comes first ends the answer. Source: OpenAI API."""
    stop = target.stop_string()
    _expect_stopped(target, ["never in any text", stop], target.sample.partition(stop)[0])


@GROUP.sleb_only
def a_stop_string_can_be_kept(target: Target) -> None:
    """include_stop_str_in_output leaves the stop string at the end of the text. Source: vLLM, sleb."""
    stop = target.stop_string()
    before = target.sample.partition(stop)[0]
    _expect_stopped(target, stop, before + stop, include_stop_str_in_output=True)


def _expect_stopped(target: Target, stop: str | list[str], expected: str, **fields: Any) -> None:
    choice = target.complete(stop=stop, **GREEDY, **fields)["choices"][0]
    expect(choice["text"] == expected, f"the text is {shown(choice['text'])}, not {shown(expected)}")
    expect(choice["finish_reason"] == "stop", f"finish_reason is {choice['finish_reason']}")


@GROUP.required
def n_gives_as_many_choices(target: Target) -> None:
    """n 3 gives choices 0, 1 and 2, and usage counts the tokens of all. Source: OpenAI API."""
    answer = target.chat(n=3, max_tokens=4)
    indices = [choice["index"] for choice in answer["choices"]]
    expect(indices == [0, 1, 2], f"the indices are {indices}")
    number, one = answer["usage"]["completion_tokens"], target.chat(max_tokens=4)["usage"]
    expect(3 <= number <= 12, f"completion_tokens is {number}")
    same = answer["usage"]["prompt_tokens"] == one["prompt_tokens"]
    expect(same, f"the prompt counts {answer['usage']['prompt_tokens']} tokens, alone {one['prompt_tokens']}")


@GROUP.required
def choices_differ(target: Target) -> None:
    """Four choices at a temperature of 1.5 are not all the same, with a seed neither. Source: OpenAI API."""
    for extra in ({}, {"seed": 5}):
        texts = {choice["text"] for choice in target.complete(n=4, **WILD, **extra)["choices"]}
        expect(len(texts) > 1, f"all four say {shown(texts.pop())}")


@GROUP.required
def logit_bias_forces_a_token(target: Target) -> None:
    """A bias of 100 makes a token certain. Source: OpenAI API."""
    texts = []
    for token in (_FIRST, _SECOND):
        answer = target.complete(logit_bias={str(token): 100}, logprobs=0, temperature=0, max_tokens=4)
        tokens = answer["choices"][0]["logprobs"]["tokens"]
        expect(len(tokens) == 4 and len(set(tokens)) == 1, f"the tokens with a bias on {token} are {tokens}")
        texts.append(answer["choices"][0]["text"])
    expect(texts[0] != texts[1], f"a bias on {_FIRST} and one on {_SECOND} both give {shown(texts[0])}")


@GROUP.required
def penalties_are_accepted(target: Target) -> None:
    """presence_penalty and frequency_penalty from -2 to 2 are served. Source: OpenAI API."""
    for value in (-2, 0, 1.5, 2):
        target.chat(presence_penalty=value, frequency_penalty=value, max_tokens=4)


@GROUP.required
def a_frequency_penalty_works(target: Target) -> None:
    """Between two tokens made likely, a frequency penalty of 2 changes which ones follow. Source: OpenAI API."""
    options = {"logit_bias": {str(_FIRST): 80, str(_SECOND): 80}, "temperature": 0, "max_tokens": 24}
    free, penalised = (_text(target, frequency_penalty=penalty, **options) for penalty in (0, 2))
    expect(free != penalised, f"with and without it the text is {shown(free)}")


@GROUP.sleb_only
def a_repetition_penalty_is_accepted(target: Target) -> None:
    """repetition_penalty is served, and changes a repeated token's chances. Source: vLLM, sleb."""
    repeated = [_FIRST] * 8
    values = [
        target.complete(repeated, repetition_penalty=penalty, temperature=0, max_tokens=12)["choices"][0][
            "text"
        ]
        for penalty in (0.01, 1.0, 100.0)
    ]
    expect(len(set(values)) > 1, f"penalties of 0.01, 1 and 100 all give {shown(values[0])}")


@GROUP.sleb_only
def a_stop_token_ends_an_answer(target: Target) -> None:
    """stop_token_ids end the answer, finish_reason is "stop". Source: vLLM, sleb."""
    answer = target.complete(logit_bias={str(_FIRST): 100}, stop_token_ids=[_FIRST], max_tokens=8)
    number, reason = answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]
    expect(number <= 1 and reason == "stop", f"there are {number} tokens, ended by {reason}")


@GROUP.sleb_only
def the_end_can_be_ignored(target: Target) -> None:
    """ignore_eos makes an answer exactly max_tokens long. Source: vLLM, llama.cpp, sleb."""
    answer = target.complete(ignore_eos=True, temperature=1, max_tokens=64)
    number, reason = answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]
    expect(number == 64 and reason == "length", f"there are {number} tokens, ended by {reason}")


@GROUP.sleb_only
def min_tokens_holds_the_end_back(target: Target) -> None:
    """min_tokens makes an answer at least that long, stop tokens or not. Source: vLLM, sleb."""
    answer = target.complete(
        logit_bias={str(_FIRST): 100}, stop_token_ids=[_FIRST], min_tokens=5, max_tokens=8, temperature=0
    )
    number = answer["usage"]["completion_tokens"]
    expect(number >= 5, f"there are {number} tokens")
