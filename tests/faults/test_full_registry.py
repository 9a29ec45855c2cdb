"""A worker whose registry's disk is full: what a request gets, what it says of itself, and how it comes out of it."""

from __future__ import annotations

import asyncio
import base64
import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from schemas.errors import ModelManagerError
from tests.contract.test_compaction import store, update
from tests.process import Answer, Processes, Service
from tests.small_disk import MIB, MountedDisk, mounted
from worker.client.amqp_caller import AmqpCaller
from worker.journal import Files, verify
from worker.journal.manifest import Manifest
from worker.journal.reserve import RESERVE
from worker.metrics import Metrics
from worker.registry import Change, Registry
from worker.upkeep.compaction import Compaction, CompactionFailed, NoRoomToCompact

PATCH = "/api/models/acme/kept/versions/1.0.0"
UPLOAD = {
    "modelId": "acme/other",
    "version": "1.0.0",
    "files": [{"path": "a", "size": 1, "sha256": f"sha256:{1:064x}"}],
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[MountedDisk]:
    """With room for the reserve twice, and a little."""
    with mounted(tmp_path / "disk", 72 * MIB) as small:
        yield small


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


def code(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.json["error"]["code"]


def store_until_refused(service: Service) -> list[str]:
    """The models that were acknowledged before the first that was not."""
    stored: list[str] = []
    for number in range(1000):
        answer = service.put(f"acme/model-{number}", b"bytes")
        if answer.status != 201:
            assert code(answer) == (507, "ERR_STORAGE_FULL")
            return stored
        stored.append(f"acme/model-{number}")
    raise AssertionError("the disk did not get full")


def metric(of: Service | Metrics, name: str) -> float:
    scrape = of.render()[1] if isinstance(of, Metrics) else of.send("GET", "/metrics").body
    found = re.search(rf"^model_manager_{re.escape(name)} (\S+)$", scrape.decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def put_by_headers(service: Service, path: str) -> bytes:
    """What a client that waits for `100 Continue` gets before it has sent any of its 5 bytes."""
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        headers = f"Host: {address.netloc}\r\nContent-Length: 5\r\nExpect: 100-continue\r\nConnection: close\r\n"
        connection.sendall(f"PUT {path} HTTP/1.1\r\n{headers}\r\n".encode())
        return connection.recv(65536).splitlines()[0]


def models(service: Service) -> set[str]:
    return {entry["modelId"] for entry in service.get("/api/models?limit=1000")["models"]}


def test_a_worker_with_a_full_registry_deletes_reads_tells_and_recovers(
    processes: Processes, disk: MountedDisk
) -> None:
    settings = {"registry.path": str(disk.folder)}
    service = processes.start(settings=settings).until_ready()
    assert service.put("acme/kept", b"kept").status == 201
    begun = service.send("POST", "/api/uploads", UPLOAD).json
    file = urlsplit(begun["files"][0]["url"])
    assert metric(service, "registry_full") == 0
    disk.fill()
    stored = store_until_refused(service)

    # What grows is refused before its bytes are taken.
    blobs = set((service.folder / "data/models/blobs").iterdir())
    content = "/api/models/acme/more/versions/1.0.0/content?type=custom"
    assert put_by_headers(service, content).startswith(b"HTTP/1.1 507")
    assert put_by_headers(service, f"{file.path}?{file.query}").startswith(b"HTTP/1.1 507")
    inline = {"modelId": "acme/more", "metadata": {"type": "custom"}, "modelData": "AAAA"}
    assert code(service.send("POST", "/api/models", inline)) == (507, "ERR_STORAGE_FULL")
    assert code(service.send("POST", "/api/uploads", UPLOAD)) == (507, "ERR_STORAGE_FULL")
    assert code(service.send("PATCH", PATCH, {"metadata": {"a": 1}})) == (507, "ERR_STORAGE_FULL")
    assert set((service.folder / "data/models/blobs").iterdir()) == blobs

    # What reads and what frees goes on.
    assert service.send("GET", "/api/models/acme/kept/versions/1.0.0/content").body == b"kept"
    assert models(service) == {"acme/kept", *stored}
    for model in stored:
        assert service.send("DELETE", f"/api/models/{model}").status == 200
    assert service.send("DELETE", f"/api/uploads/{begun['uploadId']}").status == 200

    # And it tells.
    service.until(lambda: not service.ready, "not ready")
    reason = "The registry's disk is full: only deletes are taken."
    assert service.checks()["registry"] == {"ok": False, "reason": reason}
    assert service.send("GET", "/livez").status == 200
    assert metric(service, "registry_full") == 1
    assert metric(service, "ready") == 0

    # A restart changes nothing.
    assert service.stop() == 0
    assert verify(disk.folder).damage is None
    disk.fill()
    service = processes.start(settings=settings)
    service.until(lambda: service.checks().get("registry", {}).get("reason") == reason, "the boot")
    assert models(service) == {"acme/kept"}
    assert code(service.put("acme/more", b"bytes")) == (507, "ERR_STORAGE_FULL")
    assert service.send("DELETE", "/api/models/acme/kept").status == 200

    disk.empty()
    service.until_ready()
    assert service.put("acme/more", b"bytes").status == 201
    assert metric(service, "registry_full") == 0
    assert (disk.folder / RESERVE).stat().st_size == 32 * MIB
    assert [len(service.events(name)) for name in ("registry_full", "registry_has_room")] == [1, 1]
    assert service.stop() == 0


async def test_requests_on_the_queue_are_answered_while_the_registry_is_full(
    processes: Processes, disk: MountedDisk, amqp_url: str, rack: str
) -> None:
    settings = {"registry.path": str(disk.folder), "amqp.url": amqp_url, "rack": rack}
    service = await asyncio.to_thread(processes.start("worker", settings=settings).until_ready)
    assert (await asyncio.to_thread(service.put, "acme/kept", b"kept")).status == 201
    disk.fill()
    stored = await asyncio.to_thread(store_until_refused, service)
    await asyncio.to_thread(service.until, lambda: not service.ready, "not ready")
    caller = AmqpCaller(amqp_url, rack)
    with pytest.raises(ModelManagerError) as refused:
        await caller.call("setAlias", {"modelId": "acme/kept", "alias": "a", "version": "1.0.0"}, timeout_s=30)
    assert (refused.value.code, refused.value.retryable) == ("ERR_STORAGE_FULL", False)
    found = await caller.call("getModel", {"modelId": "acme/kept", "version": "1.0.0"}, timeout_s=30)
    assert base64.b64decode(found["modelData"]) == b"kept"
    for model in ("acme/kept", *stored):
        await caller.call("deleteModel", {"modelId": model, "purge": True}, timeout_s=30)
    assert (await caller.call("listModels", {}, timeout_s=30))["models"] == []
    disk.empty()
    await asyncio.to_thread(service.until_ready)
    assert (await asyncio.to_thread(service.put, "acme/more", b"more")).status == 201
    await caller.close()
    assert await asyncio.to_thread(service.stop) == 0


# --- compaction ------------------------------------------------------------------------------------------------------


async def opened(folder: Path) -> Registry:
    registry = Registry(folder)
    registry.open()
    registry.start()
    return registry


async def filled(folder: Path, *, updates: int, note: str = "") -> Registry:
    registry = await opened(folder)
    await append(registry, "store", store("m", "1", 1))
    for number in range(updates):
        record = update("m", "1", number)
        await append(registry, "update", {**record, "metadata": {**record["metadata"], "text": note}})
    return registry


async def append(registry: Registry, op: str, record: dict[str, Any]) -> None:
    await registry.transact("m", lambda: Change(op, record))


async def test_compaction_on_a_full_disk_has_the_room_of_the_reserve(disk: MountedDisk) -> None:
    registry = await filled(disk.folder, updates=100, note="x" * 20_000)
    metrics = Metrics("rack-1")
    disk.fill()
    done = await Compaction(registry, observe=metrics.journal).compact()
    assert done.bytes < done.bytes_before / 20
    assert registry.journal.full_since is not None
    await append(registry, "delete", {"model": "m", "versions": ["1"], "whole": True, "replicas": [], "deleted": 5})
    await registry.close()
    assert verify(disk.folder).damage is None
    assert metric(metrics, 'journal_compactions_total{result="ok"}') == 1
    assert metric(metrics, "journal_compaction_seconds_count") == 1
    assert metric(metrics, 'journal_compaction_bytes{side="before"}') == done.bytes_before
    assert metric(metrics, 'journal_compaction_bytes{side="after"}') == done.bytes


async def test_compaction_without_room_says_what_it_needs_and_leaves_nothing(tmp_path: Path, disk: MountedDisk) -> None:
    registry = await filled(tmp_path / "roomy", updates=1, note="x" * 500_000)
    await registry.close()
    shutil.copytree(tmp_path / "roomy", disk.folder)
    (disk.folder / RESERVE).unlink()
    disk.fill(leave=200_000)
    registry = await opened(disk.folder)
    metrics = Metrics("rack-1")
    with pytest.raises(NoRoomToCompact, match=r"^\d+ bytes are free, and \d+ are needed$"):
        await Compaction(registry, observe=metrics.journal).compact()
    names = {path.name for path in disk.folder.iterdir()}
    assert not [name for name in names if name.startswith("base-") or name.endswith(".tmp")]
    assert metric(metrics, 'journal_compactions_total{result="no_room"}') == 1
    disk.empty()
    await Compaction(registry).compact()
    assert await registry.look(lambda: registry.catalog.resolve("m", "1").revision) == 0
    await registry.close()
    assert verify(disk.folder).damage is None


async def test_a_base_that_cannot_be_adopted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = await filled(tmp_path, updates=5)
    publish = Manifest.publish

    def without_room(manifest: Manifest, files: Files, folder: Path) -> None:
        if manifest.base is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish(manifest, files, folder)

    monkeypatch.setattr(Manifest, "publish", without_room)
    with pytest.raises(NoRoomToCompact):
        await Compaction(registry).compact()
    assert not list(tmp_path.glob("base-*"))
    await registry.close()


async def test_a_compaction_without_file_descriptors_is_tried_again_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = await filled(tmp_path, updates=5)
    journal = registry.journal
    manifest = await journal.rotate()
    left = tmp_path / f"base-{manifest.generation + 1:010d}.jsonl.tmp"
    left.write_bytes(b"left")

    async def refused(*arguments: Any, **named: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "create_subprocess_exec", refused)
        with pytest.raises(CompactionFailed, match="Too many open files"):
            await Compaction(registry).compact()
        assert not left.exists()
        running = asyncio.create_task(Compaction(registry, min_bytes=1, period_s=0.01).run())
        await asyncio.sleep(0.2)
    assert not running.done()
    running.cancel()
    await asyncio.wait([running])
    assert (await Compaction(registry).compact()).records == 2
    await registry.close()


async def test_a_compaction_that_fails_half_way_leaves_the_room_it_took(tmp_path: Path) -> None:
    registry = await filled(tmp_path / "registry", updates=5)
    journal = registry.journal
    manifest = await journal.rotate()
    name = f"base-{manifest.generation + 1:010d}.jsonl"
    (journal.folder / f"{name}.tmp").mkdir()  # so that the compacting process cannot write it
    index = journal.folder / f"base-{manifest.generation + 1:010d}.idx.tmp"
    index.write_bytes(b"left")
    with pytest.raises(Exception, match="ended with status 1"):
        await Compaction(registry).compact()
    assert not index.exists()
    (journal.folder / f"{name}.tmp").rmdir()
    await asyncio.wait_for(Compaction(registry).compact(), 30)
    await registry.close()
