"""Twenty plain questions with known answers: whether a depth still knows what the full model knows.

Perplexity averages over a text; a chat that gets the capital of France wrong has lost something that it does not show.
Chosen by plain knowledge, of several kinds, after the full SmolLM2-135M-Instruct had answered 125 such questions
greedily: 18 are among those that it gets right, so that removals have something to lose, and two (the cow, the grass)
are not. No pruned model was asked before the choice was made.

An answer is right if its first sentence has an accepted one as whole words, in whatever case. Questions do not hold
their answers, and each is judged by itself: neither the depth nor the order plays a part. A sentence that lists many
things passes if the right one is among them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import sqrt

from sleb.benchmarks.quality.answers import encode_prompts
from sleb.benchmarks.record import Measurement
from sleb.engine.llm import LLM
from sleb.engine.requests.sampling_params import SamplingParams

QUESTIONS: dict[str, tuple[str, ...]] = {
    "What is the capital of France?": ("Paris",),
    "What is the capital of Japan?": ("Tokyo",),
    "What is the capital of Germany?": ("Berlin",),
    "What is 2 plus 3?": ("5", "five"),
    "What is 3 times 4?": ("12", "twelve"),
    "What colour is the sky on a clear day?": ("blue",),
    "What color is grass?": ("green",),
    "What is the opposite of hot?": ("cold",),
    "What is the opposite of up?": ("down",),
    "What is the opposite of big?": ("small", "little"),
    "Which month comes after January?": ("February",),
    "Which day follows Saturday?": ("Sunday",),
    "Which animal says meow?": ("cat", "cats"),
    "What sound does a cow make?": ("moo", "moos", "mooing"),
    "How many days are in a week?": ("7", "seven"),
    "How many legs does a dog have?": ("4", "four"),
    "What is the plural of mouse?": ("mice",),
    "What is the largest ocean on Earth?": ("Pacific",),
    "Which planet is known as the Red Planet?": ("Mars",),
    "Who wrote Romeo and Juliet?": ("Shakespeare",),
}
_MAX_TOKENS = 32
_Z = 1.96  # 95 %, of the normal distribution


def is_right(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the first sentence of an answer holds one of the accepted words; 4 is not in 4.5 or 1,004."""
    sentence = re.split(r"(?<=[.!?])\s|\n", answer.strip(), maxsplit=1)[0]
    words = "|".join(map(re.escape, accepted))
    return bool(re.search(rf"(?<!\w)(?<!\d[.,])(?:{words})(?![.,]?\w)", sentence, re.IGNORECASE))


def wilson(share: float, number: int) -> tuple[float, float]:
    """The 95 % interval of a share of `number` trials (Wilson 1927, JASA 22): good for few trials and for all right."""
    middle, square = share + _Z**2 / (2 * number), 1 + _Z**2 / number
    width = _Z * sqrt(share * (1 - share) / number + (_Z / number) ** 2 / 4)
    return max(0.0, (middle - width) / square), min(1.0, (middle + width) / square)


def ask_questions(
    llm: LLM,
    depths: Sequence[int],
    num_samples: int,
    on_progress: Callable[[int, int, int], None] = lambda depth, done, total: None,
) -> Iterator[Measurement]:
    """How many answers are right at each depth: greedy ones, then the mean of `num_samples` by the engine's defaults.

    Greedy: with nothing of the generation config, as in `generate_answers`. A sample has a seed of its question and its
    number. The interval takes the questions as a draw of such questions, the samples of one as one: they are not
    independent. on_progress: the depth, how many tokens there are of at most how many. Raises RequestError.
    """
    encoded = encode_prompts(llm, list(QUESTIONS))
    greedy = SamplingParams(
        max_tokens=_MAX_TOKENS, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0
    )
    asked = [(question, greedy) for question in QUESTIONS]
    for number in range(num_samples):
        seeds = {question: zlib.crc32(f"{number} {question}".encode()) for question in QUESTIONS}
        asked += [(each, SamplingParams(max_tokens=_MAX_TOKENS, seed=seeds[each])) for each in QUESTIONS]
    prompts, params = encoded * (num_samples + 1), [each for _, each in asked]
    for depth in depths:
        done = 0

        def tell(number: int, depth: int = depth) -> None:
            nonlocal done
            done += number
            on_progress(depth, done, len(asked) * _MAX_TOKENS)

        answers: dict[str, list[str]] = {question: [] for question in QUESTIONS}
        for (question, _), output in zip(
            asked, llm.generate(prompts, params, depth, on_progress=tell), strict=True
        ):
            answers[question].append(output.check().text)
        yield judge(depth, "right", {question: texts[:1] for question, texts in answers.items()})
        if num_samples:
            yield judge(depth, "right sampled", {question: texts[1:] for question, texts in answers.items()})


def judge(depth: int, metric: str, answers: Mapping[str, Sequence[str]]) -> Measurement:
    """How many questions are answered rightly, each by the share of its answers that are.

    The fact "wrong" has the questions with a wrong answer: how many are right of how many, and the first wrong one.
    """
    wrong, total = [], 0.0
    for question, texts in answers.items():
        missed = [text for text in texts if not is_right(text, QUESTIONS[question])]
        right = len(texts) - len(missed)
        total += right / len(texts)
        if missed:
            wrong.append({"question": question, "right": right, "of": len(texts), "answer": missed[0]})
    number, facts = len(answers), {"depth": depth, "wrong": wrong}
    low, high = (end * number for end in wilson(total / number, number))
    return Measurement(f"{number} questions", f"depth {depth}", metric, total, (low, high), facts=facts)
