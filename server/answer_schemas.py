"""JSON schemas of what this server answers."""

from __future__ import annotations

from typing import Any

from sleb.server.schema_terms import (
    BOOLEAN,
    INTEGER,
    MAYBE_OBJECT,
    MAYBE_TEXT,
    NUMBER,
    TEXT,
    Schema,
    a_list,
    an_object,
    any_of,
    maybe,
    one_of,
    reference,
)

_COUNT: Schema = {"type": "integer", "minimum": 0}
_UNITS = ("ms", "per_token_ms", "per_second")
_END = ("stop", "length", "tool_calls", "function_call")
_OPTIONAL_IDS = {"prompt_token_ids": a_list(_COUNT), "token_ids": a_list(_COUNT)}
_FUNCTION_CALL = an_object({"name": TEXT, "arguments": TEXT})


def answer_schemas() -> dict[str, Schema]:
    """Schemas of answers, by name."""
    return _common() | _chat() | _completion() | _models() | _others()


def _answer(kind: str, choice: Schema, required: dict[str, Any], optional: dict[str, Any]) -> Schema:
    envelope = {
        "id": TEXT,
        "object": {"const": kind},
        "created": _COUNT,
        "model": TEXT,
        "system_fingerprint": MAYBE_TEXT,
        "choices": a_list(choice),
    }
    speed = {"timings": reference("Timings"), "metrics": reference("RequestMetrics")}
    return an_object(envelope | required, speed | optional)


def _choice(content: dict[str, Any], logprobs: str, ends: bool) -> Schema:
    """`ends`: whether it tells a whole answer, which has a reason for its end."""
    reason = one_of(_END) if ends else one_of([*_END, None]) | {"description": "Null while it goes on."}
    return an_object(
        {"index": _COUNT, **content, "logprobs": maybe(reference(logprobs)), "finish_reason": reason},
        {"stop_reason": {"type": ["integer", "string", "null"]}} | _OPTIONAL_IDS,
    )


def _event(chunk: str) -> Schema:
    """An event of a stream: its data are a chunk, an error, or [DONE] at the end."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": any_of(reference(chunk), reference("Error")),
    }
    return an_object({"data": any_of({"const": "[DONE]"}, data)})


def _common() -> dict[str, Schema]:
    error = {"message": TEXT, "type": TEXT, "param": MAYBE_TEXT, "code": MAYBE_TEXT}
    counts = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _COUNT)
    return {
        "Error": an_object({"error": an_object(error)}, None, "Every error, whatever its status."),
        "Usage": an_object({**counts, "prompt_tokens_details": an_object({"cached_tokens": _COUNT})}),
        "Timings": an_object(
            dict.fromkeys(("cache_n", "prompt_n", "predicted_n"), _COUNT)
            | {f"{phase}_{unit}": NUMBER for phase in ("prompt", "predicted") for unit in _UNITS},
            None,
            "llama.cpp's fields, in milliseconds and tokens a second.",
        ),
        "RequestMetrics": an_object(
            dict.fromkeys(("arrival_time", "time_in_queue", "time_to_first_token", "generation_time"), NUMBER)
            | {"tokens_per_second": {"type": ["number", "null"]}},
            None,
            "vLLM's fields, in seconds.",
        ),
    }


def _chat() -> dict[str, Schema]:
    token = {
        "token": TEXT,
        "logprob": NUMBER,
        "bytes": a_list({"type": "integer", "minimum": 0, "maximum": 255}),
    }
    entry = an_object(token | {"top_logprobs": a_list(an_object(token))})
    call = an_object({"id": TEXT, "type": {"const": "function"}, "function": _FUNCTION_CALL})
    message = an_object(
        {"role": {"const": "assistant"}, "content": MAYBE_TEXT, "refusal": MAYBE_TEXT},
        {
            "reasoning_content": TEXT,
            "tool_calls": a_list(call, least=1),
            "function_call": _FUNCTION_CALL,
        },
    )
    part = an_object({}, {"name": TEXT, "arguments": TEXT})
    call_part = an_object({"index": _COUNT, "function": part}, {"id": TEXT, "type": {"const": "function"}})
    delta = an_object(
        {},
        {
            "role": {"const": "assistant"},
            "content": TEXT,
            "reasoning_content": TEXT,
            "tool_calls": a_list(call_part, least=1),
            "function_call": part,
        },
    )
    usage = reference("Usage")
    return {
        "ChatLogprobs": an_object({"content": maybe(a_list(entry)), "refusal": {"type": "null"}}),
        "ChatMessage": message,
        "ChatDelta": delta,
        "ChatCompletion": _answer(
            "chat.completion",
            _choice({"message": reference("ChatMessage")}, "ChatLogprobs", ends=True),
            {"usage": usage},
            {},
        ),
        "ChatCompletionChunk": _answer(
            "chat.completion.chunk",
            _choice({"delta": reference("ChatDelta")}, "ChatLogprobs", ends=False),
            {},
            {"usage": maybe(usage)},
        ),
        "ChatCompletionEvent": _event("ChatCompletionChunk"),
    }


def _completion() -> dict[str, Schema]:
    top: Schema = {"type": ["object", "null"], "additionalProperties": NUMBER}
    logprobs = an_object(
        {
            "tokens": a_list(TEXT),
            "token_logprobs": a_list({"type": ["number", "null"]}),
            "top_logprobs": a_list(top),
            "text_offset": a_list(INTEGER),
        },
        None,
        "Null for the first token of a prompt, which nothing comes before.",
    )
    usage = reference("Usage")
    return {
        "CompletionLogprobs": logprobs,
        "Completion": _answer(
            "text_completion", _choice({"text": TEXT}, "CompletionLogprobs", ends=True), {"usage": usage}, {}
        ),
        "CompletionChunk": _answer(
            "text_completion",
            _choice({"text": TEXT}, "CompletionLogprobs", ends=False),
            {},
            {"usage": maybe(usage)},
        ),
        "CompletionEvent": _event("CompletionChunk"),
    }


def _models() -> dict[str, Schema]:
    model = {
        "id": TEXT,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": TEXT,
        "root": TEXT,
        "parent": MAYBE_TEXT,
        "max_model_len": _COUNT,
        "pruning": reference("Pruning"),
    }
    pruning = {
        "depth": _COUNT,
        "num_blocks": _COUNT,
        "blocks_kept": _COUNT,
        "units_removed": a_list(TEXT),
        "weight_bytes": _COUNT,
        "kv_bytes_per_token": _COUNT,
        "perplexity": MAYBE_OBJECT,
        "speedup": MAYBE_OBJECT,
    }
    return {
        "Model": an_object(model),
        "ModelList": an_object({"object": {"const": "list"}, "data": a_list(reference("Model"))}),
        "Pruning": an_object(
            pruning,
            None,
            "perplexity: dense, pruned, dataset. speedup: value, test, batch, device. Null where not measured.",
        ),
    }


def _others() -> dict[str, Schema]:
    added = an_object(
        {"content": TEXT}
        | dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), BOOLEAN)
    )
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
    return {
        "Metrics": TEXT | {"description": "Prometheus' text format."},
        "Prompt": an_object({"prompt": TEXT}),
        "Status": an_object({"status": TEXT}),
        "TokenizerInfo": an_object(
            {
                "tokenizer_class": TEXT,
                "model_max_length": _COUNT,
                "vocab_size": _COUNT,
                "added_tokens_decoder": {"type": "object", "additionalProperties": added},
            }
            | dict.fromkeys(names, MAYBE_TEXT),
            {"chat_template": TEXT},
        ),
        "Tokens": an_object(
            {
                "count": _COUNT,
                "max_model_len": _COUNT,
                "tokens": a_list(_COUNT),
                "token_strs": {"type": ["array", "null"], "items": TEXT},
            }
        ),
        "Version": an_object({"version": TEXT}),
    }
