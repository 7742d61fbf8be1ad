"""lm-eval: every kind of request, by local-completions and local-chat-completions, at every depth that is served.

lm_eval.py URL MODEL [FOLDER FILE]: FOLDER has the model's tokenizer, for the runs that take a local one; the answers
go to FILE, for lm_eval_reference.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

# This file has the name of the package: the folder of the script must not come first.
sys.path.pop(0)
# What is read from the data files is kept in this environment, and nothing is asked of the hub.
os.environ["HF_HOME"] = str(Path(sys.prefix) / "huggingface")
os.environ["HF_HUB_OFFLINE"] = "1"

import lm_eval
import requests
from lm_eval.tasks import TaskManager

url, model = sys.argv[1:3]
folder, file = map(os.path.abspath, sys.argv[3:5]) if len(sys.argv) > 3 else (None, None)
SCORED = ["sleb_continuations", "sleb_passages", "sleb_choices"]
GREEDY = ["sleb_questions"]
# lm-eval's model, the tasks, the model's arguments, whether to use the chat template
Run = tuple[str, list[str], dict[str, Any], bool]
RUNS: dict[str, Run] = {
    "remote tokenizer": ("local-completions", SCORED + GREEDY, {"tokenizer_backend": "remote"}, False),
    # Contexts are cut from the left and passages take several windows.
    "parallel, short": (
        "local-completions",
        ["sleb_continuations", "sleb_passages"],
        {"tokenizer_backend": "auto", "num_concurrent": 4, "batch_size": 3, "max_length": 48},
        False,
    ),
    "prompts as text": (
        "local-completions",
        ["sleb_continuations", *GREEDY],
        {"tokenizer_backend": "remote", "tokenized_requests": False},
        False,
    ),
    "no tokenizer": ("local-completions", GREEDY, {"tokenizer_backend": "none"}, False),
    "chat": ("local-chat-completions", GREEDY, {}, True),
}
if folder is not None:
    tokenizer = {"tokenizer_backend": "huggingface", "tokenizer": folder}
    RUNS["transformers' tokenizer"] = ("local-completions", SCORED + GREEDY, tokenizer, False)
    RUNS["chat template applied here"] = ("local-completions", GREEDY, tokenizer, True)


def evaluate(tier: str, run: Run) -> dict[str, list[dict[str, Any]]]:
    """The requests and answers of every task."""
    kind, tasks, given, templated = run
    arguments = dict(given)
    batch_size = arguments.pop("batch_size", 1)  # lm-eval takes it apart from the others
    path = "chat/completions" if kind == "local-chat-completions" else "completions"
    result = lm_eval.simple_evaluate(
        model=kind,
        # A server that answers only when asked again does not work.
        model_args=arguments | {"model": tier, "base_url": f"{url}/{path}", "max_retries": 1},
        batch_size=batch_size,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=".", include_defaults=False),
        apply_chat_template=templated,
        bootstrap_iters=0,
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for task, samples in result["samples"].items():
        found[task] = [
            {"request": request, "answer": answers[0]}
            for sample in samples
            for request, answers in zip(sample["arguments"], sample["resps"], strict=True)
        ]
    return found


def check(task: str, answers: list[Any]) -> None:
    if task in GREEDY:  # a model may have nothing to say to one of them
        assert any(answers) and all(isinstance(text, str) for text in answers), answers
    else:
        scores = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]
        assert scores and all(math.isfinite(score) and score < 0 for score in scores), (task, scores)


def main() -> None:
    # The paths of data files in the tasks are relative to the working directory.
    os.chdir(Path(__file__).parent / "lm_eval_tasks")
    cards = requests.get(f"{url}/models", timeout=60).json()["data"]
    assert model in [card["id"] for card in cards], cards
    records: list[dict[str, Any]] = []
    depths = {card["pruning"]["depth"]: card for card in reversed(cards)}  # a tier may have several names
    for card in depths.values():
        for name, run in RUNS.items():
            output = io.StringIO()  # progress bars, and why a request failed
            try:
                with contextlib.redirect_stderr(output):
                    tasks = evaluate(card["id"], run)
            except BaseException:
                print(output.getvalue()[-10_000:], file=sys.stderr)
                raise
            for task, samples in tasks.items():
                check(task, [sample["answer"] for sample in samples])
            record = {"model": card["id"], "depth": card["pruning"]["depth"], "run": name}
            records.append(record | {"max_length": run[2].get("max_length", 2048), "tasks": tasks})
    if file is not None:
        Path(file).write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    print("lm-eval", lm_eval.__version__, "ok")


main()
