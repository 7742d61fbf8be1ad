"""Streams of /chat/completions and /completions."""

from __future__ import annotations

from sleb.doctor.check import Group
from sleb.doctor.outcome import expect, skip
from sleb.doctor.target import GREEDY, PROMPT, Target, shown

GROUP = Group("streaming")


@GROUP.required
def chunks_have_their_shape(target: Target) -> None:
    """Every chunk has the same id, object "chat.completion.chunk", model and choices. Source: OpenAI API."""
    chunks = target.stream_chat(**GREEDY).chunks
    for chunk in chunks:
        expect(chunk["object"] == "chat.completion.chunk", f"object is {shown(chunk['object'])}")
        expect(chunk["id"] == chunks[0]["id"], "the id changes within the stream")
        expect(isinstance(chunk["model"], str), f"model is {shown(chunk['model'])}")
        expect(isinstance(chunk["choices"], list), f"choices is {shown(chunk['choices'])}")


@GROUP.required
def the_first_delta_has_the_role(target: Target) -> None:
    """The first chunk's delta has role "assistant". Source: OpenAI API."""
    delta = target.stream_chat(**GREEDY).choices[0]["delta"]
    expect(delta.get("role") == "assistant", f"the first delta is {shown(delta)}")


@GROUP.required
def one_chunk_tells_the_end(target: Target) -> None:
    """finish_reason is null but in the last chunk that has a choice. Source: OpenAI API."""
    stream = target.stream_chat(**GREEDY)
    expect(len(stream.finish_reasons()) == 1, f"the reasons are {stream.finish_reasons()}")
    expect(stream.choices[-1]["finish_reason"] is not None, "the last choice has no finish_reason")
    expect(
        all("finish_reason" in choice for choice in stream.choices), "finish_reason is missing from a chunk"
    )


@GROUP.required
def done_is_the_last_event(target: Target) -> None:
    """The stream ends in data: [DONE], and nothing follows. Source: OpenAI API."""
    for stream in (target.stream_chat(**GREEDY), target.stream_completion(**GREEDY)):
        expect(stream.data[-1] == "[DONE]", f"the last event is {shown(stream.data[-1])}")
        expect(stream.data.count("[DONE]") == 1, "[DONE] comes more than once")


@GROUP.required
def a_chat_stream_is_the_same_text(target: Target) -> None:
    """The joined deltas of a greedy answer are the text of the whole one. Source: OpenAI API."""
    whole = target.chat(**GREEDY)["choices"][0]["message"].get("content") or ""
    joined = target.stream_chat(**GREEDY).text()
    expect(joined == whole, f"the stream says {shown(joined)}, the whole answer {shown(whole)}")


@GROUP.required
def a_completion_stream_is_the_same_text(target: Target) -> None:
    """The joined texts of a greedy completion's stream are the whole one's. Source: OpenAI API."""
    stream = target.stream_completion(**GREEDY)
    objects = {chunk["object"] for chunk in stream.chunks}
    expect(objects == {"text_completion"}, f"the chunks are {shown(objects)}")
    expect(
        stream.text() == target.sample,
        f"the stream says {shown(stream.text())}, whole {shown(target.sample)}",
    )


@GROUP.required
def usage_comes_when_asked_for(target: Target) -> None:
    """include_usage adds a last chunk without choices, with the usage of the whole answer. Source: OpenAI API."""
    chunks = target.stream_chat(stream_options={"include_usage": True}, **GREEDY).chunks
    expect(chunks[-1]["choices"] == [], f"the last chunk's choices are {shown(chunks[-1]['choices'])}")
    usage, whole = chunks[-1]["usage"], target.chat(**GREEDY)["usage"]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        expect(usage[name] == whole[name], f"{name} is {usage[name]}, of the whole answer {whole[name]}")
    early = [chunk for chunk in chunks[:-1] if chunk.get("usage")]
    expect(not early, "an earlier chunk has usage too")


@GROUP.required
def usage_stays_away_otherwise(target: Target) -> None:
    """Without include_usage every chunk has a choice, and none tells usage. Source: OpenAI API."""
    chunks = target.stream_chat(**GREEDY).chunks
    expect(all(chunk["choices"] for chunk in chunks), "a chunk has no choice")
    expect(not any(chunk.get("usage") for chunk in chunks), "a chunk has usage")


@GROUP.sleb_only
def usage_can_come_with_every_chunk(target: Target) -> None:
    """continuous_usage_stats makes completion_tokens rise from chunk to chunk. Source: vLLM, sleb."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = target.stream_completion(stream_options=options, **GREEDY).chunks
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["choices"]]
    expect(counts == sorted(counts) and counts[0] < counts[-1], f"the counts are {shown(counts)}")


@GROUP.required
def text_comes_in_pieces(target: Target) -> None:
    """A long answer comes in several chunks of text, not in one at the end. Source: OpenAI API."""
    stream = target.stream_completion(temperature=0, max_tokens=48)
    pieces = [choice["text"] for choice in stream.choices if choice["text"]]
    if len(target.sample) < 12:
        skip("the answer is too short to come in pieces")
    expect(len(pieces) > 2, f"{len(stream.text())} characters came in {len(pieces)} pieces")


@GROUP.required
def n_streams_side_by_side(target: Target) -> None:
    """n 2 streams both choices to one end each. Source: OpenAI API."""
    stream = target.stream_chat(n=2, max_tokens=8)
    indices = {choice["index"] for choice in stream.choices}
    expect(indices == {0, 1}, f"the indices are {shown(indices)}")
    for index in (0, 1):
        reasons = stream.finish_reasons(index)
        expect(len(reasons) == 1, f"choice {index} ends by {reasons}")


@GROUP.required
def a_stop_string_is_held_back(target: Target) -> None:
    """No part of a stop string is streamed: the joined text is the whole answer's. Source: OpenAI API."""
    stop = target.stop_string()
    whole = target.complete(stop=stop, **GREEDY)["choices"][0]["text"]
    joined = target.stream_completion(stop=stop, **GREEDY).text()
    expect(stop not in joined, f"{shown(joined)} holds the stop string {shown(stop)}")
    expect(joined == whole, f"the stream says {shown(joined)}, the whole answer {shown(whole)}")


@GROUP.required
def log_probabilities_stream(target: Target) -> None:
    """With logprobs the chunks hold an entry for every token. Source: OpenAI API."""
    stream = target.stream_chat(logprobs=True, stream_options={"include_usage": True}, **GREEDY)
    number = sum(len((choice.get("logprobs") or {}).get("content") or ()) for choice in stream.choices)
    tokens = stream.chunks[-1]["usage"]["completion_tokens"]
    # Servers differ in whether the token that ends an answer has an entry.
    expect(tokens - 1 <= number <= tokens and number, f"{number} entries for {tokens} tokens")


@GROUP.required
def characters_are_whole(target: Target) -> None:
    """The bytes of a stream are UTF-8, and no character is torn between two chunks. Source: OpenAI API."""
    stream = target.stream_completion("日本語 🌍 ", temperature=1, seed=1, max_tokens=48)
    raw = stream.response.content
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        expect(False, f"the bytes {raw[error.start : error.end + 3]!r} are no UTF-8")
    for choice in stream.choices:
        torn = [character for character in choice["text"] if "\ud800" <= character <= "\udfff"]
        expect(not torn, f"half a surrogate pair is in the chunk {shown(choice['text'])}")


@GROUP.required
def echo_streams(target: Target) -> None:
    """With echo the stream begins with the prompt. Source: OpenAI API (legacy)."""
    text = target.stream_completion(echo=True, **GREEDY).text()
    expect(text.startswith(PROMPT), f"the text is {shown(text)}")


@GROUP.sleb_only
def lines_end_in_lf(target: Target) -> None:
    """No line of a stream ends in CR LF, which breaks simple clients. Source: sleb, vLLM."""
    expect(b"\r" not in target.stream_chat(**GREEDY).response.content, "there is a CR")


@GROUP.sleb_only
def the_last_chunk_has_timings(target: Target) -> None:
    """timings come with the last chunk. Source: llama.cpp, sleb."""
    last = target.stream_chat(**GREEDY).chunks[-1]
    expect(last["timings"]["predicted_per_second"] >= 0, f"timings are {shown(last['timings'])}")
