"""The official OpenAI client, unmodified, against a real socket."""

from __future__ import annotations

import asyncio

import openai
import pytest

MESSAGES = [{"role": "user", "content": "Grüße, 世界 🌍"}]


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


def test_chat(client):
    answer = client.chat.completions.create(model="fake", messages=MESSAGES)
    assert answer.choices[0].message.content == "Grüße, 世界 🌍"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.model == "fake"


def test_chat_stream(client):
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="fake", messages=MESSAGES, stream=True, stream_options=options
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Grüße, 世界 🌍"
    assert chunks[-1].usage.completion_tokens == len(text.encode())


def test_chat_stream_helper(client):
    with client.chat.completions.stream(model="fake", messages=MESSAGES, logprobs=True) as stream:
        assert list(stream)
        completion = stream.get_final_completion()
    assert completion.choices[0].message.content == "Grüße, 世界 🌍"
    assert len(completion.choices[0].logprobs.content) == len("Grüße, 世界 🌍".encode())


def test_completions(client):
    answer = client.completions.create(model="fake", prompt=["ab", "c"], echo=True, logprobs=1, max_tokens=4)
    assert [choice.text for choice in answer.choices] == ["abab", "cc"]
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    stream = client.completions.create(model="fake", prompt="abc", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "abc"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["fake:sleb-1", "fake", "fake:sleb-2"]
    assert client.models.retrieve("fake:sleb-1").owned_by == "sleb"


def test_raw_response_has_the_request_id(client):
    raw = client.chat.completions.with_raw_response.create(
        model="fake", messages=MESSAGES, extra_headers={"X-Request-Id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine"
    assert raw.parse()._request_id == "mine"


def test_async_client(server):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def stream(text):
                messages = [{"role": "user", "content": text}]
                answer = await client.chat.completions.create(model="fake", messages=messages, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

            texts = [f"text {number}" for number in range(20)]
            assert await asyncio.gather(*map(stream, texts)) == texts
            whole = await client.completions.create(model="fake", prompt="abc")
            assert whole.choices[0].text == "abc"

    asyncio.run(run())


def test_errors_become_the_right_exceptions(client):
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="fake", messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="fake", prompt="x" * 300, stream=True)
    assert too_long.value.code == "context_length_exceeded"


def test_wrong_key_and_overload(serve_engine, fake_engine):
    server = serve_engine(fake_engine, api_keys=["right"], max_num_seqs=1, max_queue=0)
    with pytest.raises(openai.AuthenticationError) as denied:
        server.client(api_key="wrong").models.list()
    assert denied.value.code == "invalid_api_key"
    client = server.client(api_key="right")
    fake_engine.delay = 0.05
    with client.completions.create(model="fake", prompt="x" * 100, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.InternalServerError) as overloaded:
            client.completions.create(model="fake", prompt="a")
        assert overloaded.value.status_code == 503
        assert overloaded.value.code == "overloaded"
    server.wait_idle()


def test_error_inside_a_stream_is_raised(serve_engine, fake_engine):
    server = serve_engine(fake_engine)
    fake_engine.delay = 0.02
    with server.client().completions.create(model="fake", prompt="x" * 100, stream=True) as stream:
        chunks = iter(stream)
        next(chunks)
        fake_engine.error = RuntimeError("broken")
        with pytest.raises(openai.APIError) as error:
            list(chunks)
    assert error.value.code == "engine_dead"
