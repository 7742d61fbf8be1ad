"""When an answer ends: a stop token, a stop string, the end of its grammar, its length, or a failure."""

from __future__ import annotations

from sleb.engine.requests.repetition import REPETITION
from sleb.engine.requests.request import Request


def append_token(request: Request, token_id: int, grammar_ended: bool, eos_token_ids: frozenset[int]) -> str:
    """Adds a sampled token; sets finish_reason, and what stopped it, if the answer ends there.

    In order: an end-of-sequence or stop token, whose text is left out unless it was asked for; a stop string in the
    text; the end of the grammar; max_tokens; a loop. Until min_tokens are there only the grammar and max_tokens count.

    grammar_ended: whether nothing may follow by the request's grammar. Returns the text that is certain by now.
    """
    params, detokenizer = request.params, request.detokenizer
    request.tokens.append(token_id)
    num_output = len(request.tokens) - request.num_prompt_tokens
    may_stop = num_output >= params.min_tokens
    stops = token_id in params.stop_token_ids
    loops = request.repetition is not None and request.repetition.push(request.tokens, num_output)
    if may_stop and (stops or (token_id in eos_token_ids and not params.ignore_eos)):
        request.finish_reason = "stop"
        request.stop_reason = token_id if stops else None
        text = detokenizer.push(token_id) if params.include_stop_str_in_output else ""
    else:
        text = detokenizer.push(token_id, check_stop=may_stop)
        if grammar_ended:
            request.finish_reason = "stop"
        elif num_output >= request.max_tokens:
            request.finish_reason = "length"
        elif loops and may_stop:
            request.finish_reason, request.stop_reason = "length", REPETITION
    if request.finish_reason is not None and detokenizer.stopped_by is None:
        text += detokenizer.flush(check_stop=may_stop)
    if detokenizer.stopped_by is not None:
        request.finish_reason = "stop"
        request.stop_reason = detokenizer.stopped_by
    return text
