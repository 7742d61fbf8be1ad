"""Jobs, increments and errors as flat lists, for msgpack: what crosses between the processes of one server.

A job's number is its own within its front process. Fields that are as they are by default are left out.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import MISSING, astuple, fields
from typing import Any

from sleb.engine.outputs import StepOutput, Timings, TokenLogprobs
from sleb.engine.requests.grammar import Grammar, GrammarSource
from sleb.engine.requests.repetition import RepetitionDetection
from sleb.engine.requests.sampling_params import SamplingParams
from sleb.errors import EngineDeadError, InvalidOutputError, RequestError
from sleb.server.engine_thread.answers import Job
from sleb.server.errors import ApiError, to_api_error
from sleb.server.grammar.grammar_spec import GrammarSpec, Part
from sleb.server.grammar.token_rules import TokenRules

_DEFAULTS: dict[str, Any] = {
    each.name: () if each.default is MISSING else each.default for each in fields(SamplingParams)
}
_COMPILED, _RULES = 0, 1


class NamedGrammar:
    """A grammar that the engine's process has compiled, by its parts: what stands for it in a front."""

    def __init__(self, parts: tuple[Part, ...]) -> None:
        self.parts = parts

    def start(self) -> Grammar:
        raise AssertionError("a grammar is followed where the engine is")


def pack_spec(spec: GrammarSpec) -> list[Any]:
    return [[astuple(part) for part in spec.parts], spec.param, spec.beside]


def unpack_spec(packed: Sequence[Any]) -> GrammarSpec:
    parts, param, beside = packed
    return GrammarSpec(tuple(Part(*part) for part in parts), param, beside)


def pack_jobs(jobs: Sequence[Job]) -> list[Any]:
    """[prompts, parameters, [[number of the prompt, number of the parameters, depth, conversation] a job]].

    Each prompt is there once, as int32 in the machine's order of bytes, so that the engine sees which jobs share one.
    """
    prompts = {id(job.prompt_token_ids): job.prompt_token_ids for job in jobs}
    params = {id(job.params): job.params for job in jobs}
    prompt_numbers, params_numbers = (
        {key: number for number, key in enumerate(each)} for each in (prompts, params)
    )
    return [
        list(map(_pack_ids, prompts.values())),
        list(map(pack_params, params.values())),
        [
            [
                prompt_numbers[id(job.prompt_token_ids)],
                params_numbers[id(job.params)],
                job.depth,
                job.conversation,
            ]
            for job in jobs
        ],
    ]


def unpack_jobs(packed: Sequence[Any], grammar: Callable[[tuple[Part, ...]], GrammarSource]) -> list[Job]:
    """grammar: the compiled one of some parts."""
    prompts = [_unpack_ids(each) for each in packed[0]]
    params = [unpack_params(each, grammar) for each in packed[1]]
    return [
        Job(prompts[prompt], params[which], depth, None if conversation is None else tuple(conversation))
        for prompt, which, depth, conversation in packed[2]
    ]


def _pack_ids(token_ids: Sequence[int]) -> Any:
    try:
        return array("i", token_ids).tobytes()
    except OverflowError:  # no token's: the engine says so
        return list(token_ids)


def _unpack_ids(packed: Any) -> list[int]:
    if isinstance(packed, list):
        return packed
    token_ids = array("i")
    token_ids.frombytes(packed)
    return token_ids.tolist()


def pack_params(params: SamplingParams) -> dict[str, Any]:
    """Sampling parameters, without what is as by default."""
    packed = {name: value for name, value in vars(params).items() if value != _DEFAULTS[name]}
    if params.repetition_detection is not None:
        packed["repetition_detection"] = astuple(params.repetition_detection)
    if params.shown_special_ids:
        packed["shown_special_ids"] = list(params.shown_special_ids)
    if params.logit_bias is not None:
        packed["logit_bias"] = list(params.logit_bias.items())
    if isinstance(params.grammar, NamedGrammar):
        packed["grammar"] = [_COMPILED, [astuple(part) for part in params.grammar.parts]]
    elif isinstance(params.grammar, TokenRules):
        packed["grammar"] = [_RULES, params.grammar.given]
    else:
        assert params.grammar is None
    return packed


def grammars_of(packed: Sequence[Any]) -> list[tuple[Part, ...]]:
    """The parts of the compiled grammars that packed jobs follow."""
    given = [each["grammar"] for each in packed[1] if "grammar" in each]
    return [tuple(Part(*part) for part in parts) for kind, parts in given if kind == _COMPILED]


def unpack_params(
    packed: dict[str, Any], grammar: Callable[[tuple[Part, ...]], GrammarSource]
) -> SamplingParams:
    values = dict(packed)
    if (detection := values.get("repetition_detection")) is not None:
        values["repetition_detection"] = RepetitionDetection(*detection)
    if "shown_special_ids" in values:
        values["shown_special_ids"] = frozenset(values["shown_special_ids"])
    if "logit_bias" in values:
        values["logit_bias"] = dict(values["logit_bias"])
    if (given := values.get("grammar")) is not None:
        kind, content = given
        values["grammar"] = (
            grammar(tuple(Part(*part) for part in content)) if kind == _COMPILED else TokenRules(*content)
        )
    return SamplingParams().changed(**values)  # checked already where they came in


def pack_output(number: int, output: StepOutput, *, whole: bool) -> tuple[Any, ...]:
    """An increment of the job `number`. whole: also what seldom changes from one to the next."""
    told = (number, output.new_token_ids, output.new_text, output.num_output_tokens)
    if not whole:
        return told
    timings = output.timings
    return (
        *told,
        _pack_logprobs(output.new_logprobs),
        _pack_logprobs(output.prompt_logprobs),
        output.finish_reason,
        output.stop_reason,
        output.num_prompt_tokens,
        output.num_cached_tokens,
        (timings.arrival, timings.first_scheduled, timings.first_token, timings.finished),
        None if output.failure is None else pack_error(output.failure),
    )


def is_whole(packed: Sequence[Any]) -> bool:
    """Whether an increment came with all that `pack_output` tells."""
    return len(packed) > 4


def unpack_whole(request_id: str, packed: Sequence[Any]) -> StepOutput:
    """An increment that `is_whole`."""
    (
        _,
        token_ids,
        text,
        num_output,
        logprobs,
        of_prompt,
        reason,
        stop,
        num_prompt,
        num_cached,
        times,
        failure,
    ) = packed
    return StepOutput(
        request_id,
        token_ids,
        text,
        _unpack_logprobs(logprobs),  # type: ignore[arg-type]  # only a prompt's first has none
        _unpack_logprobs(of_prompt),
        reason,
        stop,
        num_prompt,
        num_output,
        num_cached,
        Timings(*times),
        None if failure is None else unpack_error(failure),
    )


def _pack_logprobs(tokens: Sequence[TokenLogprobs | None] | None) -> list[Any] | None:
    if tokens is None:
        return None
    return [None if each is None else (each.token_id, each.logprob, each.top) for each in tokens]


def _unpack_logprobs(packed: Sequence[Any] | None) -> list[TokenLogprobs | None] | None:
    if packed is None:
        return None
    return [
        None if each is None else TokenLogprobs(each[0], each[1], [tuple(pair) for pair in each[2]])
        for each in packed
    ]


def pack_error(error: Exception) -> list[Any]:
    """Any error as its kind and its fields; one that nobody foresaw is told as `to_api_error` tells it."""
    if isinstance(error, RequestError):
        return ["request", str(error), error.param, error.code]
    if isinstance(error, InvalidOutputError | EngineDeadError):
        return ["invalid" if isinstance(error, InvalidOutputError) else "dead", str(error)]
    told = to_api_error(error)
    return ["api", str(told), told.status, told.type, told.param, told.code, told.headers]


def unpack_error(packed: Sequence[Any]) -> Exception:
    kind, message, *rest = packed
    if kind == "request":
        return RequestError(message, param=rest[0], code=rest[1])
    if kind == "invalid":
        return InvalidOutputError(message)
    if kind == "dead":
        return EngineDeadError(message)
    status, type_, param, code, headers = rest
    return ApiError(status, message, type=type_, param=param, code=code, headers=headers)
