"""Structured output over the real engine and random weights: json, re and a small checker of our own are the judges."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import numpy as np
import openai
import pydantic
import pytest

from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine
from sleb.errors import RequestError
from sleb.server.answer.token_text import TokenTexts
from sleb.server.errors import OverloadedError
from sleb.server.grammar import grammars
from sleb.server.grammar.grammar_spec import GrammarSpec, Part
from sleb.server.grammar.grammars import GrammarCompiler
from sleb.server.grammar.notation import FORMATS
from sleb.server.grammar.structured import MAX_CHOICES

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
        "boss": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/boss"}]},
    },
    "required": ["name", "age", "tags", "boss"],
    "additionalProperties": False,
    "$defs": {
        "boss": {
            "type": "object",
            "properties": {"cheerful": {"type": "boolean"}},
            "required": ["cheerful"],
            "additionalProperties": False,
        }
    },
}


def check_person(text):
    person = json.loads(text)
    assert list(person) == ["name", "age", "tags", "boss"]
    assert isinstance(person["name"], str) and len(person["name"]) <= 8
    assert type(person["age"]) is int and 0 <= person["age"] <= 150
    assert 1 <= len(person["tags"]) <= 2 and set(person["tags"]) <= {"a", "b"}
    boss = person["boss"]
    assert boss is None or (list(boss) == ["cheerful"] and isinstance(boss["cheerful"], bool))
    assert " " not in re.sub(r'"(\\.|[^"\\])*"', "", text)  # compact: no white space between tokens


# Both samplers must keep to a mask; how a request comes to one does not depend on them.
with_both_kernels = pytest.mark.parametrize("server", ["torch", "cpu"], indirect=True)


@pytest.fixture(scope="module")
def server(request, tiny_model_dir, tiny_chain, start_server):
    config = EngineConfig(
        model=str(tiny_model_dir),
        layer_map=tiny_chain,
        tiers=(0, 3),
        dtype="float32",
        device="cpu",
        kernels=getattr(request, "param", "cpu"),
        kv_cache_memory=0.01,
        max_num_seqs=8,
    )
    running = start_server(Engine(config), max_num_seqs=8)
    yield running
    running.wait_idle()
    running.engine.check_integrity()
    running.close()


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


def text_of(response):
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop", choice
    return choice["message"]["content"] if "message" in choice else choice["text"]


def nested(depth):
    schema = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
WAYS = [
    {"response_format": JSON_SCHEMA},
    {"guided_json": PERSON},
    {"guided_json": json.dumps(PERSON)},
    {"structured_outputs": {"json": PERSON}},
    {"response_format": {"type": "json_object", "schema": PERSON}},
]


@pytest.mark.parametrize(
    ("server", "way"), [("torch", 0), *(("cpu", way) for way in range(len(WAYS)))], indirect=["server"]
)
def test_every_seed_gives_an_answer_that_fits_the_schema(server, way):
    for seed in range(4):
        fields = WAYS[way] | {"temperature": [0.7, 1.0, 1.5, 3.0][seed], "seed": seed, "max_tokens": 200}
        check_person(text_of(server.chat("hi", **fields)))
        check_person(text_of(server.complete("hi", **fields)))


@with_both_kernels
def test_n_choices_have_states_of_their_own_and_free_requests_run_beside(server):
    free = {"max_tokens": 40, "temperature": 0}
    alone = server.chat("free", **free).json()["choices"][0]["message"]["content"]
    fields = {"response_format": JSON_SCHEMA, "temperature": 1.5, "n": 4, "seed": 1, "max_tokens": 200}
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(server.chat, "free", **free) for _ in range(4)]
        answers = [pool.submit(server.chat, f"person {number}", **fields) for number in range(3)]
        for other in others:
            assert other.result().json()["choices"][0]["message"]["content"] == alone
        for answer in answers:
            texts = [choice["message"]["content"] for choice in answer.result().json()["choices"]]
            assert len(texts) == 4 and len(set(texts)) > 1
            for text in texts:
                check_person(text)


def test_json_object_is_an_object(server):
    for seed in range(6):
        fields = {"response_format": {"type": "json_object"}, "seed": seed, "temperature": 1.5}
        choice = server.chat("hi", max_tokens=100, **fields).json()["choices"][0]
        assert choice["message"]["content"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)
    # An object of integers is short, so it always ends.
    schema = {"type": "object", "additionalProperties": {"type": "null"}, "maxProperties": 1}
    json.loads(text_of(server.chat("hi", structured_outputs={"json": schema}, max_tokens=400, seed=3)))


@with_both_kernels
@pytest.mark.parametrize(
    "pattern", [r"[A-Z]{2}\d{3}", r"(foo|ba[rz])(-\d)?", r"a/b+c{2,4}", r"[äöü]{3}", r"\d\.\d"]
)
def test_regex(server, pattern):
    for seed in range(3):
        fields = {"seed": seed, "temperature": 1.5, "max_tokens": 50}
        assert re.fullmatch(pattern, text_of(server.complete("x", guided_regex=pattern, **fields)))
        assert re.fullmatch(
            pattern, text_of(server.chat("x", structured_outputs={"regex": pattern}, **fields))
        )


def test_as_many_choices_as_there_may_be(server):
    choices = [f"number {number}" for number in range(MAX_CHOICES)]
    assert text_of(server.complete("x", guided_choice=choices, max_tokens=40)) in choices


@with_both_kernels
def test_choice_with_awkward_characters(server):
    choices = ['say "yes"', "no\\never", "tab\tand\nline", "日本 🌍", "{}", "yes", "yes, but"]
    found = set()
    for seed in range(12):
        text = text_of(server.chat("x", guided_choice=choices, seed=seed, temperature=3.0))
        assert text in choices
        found.add(text)
    assert len(found) > 2
    for choice in choices:
        assert text_of(server.complete("x", structured_outputs={"choice": [choice]}, max_tokens=40)) == choice


@with_both_kernels
def test_lark_grammar(server):
    grammar = 'start: term "+" term\nterm: NUMBER | "(" NUMBER ")"\nNUMBER: /[1-9]/'
    for seed in range(4):
        text = text_of(server.chat("x", guided_grammar=grammar, seed=seed, temperature=1.5))
        assert re.fullmatch(r"(\d|\(\d\))\+(\d|\(\d\))", text)


GBNF = r"""# a date, and what it is of
root ::= date (" " word){1,2}
date ::= [0-9]{4} "-" ("0" [1-9] | "1" [0-2])
word ::= [a-z]+ "!"? | "\""
"""
GBNF_RE = r'\d{4}-(0[1-9]|1[0-2])( ([a-z]+!?|")){1,2}'


@pytest.mark.parametrize(
    "way", [{"grammar": GBNF}, {"ebnf": GBNF}, {"structured_outputs": {"grammar": GBNF}}]
)
def test_gbnf(server, way):
    for seed, ask in enumerate((server.chat, server.complete)):
        fields = way | {"temperature": 1.0, "seed": seed, "max_tokens": 200, "logit_bias": {str(ord("!")): 9}}
        assert re.fullmatch(GBNF_RE, text_of(ask("x", **fields)))


def test_gbnf_may_recur(server):
    """Which no regular expression can: brackets that match."""
    fields = {"grammar": 'root ::= "(" root? ")"', "temperature": 1.0, "max_tokens": 60}
    texts = [server.complete("x", seed=seed, **fields).json()["choices"][0]["text"] for seed in range(6)]
    closed = [text for text in texts if text.endswith(")")]
    assert closed and all(text == "(" * (len(text) // 2) + ")" * (len(text) // 2) for text in closed)


@pytest.mark.parametrize("name", ["json_schema", "format"])
def test_a_schema_under_the_names_of_llama_and_ollama(server, name):
    check_person(text_of(server.chat("x", **{name: PERSON}, temperature=1.0, seed=1, max_tokens=200)))


def test_format_json_is_an_object(server):
    text = text_of(
        server.chat(
            "x", format="json", temperature=0.7, seed=2, max_tokens=400, logit_bias={str(ord("}")): 9}
        )
    )
    assert isinstance(json.loads(text), dict)


def test_regex_under_the_name_of_sglang(server):
    assert re.fullmatch(r"(yes|no){2}", text_of(server.chat("x", regex=r"(yes|no){2}", temperature=1.0)))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "password", "maxLength": 4},
        {"type": "string", "format": "iri", "maxLength": 4},
        {"type": "integer", "format": "int64", "maximum": 99, "minimum": 0},
        {"type": "array", "items": {"enum": ["a"]}, "uniqueItems": False, "maxItems": 2},
        {
            "type": "object",
            "properties": {"format": {"enum": [{"format": "password"}]}},
            "required": ["format"],
            "additionalProperties": False,
        },
        {"$defs": {"a": {"type": "string", "format": "x", "maxLength": 2}}, "anyOf": [{"$ref": "#/$defs/a"}]},
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_what_means_nothing_in_a_schema_is_ignored(server, schema):
    fields = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    value = json.loads(text_of(server.chat("x", **fields, temperature=1.0, seed=3, max_tokens=100)))
    jsonschema.validate(value, schema)


def test_formats_that_are_held_to_are_all_that_llguidance_knows():
    llguidance = pytest.importorskip("llguidance")
    others = {"password", "idn-email", "iri", "json-pointer", "regex", "uri-template", "int32", "binary"}
    for name in FORMATS | others:
        schema = json.dumps({"type": "string", "format": name})
        error = llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_json_schema(schema))
        assert bool(error) == (name not in FORMATS), name


def test_streamed_is_the_same(server):
    fields = {"response_format": JSON_SCHEMA, "seed": 5, "temperature": 1.5, "max_tokens": 200}
    whole = text_of(server.chat("hi", **fields))
    lines = server.chat("hi", stream=True, **fields).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_openai_client_parses(client):
    class Step(pydantic.BaseModel):
        ok: bool
        number: int = pydantic.Field(ge=0, le=99)

    class Answer(pydantic.BaseModel):
        steps: list[Step] = pydantic.Field(max_length=2)

    for seed in range(3):
        answer = client.chat.completions.parse(
            model="tiny-llama",
            messages=[{"role": "user", "content": "x"}],
            response_format=Answer,
            temperature=1.5,
            seed=seed,
            max_tokens=200,
        )
        assert isinstance(answer.choices[0].message.parsed, Answer)
        assert len(answer.choices[0].message.parsed.steps) <= 2


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema is missing"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "structural_tag"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": {"type": "objekt"}}, "guided_json", "objekt"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"guided_json": {"type": "integer", "multipleOf": 1_000_003}}, "guided_json", "'multipleOf'"),
        (
            {"guided_json": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 0.1}]}},
            "guided_json",
            "'multipleOf'",
        ),
        ({"guided_json": nested(200)}, "guided_json", "recursion limit"),
        ({"guided_json": nested(450)}, "guided_json", "ecursion"),
        ({"format": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "format", "use 'anyOf'"),
        ({"json_schema": {"$ref": "http://a/b"}}, "json_schema", "'$defs'"),
        ({"grammar": 'root ::= "a'}, "grammar", "no GBNF grammar"),
        ({"grammar": "root ::= other"}, "grammar", "other"),
        ({"grammar": 'main ::= "a"'}, "grammar", "root"),
        ({"grammar": "root ::= " + "(" * 5000}, "grammar", "too deep"),
        ({"ebnf": "root ::= a\na ::= b\n" * 1000}, "ebnf", "rules"),
        ({"grammar": {"type": "json", "value": {}}}, "grammar", "string"),
        ({"format": "yaml"}, "format", "'json'"),
        ({"regex": "a", "json_schema": {}}, "regex", "exclude"),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_regex": r"(?=a)b"}, "guided_regex", "look-around"),
        ({"guided_regex": 5}, "guided_regex", "string"),
        ({"guided_choice": []}, "guided_choice", "choices"),
        ({"guided_choice": [""]}, "guided_choice", "empty"),
        ({"guided_grammar": "start: foo"}, "guided_grammar", "foo"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs", "xml"),
        ({"structured_outputs": {"regex": ["a"]}}, "structured_outputs", "string"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "exclude"),
        ({"guided_json": {"type": "string", "pattern": "("}}, "guided_json", "regex"),
        ({"guided_regex": "a" * 300_000}, "guided_regex", "too large"),
        ({"guided_json": {"anyOf": [{}] * 5000}}, "guided_json", "5001 objects"),
        (
            {"guided_json": {"type": "object", "properties": {f"p{n}": {} for n in range(1000)}}},
            "guided_json",
            "items",
        ),
        ({"guided_regex": "(" * 50_000}, "guided_regex", "invalid regex"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_used_is_refused_in_few_words(server, fields, param, words):
    for response in (server.chat("x", **fields), server.complete("x", **fields)):
        error = response.json()["error"]
        assert response.status_code == 400, error
        assert error["param"] == param
        assert words in error["message"]
        assert len(error["message"]) < 800
        assert "coerce" not in error["message"]


def test_a_chain_of_rules_does_not_overflow_the_stack(server):
    """Each rule refers to the next: compiling it takes a stack as deep, which a common thread does not have."""
    rules = "\n".join(f"a{number}: a{number + 1}" for number in range(9000))
    assert text_of(server.complete("x", guided_grammar=f'start: a0\n{rules}\na9000: "y"')) == "y"


def test_an_unfinished_answer_says_so(server):
    choice = server.chat("x", response_format=JSON_SCHEMA, max_tokens=5, seed=0).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == '{"nam'


def spec(text, kind="regex"):
    return GrammarSpec((Part("answer", kind, text),), "guided_regex")


def compiler(byte_tokenizer):
    return GrammarCompiler(byte_tokenizer, 264, frozenset({256, 258}))


def test_grammars_are_kept_and_the_oldest_forgotten(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(grammars, "_MAX_KEPT", 2)

    async def run():
        own = compiler(byte_tokenizer)
        first, again = await asyncio.gather(own.compile(spec("a")), own.compile(spec("a")))
        assert first is again is await own.compile(spec("a"))
        await own.compile(spec("b"))
        assert first is await own.compile(spec("a"))  # used last: "b" goes when "c" comes
        second = await own.compile(spec("b"))
        await own.compile(spec("c"))
        assert second is await own.compile(spec("b"))
        assert first is not await own.compile(spec("a"))

    asyncio.run(run())


class HeldCompiler(GrammarCompiler):
    """Builds a grammar once `released` is set; `built`: the texts of what it began."""

    def __init__(self, byte_tokenizer):
        super().__init__(byte_tokenizer, 264, frozenset({256, 258}))
        self.released = threading.Event()
        self.built = []

    def _build(self, parts):
        self.built.append(parts[0].text)
        assert self.released.wait(10)
        return super()._build(parts)


def test_compiling_leaves_the_event_loop_free_and_is_bounded_in_time(byte_tokenizer, monkeypatch):
    async def run():
        own = HeldCompiler(byte_tokenizer)
        monkeypatch.setattr(grammars, "_SECONDS_TO_COMPILE", 0.05)
        with pytest.raises(RequestError, match="takes longer"):  # while it is held
            await own.compile(spec("slow"))
        monkeypatch.setattr(grammars, "_SECONDS_TO_COMPILE", 10)
        own.released.set()
        await own.compile(spec("slow"))
        assert own.built == ["slow"]  # it went on, and is there for whoever asks again

    asyncio.run(run())


def test_a_grammar_that_only_waits_for_its_turn_is_told_to_come_again_and_is_not_made(
    byte_tokenizer, monkeypatch
):
    async def run():
        own = HeldCompiler(byte_tokenizer)
        monkeypatch.setattr(grammars, "_SECONDS_TO_COMPILE", 0.15)
        answers = await asyncio.gather(
            *(own.compile(spec(text)) for text in ("a", "b", "c", "c")), return_exceptions=True
        )
        assert [type(each) for each in answers] == [
            RequestError,
            RequestError,
            OverloadedError,
            OverloadedError,
        ]
        monkeypatch.setattr(grammars, "_SECONDS_TO_COMPILE", 10)
        own.released.set()
        await asyncio.gather(*(own.compile(spec(text)) for text in ("a", "b", "e")))
        assert sorted(own.built) == ["a", "b", "e"]  # whose turn was after the one that was given up
        await own.compile(spec("c"))
        gone = asyncio.ensure_future(own.compile(spec("d")))
        await asyncio.sleep(0)
        gone.cancel()  # before its work has begun
        await asyncio.gather(gone, return_exceptions=True)
        await own.compile(spec("d"))

    asyncio.run(run())


@with_both_kernels
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_grows_too_complex_on_the_way_is_the_clients_matter(server, stream, monkeypatch):
    monkeypatch.setattr(grammars, "_MAX_ITEMS", 200)
    grammar = 'start: "a" "b" "c" "d" "e" "f" x\nx: "a" | "b" | x x'  # ambiguous, but only after a while
    body = {"prompt": "x", "guided_grammar": grammar, "max_tokens": 100, "stream": stream, "ignore_eos": True}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        answer = client.post("/v1/completions", json=body)
        error = json.loads(answer.text.split("data: ")[-2]) if stream else answer.json()
        assert answer.status_code == (200 if stream else 400)
        assert error["error"]["code"] == "grammar_too_complex" and "simplify" in error["error"]["message"]
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200


def test_end_of_sequence_is_allowed_exactly_where_the_answer_may_end(byte_tokenizer):
    async def run():
        return (await compiler(byte_tokenizer).compile(spec("ab*c?"))).start()

    state = asyncio.run(run())

    def allowed():
        mask = np.zeros(9, dtype=np.int32)
        state.fill(mask)
        return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())

    assert allowed() == {97}
    state.accept(97)
    assert allowed() == {98, 99, 256, 258}
    state.accept(98)
    assert not state.finished
    state.accept(99)
    assert state.finished
    broken = asyncio.run(run())
    with pytest.raises(RuntimeError, match="satisfy the grammar"):
        broken.accept(120)


def test_masks_of_tokens_that_are_several_bytes_against_brute_force(merged_tokenizer):
    """Every token of a vocabulary with merges, some of which end inside a character, after every step of a walk."""
    choices = ["abc abc", "ab\u20ac", "a \u20ac\u20ac", "abca a", "\u20ac"]
    texts = TokenTexts(merged_tokenizer)
    size = merged_tokenizer.get_vocab_size()
    plain = [token for token in range(size) if not 256 <= token < 260]
    text = "start: " + " | ".join(json.dumps(choice) for choice in choices)

    async def run():
        own = GrammarCompiler(merged_tokenizer, size + 7, frozenset({256, 258}))
        return await own.compile(GrammarSpec((Part("answer", "lark", text),), "guided_choice"))

    def firsts(tokens):
        return {texts.utf8(token)[0] for token in tokens}

    source, found = asyncio.run(run()), set()
    for seed in range(40):
        rng, state, written = random.Random(seed), source.start(), b""
        while not state.finished:
            mask = np.zeros((size + 7 + 31) // 32, dtype=np.int32)
            state.fill(mask)
            allowed = set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())
            wanted = {
                token
                for token in plain
                if any(choice.encode().startswith(written + texts.utf8(token)) for choice in choices)
            }
            # Where the next bytes are forced, only the tokens that the tokenizer itself writes them with are left.
            assert allowed - {256, 258} <= wanted
            assert firsts(allowed - {256, 258}) == firsts(wanted)
            assert (allowed >= {256, 258}) == (written.decode(errors="replace") in choices)
            token = rng.choice(sorted(allowed - {256, 258}))
            state.accept(token)
            written += texts.utf8(token)
        found.add(written.decode())
    assert found == set(choices)


def test_errors_reach_the_openai_client(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny-llama", prompt="x", extra_body={"guided_regex": "["})
    assert refused.value.param == "guided_regex"
