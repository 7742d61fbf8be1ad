"""`sleb doctor` as a command: our own server passes, and what it prints, writes and exits with."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sleb import cli
from sleb.doctor.check import Group
from sleb.doctor.checks import GROUPS
from sleb.doctor.outcome import CheckSkippedError, Outcome, expect
from sleb.doctor.run import Examination, choose_checks, examine, run_check
from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine
from sleb.server.context import ServerContext
from sleb.server.options import ServeOptions
from sleb.server.run import base_url, bind_socket, make_server

KEY = "right-key"
# Checks that our server does not pass yet.
NOT_BUILT: set[str] = set()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `sleb doctor` in this process; returns its exit code."""
    for name in ("SLEB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "150")

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["sleb", "doctor", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return call


def run_in_thread(server: uvicorn.Server, sock: socket.socket) -> Iterator[None]:
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield
    server.should_exit = True
    thread.join(10)
    sock.close()


@pytest.fixture(scope="module")
def own_url(tiny_model_dir: Path, tiny_chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Our own server with a tiny model, two tiers and a key; the context holds tools, a byte a token."""
    folder = tmp_path_factory.mktemp("long") / "tiny-llama"
    shutil.copytree(tiny_model_dir, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 1300}))
    config = EngineConfig(
        model=str(folder),
        layer_map=tiny_chain,
        tiers=(0, 3),
        dtype="float32",
        device="cpu",
        kv_cache_memory=0.03,
    )
    context = ServerContext.create(Engine(config), ServeOptions(port=0, warm_up=False, api_keys=(KEY,)), 8)
    sock = bind_socket("127.0.0.1", 0)
    for _ in run_in_thread(make_server(context), sock):
        yield f"{base_url(sock)}/v1"


async def refuse(request: Request) -> Response:
    if request.url.path == "/v1/models":
        return JSONResponse({"object": "list", "data": [{"id": "m\x1b[31m", "object": "model"}]})
    return PlainTextResponse("gone\x1b[31m", 500)


@pytest.fixture(scope="module")
def broken_url() -> Iterator[str]:
    """A server that lists a model and then fails."""
    app = Starlette(routes=[Route("/{path:path}", refuse, methods=["GET", "POST", "HEAD", "OPTIONS"])])
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    for _ in run_in_thread(server, sock):
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"


def test_our_own_server_keeps_the_contract(
    own_url: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "doctor.json"
    code = run(own_url, "--api-key", KEY, "--model", "tiny-llama", "--json", str(file))
    report = json.loads(file.read_text())
    bad = [each for each in report["checks"] if each["outcome"] not in ("pass", "skipped")]
    unexpected = [each for each in bad if each["name"] not in NOT_BUILT]
    assert not unexpected, json.dumps(unexpected, indent=1)
    assert code == (1 if any(each["required"] for each in bad) else 0)
    skipped = {each["name"] for each in report["checks"] if each["outcome"] == "skipped"}
    aborts = {"a closed stream is aborted", "a closed request is aborted"}  # a tiny model may be too quick
    elsewhere = {"any key opens an open server", "the context is filled at most"}  # in test_doctor_faults.py
    assert skipped <= aborts | elsewhere
    assert len(report["checks"]) == sum(len(group.checks) for group in GROUPS)
    out = capsys.readouterr().out
    for each in report["checks"]:
        assert each["name"] in out
        assert each["reason"] or each["outcome"] == "pass"


def test_json_holds_everything(
    own_url: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "doctor.json"
    assert run(own_url, "--api-key", KEY, "--only", "models", "--json", str(file)) == 0
    report = json.loads(file.read_text())
    assert report["url"] == own_url
    assert report["model"] == "tiny-llama:sleb-3"  # the first of the list: what answers where none is named
    assert report["passed"] is True
    assert report["counts"] == {"pass": 6, "fail": 0, "missing": 0, "differs": 0, "skipped": 0}
    first = report["checks"][0]
    assert first["group"] == "models" and first["name"] == "models are listed" and first["required"]
    assert first["source"] == "OpenAI API"
    assert first["expected"].endswith("owned_by.")
    assert first["reason"] is None
    captured = capsys.readouterr()
    assert "6 pass; the server passes" in captured.out
    assert captured.err == ""  # progress is for terminals


def test_another_tier_can_be_checked(own_url: str, run: Callable[..., int]) -> None:
    assert run(own_url, "--api-key", KEY, "--only", "chat", "--model", "tiny-llama:sleb-3") == 0


def test_the_key_comes_from_the_environment(
    own_url: str, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert run(own_url, "--only", "models") == 0


def test_a_wrong_key_is_one_line(
    own_url: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(own_url, "--api-key", "wrong") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--api-key" in error


def test_a_dead_port_exits_2(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    assert run(f"http://127.0.0.1:{port}/v1") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: no server at http://127.0.0.1:{port}/v1")
    assert captured.err.count("\n") == 1 and "sleb serve" in captured.err


def test_what_is_no_http_exits_2(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:

        def answer() -> None:
            connection, _ = sock.accept()
            connection.recv(1000)
            connection.sendall(b"220 mail server ready\r\n")
            connection.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        assert run(f"http://127.0.0.1:{sock.getsockname()[1]}") == 2
        thread.join(5)
    assert "broke off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("http://127.0.0.1:1/v1", "--only", "nonsense"), "the groups are models, chat"),
        (("ftp://127.0.0.1/v1",), "write it like http://"),
        (("http://127.0.0.1:99999",), "write it like http://"),
        (("http://127.0.0.1:1/v1", "--timeout", "0"), "--timeout"),
        (("http://127.0.0.1:1/v1", "--api-key", "schlüssel"), "--api-key"),
    ],
)
def test_bad_options_are_one_line(
    arguments: tuple[str, ...], complaint: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


def test_a_broken_server_exits_1_with_reasons(
    broken_url: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "doctor.json"
    assert run(broken_url, "--json", str(file)) == 1
    report = json.loads(file.read_text())
    assert report["passed"] is False
    assert report["counts"]["fail"] > 70
    assert report["counts"]["differs"] > 30
    outcomes = {each["name"]: each["outcome"] for each in report["checks"]}
    assert outcomes["ids are distinct"] == "pass"
    assert outcomes["models are listed"] == "fail"
    assert outcomes["timings are told"] == "differs"
    assert all(each["reason"] for each in report["checks"] if each["outcome"] != "pass")
    out = capsys.readouterr().out
    assert "the server does not pass" in out
    assert "\x1b" not in out  # nothing that a server sends reaches the terminal raw


def test_a_file_that_cannot_be_written_is_one_line(
    own_url: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "no" / "file.json"
    assert run(own_url, "--api-key", KEY, "--only", "models", "--json", str(path)) == 2
    shown = capsys.readouterr()
    assert str(path) in shown.err
    assert not shown.out  # no check has run


def test_outcomes_and_strictness() -> None:
    """A failure of what only sleb promises differs, and counts under --strict alone."""
    group = Group("example")

    @group.sleb_only
    def a_promise(target: Any) -> None:
        """It is kept. Source: sleb."""
        expect(False, "it is broken")

    @group.required
    def a_malformed_answer(target: Any) -> None:
        """It has its keys. Source: OpenAI API."""
        raise KeyError("choices")

    @group.required
    def an_occasion(target: Any) -> None:
        """There is one. Source: OpenAI API."""
        raise CheckSkippedError("there is none")

    target: Any = type("Target", (), {"url": "u", "model": "m"})
    examination = examine(target, group.checks)
    assert [each.outcome for each in examination.results] == [Outcome.DIFFERS, Outcome.FAIL, Outcome.SKIPPED]
    assert examination.results[1].reason == "the answer lacks 'choices'"
    assert [each.check.name for each in examination.problems] == ["a malformed answer"]
    strict = Examination("u", "m", examination.results, strict=True)
    assert [each.check.name for each in strict.problems] == ["a promise", "a malformed answer"]


def test_a_bug_of_a_check_is_no_verdict() -> None:
    group = Group("example")

    @group.required
    def a_bug(target: Any) -> None:
        """Nothing. Source: nobody."""
        raise AssertionError

    with pytest.raises(AssertionError):
        run_check(group.checks[0], None)  # type: ignore[arg-type]


def test_checks_are_described() -> None:
    checks = choose_checks(())
    names = [(check.group, check.name) for check in checks]
    assert len(set(names)) == len(names) >= 60
    for check in checks:
        assert check.expected and check.source, check.name
        assert len(check.expected) < 200, check.name
    assert {group.name for group in GROUPS} == {check.group for check in checks}
