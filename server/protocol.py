"""Request bodies: which fields there are, of which types, and what this server makes of each.

Types are checked here, ranges by SamplingParams. A field that this server cannot honour is refused rather than
dropped, unless it then means nothing (`tools: []`); fields unknown to it are named in the log.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import fields
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sleb.engine.requests.sampling_params import COUNT_RANGES, SamplingParams
from sleb.errors import RequestError
from sleb.server.errors import ApiError, shorten

logger = logging.getLogger("sleb.server")

MAX_TOP_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 4096
TOKEN_ID_PATTERN = "[0-9]{1,9}"  # a name in logit_bias
_SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams)) - {
    "logit_bias",  # its keys are strings in JSON
    "grammar",  # is compiled from other fields
    "logprobs",  # means something else in chat and in completions
    "prompt_logprobs",
}
_MAX_FIELDS_NAMED = 1000  # unknown field names that are remembered
_OTHER_FIELDS = ""  # where those past that are counted

Model = TypeVar("Model", bound="GenerationBody")


def _default_for_null(default: Any) -> BeforeValidator:
    """A null means the same as a missing field."""
    return BeforeValidator(
        lambda value: default if value is None else value, json_schema_input_type=bool | None
    )


def _whole(value: Any) -> Any:
    """JSON knows numbers only: 5.0 is the integer 5. Above 2**53 it may be another one, rounded."""
    exact = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return int(value) if exact else value


def whole_numbers(values: Any) -> Any:
    """A list with integers for the numbers in it that are whole; anything else as it is."""
    if isinstance(values, list) and any(type(value) is float for value in values):
        return [_whole(value) for value in values]
    return values


Integer = Annotated[int, BeforeValidator(_whole)]
Integers = Annotated[list[int], BeforeValidator(whole_numbers)]
TrueByDefault = Annotated[bool, _default_for_null(True)]
FalseByDefault = Annotated[bool, _default_for_null(False)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: FalseByDefault = False
    continuous_usage_stats: FalseByDefault = False


class GenerationBody(BaseModel):
    """Fields that chat and plain completions share. None is always "as if it were not there"."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    max_tokens: Integer | None = None
    min_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    n: Integer | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[Integers, Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: FalseByDefault = False
    seed: Integer | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stream: FalseByDefault = False
    stream_options: StreamOptions | None = None
    ignore_eos: FalseByDefault = False
    skip_special_tokens: TrueByDefault = True
    return_token_ids: FalseByDefault = False
    user: str | None = None
    response_format: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None

    def check(self) -> None:
        """Raises RequestError for a field that cannot be honoured."""

    def sampling_params(self, **special: Any) -> SamplingParams:
        """The sampling fields; `special` overrides. Raises RequestError for a value out of its range."""
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = _token_biases(self.logit_bias)
        return SamplingParams(**(given | special))


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Integer | None = None
    logprobs: FalseByDefault = False
    top_logprobs: Integer | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: FalseByDefault = False

    def check(self) -> None:
        if self.audio is not None or any(modality != "text" for modality in self.modalities or ()):
            _unsupported("modalities", "audio is", "this model reads and writes text")
        self._check_max_tokens()
        if self.top_logprobs is not None:
            if self.top_logprobs and not self.logprobs:
                raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
            if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
                raise RequestError(
                    f"top_logprobs is {self.top_logprobs}; it must be an integer from 0 to {MAX_TOP_LOGPROBS}",
                    param="top_logprobs",
                )
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other; leave one out",
                param="continue_final_message",
            )

    def _check_max_tokens(self) -> None:
        """Both, since the one that does not win is never used."""
        least, most = COUNT_RANGES["max_tokens"]
        for name in ("max_tokens", "max_completion_tokens"):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise RequestError(
                    f"{name} is {value}; it must be an integer of at least {least}", param=name
                )


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Any = None
    echo: FalseByDefault = False
    logprobs: Integer | None = None
    suffix: str | None = None
    best_of: Integer | None = None

    def check(self) -> None:
        if self.suffix:
            _unsupported("suffix", "suffix is", "leave it out")
        if self.best_of is not None and self.best_of != (self.n or 1):
            _unsupported("best_of", "best_of other than n is", "leave it out, or set it to n")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
            raise RequestError(
                f"logprobs is {self.logprobs}; it must be an integer from 0 to {MAX_TOP_LOGPROBS}",
                param="logprobs",
            )


def _unsupported(param: str, what: str, remedy: str) -> None:
    raise RequestError(f"{what} not supported in this version; {remedy}", param=param, code="unsupported")


def _token_biases(biases: dict[str, float]) -> dict[int, float]:
    for token_id in biases:
        if not re.fullmatch(TOKEN_ID_PATTERN, token_id):
            raise RequestError(
                f"logit_bias maps token ids to numbers; {shorten(token_id)} is no token id",
                param="logit_bias",
            )
    return {int(token_id): bias for token_id, bias in biases.items()}


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body. Raises ApiError 413 as soon as it is known to be too large, whether or not it says so first."""
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes, which is what this server takes")
    if int(request.headers.get("content-length") or 0) > max_bytes:
        raise too_large
    chunks: list[bytes] = []
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def parse_body(data: bytes, model: type[Model], unknown_fields: Counter[str]) -> Model:
    """The fields of a JSON body. Raises RequestError for what is no JSON object, or has a field of a wrong type."""
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    try:
        body = model.model_validate(content)
    except ValidationError as error:
        raise _type_error(error) from None
    _count_unknown_fields(body, unknown_fields)
    body.check()
    return body


def _type_error(error: ValidationError) -> RequestError:
    """The first bad field; the reasons of all members of a union are one message."""
    found = error.errors(include_url=False, include_context=False)
    field = found[0]["loc"][0]
    same = [each for each in found if each["loc"][0] == field]
    reasons = list(dict.fromkeys(each["msg"][0].lower() + each["msg"][1:] for each in same))
    if same[0]["type"] == "missing":
        return RequestError(f"'{field}' is missing", param=str(field))
    value = same[0]["input"]
    shown = "" if isinstance(value, list | dict) else f" {shorten(value)}"
    return RequestError(f"bad value{shown} for '{field}': {' or '.join(reasons)[:300]}", param=str(field))


def _count_unknown_fields(body: GenerationBody, counts: Counter[str]) -> None:
    """Counts them, and names each in the log when it first comes."""
    names = list(body.model_extra or {})
    if body.stream_options is not None:
        names += [f"stream_options.{name}" for name in body.stream_options.model_extra or {}]
    for name in (name[:200] for name in names):
        if name not in counts:
            if len(counts) >= _MAX_FIELDS_NAMED:
                name = _OTHER_FIELDS
            else:
                logger.warning("unknown request field %s is ignored (said once)", shorten(name))
        counts[name] += 1
