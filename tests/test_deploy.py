"""deploy/: rules, dashboard and manifests fit the server; Prometheus scrapes it, an alert fires."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from families import make_sentence_transformer
from sbert_fast import FastEncoder
from serving import ROOT, ask, running

pytest.importorskip("starlette", reason="the server is an extra")
from sbert_fast.server.app import create_app  # noqa: E402
from sbert_fast.server.models import Served  # noqa: E402
from sbert_fast.server.service import Service  # noqa: E402
from sbert_fast.server.settings import Settings  # noqa: E402

DEPLOY = ROOT / "deploy"
ALERTS = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
MANIFESTS = [
    manifest
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for manifest in yaml.safe_load_all(file.read_text())
]
CLIENTS = Path(os.environ.get("SBERT_FAST_CLIENTS", ROOT / ".venv-clients"))
_A_METRIC = re.compile(r"\b(?:te|sbert_fast|process)_\w+|\bup\b")


@pytest.fixture(scope="module")
def app() -> Any:
    served = Served("tiny", FastEncoder(make_sentence_transformer()))
    return create_app(Service([served], Settings()))


def expressions() -> Iterator[str]:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for manifest in MANIFESTS:
        for metric in manifest["spec"].get("metrics", []):
            yield metric["pods"]["metric"]["name"]


def test_every_metric_that_is_read_is_there(app: Any) -> None:
    text = ask(app, "/metrics").body.decode()
    known = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE)) | {"up"}
    known |= {f"{name}_{end}" for name in known for end in ("bucket", "sum", "count")}
    read = {name for expression in expressions() for name in _A_METRIC.findall(expression)}
    assert len(read) > 20
    assert read - known == set()


def test_the_manifests_fit_the_server(app: Any) -> None:
    kinds = {manifest["kind"]: manifest for manifest in MANIFESTS}
    assert kinds.keys() == {
        "Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"
    }  # fmt: skip
    pod = kinds["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert pod["metadata"]["labels"] == kinds["Service"]["spec"]["selector"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert ask(app, container[probe]["httpGet"]["path"]).status == 200
    assert ask(app, pod["metadata"]["annotations"]["prometheus.io/path"]).status == 200
    assert pod["spec"]["terminationGracePeriodSeconds"] > Settings().stop_seconds
    # A pod under load must not be restarted, nor a single one keep its node from being drained.
    assert container["livenessProbe"]["httpGet"]["path"] not in ("/health", "/ping", "/")
    assert kinds["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    target = kinds["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == kinds["Deployment"]["metadata"]["name"]


def test_the_manifests_have_the_schemas_of_kubernetes() -> None:
    program = CLIENTS / "bin" / "kubernetes-validate"
    if not program.exists():
        pytest.skip("the clients of others are not installed: make clients")
    files = list(map(str, sorted((DEPLOY / "kubernetes").glob("*.yaml"))))
    done = subprocess.run(
        [str(program), "--strict", *files],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_names_files_that_are_there() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for service in services.values():
        for volume in service["volumes"]:
            if volume.startswith("."):
                assert (DEPLOY / volume.split(":")[0]).exists()
    assert (ROOT / services["sbert-fast"]["build"]["dockerfile"]).exists()


def test_the_image_has_the_folder_of_models() -> None:
    """Of its user, whom a volume there gives it to; no stage copies what git or a build left."""
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    (volume,) = compose["services"]["sbert-fast"]["volumes"]
    folder = volume.split(":")[1]
    stages = (DEPLOY / "Dockerfile").read_text().split("\nFROM ")
    served = [stage for stage in stages if "\nUSER " in stage]
    assert len(served) == 2
    for stage in served:
        made = next(line for line in stage.splitlines() if "install -d" in line)
        assert "-o 10001" in made and folder in made.split()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "build", "benchmarks/results"} <= set(ignored)


# Prometheus


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize(
    "arguments",
    [["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]],
    ids=" ".join,
)
def test_promtool(arguments: list[str]) -> None:
    done = subprocess.run(
        [tool("promtool"), *arguments], cwd=DEPLOY, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_reads_the_metrics(app: Any) -> None:
    ask(app, "/embed", {"inputs": "a"})
    done = subprocess.run(
        [tool("promtool"), "check", "metrics"],
        input=ask(app, "/metrics").body,
        capture_output=True,
        timeout=120,
    )
    # It has opinions about names, which are those of text-embeddings-inference; 3 says so.
    assert done.returncode in (0, 3), done.stderr
    assert b"error while linting" not in done.stderr


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def asked(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)["data"]
    except OSError:
        return None


def test_an_alert_fires_when_the_queue_is_full(tmp_path: Path) -> None:
    program = tool("prometheus")
    make_sentence_transformer().save_pretrained(str(tmp_path / "tiny"))
    rules = json.loads(json.dumps(ALERTS))
    for rule in rules["groups"][0]["rules"]:
        rule["for"] = "0s"
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules))
    limits = ("--max-queue-tokens", "100", "--threads", "1")
    with running(tmp_path / "log", str(tmp_path / "tiny"), *limits) as server:
        config = {
            "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"},
            "rule_files": ["alerts.yml"],
            "scrape_configs": [
                {
                    "job_name": "sbert-fast",
                    "static_configs": [{"targets": [f"{server.host}:{server.port}"]}],
                }
            ],
        }
        config["global"]["evaluation_interval"] = "200ms"
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
        url = f"http://127.0.0.1:{free_port()}"
        options = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/db"]
        options += [f"--web.listen-address={url.removeprefix('http://')}"]
        with (tmp_path / "prometheus.log").open("w") as log:
            prometheus = subprocess.Popen([program, *options], stderr=log, stdout=log)
        done = threading.Event()

        def load() -> None:
            while not done.is_set():
                server.ask("/embed", {"inputs": ["word " * 60] * 2000})

        loaders = [threading.Thread(target=load) for _ in range(2)]
        try:
            query = f"{url}/api/v1/query?query=te_batch_next_tokens_count"
            until = time.monotonic() + 60
            while not (found := asked(query)) or not found["result"]:
                assert time.monotonic() < until, (tmp_path / "prometheus.log").read_text()
                time.sleep(0.2)
            for loader in loaders:
                loader.start()
            fired: set[str] = set()
            while "EmbeddingQueueFull" not in fired:
                assert time.monotonic() < until, fired
                for alert in (asked(f"{url}/api/v1/alerts") or {"alerts": []})["alerts"]:
                    if alert["state"] == "firing":
                        fired.add(alert["labels"]["alertname"])
                time.sleep(0.1)
        finally:
            done.set()
            for loader in loaders:
                if loader.ident is not None:
                    loader.join(60)
            prometheus.terminate()
            prometheus.wait(60)
