"""The first success: `sleb serve smollm2` answers rightly what the README asks and what the page suggests."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from sleb.benchmarks.quality.questions import QUESTIONS, is_right

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 30

pytestmark = pytest.mark.slow


def test_the_first_questions_are_answered_rightly(start_process, wait_until):
    """At least 9 times in 10, over a socket, by the served defaults; the seeds are fixed."""
    readme = (ROOT / "README.md").read_text("utf-8")
    body = json.loads(re.search(r"-d '(\{.*?\})'", readme, re.DOTALL)[1])
    page = (ROOT / "server/page/app.js").read_text("utf-8")
    suggested = json.loads(re.search(r"^const EXAMPLES = (\[.*?\]);", page, re.MULTILINE | re.DOTALL)[1])
    server = start_process("-m", "sleb", "serve", "smollm2", "--port", "0", "--threads", "1")
    with httpx.Client(base_url=server.url, timeout=120) as client:
        wait_until(lambda: client.get("/ready").status_code == 200, 120)

        def ask(question, seed, **fields):
            messages = [{"role": "user", "content": question}]
            response = client.post(
                "/v1/chat/completions", json={**body, **fields, "messages": messages, "seed": seed}
            )
            answer = response.raise_for_status().json()
            assert answer["model"] == "smollm2"
            return is_right(answer["choices"][0]["message"]["content"], QUESTIONS[question])

        with ThreadPoolExecutor(16) as pool:
            for question in dict.fromkeys([body["messages"][0]["content"], *suggested]):
                right = sum(pool.map(lambda seed, asked=question: ask(asked, seed), range(SAMPLES)))
                assert right >= 0.9 * SAMPLES, question
                assert ask(question, 0, model=None)  # the default tier
        cards = client.get("/v1/models").json()["data"]
    assert cards[0]["sampling"]["temperature"] == 0.2
    assert [card["pruning"]["questions"]["of"] for card in cards] == [20, 20, 20]
    shares = [card["pruning"]["questions"]["right_sampled"] for card in cards]
    assert shares == sorted(shares, reverse=True) and shares[0] > 15
