"""Request bodies: which fields there are, of which types and ranges, and what this server makes of each.

The models are what /openapi.json says. A field that this server cannot honour is refused rather than dropped, unless it
then means nothing (`tools: []`); fields unknown to it are named in the log.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasGenerator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypeAliasType

from sleb.engine.chat_template import OWN_NAMES, check_variables
from sleb.engine.requests.repetition import MAX_COUNT, MAX_PATTERN_SIZE, RepetitionDetection
from sleb.engine.requests.sampling_params import (
    COUNT_RANGES,
    MAX_INTEGER,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    NUMBER_RANGES,
    SamplingParams,
)
from sleb.errors import RequestError
from sleb.server.conversation import Conversation
from sleb.server.grammar.structured import (
    GRAMMARS,
    AnswerChoices,
    JsonSchema,
    ResponseFormat,
    StructuredOutputs,
    answer_grammar,
)
from sleb.server.message.incoming import MAX_MESSAGES, IncomingMessage
from sleb.server.message.tools import (
    MAX_TOOLS,
    AllowedTools,
    Function,
    FunctionName,
    NamedTool,
    Tool,
    read_tools,
)
from sleb.server.peer_fields import SAME_AS, honoured

MAX_PROMPTS = 2048
MAX_STOP_TOKEN_IDS = 1024
MAX_ALLOWED_TOKEN_IDS = 2**18
MAX_BAD_WORDS = 256
MAX_BAD_WORD_LENGTH = 128
MAX_LOGIT_BIAS = 4096
MAX_FIELDS = 4096  # of the body, and of an object in it
MAX_TOKENS = 2**18  # of /detokenize
_SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams)) - {
    "logit_bias",  # its keys are strings in JSON
    "grammar",  # is compiled from other fields
    "shown_special_ids",  # follows from what the answer is read for
    "logprobs",  # means something else in chat and in completions
    "prompt_logprobs",
    "repetition_detection",  # a record of the engine's
}
# Fields of chat completions that other formats pass over.
_CHANGES_NOTHING = frozenset({"model", "stream", "stream_options", "user", "draft", "depth"})


def described_as(type_: Any) -> BeforeValidator:
    """The description of a field whose rules are checked elsewhere, in words that a model has not."""
    return BeforeValidator(lambda value: value, json_schema_input_type=type_)


def _default_for_null(default: Any) -> BeforeValidator:
    """A null means the same as a missing field."""
    return BeforeValidator(
        lambda value: default if value is None else value, json_schema_input_type=bool | None
    )


def _whole(value: Any) -> Any:
    """JSON knows numbers only: 5.0 is the integer 5. Above 2**53 it may be another one, rounded."""
    if not isinstance(value, float) or not value.is_integer():
        return value
    if abs(value) >= 2**53:  # also what the parser makes of an integer that 64 bits do not hold
        raise PydanticCustomError("integer_size", "it must be an integer of at most 64 bits, in digits")
    return int(value)


def whole_numbers(values: Any) -> Any:
    """A list with integers for the numbers in it that are whole; anything else as it is."""
    kinds = set(map(type, values)) if isinstance(values, list) else set()
    if float not in kinds or not kinds <= {int, float}:
        return values
    numbers = np.array(values, dtype=np.float64)  # a list may be long: no loop in Python
    if (np.abs(numbers) < 2**53).all() and (numbers == np.floor(numbers)).all():
        return numbers.astype(np.int64).tolist()
    return [_whole(value) for value in values]


def _without_own_names(arguments: dict[str, Any]) -> dict[str, Any]:
    check_variables(arguments)
    return arguments


def in_range(name: str, text: str | None = None) -> Any:
    """The range of one of the engine's sampling fields, of which `text` says more."""
    if name in COUNT_RANGES:
        least, most = COUNT_RANGES[name]
        return Field(ge=least, le=most, description=text)
    low, high, above = NUMBER_RANGES[name]
    return Field(gt=low, le=high, description=text) if above else Field(ge=low, le=high, description=text)


WHOLE = BeforeValidator(_whole)
WHOLE_NUMBERS = BeforeValidator(whole_numbers)
TrueByDefault = Annotated[bool, _default_for_null(True)]
FalseByDefault = Annotated[bool, _default_for_null(False)]
# Named, so that the description can say how many there are: it depends on the served model.
TokenId = TypeAliasType("TokenId", Annotated[int, Field(ge=0)])
KnownTokenId = TypeAliasType("KnownTokenId", Annotated[int, Field(ge=0)])  # that the tokenizer has a text for
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_LENGTH)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
LogitBias = Annotated[
    dict[
        Annotated[str, Field(pattern="^[0-9]{1,9}$")],
        Annotated[float, Field(ge=-100, le=100)],
    ],
    Field(
        max_length=MAX_LOGIT_BIAS,
        description="Token ids to numbers.",
        json_schema_extra={"additionalProperties": False},
    ),
]
NonEmpty = Annotated[list[TokenId], Field(min_length=1)]
Prompts = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    | NonEmpty
    | Annotated[list[NonEmpty], Field(min_length=1, max_length=MAX_PROMPTS)]
)
Messages = Annotated[
    Annotated[list[dict[str, Any]], Field(max_length=MAX_MESSAGES, fail_fast=True)],
    described_as(Annotated[list[IncomingMessage], Field(min_length=1, max_length=MAX_MESSAGES)]),
]
TemplateArguments = Annotated[
    dict[str, Any],
    AfterValidator(_without_own_names),
    Field(
        description="Arguments of the model's chat template.",
        json_schema_extra={"propertyNames": {"not": {"enum": list(OWN_NAMES)}}},
    ),
]


class Body(BaseModel):
    """A JSON object. None is always "as if the field were not there"."""

    model_config = ConfigDict(extra="allow", strict=True)

    @classmethod
    def prepare(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """What is read of an object's fields. Raises RequestError for one that cannot be honoured."""
        return fields

    def check(self) -> None:
        """Raises RequestError for fields that do not go together, or cannot be honoured."""

    def unknown_names(self) -> Iterator[str]:
        """Fields that no model knows."""
        yield from self.model_extra or {}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: FalseByDefault = False
    continuous_usage_stats: FalseByDefault = False


def describe_other_names(schema: dict[str, Any]) -> None:
    properties, required = schema["properties"], schema.get("required", [])
    for name, others in SAME_AS.items():
        if name in properties and name not in required:  # what is required goes by its own name
            properties |= {
                other: {"description": f"The same as {name}."} | properties[name] for other in others
            }


class RepetitionPatterns(BaseModel):
    """vLLM's field: when an answer loops, which then ends."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_pattern_size: Annotated[
        int, Field(ge=0, le=MAX_PATTERN_SIZE, description="Tokens; 0: never."), WHOLE
    ] = 0
    min_pattern_size: Annotated[int, Field(ge=0, le=MAX_PATTERN_SIZE), WHOLE] = 0
    min_count: Annotated[int, Field(ge=0, le=MAX_COUNT, description="Times in a row, 2 or more."), WHOLE] = 0


class SamplingBody(Body):
    """How an answer is sampled and where it ends, in every format. Other servers' names: `sleb.server.peer_fields`."""

    model_config = ConfigDict(
        alias_generator=AliasGenerator(
            validation_alias=lambda name: AliasChoices(name, *SAME_AS.get(name, ()))
        ),
        json_schema_extra=describe_other_names,
    )

    max_tokens: Annotated[int | None, in_range("max_tokens"), WHOLE] = None
    min_tokens: Annotated[int | None, in_range("min_tokens"), WHOLE] = None
    temperature: Annotated[float | None, in_range("temperature", "0 is greedy.")] = None
    top_p: Annotated[float | None, in_range("top_p")] = None
    top_k: Annotated[int | None, in_range("top_k", "0 or -1 is off."), WHOLE] = None
    min_p: Annotated[float | None, in_range("min_p")] = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    include_stop_str_in_output: FalseByDefault = False
    seed: Annotated[int | None, in_range("seed"), WHOLE] = None
    presence_penalty: Annotated[float | None, in_range("presence_penalty")] = None
    frequency_penalty: Annotated[float | None, in_range("frequency_penalty")] = None
    repetition_penalty: Annotated[float | None, in_range("repetition_penalty", "1 is off.")] = None
    repetition_detection: RepetitionPatterns | None = None
    ignore_eos: FalseByDefault = False
    skip_special_tokens: TrueByDefault = True

    @classmethod
    def prepare(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return honoured(fields, cls.model_fields)

    def sampling(self) -> dict[str, Any]:
        """The fields of SamplingParams that were given."""
        given: dict[str, Any] = {
            name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name, None)) is not None
        }
        if self.repetition_detection is not None:
            given["repetition_detection"] = RepetitionDetection(**self.repetition_detection.model_dump())
        return given


def refuse_of_chat(fields: Mapping[str, Any], known: Collection[str]) -> None:
    """Raises RequestError for a field that chat completions honour and a format with the fields `known` does not."""
    others = {*ChatBody.model_fields, "n_cmpl"} - {*known, *_CHANGES_NOTHING}
    for name in fields.keys() & others:
        if fields[name] not in (None, False, "", [], {}) and (name, fields[name]) not in (
            ("n", 1),
            ("n_cmpl", 1),
        ):
            raise RequestError(
                f"{name} is not a field of this format; leave it out, or send it to /v1/chat/completions",
                param=name,
                code="unsupported",
            )


def num_alternatives(logprobs: bool, top_logprobs: int | None) -> int | None:
    """How many are told with each token; None: no log-probabilities. Raises RequestError for some without those."""
    if top_logprobs and not logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    return (top_logprobs or 0) if logprobs else None


FixedDepth = Annotated[
    Literal["fixed"] | None,
    Field(description="Of a model that ends in :auto: its shallowest, whatever waits."),
]


class GenerationBody(SamplingBody):
    """Fields that chat and plain completions share."""

    model: str | None = None
    n: Annotated[int | None, in_range("n", "Answers to each prompt."), WHOLE] = None
    stop_token_ids: Annotated[list[TokenId] | None, Field(max_length=MAX_STOP_TOKEN_IDS), WHOLE_NUMBERS] = (
        None
    )
    logit_bias: LogitBias | None = None
    truncate_prompt_tokens: Annotated[
        Literal[-1] | Annotated[int, Field(ge=1, le=MAX_INTEGER)] | None,
        Field(description="How many of a prompt's last tokens to keep; -1: as many as fit."),
        WHOLE,
    ] = None
    allowed_token_ids: Annotated[
        list[TokenId] | None, Field(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS), WHOLE_NUMBERS
    ] = None
    bad_words: Annotated[list[BadWord] | None, Field(max_length=MAX_BAD_WORDS)] = None
    prompt_logprobs: Annotated[
        int | None, in_range("prompt_logprobs", "As vLLM's; not of a stream."), WHOLE
    ] = None
    stream: FalseByDefault = False
    stream_options: StreamOptions | None = None
    return_token_ids: FalseByDefault = False
    user: str | None = None
    response_format: Annotated[dict[str, Any] | None, described_as(ResponseFormat | None)] = None
    guided_json: Annotated[Any, described_as(JsonSchema | None)] = None
    guided_regex: str | None = None
    guided_choice: Annotated[
        Annotated[list[str], Field(fail_fast=True)] | None, described_as(AnswerChoices | None)
    ] = None
    guided_grammar: Annotated[str | None, Field(description=GRAMMARS)] = None
    structured_outputs: Annotated[dict[str, Any] | None, described_as(StructuredOutputs | None)] = None
    json_schema: Annotated[Any, described_as(JsonSchema | None)] = None
    regex: str | None = None
    grammar: Annotated[str | None, Field(description=GRAMMARS)] = None
    ebnf: Annotated[str | None, Field(description=GRAMMARS)] = None
    format: Annotated[Literal["json"] | dict[str, Any] | None, Field(description="Or a JSON schema.")] = None
    draft: Annotated[Literal["off"] | None, Field(description="Nothing is drafted in any case.")] = None
    depth: FixedDepth = None

    def check(self) -> None:
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError(
                "prompt_logprobs are not of a stream; leave one of them out", param="prompt_logprobs"
            )

    def unknown_names(self) -> Iterator[str]:
        yield from super().unknown_names()
        if self.stream_options is not None:
            yield from (f"stream_options.{name}" for name in self.stream_options.model_extra or {})

    def sampling(self) -> dict[str, Any]:
        given = super().sampling()
        if self.logit_bias is not None:
            given["logit_bias"] = {int(token_id): bias for token_id, bias in self.logit_bias.items()}
        return given


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int | None, in_range("max_tokens", "Wins over max_tokens."), WHOLE] = (
        None
    )
    logprobs: FalseByDefault = False
    top_logprobs: Annotated[
        int | None, in_range("logprobs", "More than 0 needs logprobs to be true."), WHOLE
    ] = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], Field(max_length=MAX_TOOLS)] | None = None
    function_call: Literal["none", "auto"] | FunctionName | None = None
    modalities: Annotated[
        Annotated[list[str], Field(fail_fast=True)] | None, described_as(list[Literal["text"]] | None)
    ] = None
    audio: Annotated[Any, described_as(None)] = None
    chat_template_kwargs: TemplateArguments | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: FalseByDefault = False

    def check(self) -> None:
        super().check()
        if self.audio is not None or any(modality != "text" for modality in self.modalities or ()):
            refuse_unsupported("modalities", "audio is", "this model reads and writes text")
        num_alternatives(self.logprobs, self.top_logprobs)
        _check_one_end(self)

    def conversation(self) -> Conversation:
        """What is asked for. Raises RequestError for tools and grammars that are malformed or exclude each other."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return Conversation(
            messages=self.messages,
            model=self.model,
            stream=self.stream,
            sampling=self.sampling() | {"max_tokens": max_tokens},
            tools=read_tools(self),
            answer=answer_grammar(self),
            allowed_token_ids=self.allowed_token_ids,
            bad_words=self.bad_words,
            template_variables=self.chat_template_kwargs or {},
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=self.continue_final_message,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            num_logprobs=num_alternatives(self.logprobs, self.top_logprobs),
            num_prompt_logprobs=self.prompt_logprobs,
            fixed_depth=self.depth == "fixed",
        )


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[Any, described_as(Prompts)]
    echo: FalseByDefault = False
    add_special_tokens: TrueByDefault = True
    logprobs: Annotated[int | None, in_range("logprobs"), WHOLE] = None
    suffix: Annotated[str | None, described_as(Annotated[str, Field(max_length=0)] | None)] = Field(
        None, description="Not supported."
    )
    best_of: Annotated[int | None, in_range("n", "None other than n is supported."), WHOLE] = None

    def check(self) -> None:
        super().check()
        if self.suffix:
            refuse_unsupported("suffix", "suffix is", "leave it out")
        if self.best_of is not None and self.best_of != (self.n or 1):
            refuse_unsupported("best_of", "best_of other than n is", "leave it out, or set it to n")


def _tokenize_shapes(schema: dict[str, Any]) -> None:
    """What goes with a prompt, and what with messages: of continue_final_message and the other, one at most."""
    null, not_true = {"type": "null"}, {"not": {"const": True}}
    prompt = {"prompt": {"type": "string"}, "messages": null}
    messages = {"messages": {"type": "array"}, "prompt": null, "add_special_tokens": not_true}
    schema["anyOf"] = [{"required": ["prompt"], "properties": prompt}] + [
        {"required": ["messages"], "properties": messages | {name: not_true}}
        for name in ("continue_final_message", "add_generation_prompt")
    ]


class TokenizeBody(Body):
    """POST /tokenize: either `prompt` or `messages`."""

    model_config = ConfigDict(json_schema_extra=_tokenize_shapes)

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="True unless given, for a prompt; a chat template brings its own."
    )
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = Field(None, description="True unless given; for messages.")
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None
    tools: Annotated[list[dict[str, Any]] | None, Field(max_length=MAX_TOOLS)] = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("send either 'prompt' or 'messages'", param="prompt")
        if self.messages is None:
            return
        if self.add_special_tokens:
            raise RequestError(
                "add_special_tokens is for prompts; the chat template writes those of messages: leave it out",
                param="add_special_tokens",
            )
        _check_one_end(self)


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[KnownTokenId], Field(max_length=MAX_TOKENS, fail_fast=True), WHOLE_NUMBERS]


def _check_one_end(body: ChatBody | TokenizeBody) -> None:
    if body.continue_final_message and body.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other; leave one out",
            param="continue_final_message",
        )


def refuse_unsupported(param: str, what: str, remedy: str) -> None:
    """Raises the RequestError that says so of a field. what: with its verb, "suffix is"."""
    raise RequestError(f"{what} not supported in this version; {remedy}", param=param, code="unsupported")
