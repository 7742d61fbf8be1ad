"""The files of deploy/ are what the programs that read them take, and name what exists."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sleb import cli
from sleb.server.options import ServeOptions

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CONTAINERFILE = (DEPLOY / "Containerfile").read_text("utf-8")
UNIT = (DEPLOY / "sleb.service").read_text("utf-8")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
SERVE = cli.load_command("serve")
OPTIONS = {name for parameter in SERVE.params for name in parameter.opts}


def run(*words, check=True):
    """Standard output and error of a program; skips where it is not installed."""
    beside = Path(sys.executable).with_name(words[0])
    program = str(beside) if beside.exists() else shutil.which(words[0])
    if program is None:
        pytest.skip(f"there is no {words[0]}")
    done = subprocess.run([program, *map(str, words[1:])], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_containerfile_has_no_lint():
    assert run("hadolint", DEPLOY / "Containerfile") == ""


def test_hadolint_would_find_something(tmp_path):
    (tmp_path / "Containerfile").write_text("FROM python\nRUN cd /tmp && sudo apt-get install gcc\n")
    assert "DL3004" in run("hadolint", tmp_path / "Containerfile", check=False)


def test_the_unit_is_one_of_systemd(tmp_path):
    """With another program in place of the one that an installation would bring."""
    assert "ExecStart=/opt/sleb/bin/sleb serve" in UNIT
    unit = tmp_path / "sleb.service"
    unit.write_text(UNIT.replace("/opt/sleb/bin/sleb", "/bin/true"))
    assert run("systemd-analyze", "verify", "--man=no", unit) == ""


def test_the_unit_may_do_little():
    """systemd's own measure, from 0 to 100 (a unit without any of it: 96)."""
    run("systemd-analyze", "security", "--offline=true", "--threshold=20", DEPLOY / "sleb.service")


def test_prometheus_takes_its_file(tmp_path):
    text = (DEPLOY / "prometheus.yaml").read_text("utf-8")
    (tmp_path / "key").write_text("key\n")
    (tmp_path / "prometheus.yaml").write_text(text.replace("/run/secrets/key", str(tmp_path / "key")))
    assert "SUCCESS" in run("promtool", "check", "config", tmp_path / "prometheus.yaml")


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.cuda.yaml")])
def test_compose_takes_its_files(files):
    if shutil.which("docker") is None or "compose" not in run("docker", "--help"):
        pytest.skip("there is no docker compose")
    run("docker", "compose", *(f"--file={DEPLOY / file}" for file in files), "config", "--quiet")


def test_what_compose_mounts_is_here():
    sources = [
        volume.split(":")[0]
        for service in COMPOSE["services"].values()
        for volume in service.get("volumes", ())
    ]
    files = [DEPLOY / source for source in sources if source.startswith(".")]
    assert len(files) == 2
    assert all(file.exists() for file in files)
    assert {source for source in sources if not source.startswith(".")} == set(COMPOSE["volumes"])
    build = COMPOSE["services"]["sleb"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Containerfile"
    ignored = (ROOT / ".gitignore").read_text("utf-8").splitlines()
    assert "/deploy/key" in ignored


def test_the_parts_know_each_other():
    """Prometheus finds the server, Grafana finds Prometheus, and the dashboard lies where Grafana looks."""
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text("utf-8"))
    [job] = prometheus["scrape_configs"]
    port = re.search(r"SLEB_PORT=(\d+)", CONTAINERFILE)[1]
    assert job["static_configs"] == [{"targets": [f"sleb:{port}"]}]
    assert COMPOSE["services"]["sleb"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    for name in ("sleb", "prometheus"):
        assert COMPOSE["services"][name]["secrets"] == ["key"]
    provisioning = "/etc/grafana/provisioning"
    assert f"./grafana:{provisioning}:ro" in COMPOSE["services"]["grafana"]["volumes"]
    [source] = yaml.safe_load((DEPLOY / "grafana/datasources/prometheus.yaml").read_text("utf-8"))[
        "datasources"
    ]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    [provider] = yaml.safe_load((DEPLOY / "grafana/dashboards/provider.yaml").read_text("utf-8"))["providers"]
    assert provider["options"]["path"] == f"{provisioning}/dashboards"
    home = COMPOSE["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / "grafana" / Path(home).relative_to(provisioning)).exists()


@pytest.mark.parametrize("file", ["Containerfile", "compose.yaml", "sleb.service"])
def test_options_exist(file):
    names = set(re.findall(r"\bSLEB_([A-Z_]+)", (DEPLOY / file).read_text("utf-8"))) - {"CACHE"}
    assert names
    assert {f"--{name.lower().replace('_', '-')}" for name in names} <= OPTIONS


def test_commands_parse():
    words = COMPOSE["services"]["sleb"]["command"]
    assert words.pop(0) == "serve"
    SERVE.make_context("serve", words)


def test_nobody_waits_less_than_a_drain():
    seconds = ServeOptions().drain_timeout
    assert int(COMPOSE["services"]["sleb"]["stop_grace_period"].removesuffix("s")) > seconds
    assert int(re.search(r"^TimeoutStopSec=(\d+)$", UNIT, re.MULTILINE)[1]) > seconds


def test_the_container_is_nobodys_root():
    last = CONTAINERFILE[CONTAINERFILE.rindex("\nFROM ") :]
    assert re.search(r"^USER ([1-9]\d+)", last, re.MULTILINE)
    assert re.search(r"^ENTRYPOINT \[\"sleb\"\]\nCMD \[\"serve\"\]$", last, re.MULTILINE)
