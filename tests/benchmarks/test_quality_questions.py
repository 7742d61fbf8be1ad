"""Questions with known answers: what counts as right, and that neither the order nor the depth plays a part."""

from __future__ import annotations

import json
import random

import pytest
from typer.testing import CliRunner

from sleb.benchmarks.old import load
from sleb.benchmarks.quality import questions
from sleb.benchmarks.quality.questions import QUESTIONS, ask_questions, is_right, judge, wilson
from sleb.engine.llm import LLM


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("The capital of France is Paris.", ("Paris",), True),
        ("  paris!\nLondon", ("Paris",), True),
        ("PARIS", ("Paris",), True),
        ("London. No, it is Paris.", ("Paris",), False),  # not the first sentence
        ("London\nParis", ("Paris",), False),
        ("The Parisian capital.", ("Paris",), False),
        ("2 + 3 = 5", ("5", "five"), True),
        ("It is Five, of course", ("5", "five"), True),
        ("It is 5, of course. Or 6.", ("5",), True),
        ("It is 15.", ("5",), False),
        ("It is 5.5 or 1,005 or 5,000 or 5th.", ("5",), False),
        ("About 3.5. Not 5.", ("5",), False),
        ("", ("Paris",), False),
    ],
)
def test_what_is_right(answer: str, accepted: tuple[str, ...], right: bool) -> None:
    assert is_right(answer, accepted) == right


def test_no_question_holds_its_answer() -> None:
    assert len(QUESTIONS) == 20
    for question, accepted in QUESTIONS.items():
        assert not is_right(question, accepted)
        assert all(is_right(f"The answer is {word}.", accepted) for word in accepted)


def test_the_interval_is_wilson_s() -> None:
    """Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for count, number, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(count / number, number) == pytest.approx((low, high), abs=6e-5)
    assert wilson(1.0, 20)[1] == pytest.approx(1.0)


def test_judging_counts_each_question_once() -> None:
    answers = {question: [accepted[0], "no idea"] for question, accepted in QUESTIONS.items()}
    answers["What is 2 plus 3?"] = ["5", "five"]
    found = judge(3, "right sampled", answers)
    assert (found.value, found.case, found.subject) == (10.5, "20 questions", "depth 3")
    assert len(found.facts["wrong"]) == 19
    first = {"question": "What is the capital of France?", "right": 1, "of": 2, "answer": "no idea"}
    assert found.facts["wrong"][0] == first
    in_any_order = dict(random.Random(1).sample(sorted(answers.items()), 20))
    assert judge(3, "right sampled", in_any_order).value == 10.5


@pytest.fixture(scope="module")
def llm(tiny_model_dir, tiny_chain) -> LLM:
    return LLM(str(tiny_model_dir), tiny_chain, (0, 3), device="cpu", dtype="float32", kv_cache_memory=0.01)


def test_answers_do_not_hang_on_the_order_or_the_other_depths(llm, monkeypatch) -> None:
    alone = [each for depth in (0, 3) for each in ask_questions(llm, (depth,), 2)]
    assert [(each.subject, each.metric) for each in alone] == [
        (f"depth {depth}", metric) for depth in (0, 3) for metric in ("right", "right sampled")
    ]
    shuffled = list(QUESTIONS)
    random.Random(2).shuffle(shuffled)
    monkeypatch.setattr(questions, "QUESTIONS", {each: QUESTIONS[each] for each in shuffled})
    together = list(ask_questions(llm, (0, 3), 2))
    for one, other in zip(alone, together, strict=True):
        by_question = [{row["question"]: row for row in each.facts["wrong"]} for each in (one, other)]
        assert by_question[0] == by_question[1]


def test_samples_follow_what_is_served(tiny_model_dir, tiny_chain, monkeypatch) -> None:
    """With an operator's temperature of 0 each sample is the greedy answer, by plain requests too."""
    options = {"device": "cpu", "dtype": "float32", "kv_cache_memory": 0.01, "temperature": 0.0}
    greedy = LLM(str(tiny_model_dir), tiny_chain, (0, 3), **options)
    seen: dict[str, list[str]] = {}
    monkeypatch.setattr(questions, "judge", lambda depth, metric, answers: seen.update({metric: answers}))
    list(ask_questions(greedy, (0,), 2))
    assert seen["right sampled"] == {question: 2 * texts for question, texts in seen["right"].items()}


def test_the_command_writes_them_in_the_one_shape(tiny_model_dir, tiny_chain, tmp_path) -> None:
    import typer

    from sleb.cli.eval import evaluate
    from sleb.cli.options import OptionsCommand

    app = typer.Typer()
    app.command(cls=OptionsCommand)(evaluate)
    chain, file = tmp_path / "map.json", tmp_path / "result.json"
    tiny_chain.save(chain)
    arguments = (
        "--layer-map",
        chain,
        "--depths",
        "3",
        "--no-generate",
        "--questions",
        "--question-samples",
        "0",
        "--json",
        file,
        "--device",
        "cpu",
    )
    done = CliRunner().invoke(app, [str(tiny_model_dir), *map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert "20 questions" in done.stdout and "right" in done.stdout
    measured = load(file).measurements
    assert [(each.subject, each.metric, each.facts["depth"]) for each in measured] == [
        *(("depth 0", "right", 0), ("depth 3", "right", 3))
    ]
    settings = json.loads(file.read_text())["settings"]
    assert (settings["questions"], settings["question_samples"]) == (20, 0)
    off = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert settings["sampling"] == off
    refused = CliRunner().invoke(app, [str(tiny_model_dir), "--question-samples", "3"])
    assert "ask --questions" in str(refused.exception)
