"""Servers that run already, and ours, through streamed completions: what each of them takes, and what it tells."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import httpx

from sleb.benchmarks.idle import PROC, peak_memory, process_tree, read_processes
from sleb.benchmarks.peer_engines import Measured, Task
from sleb.benchmarks.peer_http import Answer, CompletionClient, ServerError
from sleb.benchmarks.peer_options import PeerTest, ServerSpec
from sleb.benchmarks.peer_process import PeerError, UnableError, Worker
from sleb.benchmarks.peer_prompts import Prompts
from sleb.client.connection import ClientError, explained, is_loopback, open_client, refusal
from sleb.errors import ConfigError

_SECONDS_TO_TELL = 30.0
_NO_USE = (401, 403, 404, 405)  # another form of the request changes nothing
_PROBE = PeerTest("prompt", 1, 8, 2)
# Nothing of a model's own generation config, whose penalties would cost time.
_GREEDY = {"temperature": 0, "repetition_penalty": 1, "ignore_eos": True}
_COUNTING = {"stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Dialect:
    """How completions are asked for: with token ids or text, and the fields besides.

    generation_config: `transformers serve` refuses fields that OpenAI's API lacks, but takes its own settings whole.
    """

    name: str
    takes_ids: bool
    fields: Mapping[str, Any] = field(default_factory=dict)
    generation_config: bool = False

    def body(self, model: str | None, prompt: list[int] | str, num_tokens: int) -> dict[str, Any]:
        """A request for exactly num_tokens tokens."""
        body = {"prompt": prompt, "max_tokens": num_tokens, "stream": True, **self.fields}
        if model is not None:
            body["model"] = model
        if self.generation_config:
            lengths = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
            body["generation_config"] = json.dumps({"do_sample": False, **lengths})
        return body


IDS = Dialect("token ids", True, {**_GREEDY, **_COUNTING})
DIALECTS = (
    IDS,
    Dialect("text", False, {**_GREEDY, **_COUNTING}),
    Dialect("text, with generation_config", False, generation_config=True),
)


class HttpEngine:
    """An engine behind HTTP.

    Attributes:
        pids: the processes of the server; (): it runs elsewhere; None: they cannot be found.
        worker: the one that holds it, if it is ours.
    """

    warms = True

    def __init__(
        self,
        name: str,
        url: str,
        models: Mapping[int, str | None],
        dialect: Dialect,
        facts: Mapping[str, Any],
        pids: tuple[int, ...] | None,
        *,
        api_key: str | None = None,
        worker: Worker | None = None,
    ) -> None:
        self.name, self.facts, self.pids = name, {**facts, "transport": "HTTP"}, pids
        self.takes_ids = dialect.takes_ids
        self._models, self._dialect, self._worker = models, dialect, worker
        self._client = CompletionClient(url, api_key)

    def turn(self, task: Task) -> Measured:
        """Every run has new prompts. Raises PeerError; UnableError where the server cannot do this test."""
        rates, seconds = [], []
        for _ in range(task.num_runs):
            answers = self._answers(task)
            rates.append(rate_over_http(task.test, answers))
            last = max(answer.last for answer in answers)
            seconds += [answers[0].first, last] if task.test.single else [last]
        return Measured(median(rates), seconds)

    def _answers(self, task: Task) -> list[Answer]:
        model, tokens = self._models[task.depth], task.test.output_tokens
        try:
            answers = self._client.run([self._dialect.body(model, each, tokens) for each in task.fresh()])
        except ServerError as error:
            kind = UnableError if error.status is not None and 400 <= error.status < 500 else PeerError
            raise kind(f"{self.name} {error}", self.name) from None
        short = next((each for each in answers if not _is_whole(each, tokens)), None)
        if short is not None:
            count = "an unknown number" if short.num_tokens is None else short.num_tokens
            what = (
                f"ended an answer after {count} of {tokens} tokens: it does not ignore the end of a sequence"
            )
            raise UnableError(f"{self.name} {what}", self.name)
        return answers

    def memory(self) -> dict[str, int] | None:
        """Of the server's processes on this machine."""
        found = [peak_memory(pid) for pid in self.pids or ()]
        return {key: sum(each[key] for each in found) for key in found[0]} if found else None

    def close(self, grace_seconds: float) -> None:
        """Ends the worker; a server that ran already goes on."""
        if self._worker is not None:
            self._worker.close(grace_seconds)


def rate_over_http(test: PeerTest, answers: list[Answer]) -> float:
    """Tokens/s, as `tokens_per_second`; of a prompt the server's own count where it tells one."""
    if test.kind == "prompt":
        return (answers[0].prompt_tokens or test.prompt_tokens) / answers[0].first
    if test.single:
        return (test.output_tokens - 1) / max(answers[0].last - answers[0].first, 1e-9)
    return test.batch * test.output_tokens / max(answer.last for answer in answers)


def _is_whole(answer: Answer, num_tokens: int) -> bool:
    return answer.finish_reason == "length" if answer.num_tokens is None else answer.num_tokens == num_tokens


def serve_ours(worker: Worker) -> HttpEngine:
    """Our engine in `worker`, which has been loaded, behind its own server. Raises PeerError."""
    worker.resume()
    served = worker.call("serve", timeout=120.0)
    models = {int(depth): str(model) for depth, model in served["models"].items()}
    url = f"{served['url']}/v1"
    return HttpEngine(worker.name, url, models, IDS, worker.facts, (worker.pid,), worker=worker)


def find_server(spec: ServerSpec, api_key: str | None, prompts: Prompts) -> HttpEngine:
    """Asks a server what it is and what it takes. Raises PeerError if nothing can be compared."""
    try:
        with open_client(spec.url, api_key, _SECONDS_TO_TELL) as http:
            cards = _cards(http, spec.url)
            told = _told(http, spec.url)
    except ClientError as error:
        raise PeerError(f"{spec.name}: {error}", spec.name) from None
    card = next((each for each in cards if each.get("id") == spec.model), cards[0] if cards else {})
    model = spec.model or card.get("id")
    dialect = _find_dialect(spec, model, card.get("owned_by") == "llamacpp", api_key, prompts)
    facts = told | {
        "model": None if model is None else model.rstrip("/").rpartition("/")[2],
        "takes": dialect.name,
        "settings": {"server": card.get("owned_by")},
    }
    pids: tuple[int, ...] | None = ()
    if is_loopback(spec.url):
        pids = listening_pids(urlsplit(spec.url).port or 80) or None
    return HttpEngine(spec.name, spec.url, {0: model}, dialect, facts, pids, api_key=api_key)


def _cards(http: httpx.Client, url: str) -> list[dict[str, Any]]:
    """Of the models that it lists; none where it has no such list."""
    with explained(url):
        response = http.get("models")
    if response.status_code in (401, 403):
        raise refusal(response, url)
    try:
        cards = list(response.json()["data"])
    except (ValueError, KeyError, TypeError):
        return []
    return [card for card in cards if isinstance(card, dict) and isinstance(card.get("id"), str)]


def _told(http: httpx.Client, url: str) -> dict[str, Any]:
    """What servers tell of themselves beside the API: each asked where one of them keeps it."""
    root = url.rpartition("/")[0]
    version, props, info = (_json(http, f"{root}/{path}") for path in ("version", "props", "get_server_info"))
    return {
        "version": version.get("version") or props.get("build_info") or info.get("version"),
        "dtype": info.get("dtype"),
        "weights": props.get("model_ftype"),
        "attention": info.get("attention_backend"),
        "parallel": props.get("total_slots"),
    }


def _json(http: httpx.Client, address: str) -> dict[str, Any]:
    try:
        content = http.get(address).json()
    except (httpx.HTTPError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _find_dialect(
    spec: ServerSpec, model: str | None, is_llama: bool, api_key: str | None, prompts: Prompts
) -> Dialect:
    """The first that the server answers in."""
    client, reasons = CompletionClient(spec.url, api_key), []
    for dialect in (_without_cache(each) if is_llama else each for each in DIALECTS):
        try:
            (prompt,) = prompts.fresh(_PROBE, 0, 0, as_text=not dialect.takes_ids)
            (answer,) = client.run([dialect.body(model, prompt, _PROBE.output_tokens)], timeout=300.0)
        except ServerError as error:
            reasons.append(str(error))
            if error.status in _NO_USE:
                break
        except ConfigError as error:
            reasons.append(str(error))
        else:
            read = answer.prompt_tokens
            if not dialect.takes_ids or read is None or 0 <= read - _PROBE.prompt_tokens <= 1:
                return dialect
            reasons.append(f"read {_PROBE.prompt_tokens} token ids as {read} tokens")
    why = "; ".join(dict.fromkeys(reasons))
    raise PeerError(f"{spec.name} cannot be compared: its /completions {why}", spec.name)


def _without_cache(dialect: Dialect) -> Dialect:
    """llama.cpp's server looks for common beginnings unless it is told not to; others would refuse or log that."""
    return replace(dialect, fields={**dialect.fields, "cache_prompt": False})


def listening_pids(port: int, proc: Path = PROC) -> tuple[int, ...]:
    """The processes that listen on a TCP port of this machine, without those that descend from another of them."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port, proc)}
    folders = proc.glob("[0-9]*") if sockets else ()
    found = {int(folder.name) for folder in folders if _open_files(folder) & sockets}
    processes = read_processes(proc)
    trees = {pid: process_tree(processes, pid) for pid in found}
    return tuple(
        sorted(pid for pid in found if not any(pid in trees[other] for other in found if other != pid))
    )


def _open_files(folder: Path) -> set[str]:
    """What the descriptors of a process are; nothing where it is another user's, or has ended."""
    links: set[str] = set()
    try:
        names = os.listdir(folder / "fd")
    except OSError:
        return links
    for name in names:
        try:
            links.add(os.readlink(folder / "fd" / name))
        except OSError:  # closed meanwhile
            continue
    return links


def _listening_inodes(port: int, proc: Path) -> set[str]:
    """From /proc/net/tcp, whose columns proc(5) explains: local address, state (0A: listening), inode."""
    inodes = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(fields[9])
    return inodes
