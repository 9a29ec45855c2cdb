"""A running worker finds rot by itself: in files on disk, and in objects of a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deploy.local import ObjectStore
from tests.process import Processes, Service, s3_environment

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

PERIOD = {"limits.scrubSeconds": 0.5}


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


def finds(service: Service, spoil: Callable[[str], None]) -> None:
    """Of two versions one is spoiled, found, refused, stored again, and given out again."""
    key = service.put("acme/spoiled", b"bytes").json["storageKey"]
    assert service.put("acme/sound", b"others").status == 201
    service.until(lambda: b"model_manager_scrub_last_pass_timestamp_seconds 0.0" not in metrics(service), "a pass")
    assert b'scrub_blobs_total{result="wrong"} 0.0' in metrics(service)
    spoil(key)
    content = "/api/models/acme/{}/versions/1.0.0/content"
    service.until(lambda: service.send("GET", content.format("spoiled")).status == 422, "it is refused")
    assert b'model_manager_checksum_mismatch_total{where="validate"} 1.0' in metrics(service)
    assert service.get("/api/models/acme/spoiled/versions/1.0.0")["state"] == "quarantined"
    assert service.send("GET", content.format("sound")).body == b"others"
    assert service.put("acme/spoiled", b"bytes").status == 200
    assert service.send("GET", content.format("spoiled")).body == b"bytes"
    assert service.stop() == 0


def metrics(service: Service) -> bytes:
    return service.send("GET", "/metrics").body


def test_rot_on_disk_is_found(processes: Processes) -> None:
    service = processes.start(settings=PERIOD).until_ready()
    finds(service, lambda key: place(service, key).write_bytes(b"rotte"))


def place(service: Service, key: str) -> Path:
    return service.folder / "data/models" / key


def test_rot_in_an_object_store_is_found(
    processes: Processes, object_store: ObjectStore, s3_bucket: str, s3_client: S3Client
) -> None:
    settings = {
        "storage.backend": "s3",
        "storage.s3.endpointUrl": object_store.endpoint_url,
        "storage.s3.bucket": s3_bucket,
        "storage.s3.region": object_store.region,
    }
    environment = s3_environment(object_store.access_key, object_store.secret_key)
    service = processes.start(settings={**PERIOD, **settings}, environment=environment).until_ready()
    finds(service, lambda key: s3_client.put_object(Bucket=s3_bucket, Key=f"rack-1/{key}", Body=b"rotte") and None)


def test_a_period_of_0_reads_nothing_back(processes: Processes) -> None:
    service = processes.start(settings={"limits.scrubSeconds": 0, "limits.cleanUpSeconds": 0.1}).until_ready()
    key = service.put("acme/spoiled", b"bytes").json["storageKey"]
    place(service, key).write_bytes(b"rotte")
    # In this time the clean-up, which runs beside it, has had its turns.
    assert service.put("acme/gone", b"gone").status == 201
    assert service.send("DELETE", "/api/models/acme/gone?purge=true").status == 200
    service.until(lambda: b'orphans_removed_total{kind="unneeded"} 1.0' in metrics(service), "a clean-up")
    assert b'scrub_blobs_total{result="wrong"} 0.0' in metrics(service)
    assert not (service.folder / "data/models/scrub.json").exists()
