"""SIGKILL at any moment: what was acknowledged is all there, what was not is not seen, and the next process goes on."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp
import pytest

from deploy.local import ObjectStore
from schemas.ids import digest_of, new_ulid
from tests.process import REAL_MODEL, Processes, Service, active_segment, s3_environment, wait_until
from worker.client.amqp_caller import AmqpCaller
from worker.client.client import ModelManagerClient
from worker.client.http_caller import HttpCaller

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

CALLERS = 8
ROUNDS = 10
FILE_BYTES = 30_000_000
FEW_BYTES = 8_000_000  # of a push, when it is cut in the middle


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


# --- in the middle of a push ---


class Blobs(Protocol):
    """A storage prefix as a bystander sees it."""

    def stored(self) -> set[str]: ...

    def add(self, key: str, data: bytes) -> None: ...

    def brought(self, begun: dict[str, Any], before: set[str]) -> int:
        """The bytes that came since the upload with the record `begun`; `before` are the keys of then."""


@dataclass(frozen=True)
class DiskBlobs:
    root: Path

    def stored(self) -> set[str]:
        return {f"blobs/{path.name}" for path in (self.root / "blobs").iterdir()}

    def add(self, key: str, data: bytes) -> None:
        (self.root / key).write_bytes(data)

    def brought(self, begun: dict[str, Any], before: set[str]) -> int:
        total = 0
        for key in self.stored() - before:
            with suppress(FileNotFoundError):
                total += (self.root / key).stat().st_size
        return total


@dataclass(frozen=True)
class S3Blobs:
    client: S3Client
    bucket: str
    prefix: str

    def stored(self) -> set[str]:
        listing = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.prefix}/blobs/")
        return {entry["Key"].removeprefix(f"{self.prefix}/") for entry in listing.get("Contents", [])}

    def add(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{key}", Body=data)

    def brought(self, begun: dict[str, Any], before: set[str]) -> int:
        total = 0
        for file in begun["files"]:
            place = f"{self.prefix}/{file['key']}"
            parts = self.client.list_parts(Bucket=self.bucket, Key=place, UploadId=file["multipart"])
            total += sum(part["Size"] for part in parts.get("Parts", []))
        return total


@dataclass(frozen=True)
class Rack:
    """A rack that is started, killed and started again, and the client commands pointed at it."""

    processes: Processes
    blobs: Blobs
    settings: dict[str, object]
    secrets: dict[str, str] = field(default_factory=dict)

    def start(self) -> Service:
        command: Any = "worker" if "amqp.url" in self.settings else "serve"
        return self.processes.start(command, settings=self.settings, environment=self.secrets).until_ready()

    def address(self, service: Service) -> dict[str, str]:
        """Where the command line finds it, as environment variables."""
        if "amqp.url" not in self.settings:
            return {"MODEL_MANAGER_URL": service.url}
        amqp_url, rack = str(self.settings["amqp.url"]), str(self.settings["rack"])
        return {"MODEL_MANAGER_AMQP__URL": amqp_url, "MODEL_MANAGER_RACK": rack}

    def client(self, service: Service) -> ModelManagerClient:
        if "amqp.url" not in self.settings:
            return ModelManagerClient(HttpCaller(service.url))
        return ModelManagerClient(AmqpCaller(str(self.settings["amqp.url"]), str(self.settings["rack"])))

    def records(self, op: str) -> list[dict[str, Any]]:
        """The records of one kind in the journal, as it is at this moment."""
        lines = self.journal().split(b"\n")[:-1]
        return [line["rec"] for line in map(json.loads, lines) if line["op"] == op]

    def shows_what_was_committed(self, service: Service) -> bool:
        """Whether the listing is the models whose store is recorded."""
        return listed(service) == [record["model"] for record in self.records("store")]

    def keeps_only_what_is_recorded(self) -> bool:
        """Whether the journal names every blob there is."""
        journal = self.journal().decode()
        return all(key in journal for key in self.blobs.stored())

    def journal(self) -> bytes:
        return active_segment(self.processes.folder / "data/registry").read_bytes()


@pytest.fixture
def disk_rack(processes: Processes) -> Rack:
    return Rack(processes, DiskBlobs(processes.folder / "data/models"), {})


@pytest.fixture
def s3_rack(
    processes: Processes, amqp_url: str, rack: str, object_store: ObjectStore, s3_client: S3Client, s3_bucket: str
) -> Rack:
    settings: dict[str, object] = {
        "rack": rack,
        "amqp.url": amqp_url,
        "storage.backend": "s3",
        "storage.s3.endpointUrl": object_store.endpoint_url,
        "storage.s3.region": object_store.region,
        "storage.s3.bucket": s3_bucket,
    }
    secrets = s3_environment(object_store.access_key, object_store.secret_key)
    return Rack(processes, S3Blobs(s3_client, s3_bucket, rack), settings, secrets)


def push_until(rack: Rack, service: Service, folder: Path, moment: str, *, may_end: bool) -> None:
    """Push `folder` as `second:1.0.0`, and kill the worker and the client when that `moment` has come, or the end."""
    before, begun = rack.blobs.stored(), len(rack.records("upload.begin"))
    jobs, ended = len(rack.records("job.begin")), len(rack.records("upload.end"))
    pushing = rack.processes.command("push", folder, "second:1.0.0", "--type", "custom", **rack.address(service))

    def has_come() -> bool:
        if pushing.poll() is not None:
            assert may_end, "the push ended before it could be cut"
            return True
        match moment:
            case "after createUpload":
                return len(rack.records("upload.begin")) > begun
            case "in the middle of the parts":
                uploads = rack.records("upload.begin")[begun:]
                return bool(uploads) and rack.blobs.brought(uploads[0], before) > FEW_BYTES
            case "during completeUpload":
                return len(rack.records("job.begin")) > jobs
            case _:
                return len(rack.records("upload.end")) > ended

    wait_until(has_come, moment)
    service.kill()
    pushing.kill()
    pushing.wait()


def listed(service: Service) -> list[str]:
    return [entry["modelId"] for entry in service.get("/api/models")["models"]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("storage", ["disk", "s3"])
def test_a_worker_killed_in_the_middle_of_a_push_keeps_the_first_model_and_shows_nothing_of_the_second(
    storage: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    rack: Rack = request.getfixturevalue(f"{storage}_rack")
    folder = tmp_path / "second"
    folder.mkdir()
    for name in ("a.bin", "b.bin"):
        (folder / name).write_bytes(os.urandom(FILE_BYTES))
    service = rack.start()
    asyncio.run(push(rack.client(service), REAL_MODEL, "first", "safetensors"))

    for moment in ("after createUpload", "in the middle of the parts", "during completeUpload", "during storeModel"):
        # Once its bytes are there, a push has but moments to go, and may be through before the signal is.
        at_the_end = moment in ("during completeUpload", "during storeModel")
        push_until(rack, service, folder, moment, may_end=at_the_end)
        rack.blobs.add(f"blobs/{new_ulid()}", b"bytes that were never recorded")
        service = rack.start()
        names = listed(service)
        assert names == ["first"] or at_the_end, moment
        # A request that was not acknowledged is delivered again, so the end may come a moment later.
        service.until(partial(rack.shows_what_was_committed, service), "what is listed is what was committed")
        service.until(rack.keeps_only_what_is_recorded, "the blobs that no record names are swept")

    asyncio.run(push(rack.client(service), folder, "second", "custom"))
    assert sorted(listed(service)) == ["first", "second"]
    asyncio.run(verify_and_pull(rack.client(service), tmp_path, {"first": REAL_MODEL, "second": folder}))
    assert service.stop() == 0


async def push(client: ModelManagerClient, folder: Path, model: str, model_type: str) -> None:
    async with client:
        await client.push(folder, model, "1.0.0", metadata={"type": model_type})


async def verify_and_pull(client: ModelManagerClient, folder: Path, sources: dict[str, Path]) -> None:
    """The worker finds the models good, and what comes back is what was pushed."""
    async with client:
        for model, source in sources.items():
            outcome = await client.outcome(await client.validate_model(model))
            assert outcome["isValid"] is True
            await client.pull(model, destination=folder / f"pulled-{model}")
            assert contents(folder / f"pulled-{model}") == contents(source)


# --- under many small stores ---


@dataclass
class Ledger:
    """What a worker acknowledged, kept outside of it: the checksum by model."""

    checksums: dict[str, str] = field(default_factory=dict)
    in_doubt: set[str] = field(default_factory=set)

    async def store_until_killed(self, url: str, name: str) -> None:
        """Store one model after the other until there is no answer any more."""
        async with aiohttp.ClientSession() as session:
            number = 0
            while True:
                number += 1
                model, data = f"{name}-{number}", f"{name} {number}".encode() * 20
                self.in_doubt.add(model)
                request = {
                    "modelId": model,
                    "metadata": {"type": "custom"},
                    "modelData": base64.b64encode(data).decode(),
                }
                try:
                    async with session.post(f"{url}/api/models", json=request) as answer:
                        reply = await answer.json()
                        status = answer.status
                except aiohttp.ClientError:
                    return
                assert status == 201, reply
                assert reply["checksum"] == digest_of(hashlib.sha256(data).hexdigest())
                self.in_doubt.remove(model)
                self.checksums[model] = reply["checksum"]

    async def verify(self, url: str, models: set[str]) -> None:
        """Every acknowledged model is listed with its checksum, nothing else is, and the bytes of `models` are it."""
        async with aiohttp.ClientSession() as session:
            listed = await listing(session, url)
            assert self.checksums.items() <= listed.items()
            assert listed.keys() <= self.checksums.keys() | self.in_doubt
            self.checksums, self.in_doubt = listed, set()
            for model in models:
                async with session.get(f"{url}/api/models/{model}/versions/1.0.0/content") as answer:
                    assert digest_of(hashlib.sha256(await answer.read()).hexdigest()) == listed[model]


async def listing(session: aiohttp.ClientSession, url: str) -> dict[str, str]:
    """The checksum of every model."""
    found: dict[str, str] = {}
    query = {"limit": "1000"}
    while True:
        async with session.get(f"{url}/api/models", params=query) as answer:
            page = await answer.json()
        found |= {entry["modelId"]: entry["checksum"] for entry in page["models"]}
        if "nextCursor" not in page:
            return found
        query["cursor"] = page["nextCursor"]


async def test_every_acknowledged_store_survives_being_killed_at_random_moments(processes: Processes) -> None:
    choose = random.Random(11)
    ledger = Ledger()
    service = processes.start().until_ready()
    for round_number in range(ROUNDS):
        before = set(ledger.checksums)
        wanted = len(before) + choose.randint(1, 100)
        async with asyncio.TaskGroup() as group:
            callers = [
                group.create_task(ledger.store_until_killed(service.url, f"r{round_number}-c{caller}"))
                for caller in range(CALLERS)
            ]
            while len(ledger.checksums) < wanted and not any(caller.done() for caller in callers):
                await asyncio.sleep(0.001)
            service.process.kill()
        service.kill()
        acknowledged = set(ledger.checksums) - before
        assert len(acknowledged) >= wanted - len(before)
        service = processes.start().until_ready()
        await ledger.verify(service.url, acknowledged)
    assert service.stop() == 0
