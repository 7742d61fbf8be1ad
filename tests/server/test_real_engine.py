"""The server over the real engine and a tiny random model, with transformers as the judge of its numbers."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import subprocess

import openai
import pytest
import torch

from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine

MESSAGES = [{"role": "user", "content": "Say something, 世界!"}]
TIERS = ["tiny-llama", "tiny-llama:sleb-3", "tiny-llama:sleb-5"]


@pytest.fixture(scope="module")
def engine(tiny_model_dir, tiny_chain):
    config = EngineConfig(
        model=str(tiny_model_dir),
        layer_map=tiny_chain,
        tiers=(0, 3, 5),
        dtype="float32",
        device="cpu",
        kv_cache_memory=0.01,
        max_num_batched_tokens=64,
    )
    return Engine(config)


@pytest.fixture(scope="module")
def server(engine, start_server):
    running = start_server(engine, max_num_seqs=64)
    yield running
    running.wait_idle()
    engine.check_integrity()
    running.close()


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


def collect(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_openai_client_streams_what_it_gets_whole(client, tier, temperature):
    fields = {"model": tier, "messages": MESSAGES, "max_tokens": 40, "temperature": temperature, "seed": 3}
    whole = client.chat.completions.create(**fields)
    streamed = collect(client.chat.completions.create(**fields, stream=True))
    assert whole.choices[0].message.content == streamed
    assert streamed
    assert whole.model == tier


def test_a_random_model_never_breaks_a_character(client):
    for seed in range(3):
        fields = {
            "model": TIERS[0],
            "messages": MESSAGES,
            "temperature": 2.0,
            "seed": seed,
            "max_tokens": 60,
        }
        whole = client.chat.completions.create(**fields, stop=["e", "zz"]).choices[0].message.content
        assert collect(client.chat.completions.create(**fields, stop=["e", "zz"], stream=True)) == whole
        assert "e" not in whole


def test_echoed_logprobs_are_those_of_transformers(client, tiny_model_dir):
    from transformers import AutoModelForCausalLM

    ids = list(b"The sea is wide and the sky is high.")
    answer = client.completions.create(
        model=TIERS[0], prompt=ids, echo=True, logprobs=3, max_tokens=1, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = wanted[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert logprobs.token_logprobs[0] is None
    got = torch.tensor(logprobs.token_logprobs[1 : len(ids)])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    best = torch.tensor([max(top.values()) for top in logprobs.top_logprobs[1 : len(ids)]])
    torch.testing.assert_close(best, wanted[:-1].max(-1).values, atol=1e-4, rtol=0)
    assert len(logprobs.token_logprobs) == len(ids) + 1
    assert answer.choices[0].text.startswith("The sea is wide")


def test_many_clients_on_all_tiers_get_what_each_gets_alone(server, client):
    def fields(number):
        content = "x" * (7 * number % 60) + str(number)
        messages = [{"role": "user", "content": content}]
        return {"model": TIERS[number % 3], "messages": messages, "max_tokens": 12, "temperature": 0}

    alone = [
        client.chat.completions.create(**fields(number)).choices[0].message.content for number in range(12)
    ]

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def stream(number):
                answer = await client.chat.completions.create(**fields(number), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

            return await asyncio.gather(*map(stream, range(12)))

    assert asyncio.run(together()) == alone
    server.wait_idle()


def test_repeated_prompt_reports_cached_tokens(client):
    messages = [{"role": "user", "content": "a prompt of more than one page of tokens " * 3}]
    fields = {"model": TIERS[1], "messages": messages, "max_tokens": 2}
    client.chat.completions.create(**fields)
    again = client.chat.completions.create(**fields)
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    assert again.timings["cache_n"] == again.usage.prompt_tokens_details.cached_tokens


def test_refusals_of_the_engine_arrive(client):
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=TIERS[0], prompt="x" * 600)
    assert too_long.value.code == "context_length_exceeded"
    assert "600" in str(too_long.value)
    assert "512" in str(too_long.value)
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model=TIERS[0], messages=[{"role": "user", "content": "x" * 600}])
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.responses.create(model=TIERS[0], input="x" * 600, truncation="disabled")
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "input")
    with pytest.raises(openai.BadRequestError) as unknown:
        client.completions.create(model=TIERS[0], prompt=[5, 10**6])
    assert unknown.value.param == "prompt"
    with pytest.raises(openai.NotFoundError) as not_found:
        client.completions.create(model="tiny-llama:sleb-1", prompt="a")
    assert all(tier in str(not_found.value) for tier in TIERS)


@pytest.mark.parametrize("stream", [False, True])
def test_closed_connection_frees_the_engine(server, engine, client, stream):
    fields = {
        "model": TIERS[0],
        "prompt": "x",
        "max_tokens": 500,
        "n": 64,
        "extra_body": {"ignore_eos": True},
    }
    if stream:
        with client.completions.create(**fields, stream=True) as answer:
            next(iter(answer))
    else:
        with server.client(timeout=0.3) as impatient, pytest.raises(openai.APITimeoutError):
            impatient.completions.create(**fields)
    server.wait_idle()
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    engine.check_integrity()


def test_command_line_serves_and_its_curl_line_works(start_process, tiny_model_dir, tiny_chain, tmp_path):
    layer_map = tmp_path / "map.json"
    tiny_chain.save(layer_map)
    process = start_process(
        "-m",
        "sleb",
        "serve",
        tiny_model_dir,
        "--layer-map",
        layer_map,
        "--tiers",
        "0,3",
        "--port",
        0,
        "--threads",
        1,
    )
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [
            TIERS[1],
            TIERS[0],
        ]  # the recommended depth first
        assert client.models.list().data[0].pruning["blocks_kept"] == 4
        options = {"include_usage": True}
        chunks = list(
            client.chat.completions.create(
                model=TIERS[1], messages=MESSAGES, stream=True, max_tokens=10, stream_options=options
            )
        )
    assert chunks[-1].usage.completion_tokens >= 1
    line = re.search(r"^curl .*$", process.output, re.MULTILINE)[0]
    done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=20)
    if done.returncode != 127:  # curl is not installed
        assert json.loads(done.stdout)["model"] == TIERS[1]
    process.signal(signal.SIGTERM)
    assert process.wait() == 0
    assert "Traceback" not in process.output


@pytest.mark.parametrize("stop", ["<|im_end|>", "b<|im_end|>", "<|im_end|><|im_start|>"])
@pytest.mark.parametrize("skip", [True, False])
def test_a_stop_string_that_is_a_special_token(server, tiny_model_dir, stop, skip):
    """Stops where the token comes, though its text is left out; the bias lets the model say `ab<|im_end|>` for ever."""
    bias = {"97": 60.0, "98": 60.0, "258": 60.0, "257": 60.0}
    fields = {"stop": stop, "ignore_eos": True, "temperature": 3.0, "max_tokens": 300, "logit_bias": bias}
    for seed in range(3):
        whole = server.chat("x", **fields, seed=seed, skip_special_tokens=skip, return_token_ids=True)
        [choice] = whole.json()["choices"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
        said = "".join(
            {257: "<|im_start|>", 258: "<|im_end|>"}.get(each, chr(each)) for each in choice["token_ids"]
        )
        assert said.index(stop) + len(stop) == len(said)
        wanted = said[: -len(stop)]
        if skip:
            wanted = wanted.replace("<|im_end|>", "").replace("<|im_start|>", "")
        assert choice["message"]["content"] == wanted
        assert whole.json()["usage"]["completion_tokens"] == len(choice["token_ids"])
        lines = server.chat("x", **fields, seed=seed, skip_special_tokens=skip, stream=True).text.split(
            "\n\n"
        )
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == wanted
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_an_empty_prompt_begins_with_the_token_that_texts_begin_with(server):
    """As transformers has it of `generate` without a prompt; a list of no token ids is refused, as vLLM does."""
    fields = {"max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 1}
    empty = server.post("/v1/completions", prompt="", **fields).json()
    begun = server.post("/v1/completions", prompt=[256], **fields).json()
    [choice], [other] = empty["choices"], begun["choices"]
    assert empty["usage"]["prompt_tokens"] == 1 and empty["usage"]["completion_tokens"] == 3
    assert choice["logprobs"]["tokens"] == other["logprobs"]["tokens"]
    assert other["text"] == "<|endoftext|>" + choice["text"]
    assert choice["logprobs"]["text_offset"][:2] == [0, 0]
    assert server.post("/v1/completions", prompt=["", "a"], max_tokens=1).status_code == 200
    for prompt in ([], [[]]):
        assert server.post("/v1/completions", prompt=prompt).status_code == 400
    assert server.post("/tokenize", prompt="").json()["tokens"] == []


def test_offsets_with_a_sentencepiece_tokenizer(tiny_model_dir, tmp_path, serve_engine):
    """Every token of prompt and answer begins at its offset of the text, echoed or not, streamed or not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=264, special_tokens=special, show_progress=False)
    words = [
        "Hello world, how are you",
        "Hello there, world wide words",
        "where are we now, you and the others",
    ]
    tokenizer.train_from_iterator(words * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder = shutil.copytree(tiny_model_dir, tmp_path / "tiny-llama")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    running = serve_engine(
        Engine(EngineConfig(model=str(folder), dtype="float32", device="cpu", kv_cache_memory=0.01))
    )
    fields = {
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": 0,
        "ignore_eos": True,
        "logit_bias": {"0": -100},
    }
    for prompt in ("Hello world, how are you", "where", ""):
        for echo in (True, False):
            [choice] = running.post("/v1/completions", prompt=prompt, echo=echo, **fields).json()["choices"]
            text, logprobs = choice["text"], choice["logprobs"]
            bounds = [*logprobs["text_offset"], len(text)]
            assert bounds == sorted(bounds) and text.startswith(prompt if echo else "")
            for number, token in enumerate(logprobs["tokens"]):
                piece = text[bounds[number] : bounds[number + 1]]
                if token.startswith("token_id:"):  # the model has more tokens than the tokenizer
                    assert piece == ""
                elif (
                    number < 2 or token in special
                ):  # the first word, with the space that no text begins with
                    assert piece in (token, token.removeprefix(" "), "")
                else:
                    assert piece == token
