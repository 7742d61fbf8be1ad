"""`sleb batch`: the HTTP server's own answers in files that are whole or not there, every line once and in order."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

import httpx
import openai
import pytest
import torch

from sleb import cli
from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine
from sleb.server.context import ServerContext
from sleb.server.options import ServeOptions
from sleb.server.run import base_url, listen, make_server

CHAT = "/v1/chat/completions"
TIERS = ("tiny-llama", "tiny-llama:sleb-3", "tiny-llama:sleb-5")


@pytest.fixture(scope="module")
def engine(tiny_model_dir, tiny_chain):
    config = EngineConfig(
        model=str(tiny_model_dir),
        layer_map=tiny_chain,
        tiers=(0, 3, 5),
        dtype="float32",
        device="cpu",
        kv_cache_memory=0.01,
        max_num_batched_tokens=64,
    )
    return Engine(config)


@pytest.fixture(scope="module")
def chain_file(tiny_chain, tmp_path_factory):
    path = tmp_path_factory.mktemp("map") / "map.json"
    tiny_chain.save(path)
    return path


@pytest.fixture
def run(monkeypatch, engine, tiny_model_dir, chain_file):
    """run(IN, OUT, *flags) -> exit code of `sleb batch` in this process, over the engine that is loaded already."""
    monkeypatch.setattr("sleb.cli.batch.load_engine", lambda config: engine)

    def call(source, out, *flags):
        always = ["--layer-map", str(chain_file), "--tiers", "0,3,5", "--max-num-seqs", "4"]
        words = ["sleb", "batch", str(tiny_model_dir), str(source), str(out), *always, *flags]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code or 0

    return call


def write_lines(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def batch_line(number, url=CHAT, **fields):
    prompt = {"prompt": f"text {number}"}
    if url != "/v1/completions":
        prompt = {"messages": [{"role": "user", "content": f"Question {number % 3}, and {number}"}]}
    if url == "/v1/responses":
        prompt = {"input": f"Question {number}"}
    limit = {"max_output_tokens" if url == "/v1/responses" else "max_tokens": 6}
    body = prompt | limit | {"temperature": 0} | fields
    return {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": body}


def read_rows(out):
    """All rows, in the order of the files' names."""
    return [json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.open()]


def lasting(body):
    """A body without what two equal answers differ in: ids, moments, and what was in the prefix cache."""
    if isinstance(body, dict):
        volatile = {
            "id",
            "created",
            "created_at",
            "completed_at",
            "store",
            "request_id",
            "timings",
            "metrics",
        }
        volatile |= {name for name in body if "cache" in name or name.endswith("tokens_details")}
        volatile |= {"input_tokens"} if "cache_read_input_tokens" in body else set()
        return {name: lasting(value) for name, value in body.items() if name not in volatile}
    return [lasting(each) for each in body] if isinstance(body, list) else body


def forget_all(engine):
    """What a process that ends leaves in its engine, which here goes on."""
    for number in range(100):
        engine.abort(f"r{number}")
    assert not engine.has_unfinished()
    engine.check_integrity()


class Served:
    """The engine behind a real socket."""

    def __init__(self, engine):
        context = ServerContext.create(engine, ServeOptions(port=0, warm_up=False), 4)
        self.socket = listen(context.options)
        self.server = make_server(context)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        ready = threading.Event()
        self.server.on_started = ready.set
        self.thread.start()
        assert ready.wait(20)
        self.url = base_url(self.socket)

    def close(self):
        self.server.handle_exit(signal.SIGTERM, None)
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.socket.close()


def test_rows_are_what_the_server_answers(run, engine, tmp_path):
    """Three tiers, four endpoints, and errors of the server, over several files; ids once and in order."""
    urls = (CHAT, "/v1/completions", "/v1/responses", "/v1/messages")
    lines = [batch_line(number, urls[number % 4], model=TIERS[number % 3]) for number in range(24)]
    lines[5] = batch_line(5, model="gpt-4o")
    lines[6] = batch_line(6, temperature=-3)
    lines[7] = batch_line(7, messages=[])
    out = tmp_path / "out"
    assert run(write_lines(tmp_path / "in.jsonl", lines), out, "--block-size", "7") == 0
    rows = read_rows(out)
    assert len(list(out.glob("*.jsonl"))) == 4
    assert [row["custom_id"] for row in rows] == [line["custom_id"] for line in lines]
    assert len({row["id"] for row in rows}) == len(rows)

    served = Served(engine)
    try:
        with httpx.Client(base_url=served.url, timeout=20) as http:
            for line, row in zip(lines, rows, strict=True):
                answer = http.post(line["url"], json=line["body"])
                assert row["error"] is None
                assert row["response"]["request_id"]
                assert row["response"]["status_code"] == answer.status_code, row
                assert lasting(row["response"]["body"]) == lasting(answer.json())
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            told = client.chat.completions.create(**lines[0]["body"]).choices[0].message.content
        assert rows[0]["response"]["body"]["choices"][0]["message"]["content"] == told
    finally:
        served.close()
    assert [row["response"]["status_code"] for row in rows[5:8]] == [404, 400, 400]


def test_lines_that_cannot_be_asked_are_rows(run, tmp_path, capsys):
    lines = [
        batch_line(0),
        '{"custom_id": "broken',
        "[1]",
        batch_line(3, url="/v1/embeddings"),
        batch_line(4) | {"method": "GET"},
        batch_line(5, stream=True),
        batch_line(6) | {"custom_id": 6},
        "",
        batch_line(8, user="x" * 4000),
        batch_line(9),
    ]
    out = tmp_path / "out"
    source = write_lines(tmp_path / "in.jsonl", lines)
    assert run(source, out, "--max-line-mb", "0.003") == 0
    rows = read_rows(out)
    told = capsys.readouterr().err
    assert "7 lines cannot be asked" in told and "line 2: the line is not valid JSON" in " ".join(
        told.split()
    )
    codes = [row["error"] and row["error"]["code"] for row in rows]
    assert codes == [
        None,
        "invalid_json_line",
        "invalid_request",
        "invalid_url",
        "invalid_method",
        "unsupported",
        "invalid_request",
        "line_too_long",
        None,
    ]
    ids = ["id-0", None, None, "id-3", "id-4", "id-5", None, None, "id-9"]
    assert [row["custom_id"] for row in rows] == ids
    assert [row["error"]["line"] for row in rows if row["error"]] == [2, 3, 4, 5, 6, 7, 9]
    assert CHAT in rows[3]["error"]["message"]


@pytest.mark.parametrize(
    ("lines", "flags", "told"),
    [
        ([], (), "has no line"),
        ([batch_line(1), batch_line(2), batch_line(1)], (), "lines 1 and 3 have the same custom_id, 'id-1'"),
        (
            [batch_line(1, model="gpt-4o")],
            (),
            "'gpt-4o' does not exist; served models: tiny-llama:sleb-3, tiny",
        ),
        ([batch_line(1)["body"]], (), "name an --endpoint"),
        ([batch_line(1)], ("--endpoint", CHAT), "leave --endpoint and --score out"),
        ([batch_line(1)], ("--column", "text"), "--column is of Parquet files"),
        ([batch_line(1)], ("--body", "[]"), "--body is '[]'; it must be a JSON object"),
        ([batch_line(1)], ("--score", "--endpoint", CHAT), "is of /v1/completions"),
        ([batch_line(1)], ("--tiers", "9"), "tier 9 is deeper"),
    ],
)
def test_what_is_wrong_with_all_of_it_is_told_at_start(run, tmp_path, capsys, lines, flags, told):
    out = tmp_path / "out"
    assert run(write_lines(tmp_path / "in.jsonl", lines), out, *flags) == 2
    assert told in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_bodies_of_one_endpoint(run, tmp_path):
    """By number; --body is for the fields that a line does not have."""
    bodies = [{"prompt": "one"}, {"prompt": "two", "max_tokens": 2, "model": "mine:sleb-3"}]
    out = tmp_path / "out"
    flags = (
        "--endpoint",
        "/v1/completions",
        "--body",
        '{"max_tokens": 3, "ignore_eos": true, "model": "mine"}',
    )
    source = write_lines(tmp_path / "in.jsonl", bodies)
    assert run(source, out, *flags, "--served-model-name", "mine") == 0
    rows = read_rows(out)
    assert [row["custom_id"] for row in rows] == ["line-1", "line-2"]
    answers = [row["response"]["body"] for row in rows]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [3, 2]
    assert [answer["model"] for answer in answers] == ["mine", "mine:sleb-3"]


def test_scores_are_those_of_transformers(run, tmp_path, tiny_model_dir):
    import transformers

    texts = ["The first text", "and another, longer one"]
    out = tmp_path / "out"
    bodies = [{"prompt": text, "model": TIERS[0], "max_tokens": 9} for text in texts]
    assert run(write_lines(tmp_path / "in.jsonl", bodies), out, "--score") == 0
    judge = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for text, row in zip(texts, read_rows(out), strict=True):
        told = row["response"]["body"]["choices"][0]
        assert told["text"] == text
        token_ids = list(text.encode())
        with torch.inference_mode():
            logprobs = judge(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        wanted = [float(logprobs[i, token]) for i, token in enumerate(token_ids[1:])]
        assert told["logprobs"]["token_logprobs"][0] is None
        assert told["logprobs"]["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)


def test_an_interrupted_run_goes_on_where_it_was(run, engine, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle: whole files alone; the rerun asks only what is missing."""
    lines = [batch_line(number, ignore_eos=True, model=TIERS[number % 3]) for number in range(30)]
    source, out = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out"
    step, num_steps = engine.step, 0

    def interrupted_step():
        nonlocal num_steps
        num_steps += 1
        if num_steps == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(engine, "step", interrupted_step)
    assert run(source, out, "--block-size", "4") == 130
    monkeypatch.setattr(engine, "step", step)
    forget_all(engine)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}
    assert 0 < len(before) < 8
    told = " ".join(capsys.readouterr().err.split())
    assert f"Stopped: {len(before)} of 8 files are done" in told and "the same command does the rest" in told
    assert not list(out.glob(".*.tmp"))

    # What a crash leaves: half a file under another name. What is of somebody else stays.
    first = min(before)
    half = out / f".{first}.123-456.tmp"
    half.write_text("half")
    (out / "notes.txt").write_text("mine")
    asked = []
    add_request = engine.add_request
    monkeypatch.setattr(engine, "add_request", lambda *a, **k: (asked.append(a[0]), add_request(*a, **k))[1])
    assert run(source, out, "--block-size", "4") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert f"{len(before) * 4} of 30 lines are answered in" in told or len(before) == 8
    assert half.name in told and not half.exists()
    assert "notes.txt" in told and (out / "notes.txt").read_text() == "mine"
    assert len(asked) == 30 - sum(sum(1 for _ in (out / name).open()) for name in before)
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}.items()
    assert [row["custom_id"] for row in read_rows(out)] == [line["custom_id"] for line in lines]

    asked.clear()
    assert run(source, out, "--block-size", "4") == 0
    assert not asked


def test_answers_of_two_jobs_do_not_mix(run, tmp_path, capsys):
    source, out = write_lines(tmp_path / "in.jsonl", [batch_line(1), batch_line(2)]), tmp_path / "out"
    assert run(source, out) == 0
    assert run(source, out, "--temperature", "0.5") == 2
    assert "whose temperature was 'None' and is '0.5' now" in " ".join(capsys.readouterr().err.split())
    write_lines(source, [batch_line(1), batch_line(3)])
    assert run(source, out) == 2
    assert "answers to lines that the input has not" in " ".join(capsys.readouterr().err.split())
    [path] = out.glob("*.jsonl")
    path.unlink()
    assert run(source, out) == 0
    assert [row["custom_id"] for row in read_rows(out)] == ["id-1", "id-3"]


def test_a_dead_engine_ends_the_job(run, engine, tmp_path, monkeypatch, capsys):
    """Nothing is written that says an error of the engine's is an answer."""
    source, out = write_lines(tmp_path / "in.jsonl", [batch_line(1), batch_line(2)]), tmp_path / "out"

    def fail():
        raise RuntimeError("broken")

    step = engine.step
    monkeypatch.setattr(engine, "step", fail)
    assert run(source, out) == 2
    monkeypatch.setattr(engine, "step", step)
    forget_all(engine)
    told = " ".join(capsys.readouterr().err.split())
    assert "Stopped: 0 of 1 files" in told and "the engine has stopped" in told
    assert not list(out.glob("*.jsonl"))


def test_two_runs_cannot_write_to_one_folder(run, tmp_path, capsys):
    from filelock import FileLock

    source, out = write_lines(tmp_path / "in.jsonl", [batch_line(1)]), tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"):
        assert run(source, out) == 2
    assert "another sleb batch writes to" in " ".join(capsys.readouterr().err.split())


def test_parquet_without_pyarrow_names_the_remedy(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "in.parquet"
    path.write_bytes(b"PAR1")
    assert run(path, tmp_path / "out", "--column", "text") == 2
    assert "pip install 'sleb[eval]'" in " ".join(capsys.readouterr().err.split())


def test_a_column_of_a_parquet_file(run, tmp_path, capsys):
    """Texts are what a user says, rows by number, across row groups and blocks; what is no text is an error."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"text {number}" for number in range(11)]
    texts[4] = None
    path, out = tmp_path / "in.parquet", tmp_path / "out"
    parquet.write_table(arrow.table({"n": list(range(11)), "text": texts}), path, row_group_size=4)
    flags = ("--endpoint", "/v1/completions", "--body", '{"max_tokens": 0, "echo": true}')
    assert run(path, out, *flags) == 2
    assert "its columns are: n, text" in " ".join(capsys.readouterr().err.split())
    assert run(path, out, *flags, "--column", "text", "--block-size", "3") == 0
    rows = read_rows(out)
    assert [row["custom_id"] for row in rows] == [f"row-{number}" for number in range(1, 12)]
    assert rows.pop(4)["error"]["code"] == "invalid_request"
    told = [row["response"]["body"]["choices"][0]["text"] for row in rows]
    assert told == [text for text in texts if text is not None]
