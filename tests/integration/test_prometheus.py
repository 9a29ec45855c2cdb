"""What a real Prometheus makes of a real worker's /metrics, with the configuration that is shipped."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from tests.process import Processes, Service, free_port, wait_until

SHIPPED = Path(__file__).parents[2] / "deploy/prometheus/prometheus.yml"
SHIPPED_PORT = 8002
INSTALL = "is not installed; `apt-get install prometheus` brings it"


def program(name: str) -> str:
    """The path of a program; without it the test is skipped."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} {INSTALL}")
    return found


def is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


@pytest.fixture
def service(processes: Processes) -> Service:
    """A worker on the port that the shipped configuration names, if it is free, that has seen some traffic."""
    port = SHIPPED_PORT if is_free(SHIPPED_PORT) else free_port()
    service = processes.start(settings={"http.port": port}).until_ready()
    assert service.put("acme/model", b"bytes").status == 201
    assert service.send("GET", "/api/models/acme/model").status == 200
    assert service.send("GET", "/api/models/acme/model/versions/1.0.0/content").status == 200
    assert service.send("GET", "/api/models/nobody").status == 404
    assert service.send("POST", "/api/models/acme/model/versions/1.0.0/validate").status == 200
    assert service.send("DELETE", "/api/models/acme/model").status == 200
    return service


def test_the_metrics_of_a_worker_are_as_promtool_wants_them(service: Service) -> None:
    promtool = program("promtool")
    metrics = service.send("GET", "/metrics")
    assert metrics.status == 200
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=metrics.body, capture_output=True, timeout=60, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
    assert b"model_manager_" in metrics.body


def test_the_shipped_configuration_is_as_promtool_wants_it() -> None:
    subprocess.run([program("promtool"), "check", "config", str(SHIPPED)], capture_output=True, timeout=60, check=True)


def test_each_alert_fires_for_what_is_sick_and_not_for_what_is_well() -> None:
    ran = subprocess.run(
        [program("promtool"), "test", "rules", "rules_test.yml"],
        cwd=SHIPPED.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "Unit Testing:  rules_test.yml\n  SUCCESS\n\n"), ran.stderr


def test_prometheus_with_the_shipped_configuration_sees_the_worker_up(service: Service, tmp_path: Path) -> None:
    with Prometheus(program("prometheus"), tmp_path, urlsplit(service.url).netloc) as prometheus:
        wait_until(lambda: prometheus.health() == "up", "the target is up")
        [target] = prometheus.ask("targets")["activeTargets"]
        assert target["scrapeUrl"] == f"{service.url}/metrics"
        assert target["labels"]["job"] == "model-manager"
        # A sample can be asked for a moment after the target is known to be up.
        wait_until(lambda: [each["value"][1] for each in prometheus.query("up")] == ["1"], "the sample of a target up")
        wait_until(lambda: prometheus.query("model_manager_ready"), "the worker's own metrics")
        rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
        assert len(rules) > 10
        # A rule that was looked at before the first sample may be pending for a moment.
        wait_until(
            lambda: prometheus.alerts() <= {"ModelManagerChecksumMismatch"}, "no alert but that of the quarantine"
        )
        for expression in dashboard():
            wait_until(lambda asked=expression: prometheus.query(asked), f"data for {expression}")


def dashboard() -> set[str]:
    """What the dashboard asks for that there is after two scrapes of a worker without a broker: the series of what has
    not happened yet too, which some panels leave out."""
    board = json.loads((SHIPPED.parents[1] / "grafana/model-manager.json").read_text())
    targets = [target for panel in board["panels"] for target in panel.get("targets", [])]
    asked, legends = {target["expr"] for target in targets}, {each["expr"]: each["legendFormat"] for each in targets}
    return {
        each.removesuffix(" > 0").replace("$rack", ".*").replace("$__rate_interval", "5s")
        for each in asked
        if "histogram_quantile" not in each and "errors_total" not in each and "{{origin}}" not in legends[each]
    }


class Prometheus:
    """A server with the shipped configuration, in which only the address of the worker is another one."""

    def __init__(self, program: str, folder: Path, target: str) -> None:
        shipped = SHIPPED.read_text()
        address = f"127.0.0.1:{SHIPPED_PORT}"
        assert shipped.count(address) == 1
        config = folder / "prometheus.yml"
        config.write_text(shipped.replace(address, target).replace("15s", "1s"))
        shutil.copy(SHIPPED.with_name("rules.yml"), folder)
        self._url = f"http://127.0.0.1:{free_port()}"
        self._log = folder / "prometheus-log"
        self._command = [
            program,
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address={urlsplit(self._url).netloc}",
        ]

    def __enter__(self) -> Prometheus:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, question: str) -> Any:
        """The data of an answer of its HTTP API."""
        with urllib.request.urlopen(f"{self._url}/api/v1/{question}", timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def alerts(self) -> set[str]:
        """Those that are pending or fire."""
        rules = [rule for group in self.ask("rules")["groups"] for rule in group["rules"]]
        return {rule["name"] for rule in rules if rule["state"] != "inactive"}

    def query(self, expression: str) -> Any:
        """What the expression gives now; nothing is no series."""
        return self.ask(f"query?query={quote(expression)}")["result"]

    def health(self) -> str:
        """The health of the one target; it is `unknown` before the first scrape."""
        assert self._process.poll() is None, self._log.read_text()
        try:
            targets = self.ask("targets")["activeTargets"]
        except OSError:
            return "unknown"
        return str(targets[0]["health"]) if targets else "unknown"
