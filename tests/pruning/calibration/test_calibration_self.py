"""Text that the model writes, and conversations by its template, against the engine and transformers used directly."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from sleb import LLM, LayerMap, SamplingParams
from sleb.cli.prune import prune as prune_command
from sleb.engine.generation import GenerationDefaults
from sleb.engine.model.scoring import DecoderScorer
from sleb.engine.outputs import Choice, Output
from sleb.engine.text import TextProcessor
from sleb.errors import ConfigError
from sleb.pruning.calibration import Calibration, calibration_windows, generated
from sleb.pruning.calibration.generated import generated_tokens
from sleb.pruning.options import PruneOptions
from sleb.pruning.run import prune, run_pruning
from sleb.pruning.tokens import _Writer, gather_tokens

BEGIN, ENDS = 256, (258, 256)  # of tiny_model_dir


def seeds_of(seed: int, count: int) -> list[int]:
    """What the documents of a calibration are sampled with."""
    return [int(np.random.SeedSequence([seed, at]).generate_state(1, np.uint64)[0]) for at in range(count)]


def gather(path: Path, scorer: Any = None, **options: Any) -> tuple[Calibration, list[Calibration]]:
    chosen = PruneOptions(**{"calibration": "self", "windows": 4, "seqlen": 24, "device": "cpu", **options})
    scorer = scorer or DecoderScorer.load(str(path), device="cpu")
    return gather_tokens(path, scorer, chosen, note=lambda message: None, on_generate=lambda share: None)


# What the model is asked for: documents of invented tokens, 100 · number of the seed, of invented lengths.
def invented(lengths: dict[int, int]) -> Callable[..., list[list[int]]]:
    def generate(seeds: Sequence[int], max_tokens: int, on_tokens: Callable[[int], None]) -> list[list[int]]:
        documents = []
        for seed in seeds:
            length = min(lengths.get(seed, 5), max_tokens)
            documents.append([seed % 1000] * length + [0])
            on_tokens(length)
        return documents

    return generate


def test_documents_are_packed_in_order_however_many_are_sampled_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds = seeds_of(3, 300)
    lengths = {seed: at * 7 % 40 for at, seed in enumerate(seeds)}
    packed = [token for seed in seeds for token in [seed % 1000] * min(lengths[seed], 30) + [0]]
    shares: list[float] = []
    found = generated_tokens(invented(lengths), 2000, 3, 30, shares.append)
    assert found == packed[:2000]
    assert shares == sorted(shares) and len(shares) > 100 and shares[-1] == 1
    monkeypatch.setattr(generated, "_MAX_DOCUMENTS", 7)
    assert generated_tokens(invented(lengths), 2000, 3, 30) == found
    assert generated_tokens(invented(lengths), 900, 3, 30) == found[:900]
    assert len({*seeds, *seeds_of(4, 300)}) == 600


def test_a_model_that_writes_nothing_is_an_error() -> None:
    nothing = dict.fromkeys(seeds_of(0, 100), 0)
    with pytest.raises(ConfigError, match=r"ends its documents at once \(\d+ of them .*: name a text file"):
        generated_tokens(invented(nothing), 500, 0, 10)
    some = nothing | {seeds_of(0, 100)[2]: 9}  # rare is not never
    assert len(generated_tokens(invented(some), 100, 0, 10)) == 100


def test_a_mix_tells_of_a_short_text_before_the_model_writes(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x" * 50)

    def encode(text: str) -> list[int]:
        return [7] * len(text)

    def refuse(*arguments: Any) -> list[list[int]]:
        raise AssertionError("it must not write")

    source = f"self,{tmp_path}/short.txt=3"
    with pytest.raises(ConfigError, match=r"short.txt=3 must give 6 of the 8 windows of 10 .* and has 5"):
        calibration_windows(source, encode, seqlen=10, windows=8, generate=refuse)
    found = calibration_windows(source, encode, seqlen=10, windows=4, generate=invented({}))
    assert found.windows[1:].flatten().tolist() == [7] * 30
    assert (
        found.windows[0].tolist()
        == [each % 1000 for each in seeds_of(0, 1)] * 5
        + [0]
        + [each % 1000 for each in seeds_of(0, 2)[1:]] * 4
    )
    record = found.record
    assert (record.source, record.sampler, record.seed) == ("self,short.txt=3", "generated+packed", 0)


def test_the_text_is_what_the_engine_samples(tiny_model_dir: Path) -> None:
    llm = LLM(tiny_model_dir, device="cpu", dtype="float32", max_model_len=24)
    expected: list[int] = []
    ended = 0
    for seed in seeds_of(5, 40):  # one at a time; the calibration has them in one batch
        params = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=23, seed=seed)
        [output] = llm.generate([[BEGIN]], params)
        assert len(output.token_ids) == 23 or output.token_ids[-1] in ENDS
        ended += output.finish_reason == "stop"
        expected += output.token_ids if output.finish_reason == "stop" else [*output.token_ids, ENDS[0]]
    assert ended
    tokens, _ = gather(tiny_model_dir, seed=5, windows=20)
    assert tokens.windows.flatten().tolist() == expected[:480]
    record = tokens.record
    assert (record.source, record.sampler, record.seed, record.special_tokens) == (
        "self",
        "generated",
        5,
        False,
    )


def test_a_seed_repeats_itself_and_the_held_out_text_has_the_next(tiny_model_dir: Path) -> None:
    scorer = DecoderScorer.load(str(tiny_model_dir), device="cpu")
    tokens, [held_out, further] = gather(tiny_model_dir, scorer, held_out=["self", "self"], windows=6)
    again, _ = gather(tiny_model_dir, scorer, windows=6)
    other, _ = gather(tiny_model_dir, scorer, windows=6, seed=1)
    assert tokens.record == again.record and tokens.record.seed == 0
    assert other.record.token_hash != tokens.record.token_hash
    assert (held_out.record.token_hash, held_out.record.seed) == (other.record.token_hash, 1)
    assert further.record.seed == 2


def test_the_tokens_have_the_probabilities_of_the_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Also where the generation config would make the answers greedy. The probabilities are transformers'."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "greedy"
    shutil.copytree(tiny_model_dir, folder)
    config = {
        "bos_token_id": BEGIN,
        "eos_token_id": list(ENDS),
        "do_sample": True,
        "top_k": 1,
        "temperature": 0.1,
    }
    (folder / "generation_config.json").write_text(json.dumps(config))
    llm = LLM(folder, device="cpu", dtype="float32", max_model_len=24, max_num_seqs=256)
    count = 4000
    documents = _Writer(llm).write(seeds_of(0, count), 1, lambda new: None)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.inference_mode():
        probabilities = model(torch.tensor([[BEGIN]])).logits[0, -1].softmax(-1).tolist()
    first = Counter(document[0] for document in documents)
    for token, probability in enumerate(probabilities):
        expected = count * probability
        assert abs(first[token] - expected) <= 5 * (expected * (1 - probability)) ** 0.5 + 1, token
    assert len(first) > 20


@pytest.mark.parametrize(
    ("named", "config", "ends", "begin", "end"),
    [
        ({"bos_token": "<b>", "eos_token": "<e>"}, {"bos_token_id": 9}, {2, 9}, 1, 2),
        ({"eos_token": "<e>"}, {"bos_token_id": 9}, {2}, 9, 2),
        ({"eos_token": "<e>"}, {}, {2}, 2, 2),
        ({}, {}, {6, 5}, 5, 5),
        ({"bos_token": "<unknown>"}, {}, set(), None, None),
    ],
)
def test_what_a_document_begins_and_ends_with(
    named: dict[str, str], config: dict[str, int], ends: set[int], begin: int | None, end: int | None
) -> None:
    asked: list[tuple[list[int], SamplingParams]] = []

    def generate(prompts: Any, params: Any, depth: int, on_progress: Any) -> list[Any]:
        asked.extend(zip(prompts, params, strict=True))
        answer = Choice(token_ids=[7, 8], finish_reason="length")
        return [Output(list(prompt), depth, [answer], None, 0, None) for prompt in prompts]

    tokenizer = SimpleNamespace(token_to_id={"<b>": 1, "<e>": 2}.get)
    engine = SimpleNamespace(
        text=SimpleNamespace(named_tokens=named, tokenizer=tokenizer),
        defaults=GenerationDefaults(begin_token_id=config.get("bos_token_id")),
        eos_token_ids=frozenset(ends),
        spec=SimpleNamespace(vocab_size=50),
    )
    llm: Any = SimpleNamespace(engine=engine, generate=generate)
    documents = _Writer(llm).write([11, 12, 13], 3, lambda new: None)
    ending = [] if end is None else [end]
    if begin is None:  # a token drawn from all, which is then part of the document
        given = [prompt[0] for prompt, _ in asked]
        assert len(set(given)) > 1 and all(0 <= token < 50 for token in given)
        assert documents == [[token, 7, 8, *ending] for token in given]
        assert [params.max_tokens for _, params in asked] == [2, 2, 2]
    else:
        assert [prompt for prompt, _ in asked] == [[begin]] * 3
        assert documents == [[7, 8, *ending]] * 3
        assert [params.max_tokens for _, params in asked] == [3, 3, 3]
    assert [params.seed for _, params in asked] == [11, 12, 13]


def test_a_loaded_model_cannot_write(tiny_model_dir: Path) -> None:
    scorer = DecoderScorer.load(str(tiny_model_dir), device="cpu")
    with pytest.raises(
        ConfigError, match="self can only be written by a model given by name: pass its folder"
    ):
        prune(scorer, 1, "self", windows=2, seqlen=16)


# The command.
def run_command(*arguments: Any) -> Any:
    app = typer.Typer()
    app.command()(prune_command)
    fixed = ("--no-speedup", "--no-plot", "--device", "cpu", "--seqlen", 24, "--windows", 4)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(each) for each in (*arguments, *fixed)])


def test_the_command_goes_on_with_the_same_text(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    begin = (tiny_model_dir, "-o", path, "--calibration", "self", "--held-out", "self")
    done = run_command(*begin, "--remove", 1)
    assert done.exit_code == 0, done.output
    record = LayerMap.load(path).calibration
    assert record is not None and (record.source, record.sampler, record.seed) == ("self", "generated", 0)
    done = run_command(*begin, "--remove", 2, "--resume")
    assert done.exit_code == 0, done.output
    assert "1 of 2 removals are decided" in done.output
    assert LayerMap.load(path).max_depth == 2
    other = run_command(*begin, "--remove", 3, "--resume", "--seed", 9)
    assert other.exit_code == 1 and "held-out text is sha256" in str(other.exception)


def test_it_reports_its_progress_and_can_be_interrupted(tiny_model_dir: Path, tmp_path: Path) -> None:
    shares: list[float] = []

    def stop(share: float) -> None:
        shares.append(share)
        if share > 0.5:
            raise KeyboardInterrupt

    options = PruneOptions(1, "self", tmp_path / "map.json", seqlen=24, windows=8, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        run_pruning(str(tiny_model_dir), options, on_generate=stop)
    assert len(shares) > 2 and shares == sorted(shares) and shares[-2] <= 0.5
    assert not (tmp_path / "map.json").exists()


# Conversations.
CHATS: list[list[dict[str, str]]] = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé?"}],
    [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4\n"}],
]


def test_conversations_are_those_of_the_template(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    expected = [
        token
        for chat in CHATS
        for token in tokenizer.apply_chat_template(
            chat, tokenize=True, add_generation_prompt=False, return_dict=False
        )
    ]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [[{"from": names[each["role"]], "value": each["content"]} for each in chat] for chat in CHATS]
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": chat, "conversations": other} for chat, other in zip(CHATS, shared, strict=True)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    for column in ("messages", "conversations"):
        tokens, _ = gather(tiny_model_dir, calibration=f"{path}:{column}", windows=None, seqlen=10)
        assert tokens.windows.flatten().tolist() == expected[: len(expected) // 10 * 10]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}", "26 Jul 2024 Hi"),
        (
            "\n{%- macro today() %}{{ strftime_now('%A %d %B %y') }}{% endmacro %}\n"
            "  {% if strftime_now is defined %}\n{{ today() }}{% endif %}",
            "Friday 26 July 24",
        ),
        ("\n{{ messages[0]['content'] }}", "\nHi"),
        ("\n{{ messages[0]['content'] }}{# strftime_now #}", "\nHi"),
        ("  {{ messages[0]['content'] }}{# strftime_now #}", "  Hi"),
        ("  {% if true %}{{ messages[0]['content'] }}{% endif %}{# strftime_now #}", "Hi"),
    ],
)
def test_a_template_sees_one_date(template: str, expected: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """And renders the white space that it begins with as it does without the date."""
    folder = tmp_path / "dated"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir / name, folder)
    (tmp_path / "chats.jsonl").write_text(json.dumps({"chat": [{"role": "user", "content": "Hi"}]}))
    text = TextProcessor(folder)
    text.chat_template = template
    scorer = SimpleNamespace(text=text, tokenizer=text.tokenizer, max_length=64, model_name="dated")
    chosen = {"calibration": f"{tmp_path}/chats.jsonl:chat", "windows": 1, "seqlen": len(expected)}
    tokens, _ = gather(folder, scorer, **chosen)
    assert bytes(tokens.windows[0].tolist()).decode() == expected
    assert text.chat_template == template
    text.chat_template = None
    with pytest.raises(
        ConfigError, match=r"chats.jsonl line 1 holds a conversation, but .* no chat template"
    ):
        gather(folder, scorer, **chosen)
