"""Request fields of other servers (vLLM, llama.cpp, SGLang, Ollama, TGI): what becomes of each, as data.

Honoured ones are fields of `sleb.server.protocol`, some under further names (SAME_AS). Of the others, those that would
shape or limit an answer are refused (REFUSED) unless their value changes nothing, and harmless ones are passed over
(HARMLESS). What is in no table is unknown: accepted, named in the log, counted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sleb.errors import RequestError
from sleb.server.errors import shorten

# A field of ours, and what others call it.
SAME_AS: dict[str, tuple[str, ...]] = {
    "max_tokens": ("n_predict", "num_predict", "max_new_tokens"),
    "min_tokens": ("min_new_tokens",),
    "n": ("n_cmpl",),
    "repetition_penalty": ("repeat_penalty",),
    "include_stop_str_in_output": ("no_stop_trim",),
    "seed": ("sampling_seed",),
    "stop": ("stop_sequences",),
}
_NOTHING: tuple[Any, ...] = ("", [], {})  # the values, beside null, by which no field asks for anything

# What to do instead: fields, each with the values that change nothing.
_REFUSED: dict[str, dict[str, tuple[Any, ...]]] = {
    "sample with temperature, top_k, top_p, min_p and the penalties, and leave it out": {
        "typical_p": (1,),
        "typ_p": (1,),
        "tfs_z": (1,),
        "top_a": (0,),
        "top_n_sigma": (-1, 0),
        "mirostat": (0,),
        "mirostat_mode": (0,),
        "xtc_probability": (0,),
        "dynatemp_range": (0,),
        "dry_multiplier": (0,),
        "adaptive_target": (-1,),
        "epsilon_cutoff": (0,),
        "eta_cutoff": (0,),
        "smoothing_factor": (0,),
        "min_keep": (0,),
        "samplers": (),
        "penalty_alpha": (0,),
        "encoder_repetition_penalty": (1,),
        "no_repeat_ngram_size": (0,),
        "guidance_scale": (1,),
        "negative_prompt": (),
        "logits_processors": (),
        "custom_logit_processor": (),
        "watermark": (False,),
        "watermarking": (False,),
    },
    "there is no beam search; use n, and leave it out": {
        "use_beam_search": (False,),
        "num_beams": (1,),
        "length_penalty": (1,),
        "early_stopping": (False,),
    },
    "for the most probable tokens set temperature to 0": {"do_sample": (True,)},
    "set n": {"best_of": (1,)},
    "set temperature to 0 for one token, or logit_bias to -100": {
        "suppress_tokens": (),
        "begin_suppress_tokens": (),
        "bad_words_ids": (),
        "force_words_ids": (),
        "banned_tokens": (),
        "banned_strings": (),
        "custom_token_bans": (),
        "ban_eos_token": (False,),
    },
    "use stop with strings, or a grammar that ends": {"stop_regex": ()},
    "set max_tokens": {"max_completion_tokens": (), "t_max_predict_ms": (0, -1), "max_time": ()},
    "JSON is written compactly; leave it out": {
        "guided_whitespace_pattern": (),
        "whitespace_pattern": (),
        "n_indent": (0,),
    },
    "use tools, response_format or grammar": {
        "structural_tag": (),
        "grammar_lazy": (False,),
        "grammar_triggers": (),
    },
    'give the template what it knows, as chat_template_kwargs {"enable_thinking": false}': {
        "think": (),
        "thinking": (),
        "enable_thinking": (),
        "thinking_budget": (-1,),
        "thinking_token_budget": (-1,),
        "thinking_budget_tokens": (-1,),
        "reasoning_budget": (-1,),
    },
    "thoughts are told as reasoning_content; leave it out": {
        "include_reasoning": (True,),
        "separate_reasoning": (True,),
        "reasoning_format": ("auto", "deepseek"),
    },
    "start the server with --chat-template": {"chat_template": (), "template": ()},
    "send messages to /v1/chat/completions": {
        "messages": (),
        "system": (),
        "tools": (),
        "tool_choice": ("none",),
        "functions": (),
        "function_call": ("none",),
        "continue_final_message": (False,),
    },
    "send a prompt to /v1/completions": {
        "prompt": (),
        "input_ids": (),
        "prompt_embeds": (),
        "echo": (False,),
        "suffix": (),
        "raw": (False,),
        "context": (),
        "add_special_tokens": (False,),
        "return_full_text": (False,),
    },
    'give the template what it knows, as chat_template_kwargs {"documents": [...]}': {"documents": ()},
    "this model reads and writes text": {
        "images": (),
        "image_data": (),
        "multimodal_data": (),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
    },
    "prompts are cut from the left: set truncate_prompt_tokens": {
        "truncate": (False,),
        "truncation_side": ("left",),
    },
    "set logprobs (and top_logprobs in a chat)": {
        "n_probs": (0,),
        "top_logprobs": (0,),
        "top_n_tokens": (0,),
        "logprob_token_ids": (),
        "return_tokens_as_token_ids": (False,),
    },
    "set return_token_ids": {"return_tokens": (False,)},
    "the whole answer is sent; leave it out": {"response_fields": (), "return_hidden_states": (False,)},
    "serve a checkpoint in which the adapter is merged": {
        "lora": (),
        "lora_path": (),
        "lora_name": (),
        "lora_request": (),
        "adapter_id": (),
    },
    "send its fields beside the others": {
        "options": (),  # that is no object
        "extra_body": (),
        "sampling_params": (),
        "parameters": (),
        "generation_config": (),
    },
}
REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    name: (remedy, neutral) for remedy, names in _REFUSED.items() for name, neutral in names.items()
}
# What is refused beside one of the penalties, which here look at the whole prompt and answer.
_PENALTIES = {"repetition_penalty": 1, "repeat_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
_OF_PENALTIES: dict[str, tuple[Any, ...]] = {
    "repeat_last_n": (-1,),
    "penalize_nl": (True,),
    "penalize_newline": (True,),
}
_HARMLESS = {
    "OpenAI's own": "metadata store service_tier prompt_cache_key prompt_cache_retention safety_identifier verbosity "
    "reasoning_effort prediction client_metadata",
    "Anthropic's own": "cache_control container diagnostics inference_geo speed user_profile_id",
    "means something only beside one that is refused": "mirostat_tau mirostat_eta xtc_threshold dynatemp_exponent "
    "dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers adaptive_decay post_sampling_probs "
    "preserved_tokens",
    "how the work is done, or told": "guided_decoding_backend keep_alive cache_prompt n_cache_reuse id_slot slot_id "
    "n_keep n_discard priority request_id rid timings_per_token return_progress sse_ping_interval stream_interval "
    "stream_reasoning parse_tool_calls spaces_between_special_tokens mm_processor_kwargs media_io_kwargs",
    "Ollama's options of loading": "num_ctx num_batch num_gpu main_gpu low_vram f16_kv use_mmap use_mlock num_thread "
    "numa num_keep vocab_only logits_all",
}
HARMLESS = frozenset(name for names in _HARMLESS.values() for name in names.split())


def honoured(fields: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The fields of a body that ask for something and are not passed over; Ollama's `options` as fields of the body.

    known: the fields of the body's model, which are its own matter.

    Raises RequestError for one that would be refused, and for two names of one field with different values.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if isinstance(given.get("options"), dict):
        given = _joined(given, given.pop("options"))
    for ours, theirs in SAME_AS.items():
        first, *others = [name for name in (ours, *theirs) if name in given] or [ours]
        for other in others:
            if not _is_one_of(given.pop(other), [given[first]]):
                raise RequestError(f"{first} and {other} are the same field; send one of them", param=other)
    penalised = any(given.get(name, off) != off for name, off in _PENALTIES.items())
    return {name: value for name, value in given.items() if name in known or _asks(name, value, penalised)}


def _joined(fields: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    for name, value in options.items():
        if value is not None and not _is_one_of(value, [fields.setdefault(name, value)]):
            raise RequestError(
                f"options.{name} and {name} are the same field; send one of them", param="options"
            )
    return fields


def _asks(name: str, value: Any, penalised: bool) -> bool:
    """False for what is passed over, True for what is unknown. Raises RequestError for what is refused."""
    if name in _OF_PENALTIES:
        if penalised and not _is_one_of(value, _OF_PENALTIES[name]):
            raise _refusal(name, value, "penalties count the whole prompt and answer: leave it out")
        return False
    if name in REFUSED:
        remedy, neutral = REFUSED[name]
        if not _is_one_of(value, (*_NOTHING, *neutral)):
            raise _refusal(name, value, remedy)
        return False
    return name not in HARMLESS


def _is_one_of(value: Any, allowed: Collection[Any]) -> bool:
    """Equal to one of them, where true is not 1."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed)


def _refusal(name: str, value: Any, remedy: str) -> RequestError:
    what = "" if isinstance(value, dict | list) else f" {shorten(value)}"
    return RequestError(
        f"{name}{what} is not supported here, and would change the answer; {remedy}",
        param=name,
        code="unsupported",
    )
