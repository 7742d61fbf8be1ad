"""`sleb bench peers`: this engine and others that are installed or served here, in turns, on the same prompts.

Every Python engine, ours included, is a process of its own that stays loaded; llama.cpp's own benchmarks are a process
a run; a server goes on as it runs, and meets ours behind our own server, so that HTTP meets HTTP. In a repetition each
peer runs once, together with those of ours that it is compared with: one of them before it, the others after it, and
in the next repetition backwards. So a ratio is of two runs of one round, no more than a few runs apart. A run begins
when the machine is idle and is made anew if others took more than 3 % of the processors meanwhile.

decode-1: tokens/s of one stream after 64 tokens, its first token left out. decode-N: new tokens of N streams, 64 → 128,
over the whole time, prompts included. prompt-N: tokens of a prompt over the time to the first new one. All greedy, the
end of a sequence ignored, no prefix cache; servers, whose cache is their own affair, get new prompts in every run.
Ctrl-C keeps the repetitions that are complete.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sleb.benchmarks.harness import Progress
from sleb.benchmarks.peer_measure import Contest
from sleb.benchmarks.peer_options import Own, PeerOptions, is_ours
from sleb.benchmarks.peer_process import PeerError
from sleb.benchmarks.peer_public import public_text
from sleb.benchmarks.peer_results import bandwidth_summary, compare, conditions, floor_shares

# What users and systems end a program with.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def describe(contest: Contest, memory: dict[str, dict[str, int]], complete: bool) -> dict[str, Any]:
    """The result as its file holds it."""
    options, entrants, samples = contest.options, contest.entrants, contest.samples
    own = entrants.own
    facts = entrants.facts
    environment: dict[str, Any] = next(
        (each["environment"] for name, each in facts.items() if is_ours(name)), {}
    )
    return {
        "kind": "peers",
        "environment": environment,
        "model": options.model_name,
        "settings": _settings(options, own),
        "engines": {
            name: {key: value for key, value in each.items() if key != "environment"}
            for name, each in facts.items()
        },
        "rows": [asdict(row) for row in compare(samples, own, options.peer_names)],
        "memory": memory,
        "bandwidth_gb_per_second": bandwidth_summary(samples),
        "floor_shares": {
            each.label: floor_shares(
                samples, each, facts[each.engine]["decode_bytes_per_token"][str(each.depth)]
            )
            for each in own
            if not each.http and each.engine in facts
        },
        "first_tokens": contest.first_tokens,
        "repetitions": {
            str(test): [asdict(repetition) for repetition in repetitions]
            for test, repetitions in samples.items()
        },
        "failures": {name: public_text(text) for name, text in entrants.failures.items()},
        "conditions": conditions(samples, entrants.notices, options.policy.limit),
        "complete": complete,
    }


def _settings(options: PeerOptions, own: list[Own]) -> dict[str, Any]:
    return {
        "threads": options.threads,
        "dtype": "bfloat16",
        "formats": list(dict.fromkeys(each.weight_format for each in own)),
        "depths": list(options.depths),
        "repetitions": options.repetitions,
        "seed": options.seed,
        "kv_cache_gib": options.kv_gib,
        "idle": asdict(options.policy),
    }


def run_peers(
    options: PeerOptions,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda text: None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Starts all, measures, ends all, and gives the result; Ctrl-C keeps complete repetitions.

    say: what users should learn at once, a peer that failed above all. save: gets the result so far after every test.
    A failure of ours ends it: "problem" in the result says so, if there are repetitions. Raises SlebError.
    """
    contest = Contest(options, on_progress, say)
    complete = False
    grace = 10.0
    problem: PeerError | None = None
    memory: dict[str, dict[str, int]] = {}
    try:
        contest.entrants.start()
        contest.run(on_test=lambda: save(describe(contest, {}, False)))
        complete = True
    except KeyboardInterrupt:
        grace = 1.0
    except PeerError as error:
        problem = error
        say(error.details)
    finally:
        # A second Ctrl-C must leave no process, nor a terminal that closes and tells so twice.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
        try:
            memory = contest.entrants.memory()
        finally:
            contest.entrants.close(grace)
            for number, handler in before.items():
                signal.signal(number, handler)
    result = describe(contest, memory, complete)
    if problem is not None:
        if not result["rows"]:
            raise problem
        result["problem"] = public_text(str(problem))
    return result
