"""The worker's image: it runs as nobody in particular on a file system it cannot write to, and loses nothing."""

from __future__ import annotations

import json
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from testcontainers.core.container import DockerContainer

from tests.process import free_port, wait_until

DATA = "/var/lib/wrk-model-manager"
USER = 10001


@dataclass(frozen=True)
class Worker:
    """A container of the image that serves without a broker."""

    container: Any
    url: str
    token: str

    def send(self, verb: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/octet-stream"}
        request = urllib.request.Request(self.url + path, body, headers, method=verb)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError as error:
            return 0, str(error).encode()

    def until_ready(self) -> None:
        wait_until(lambda: self.send("GET", "/readyz")[0] == 200, f"ready: {self.container.logs().decode()}")

    def state(self) -> dict[str, Any]:
        self.container.reload()
        return cast("dict[str, Any]", self.container.attrs["State"])

    def inside(self, *command: str) -> str:
        code, output = self.container.exec_run(list(command))
        assert code == 0, output
        return str(output.decode())


@pytest.fixture
def worker(worker_image: str, tmp_path: Path) -> Iterator[Worker]:
    data, token, port = tmp_path / "data", secrets.token_hex(16), free_port()
    data.mkdir()
    (tmp_path / "token").write_text(token)
    (tmp_path / "token").chmod(0o400)
    for path in (data, tmp_path / "token"):
        os.chown(path, USER, USER)
    environment = {"MODEL_MANAGER_HTTP__HOST": "0.0.0.0", "MODEL_MANAGER_HTTP__TOKEN_FILE": "/run/token"}
    container: Any = DockerContainer(
        worker_image,
        command="serve",
        env=environment,
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
    )
    container.ports["8002/tcp"] = ("127.0.0.1", port)
    container.with_volume_mapping(str(data), DATA, "rw").with_volume_mapping(
        str(tmp_path / "token"), "/run/token", "ro"
    )
    with container:
        worker = Worker(container.get_wrapped_container(), f"http://127.0.0.1:{port}", token)
        worker.until_ready()
        yield worker


def test_it_runs_with_no_rights_and_keeps_what_it_acknowledged_when_it_is_killed(worker: Worker) -> None:
    assert worker.inside("id", "-u").strip() == str(USER)
    status = worker.inside("cat", "/proc/1/status")
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert worker.container.exec_run(["touch", "/anywhere"])[0] != 0

    names = [f"net-{number}" for number in range(20)]
    for name in names:
        assert worker.send("PUT", f"/api/models/{name}/versions/1.0.0/content?type=custom", name.encode())[0] == 201
    worker.container.kill(signal="KILL")
    worker.container.wait()
    worker.container.start()
    worker.until_ready()
    listed = json.loads(worker.send("GET", "/api/models?limit=100")[1])
    assert sorted(entry["modelId"] for entry in listed["models"]) == sorted(names)
    for name in names:
        assert worker.send("GET", f"/api/models/{name}/versions/1.0.0/content")[1] == name.encode()


def test_it_tells_its_health_and_its_revision_and_stops_in_peace(worker: Worker) -> None:
    wait_until(lambda: worker.state().get("Health", {}).get("Status") == "healthy", "healthy")
    version = json.loads(worker.send("GET", "/version")[1])
    labels = worker.container.image.labels
    assert version["version"] == labels["org.opencontainers.image.version"]
    assert version["revision"] == labels["org.opencontainers.image.revision"]
    worker.container.stop(timeout=30)
    assert worker.state()["ExitCode"] == 0
