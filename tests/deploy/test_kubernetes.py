"""deploy/kubernetes: what Kustomize makes of it is what Kubernetes takes, and fits the server that it starts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from sleb import cli
from sleb.engine.outputs import EngineStats
from sleb.server.api import health
from sleb.server.engine_thread.metrics import Scrape, ServerMetrics
from sleb.server.options import ServeOptions

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
OVERLAYS = ("single", "tiers")
# Of what extensions define, the fields that their schemas (CustomResourceDefinitions) demand, with their types.
EXTENSIONS = {
    # prometheus-operator, monitoring.coreos.com_podmonitors.yaml
    ("monitoring.coreos.com/v1", "PodMonitor"): {
        "spec.selector.matchLabels": dict,
        "spec.podMetricsEndpoints.0.port": str,
        "spec.podMetricsEndpoints.0.path": str,
        "spec.podMetricsEndpoints.0.authorization.credentials.name": str,
        "spec.podMetricsEndpoints.0.authorization.credentials.key": str,
    },
    # kedacore/keda, config/crd/bases/keda.sh_scaledobjects.yaml, and its prometheus scaler
    ("keda.sh/v1alpha1", "ScaledObject"): {
        "spec.scaleTargetRef.name": str,
        "spec.triggers.0.type": str,
        "spec.triggers.0.metadata.serverAddress": str,
        "spec.triggers.0.metadata.query": str,
        "spec.triggers.0.metadata.threshold": str,
        "spec.minReplicaCount": int,
        "spec.maxReplicaCount": int,
    },
    # gateway-api-inference-extension, inference.networking.k8s.io_inferencepools.yaml
    ("inference.networking.k8s.io/v1", "InferencePool"): {
        "spec.selector.matchLabels": dict,
        "spec.targetPorts.0.number": int,
        "spec.endpointPickerRef.name": str,
        "spec.endpointPickerRef.port.number": int,
    },
}


def find(document, path):
    for name in path.split("."):
        document = document[int(name)] if name.isdecimal() else document[name]
    return document


def render(folder):
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("there is no kubectl (Debian: apt install kubectl, or kubernetes-client)")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def validate(documents, tmp_path):
    """What kubernetes-validate says against the newest version that it knows; empty if it finds nothing."""
    pytest.importorskip("kubernetes_validate")
    file = tmp_path / "rendered.yaml"
    file.write_text(yaml.safe_dump_all(documents))
    done = subprocess.run(
        [sys.executable, "-m", "kubernetes_validate", "--strict", file],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.fixture(scope="module", params=OVERLAYS)
def rendered(request):
    return render(FOLDER / "overlays" / request.param)


def of_kind(documents, kind):
    return [each for each in documents if each["kind"] == kind]


def problems(documents):
    """What is wrong for this server, in words; of Deployments and what belongs to them."""
    found = []
    for deployment in of_kind(documents, "Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        [container] = pod["containers"]
        [port] = container["ports"]
        [config] = [
            each["data"]
            for each in of_kind(documents, "ConfigMap")
            if each["metadata"]["name"] == container["envFrom"][0]["configMapRef"]["name"]
        ]
        seconds = [container["lifecycle"]["preStop"]["sleep"]["seconds"]]
        seconds += [float(config[name]) for name in ("SLEB_SHUTDOWN_DELAY", "SLEB_DRAIN_TIMEOUT")]
        if pod["terminationGracePeriodSeconds"] <= sum(seconds) + 5:  # and clients read the end
            found.append("the grace period ends before the drain")
        for probe, path in (("startup", "/health"), ("liveness", "/health"), ("readiness", "/ready")):
            get = container[f"{probe}Probe"]["httpGet"]
            if (get["path"], get["port"]) != (path, port["name"]):
                found.append(f"the {probe} probe asks {get}")
        if container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] < 900:
            found.append("a large model is killed while it loads")
        if str(port["containerPort"]) != config["SLEB_PORT"] or config["SLEB_HOST"] != "0.0.0.0":
            found.append("the server listens elsewhere")
        writable = {each["mountPath"] for each in container["volumeMounts"] if not each.get("readOnly")}
        if writable != {"/cache", "/tmp"} or not container["securityContext"]["readOnlyRootFilesystem"]:
            found.append("what can be written is not the caches alone")
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        for kind, path in (
            ("Deployment", "spec.selector.matchLabels"),
            ("Service", "spec.selector"),
            ("PodDisruptionBudget", "spec.selector.matchLabels"),
        ):
            own = [find(each, path).items() <= labels.items() for each in of_kind(documents, kind)]
            if own.count(True) != 1:
                found.append(
                    f"{own.count(True)} of {kind} select the pods of {deployment['metadata']['name']}"
                )
    return found


def test_it_is_what_kubernetes_takes(rendered, tmp_path):
    known = [each for each in rendered if (each["apiVersion"], each["kind"]) not in EXTENSIONS]
    assert validate(known, tmp_path) == ""
    assert {each["kind"] for each in known} >= {"Deployment", "Service", "PodDisruptionBudget"}


def test_what_extensions_define_has_what_they_demand(rendered):
    for each in rendered:
        for path, kind in EXTENSIONS.get((each["apiVersion"], each["kind"]), {}).items():
            assert isinstance(find(each, path), kind), (each["kind"], path)


def test_it_fits_the_server(rendered):
    assert problems(rendered) == []


def test_nobody_is_root_and_nothing_may_be_gained(rendered):
    for deployment in of_kind(rendered, "Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        context = pod["containers"][0]["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"]} and context["allowPrivilegeEscalation"] is False
        assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False


def test_every_variable_is_an_option_of_serve(rendered):
    flags = {name for parameter in cli.load_command("serve").params for name in parameter.opts}
    for config in of_kind(rendered, "ConfigMap"):
        for name, value in config["data"].items():
            flag = f"--{name.removeprefix('SLEB_').lower().replace('_', '-')}"
            assert flag in flags or name == "SLEB_MODEL", name
            assert value
    known = {"host", "port", "shutdown_delay", "drain_timeout", "log_format"}
    assert known <= set(vars(ServeOptions()))


def test_probes_ask_paths_that_need_no_key():
    open_paths = {route.path for route in health.router.routes}
    assert {"/health", "/ready"} <= open_paths


def test_tier_groups_are_apart():
    documents = render(FOLDER / "overlays" / "tiers")
    groups = {each["metadata"]["name"]: each for each in of_kind(documents, "Deployment")}
    assert groups.keys() == {"sleb-full", "sleb-deep"}
    tiers = {
        each["metadata"]["name"].rsplit("-", 1)[0]: each["data"]["SLEB_TIERS"]
        for each in of_kind(documents, "ConfigMap")
    }
    assert tiers == {"sleb-full": "0", "sleb-deep": "3,6"}
    for name in groups:
        labels = groups[name]["spec"]["template"]["metadata"]["labels"]
        for kind in ("PodMonitor", "InferencePool"):
            chosen = [each for each in of_kind(documents, kind) if each["metadata"]["name"] == name]
            assert find(chosen[0], "spec.selector.matchLabels").items() <= labels.items()
        [scaled] = [each for each in of_kind(documents, "ScaledObject") if each["metadata"]["name"] == name]
        assert scaled["spec"]["scaleTargetRef"]["name"] == name
        query = scaled["spec"]["triggers"][0]["metadata"]["query"]
        assert f'pod=~"{name}-.*"' in query


def test_every_series_that_is_named_is_one_of_the_servers():
    tier = SimpleNamespace(id="m", depth=0)
    model = SimpleNamespace(model_name="m", tiers=(tier,), max_model_len=64, page_size=16, num_pages=9)
    stats = EngineStats({}, {}, 0.0, 0, 0, 0, 0)
    text = ServerMetrics(model).text(Scrape(stats)).decode()
    named = {
        name for file in FOLDER.rglob("*.yaml") for name in re.findall(r"\bsleb:\w+", file.read_text("utf-8"))
    }
    assert named >= {"sleb:engine_requests_waiting", "sleb:cache_config_info"}
    assert all(re.search(rf"^{name}[ {{]", text, re.MULTILINE) for name in named)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("spec.template.spec.terminationGracePeriodSeconds", 30, "the grace period ends before the drain"),
        (
            "spec.template.spec.containers.0.readinessProbe.httpGet.path",
            "/health",
            "the readiness probe asks",
        ),
        ("spec.template.spec.containers.0.startupProbe.failureThreshold", 3, "killed while it loads"),
        ("spec.template.spec.containers.0.ports.0.containerPort", 8080, "listens elsewhere"),
        ("spec.template.metadata.labels", {"app.kubernetes.io/name": "other"}, "0 of Service select"),
    ],
)
def test_a_fault_would_be_found(path, value, told):
    documents = render(FOLDER / "overlays" / "single")
    [deployment] = of_kind(documents, "Deployment")
    *way, last = path.split(".")
    find(deployment, ".".join(way))[last] = value
    assert any(told in each for each in problems(documents))


def test_a_misspelt_field_would_be_found(tmp_path):
    documents = render(FOLDER / "overlays" / "single")
    [deployment] = of_kind(documents, "Deployment")
    probe = deployment["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]
    probe["httpget"] = probe.pop("httpGet")
    assert "httpget" in validate([deployment], tmp_path)
