"""The dashboard asks for what /metrics has, as its types want; Prometheus, which scrapes a server, answers it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine
from sleb.server.context import ServerContext
from sleb.server.options import ServeOptions
from sleb.server.run import base_url, bind_socket, make_server

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KEY = "of-the-tests"
PROMPT = "a prompt of more than a page of the cache, so that it is found there the next time"
BOARD = json.loads((DEPLOY / "grafana/dashboards/sleb.json").read_text("utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TARGETS = {
    f"{panel['title']}: {target['legendFormat']}": target for panel in PANELS for target in panel["targets"]
}
VARIABLES = {
    each["name"]: each["query"]["query"] for each in BOARD["templating"]["list"] if each["type"] == "query"
}
# vLLM's older name of another one, the sum of two others, and one that is as good as another.
LEFT_OUT = {
    f"sleb:{name}"
    for name in (
        "time_per_output_token_seconds",
        "request_inference_time_seconds",
        "request_max_num_generation_tokens",
        # for what picks a server; the dashboard adds up the tiers'
        "engine_requests_running",
        "engine_requests_waiting",
        "cache_config_info",
    )
}


@pytest.fixture(scope="module")
def client(tiny_model_dir, tiny_chain, tmp_path_factory):
    """A client of a server with two depths and a key that has a name."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"tests: {KEY}\n")
    config = EngineConfig(
        model=str(tiny_model_dir), layer_map=tiny_chain, tiers=(0, 3), device="cpu", kv_cache_memory=0.01
    )
    sock = bind_socket("127.0.0.1", 0)
    server = make_server(ServerContext.create(Engine(config), ServeOptions(port=0, api_key_files=(keys,)), 8))
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    until(lambda: server.started)
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=base_url(sock), headers=headers, timeout=20) as client:
        yield client
    server.should_exit = True
    thread.join(10)
    sock.close()


def until(condition):
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def work(client):
    """Counts under every name: answers at each depth, from the cache the second time; a failure, a field of nobody."""
    for model in client.get("/v1/models").json()["data"]:
        for stream in (True, False):
            complete(client, 200, model=model["id"], stream=stream, max_tokens=8, ignore_eos=True)
    complete(client, 200, max_tokens=2, of_nobody=1)
    complete(client, 404, model="of nobody")


def complete(client, status, **fields):
    answer = client.post("/v1/completions", json={"prompt": PROMPT, **fields})
    assert answer.status_code == status, answer.text


@pytest.fixture(scope="module")
def families(client):
    """What /metrics has, by name: type and labels of each."""
    work(client)
    read = text_string_to_metric_families(client.get("/metrics").text)
    return {family.name: (family.type, {*family.samples[0].labels}) for family in read if family.samples}


def selections(expression):
    """Name and labels of every series that an expression reads, and what stands before it."""
    for found in re.finditer(r"\b((?:sleb:|process_)\w+)(?:\{([^}]*)\})?", expression):
        yield found[1], {*re.findall(r"(\w+)=~?\"", found[2] or "")}, expression[: found.start()]


@pytest.mark.parametrize("title", TARGETS)
def test_a_query_reads_series_as_their_types_want(families, title):
    """A counter or a bucket only as a rate, a gauge never; buckets only for quantiles; labels that the series has."""
    expression = TARGETS[title]["expr"]
    read = [*selections(expression)]
    assert read
    for name, labels, before in read:
        family = re.sub(r"_(total|bucket|sum|count)$", "", name)
        kind, known = families[family if family in families else name]
        assert (before.endswith("rate(")) == (kind in ("counter", "histogram")), name
        assert labels <= {*known, "instance"}, name
        assert name.endswith("_bucket") == ("histogram_quantile" in before), name
        grouped = {*re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expression)))}
        assert grouped <= {*known, "le"}


def test_every_series_of_ours_is_on_the_dashboard(families):
    shown = " ".join(target["expr"] for target in TARGETS.values())
    missing = {name for name in families if name.startswith("sleb:") and not re.search(rf"\b{name}", shown)}
    assert missing == LEFT_OUT
    assert len(families) > 20


def test_the_panels_lie_side_by_side():
    taken = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    identities = [panel["id"] for panel in BOARD["panels"]]
    assert len({*identities}) == len(identities)


@pytest.fixture(scope="module")
def prometheus(client, tmp_path_factory):
    """A client of Prometheus with deploy/prometheus.yaml, but for address, key and haste."""
    if shutil.which("prometheus") is None:
        pytest.skip("there is no prometheus (Debian: apt install prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "key").write_text(f"{KEY}\n")
    config = (DEPLOY / "prometheus.yaml").read_text("utf-8")
    address = client.base_url.netloc.decode()
    for old, new in (("sleb:8000", address), ("/run/secrets/key", str(folder / "key")), (" 5s", " 200ms")):
        assert config.count(old) == 1
        config = config.replace(old, new)
    (folder / "prometheus.yaml").write_text(config)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{sock.getsockname()[1]}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    process = subprocess.Popen([*command, f"--web.listen-address={listen}"], stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://{listen}/api/v1", timeout=20) as prometheus:
            until(lambda: answers(prometheus))
            for _ in range(2):  # a rate needs a count ahead of those that it tells
                work(client)
                scraped = f"timestamp(up) > {time.time()} and up == 1"
                until(partial(ask, prometheus, scraped))
            yield prometheus
    finally:
        process.terminate()
        process.wait(20)


def answers(prometheus):
    with contextlib.suppress(httpx.TransportError):
        return prometheus.get("/query", params={"query": "1"}).status_code == 200


def ask(prometheus, expression):
    """The rows of an instant query."""
    answer = prometheus.get("/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    return answer["data"]["result"]


def fill_in(expression, prometheus):
    """Grafana's variables, as it replaces them where All is chosen."""
    for name, query in VARIABLES.items():
        selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", query).groups()
        values = {row["metric"][label] for row in ask(prometheus, selector.replace('"$instance"', '".+"'))}
        assert values, query
        expression = expression.replace(f'"${name}"', json.dumps("|".join(map(re.escape, sorted(values)))))
    expression = expression.replace("$__rate_interval", "1m")
    assert "$" not in expression
    return expression


@pytest.mark.parametrize("title", TARGETS)
def test_prometheus_answers_a_query(prometheus, title):
    """With numbers, and with the labels by which the panel names the lines."""
    target = TARGETS[title]
    rows = ask(prometheus, fill_in(target["expr"], prometheus))
    assert rows
    named = {*re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])}
    for row in rows:
        assert named <= {*row["metric"]}
        assert 0 <= float(row["value"][1]) < float("inf")
    assert len(rows) > 1 or "model_name" not in named


def test_the_numbers_are_those_of_the_server(prometheus, client):
    """Prometheus has counted the tokens that were asked for: each `work` 16 at each depth, and 2 more at one."""
    rows = ask(prometheus, "sleb:generation_tokens_total")
    totals = {row["metric"]["model_name"]: float(row["value"][1]) for row in rows}
    assert {*totals} == {model["id"] for model in client.get("/v1/models").json()["data"]}
    smaller, larger = sorted(totals.values())
    assert smaller >= 32 and smaller % 16 == 0
    assert larger - smaller == smaller / 16 * 2


def test_the_container_is_healthy_while_the_server_is_ready(client):
    """Its health check, as the Containerfile writes it, without a key."""
    text = (DEPLOY / "Containerfile").read_text("utf-8")
    command = json.loads(re.search(r"^HEALTHCHECK .*?CMD (\[.*?\])$", text, re.MULTILINE | re.DOTALL)[1])
    assert command[0] == "python"
    until(lambda: client.get("/ready").status_code == 200)

    def check(port):
        environment = {"SLEB_PORT": str(port)}
        return subprocess.run(
            [sys.executable, *command[1:]], env=environment, capture_output=True, timeout=20
        )

    assert check(client.base_url.port).returncode == 0
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert check(closed.getsockname()[1]).returncode != 0
