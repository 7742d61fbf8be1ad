"""lm-eval behind our own server: a stand-in that scores over HTTP as lm-eval does, and failures of it."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from sleb import LLM
from sleb.benchmarks.quality.options import EvalOptions
from sleb.benchmarks.quality.tasks import (
    find_lm_eval,
    read_results,
    run_lm_eval,
    run_tasks,
    served,
)
from sleb.errors import ConfigError, SlebError


@pytest.fixture
def llm(tiny_model_dir, tiny_chain):
    options = {"dtype": "float32", "device": "cpu", "kernels": "torch", "kv_cache_memory": 0.02}
    return LLM(tiny_model_dir, tiny_chain, [0, 2], **options)


@pytest.fixture
def script(tmp_path):
    """script(text) -> an executable Python program with that text."""

    def make(text, name="lm_eval"):
        path = tmp_path / name
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


RESULTS = {
    "results": {
        "arc_easy": {
            "alias": "arc_easy",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "acc_norm,none": 0.25,
            "acc_norm_stderr,none": "N/A",
        },
        "gsm8k": {"exact_match,strict": 1, "exact_match_stderr,strict": 0.0, "sample_len": 10, "name": "x"},
    }
}


def test_results():
    assert read_results(RESULTS) == {
        "arc_easy": {"acc": (0.5, 0.1), "acc_norm": (0.25, None)},
        "gsm8k": {"exact_match,strict": (1.0, 0.0)},
    }


def asked(executable, tasks, **more):
    return EvalOptions("tiny", tasks=tasks, lm_eval=str(executable), **more)


SHOW = "import sys, json; sys.exit(json.dumps(sys.argv[1:]))"


def shown(options):
    with pytest.raises(SlebError) as caught:
        run_lm_eval(options, "http://127.0.0.1:9", "tiny:sleb-2", 300)
    return json.loads(str(caught.value).partition("status 1: ")[2])


def test_command(script):
    program = script(SHOW)
    command = shown(asked(program, ["a", "b"], limit=5, include_path=Path("more")))
    assert command[:2] == ["--model", "local-completions"]
    arguments = dict(pair.split("=", 1) for pair in command[3].split(","))
    assert arguments["base_url"] == "http://127.0.0.1:9/v1/completions"
    assert arguments["model"] == "tiny:sleb-2"
    assert (arguments["tokenizer_backend"], arguments["max_length"]) == ("remote", "300")
    assert command[4:7] == ["--tasks", "a,b", "--output_path"]
    assert command[8:] == ["--limit", "5", "--include_path", "more"]
    assert "--limit" not in shown(asked(program, ["a"]))


class TestFind:
    def test_given(self, script):
        path = script("", "other_name")
        assert find_lm_eval(str(path)) == path
        with pytest.raises(ConfigError, match=r"--lm-eval .*nowhere is no executable"):
            find_lm_eval("/nowhere")

    def test_beside_this_python_then_on_the_path(self, script, monkeypatch, tmp_path):
        monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigError, match=r"pip install 'lm_eval\[api\]'"):
            find_lm_eval(None)
        on_path = script("")
        assert find_lm_eval(None) == on_path
        (tmp_path / "bin").mkdir()
        beside = script("", "bin/lm_eval")
        assert find_lm_eval(None) == beside


def test_the_server_is_there_until_the_end(llm):
    with served(llm) as url:
        cards = httpx.get(f"{url}/v1/models", timeout=10).json()["data"]
        assert [card["pruning"]["depth"] for card in cards] == [0, 2]
        assert httpx.get(f"{url}/tokenizer_info", timeout=10).status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", timeout=2)
    assert len(llm.generate("Hi", depth=2)[0].token_ids) > 0  # the engine is ours again


# What stands in for lm_eval: `acc` is the number of letters of the model's id that the server knows.
STAND_IN = """
import json, sys, httpx, pathlib
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
arguments = dict(pair.split("=", 1) for pair in given["--model_args"].split(","))
body = {"model": arguments["model"], "prompt": [[65, 66]], "max_tokens": 1, "temperature": 0}
answer = httpx.post(arguments["base_url"], json=body, timeout=30).raise_for_status().json()
results = {task: {"acc,none": len(answer["model"]), "acc_stderr,none": 0.5} for task in given["--tasks"].split(",")}
folder = pathlib.Path(given["--output_path"]) / "model"
folder.mkdir()
(folder / "results_2026.json").write_text(json.dumps({"results": results}))
"""


def test_every_depth(llm, script):
    options = asked(script(STAND_IN), ["one", "two"])
    seen = []
    found = list(run_tasks(llm, (0, 2), options, seen.append))
    assert seen == [0, 2]
    lengths = [len("tiny-llama"), len("tiny-llama:sleb-2")]
    assert found == [{task: {"acc": (length, 0.5)} for task in ("one", "two")} for length in lengths]


@pytest.mark.parametrize(
    ("program", "match"),
    [
        (
            "import sys\nprint('noise')\nsys.exit('ValueError: Tasks not found: x')",
            "status 1: ValueError: Tasks",
        ),
        ("import sys; sys.exit(3)", "status 3: it said nothing"),
        ("print('done')", "wrote no results: done"),
    ],
)
def test_failures_end_with_its_own_words(llm, script, program, match):
    with pytest.raises(SlebError, match=f"lm-eval at depth 0: it .*{match}"):
        list(run_tasks(llm, (0,), asked(script(program), ["x"])))


STUBBORN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
path = pathlib.Path(sys.argv[0] + ".pid")
path.with_suffix(".new").write_text(str(os.getpid()))
path.with_suffix(".new").rename(path)
time.sleep(60)
"""


def test_an_interrupt_ends_lm_eval(script):
    """Also one that does not go when it is told to."""
    program = script(STUBBORN)
    file = program.with_name("lm_eval.pid")

    def interrupt():
        while not file.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_lm_eval(asked(program, ["x"]), "http://127.0.0.1:9", "m", 300)
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
