"""Two workers with a broker between them: what is stored in one rack is held, and kept up to date, in the other."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import ObjectStore
from tests.process import Processes, Service, free_port, s3_environment

pytestmark = pytest.mark.broker
CONTENT = "/api/models/{}/versions/1.0.0/content"


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


class Racks:
    """Two racks that replicate to each other; `start` starts one, or starts it again on what it left."""

    def __init__(
        self, processes: Processes, amqp_url: str, storage: dict[str, object], environment: dict[str, str]
    ) -> None:
        self._processes, self._amqp_url, self._storage, self._environment = processes, amqp_url, storage, environment
        self.names = [f"r-{secrets.token_hex(4)}" for _ in range(2)]
        self._ports = {name: free_port() for name in self.names}

    def start(self, name: str, **more: object) -> Service:
        settings: dict[str, object] = {
            "rack": name,
            "amqp.url": self._amqp_url,
            "registry.path": f"{name}/registry",
            "storage.path": f"{name}/models",
            "http.port": self._ports[name],
            "replicationFactor": 2,
            "replication.peers": [peer for peer in self.names if peer != name],
            **self._storage,
            **more,
        }
        return self._processes.start("worker", settings=settings, environment=self._environment).until_ready()


@pytest.fixture(params=["disk", "s3"])
def racks(request: pytest.FixtureRequest, processes: Processes, amqp_url: str) -> Racks:
    if request.param == "disk":
        return Racks(processes, amqp_url, {}, {})
    store: ObjectStore = request.getfixturevalue("object_store")
    storage = {
        "storage.backend": "s3",
        "storage.s3.endpointUrl": store.endpoint_url,
        "storage.s3.bucket": request.getfixturevalue("s3_bucket"),
    }
    return Racks(processes, amqp_url, storage, s3_environment(store.access_key, store.secret_key))


def holds(service: Service, model: str, data: bytes) -> bool:
    answer = service.send("GET", CONTENT.format(model))
    return answer.status == 200 and answer.body == data


def test_a_copy_is_made_kept_up_to_date_and_deleted(racks: Racks) -> None:
    one, two = (racks.start(name) for name in racks.names)
    data = os.urandom(3_000_000)
    assert one.put("acme/m", data).status == 201
    two.until(lambda: holds(two, "acme/m", data), "a copy")
    assert two.put("acme/m", b"mine").json["error"]["code"] == "ERR_NOT_ORIGIN"
    patch = {"metadata": {"stage": "prod"}}
    assert one.send("PATCH", "/api/models/acme/m/versions/1.0.0", patch).status == 200
    two.until(lambda: two.get("/api/models/acme/m/versions/1.0.0")["metadata"].get("stage") == "prod", "the update")
    described = two.get("/api/models/acme/m/versions/1.0.0")
    assert (described["origin"], described["replicas"]) == (racks.names[0], [racks.names[1]])
    assert one.send("DELETE", "/api/models/acme/m").status == 200
    two.until(lambda: two.send("GET", CONTENT.format("acme/m")).status == 404, "the delete")
    assert one.send("POST", "/api/models/acme/m/restore").status == 200
    two.until(lambda: holds(two, "acme/m", data), "the restore")
    assert (one.stop(), two.stop()) == (0, 0)


def test_a_rack_that_was_away_catches_up_and_an_asked_for_copy_is_confirmed(racks: Racks) -> None:
    first, second = racks.names
    one = racks.start(first, replicationFactor=1)
    data = os.urandom(1_000_000)
    assert one.put("m", data).status == 201
    replicated = one.send("POST", "/api/models/m/versions/1.0.0/replicate", {"peers": [second], "waitMs": 0})
    job = f"/api/jobs/{replicated.json['jobId']}"
    two = racks.start(second)
    two.until(lambda: holds(two, "m", data), "a copy")
    one.until(lambda: one.get(job)["state"] == "succeeded", "the job")
    result = one.get(job)["result"]
    assert (result["totalPeers"], result["successfulReplications"], result["failedReplications"]) == (1, 1, 0)
    two.kill()
    assert one.put("n", data[:1000]).status == 201
    assert one.send("DELETE", "/api/models/m").status == 200
    one.send("POST", "/api/models/n/versions/1.0.0/replicate", {"peers": [second], "waitMs": 0})
    two = racks.start(second)
    two.until(lambda: holds(two, "n", data[:1000]), "what was stored meanwhile")
    two.until(lambda: two.send("GET", CONTENT.format("m")).status == 404, "what was deleted meanwhile")
    stats = two.get("/api/stats")["replication"]
    assert (stats["copies"], stats["pending"], [each["rack"] for each in stats["following"]]) == (1, 0, [first])
    metrics = two.send("GET", "/metrics").body
    assert b"model_manager_replication_copies 1.0" in metrics
    assert b"model_manager_replication_pending 0.0" in metrics
    assert (one.stop(), two.stop()) == (0, 0)
