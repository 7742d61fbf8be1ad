"""What pruning does to answers: loops, early ends, and how soon they leave the dense model's.

Perplexity sees one token at a time. Here the model goes on from its own words, where small errors add up: a pruned
model often repeats itself without end (Holtzman et al. 2020, arXiv:1904.09751) or stops at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sleb.benchmarks.quality.texts import read_file
from sleb.engine.llm import LLM
from sleb.engine.outputs import Output
from sleb.engine.requests.sampling_params import SamplingParams
from sleb.errors import ConfigError

PROMPTS = (
    "What is the capital of France?",
    "Name the three primary colours.",
    "Write one sentence about the sea.",
    "What is 17 plus 25?",
    "Translate into Spanish: Good morning, my friend.",
    "Explain in two sentences why the sky is blue.",
    "List the days of the week.",
    "Write a Python function that returns the larger of two numbers.",
    "Who wrote Romeo and Juliet?",
    "Give me a short recipe for pancakes.",
    "Say this in fewer words: Water evaporates from the sea, forms clouds, and falls down again as rain.",
    "Write a poem of two lines about winter.",
    "What do bees make, and why?",
    "Which number comes next: 2, 4, 8, 16?",
    "Is a tomato a fruit or a vegetable? Give a reason.",
    "Write a polite email that asks for a day off.",
)

Quality = dict[str, float]
"""Figures of one depth's greedy answers by metric, the last two not for the dense model itself.

mean tokens: of an answer, its end-of-text token not counted. looped: share whose end is one piece said three times or
more, twelve tokens at least. early: without visible text, or below a quarter of the dense answer's tokens. identical:
of the same tokens.
"""


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """The prompts in a file, one a line, blank lines left out; those built in for None. Raises ConfigError."""
    if path is None:
        return PROMPTS
    lines = read_file(str(path), "--prompts", "name a text file, a prompt a line").splitlines()
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ConfigError(f"--prompts {path} holds no prompt; write one a line")
    return prompts


def encode_prompts(llm: LLM, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids: as a user's message where the model has a chat template, else as they are. Raises RequestError."""
    engine = llm.engine
    if engine.text.chat_template is None:
        return [list(engine.encode(prompt)) for prompt in prompts]
    return [list(engine.render_chat([{"role": "user", "content": prompt}])) for prompt in prompts]


def generate_answers(
    llm: LLM,
    prompts: Sequence[str],
    depths: Sequence[int],
    num_tokens: int,
    on_progress: Callable[[int, int, int], None] = lambda depth, done, total: None,
) -> Iterator[tuple[Quality, Mapping[str, Any] | None]]:
    """The quality of each depth's answers, in the order of the depths; the first is the dense one.

    on_progress: the depth, and how many tokens there are of at most how many. Raises RequestError.
    """
    encoded = encode_prompts(llm, prompts)
    # Nothing of the model's generation config: a penalty on repetition would hide what is looked for.
    params = SamplingParams(
        max_tokens=num_tokens, temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0
    )
    dense: list[Output] | None = None
    for depth in depths:
        done = 0

        def tell(number: int, depth: int = depth) -> None:
            nonlocal done
            done += number
            on_progress(depth, done, len(encoded) * num_tokens)

        answers = [each.check() for each in llm.generate(encoded, params, depth, on_progress=tell)]
        yield summarise(prompts, answers, dense)
        dense = dense or answers


def summarise(
    prompts: Sequence[str], answers: Sequence[Output], dense: Sequence[Output] | None
) -> tuple[Quality, Mapping[str, Any] | None]:
    """The figures of one depth, and the first prompt that the dense model answers otherwise, with both answers.

    dense: the dense model's answers, None if these are.
    """
    ids = list(map(spoken, answers))
    found: Quality = {"mean tokens": fmean(map(len, ids)), "looped": fmean(map(has_looped_tail, ids))}
    if dense is None:
        return found, None
    wanted = list(map(spoken, dense))
    early = [
        not answer.text.strip() or 4 * len(own) < len(other)
        for answer, own, other in zip(answers, ids, wanted, strict=True)
    ]
    examples = [
        {"prompt": prompt, "dense": dense[place].text, "pruned": answers[place].text}
        for place, prompt in enumerate(prompts)
        if ids[place] != wanted[place]
    ]
    found |= {"early": fmean(early), "identical": 1 - len(examples) / len(ids)}
    return found, examples[0] if examples else None


def spoken(answer: Output) -> list[int]:
    """The tokens of an answer without the one that ended it: nothing else than that token stops these."""
    return answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids


def has_looped_tail(token_ids: Sequence[int]) -> bool:
    """Whether the end is one piece said three times or more, twelve tokens in all at least."""
    length = len(token_ids)
    for period in range(1, length // 3 + 1):
        num_tail = max(3 * period, 12)
        tail = token_ids[-num_tail:]
        if num_tail <= length and tail[period:] == tail[:-period]:
            return True
    return False
