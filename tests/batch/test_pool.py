"""`sleb batch --workers`: what one process would write, whoever is killed. Ray is needed: pip install 'sleb[ray]'."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from sleb import cli

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
NUM_LINES, BLOCK_SIZE = 160, 8

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture
def words(tiny_model_dir, tiny_chain, tmp_path):
    """Arguments of `sleb batch` but for OUT; IN has lines of three tiers."""
    lines = []
    for number in range(NUM_LINES):
        messages = [{"role": "user", "content": f"Question {number % 7}, and {number}"}]
        body = {"model": f"tiny-llama{('', ':sleb-3', ':sleb-5')[number % 3]}", "messages": messages}
        body |= {"max_tokens": 150, "temperature": 0, "ignore_eos": True}
        url = "/v1/chat/completions"
        lines.append({"custom_id": f"id-{number}", "method": "POST", "url": url, "body": body})
    lines[3]["body"]["model"] = "gpt-4o"
    source, chain = tmp_path / "in.jsonl", tmp_path / "map.json"
    source.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    tiny_chain.save(chain)
    flags = f"--layer-map {chain} --tiers 0,3,5 --dtype float32 --device cpu --kv-cache-memory 0.02"
    always = [*flags.split(), "--max-num-seqs", "4", "--block-size", str(BLOCK_SIZE)]
    return lambda out, *more: ["batch", str(tiny_model_dir), str(source), str(out), *always, *more]


def start(arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "sleb", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 0, told
    return told


def files(out):
    return sorted(out.glob("*.jsonl"))


def answers(out):
    """(id, status, text or message) of every row, in the order of the files' names."""
    found = []
    for path in files(out):
        for line in path.open():
            row = json.loads(line)
            body = row["response"]["body"]
            text = body["choices"][0]["message"]["content"] if "choices" in body else body["error"]["message"]
            found.append((row["custom_id"], row["response"]["status_code"], text))
    return found


def wait_for(process, condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def worker_processes(driver):
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "MapWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@needs_ray
def test_an_actor_and_the_driver_are_killed(words, tmp_path):
    """Every id once, in order, with the answers and in the files of one process, which is asked last.

    Actors whose driver is gone may finish a block: it is whole, too.
    """
    pooled, alone = tmp_path / "pooled", tmp_path / "alone"
    driver = start(words(pooled, "--workers", "2"))
    started = []
    try:
        wait_for(driver, lambda: len(files(pooled)) >= 2)
        started = psutil.Process(driver.pid).children(recursive=True)
        victim = wait_for(driver, lambda: worker_processes(driver))[0]
        victim.send_signal(signal.SIGKILL)
        num_files = len(files(pooled))
        wait_for(driver, lambda: len(files(pooled)) >= num_files + 4)
        started += psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.communicate()
        assert len(files(pooled)) < NUM_LINES // BLOCK_SIZE
        kept = {path.name: path.read_bytes() for path in files(pooled)}
        driver = start(words(pooled, "--workers", "2"))
        assert f"of {NUM_LINES} lines are answered in" in finish(driver)
        assert kept.items() <= {path.name: path.read_bytes() for path in files(pooled)}.items()
    finally:
        driver.kill()
        for process in started:
            if process.is_running():
                process.kill()
    assert [each[0] for each in answers(pooled)] == [f"id-{number}" for number in range(NUM_LINES)]
    finish(start(words(alone)))
    assert answers(pooled) == answers(alone)
    assert [path.name for path in files(pooled)] == [path.name for path in files(alone)]


def test_workers_without_ray_name_the_remedy(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    monkeypatch.setattr(sys, "argv", ["sleb", *words(tmp_path / "out", "--workers", "2")])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "pip install 'sleb[ray]'" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
