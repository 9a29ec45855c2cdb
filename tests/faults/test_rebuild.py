"""The registry's folder is lost: it is made again of the storage alone, and the old owner never comes back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deploy.local import ObjectStore
from schemas.errors import EXIT_CONFIG_INVALID
from tests.benchmarks.records import store_record
from tests.process import Processes, Service, environment_of, s3_environment, wait_until
from worker.registry import Change, Registry
from worker.upkeep.rebuild import without_bytes

NOTICED_WITHIN_S = 20.0
PERIOD_S = 0.5


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


@dataclass(frozen=True)
class Rack:
    """Settings of a rack, and what a process needs to reach its storage."""

    settings: dict[str, object]
    environment: dict[str, str]

    def start(self, processes: Processes, **changed: object) -> Service:
        settings = {**self.settings, **{name.replace("_", "."): value for name, value in changed.items()}}
        return processes.start("serve", settings=settings, environment=self.environment)

    def command(self, folder: Path, *words: str, **changed: object) -> tuple[int, dict[str, Any], str]:
        """Run an operator's command with `-o json`: exit status, document, stderr."""
        settings = {**self.settings, **{name.replace("_", "."): value for name, value in changed.items()}}
        done = subprocess.run(
            [sys.executable, "-m", "worker", *words, "-o", "json"],
            cwd=folder,
            env={
                "PYTHONPATH": ":".join(sys.path),
                "PATH": "/usr/bin:/bin",
                **environment_of(settings),
                **self.environment,
            },
            capture_output=True,
            check=False,
            timeout=120,
        )
        return done.returncode, json.loads(done.stdout or b"{}"), done.stderr.decode()


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def rack(request: pytest.FixtureRequest) -> Rack:
    period = {"archive.periodSeconds": PERIOD_S}
    if request.param == "disk":
        return Rack(period, {})
    object_store: ObjectStore = request.getfixturevalue("object_store")
    bucket: str = request.getfixturevalue("s3_bucket")
    settings = {
        "storage.backend": "s3",
        "storage.s3.endpointUrl": object_store.endpoint_url,
        "storage.s3.region": object_store.region,
        "storage.s3.bucket": bucket,
        **period,
    }
    return Rack(settings, s3_environment(object_store.access_key, object_store.secret_key))


@dataclass
class Load:
    """Stores models one after the other until the worker is gone; remembers when each was acknowledged."""

    service: Service
    acknowledged: dict[str, float] = field(default_factory=dict)

    def __enter__(self) -> Load:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)

    def _run(self) -> None:
        number = 0
        while self.service.process.poll() is None:
            name = f"net-{number}"
            try:
                if self.service.put(name, name.encode()).status == 201:
                    self.acknowledged[name] = time.time()
            except OSError:
                continue
            number += 1


def test_a_registry_that_is_lost_under_load_is_made_of_the_storage_alone(processes: Processes, rack: Rack) -> None:
    service = rack.start(processes).until_ready()
    with Load(service) as load:
        time.sleep(8 * PERIOD_S)
        killed = time.time()
        service.kill()
    folder = processes.folder / "data/registry"
    shutil.copytree(folder, processes.folder / "kept")
    shutil.rmtree(folder)

    # A worker that is started on nothing says what to do, and leaves the storage alone.
    refused = rack.start(processes)
    assert refused.status(30) == EXIT_CONFIG_INVALID
    assert "model-manager rebuild" in refused.log

    status, done, errors = rack.command(processes.folder, "rebuild", "--yes", "--patience", "0.5")
    assert status == 0, errors
    assert (done["fromEpoch"], done["epoch"], done["ownerClosedAt"]) == (1, 2, None)
    assert "not archived, is not known" in errors
    again = rack.start(processes).until_ready()
    found = again.model_ids()
    old = {name for name, at in load.acknowledged.items() if at < killed - 3 * PERIOD_S}
    assert len(old) > 5
    assert old <= found, "all that is older than the lag is there"
    lost = sorted(set(load.acknowledged) - found, key=lambda name: int(name.split("-")[1]))
    assert lost == list(load.acknowledged)[len(load.acknowledged) - len(lost) :], "and what is lost is the very last"
    for name in list(old)[:20]:
        assert again.send("GET", f"/api/models/{name}/versions/1.0.0/content").body == name.encode()
    assert again.get("/api/ping")["epoch"] == 2

    # Whoever finds the old folder cannot go on with it.
    back = rack.start(processes, registry_path="kept")
    assert back.status(30) == EXIT_CONFIG_INVALID
    assert "epoch 2" in back.log
    assert again.ready
    assert again.stop() == 0


def test_an_owner_that_is_taken_over_under_load_stops_by_itself(processes: Processes, rack: Rack) -> None:
    service = rack.start(processes).until_ready()
    with Load(service) as load:
        wait_until(lambda: len(load.acknowledged) > 50, "some models")
        time.sleep(2 * PERIOD_S)
        status, done, errors = rack.command(processes.folder, "rebuild", "--yes", "--registry-path", "elsewhere")
        assert status == 0, errors
        assert service.status(NOTICED_WITHIN_S) == EXIT_CONFIG_INVALID
    [lost] = service.events("ownership_lost")
    assert "epoch 2" in lost["reason"]
    assert done["ownerClosedAt"] == done["sequence"], "it said so, and then it closed its archive"
    new = rack.start(processes, registry_path="elsewhere").until_ready()
    assert set(load.acknowledged) <= new.model_ids(), "what it acknowledged before it noticed is there too"
    assert new.stop() == 0


def test_a_rebuild_goes_back_to_a_point_in_time(processes: Processes, rack: Rack) -> None:
    service = rack.start(processes).until_ready()
    assert service.put("before", b"1").status == 201
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 1))
    wait_until(lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) > moment, "the next second")
    assert service.put("after", b"2").status == 201
    assert service.stop() == 0
    shutil.rmtree(processes.folder / "data/registry")
    status, done, errors = rack.command(processes.folder, "rebuild", "--yes", "--to-time", moment)
    assert status == 0, errors
    assert (done["versions"], done["unknownBlobs"]) == (1, 1)
    assert done["ownerClosedAt"] is not None
    again = rack.start(processes).until_ready()
    assert again.model_ids() == {"before"}
    assert again.stop() == 0

    # It was the wrong point: the bytes of the later one are still there, and so is its record, in the older epoch.
    shutil.rmtree(processes.folder / "data/registry")
    status, done, errors = rack.command(processes.folder, "rebuild", "--yes", "--epoch", "1")
    assert status == 0, errors
    assert (done["versions"], done["versionsWithoutBytes"], done["epoch"]) == (2, 0, 3)
    again = rack.start(processes).until_ready()
    assert again.send("GET", "/api/models/after/versions/1.0.0/content").body == b"2"
    assert again.stop() == 0


def test_a_backup_is_restored_to_its_end_or_to_a_point_in_a_new_epoch(processes: Processes) -> None:
    rack = Rack({}, {})
    service = rack.start(processes).until_ready()
    for name in ("first", "second"):
        assert service.put(name, name.encode()).status == 201
    status, backup, errors = rack.command(processes.folder, "journal", "backup", "copy")
    assert status == 0, errors
    assert service.put("third", b"third").status == 201
    status, _, errors = rack.command(processes.folder, "journal", "restore", "copy", "--yes")
    assert (status, json.loads(errors)["error"]["code"]) == (4, "ERR_CONFLICT"), "a worker runs on it"
    assert service.stop() == 0
    shutil.move(processes.folder / "data/registry", processes.folder / "old")

    status, done, errors = rack.command(processes.folder, "journal", "restore", "copy", "--yes")
    assert status == 0, errors
    assert (done["records"], done["epoch"], done["sequence"]) == (2, 2, backup["head"])
    again = rack.start(processes).until_ready()
    assert again.model_ids() == {"first", "second"}
    assert again.stop() == 0
    assert rack.start(processes, registry_path="old").status(30) == EXIT_CONFIG_INVALID

    shutil.rmtree(processes.folder / "data/registry")
    restore = ("journal", "restore", "copy", "--yes", "--to-sequence")
    status, done, errors = rack.command(processes.folder, *restore, "2")
    assert status == 0, errors
    assert (done["records"], done["epoch"]) == (1, 3)
    again = rack.start(processes).until_ready()
    assert again.model_ids() == {"first"}
    assert again.stop() == 0


def test_a_rebuild_over_a_registry_with_records_is_refused(processes: Processes) -> None:
    rack = Rack({}, {})
    service = rack.start(processes).until_ready()
    assert service.put("net", b"1").status == 201
    status, _, errors = rack.command(processes.folder, "rebuild", "--yes")
    assert (status, json.loads(errors)["error"]["code"]) == (4, "ERR_CONFLICT")
    assert service.stop() == 0
    status, _, errors = rack.command(processes.folder, "rebuild", "--yes")
    assert status == 4
    assert "1 records" in errors
    status, _, errors = rack.command(processes.folder, "rebuild")
    assert status == 2
    assert "--yes" in errors
    status, _, errors = rack.command(processes.folder, "rebuild", "--yes", "--to-time", "yesterday")
    assert status == 2


async def test_versions_whose_records_are_not_in_memory_are_compared_too(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.open()
    registry.start()
    for number in range(3):
        await registry.transact("net", partial(Change, "store", store_record(number)))
    await registry.close()

    again = Registry(tmp_path)
    again.open()
    for file in tmp_path.glob("*.jsonl"):
        with file.open("rb") as segment:
            os.posix_fadvise(segment.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        assert len(without_bytes(again.catalog, {}, lambda *_: None)) == 3
    finally:
        await again.close()
