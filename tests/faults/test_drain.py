"""The end: not ready at once, no new writes, what is under way finishes, and the next process goes on from there."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.process import REAL_MODEL, Processes, Service
from worker.app import App
from worker.client.amqp_caller import AmqpCaller
from worker.client.client import ModelManagerClient
from worker.journal.lock import is_held
from worker.settings import load_settings
from worker.stall import LoopWatch, Supervisor
from worker.upkeep.archive import Archive

CONTENT = os.urandom(40_000_000)  # more than the buffers between two processes hold
SENT_BEFORE = 1_000_000
JOBS = 8


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


class Connection:
    """A client that reads and writes when the test says so."""

    def __init__(self, service: Service, head: str) -> None:
        address = urlsplit(service.url)
        assert address.hostname is not None
        self._socket = socket.create_connection((address.hostname, address.port), timeout=60)
        self.send(f"{head}\r\nHost: {address.netloc}\r\n\r\n".encode())

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read(self, count: int) -> bytes:
        return self._socket.recv(count, socket.MSG_WAITALL)

    def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        with self._socket, self._socket.makefile("rb") as stream:
            return stream.read()


def split(reply: bytes) -> tuple[int, bytes]:
    """The status and the body."""
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def download(service: Service) -> Connection:
    return Connection(service, "GET /api/models/large/versions/1.0.0/content HTTP/1.1")


def begin_upload(processes: Processes, service: Service) -> Connection:
    """An upload of CONTENT as `late`, whose first bytes have arrived."""
    blobs = processes.folder / "data/models/blobs"
    before = len(list(blobs.iterdir()))
    line = "PUT /api/models/late/versions/1.0.0/content?type=custom HTTP/1.1"
    uploading = Connection(service, f"{line}\r\nContent-Length: {len(CONTENT)}")
    uploading.send(CONTENT[:SENT_BEFORE])
    service.until(lambda: len(list(blobs.iterdir())) > before, "the upload is under way")
    return uploading


def test_a_download_and_an_upload_that_are_under_way_finish(processes: Processes) -> None:
    service = processes.start().until_ready()
    assert service.put("large", CONTENT).status == 201
    downloading = download(service)
    begun = downloading.read(1000)
    uploading = begin_upload(processes, service)

    service.signal(signal.SIGTERM)
    service.until(lambda: not service.ready, "not ready", within_s=5)
    uploading.send(CONTENT[SENT_BEFORE:])
    status, body = split(uploading.rest())
    assert status == 201, body
    status, body = split(begun + downloading.rest())
    assert status == 200
    assert body == CONTENT
    assert service.status() == 0

    again = processes.start().until_ready()
    assert sorted(entry["modelId"] for entry in again.get("/api/models")["models"]) == ["large", "late"]
    late = again.send("GET", "/api/models/late/versions/1.0.0/content")
    assert late.body == CONTENT
    assert again.stop() == 0


def test_while_a_transfer_finishes_probes_say_why_and_new_writes_are_refused(processes: Processes) -> None:
    service = processes.start().until_ready()
    uploading = begin_upload(processes, service)
    service.signal(signal.SIGTERM)
    service.until(lambda: not service.ready, "not ready", within_s=5)

    assert service.checks().get("draining") == {"ok": False, "reason": "the worker is shutting down"}
    assert service.send("GET", "/livez").status == 200
    for refused in (service.put("refused", b"bytes"), service.send("POST", "/api/models/late/restore")):
        assert (refused.status, refused.json["error"]["code"]) == (503, "ERR_SHUTTING_DOWN")
        assert refused.json["error"]["retryable"] is True
    assert service.process.poll() is None, "it waits for the upload"

    uploading.send(CONTENT[SENT_BEFORE:])
    status, body = split(uploading.rest())
    assert status == 201, body
    assert service.status() == 0


def test_a_transfer_that_does_not_end_is_cut_off_when_the_time_is_over(processes: Processes) -> None:
    service = processes.start(settings={"timeouts.drain": 1}).until_ready()
    assert service.put("large", CONTENT).status == 201
    stuck = download(service)
    begun = stuck.read(1000)
    assert service.stop() == 0
    assert len(begun + stuck.rest()) < len(CONTENT)


def test_a_second_signal_ends_it_at_once(processes: Processes) -> None:
    service = processes.start(settings={"timeouts.drain": 600}).until_ready()
    assert service.put("large", CONTENT).status == 201
    stuck = download(service)
    stuck.read(1000)
    service.signal(signal.SIGTERM)
    service.until(lambda: not service.ready, "not ready")
    service.signal(signal.SIGTERM)
    assert service.status(within_s=10) == 128 + signal.SIGTERM
    assert len(stuck.rest()) < len(CONTENT)


def test_jobs_that_were_running_are_resumed_by_the_next_process_and_end(processes: Processes) -> None:
    one_at_a_time = {"limits.jobs": 1}
    service = processes.start(settings=one_at_a_time).until_ready()
    weights = max((path for path in REAL_MODEL.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    stored = service.send("PUT", "/api/models/real/versions/1.0.0/content?type=safetensors", weights.read_bytes())
    assert stored.status == 201
    jobs = []
    for _ in range(JOBS):
        begun = service.send("POST", "/api/models/real/versions/1.0.0/validate", {"waitMs": 0})
        assert begun.status == 202
        jobs.append(begun.json["jobId"])
    states = [service.get(f"/api/jobs/{job}")["state"] for job in jobs]
    assert {"running", "queued"} <= set(states)
    assert service.stop() == 0

    again = processes.start(settings=one_at_a_time).until_ready()
    [started] = again.events("worker_started")
    assert 0 < started["jobs_resumed"] <= JOBS
    for job in jobs:
        ended = again.get(f"/api/jobs/{job}?waitMs=5000")
        assert (ended["state"], ended["result"]["isValid"]) == ("succeeded", True)
    assert again.stop() == 0


async def test_the_registry_is_its_next_owner_s_only_when_the_archive_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, seen = Archive.finish, []

    async def watched(archive: Archive, timeout_s: float) -> None:
        await finish(archive, timeout_s)
        seen.append((is_held(tmp_path / "registry"), (tmp_path / "models/journal/1/CLOSED").exists()))

    monkeypatch.setattr(Archive, "finish", watched)
    (tmp_path / "common.json").write_text("{}")
    places = {"registry.path": str(tmp_path / "registry"), "storage.path": str(tmp_path / "models"), "http.port": 0}
    loaded = load_settings(places, environment={"MODEL_MANAGER_CONFIG": str(tmp_path / "common.json")})
    stop, app = asyncio.Event(), App(loaded, LoopWatch(60.0, Supervisor({})), broker=False)
    running = asyncio.create_task(app.run(stop))
    async with asyncio.timeout(30):
        while not (app.readiness.checks and app.readiness.ready):
            await asyncio.sleep(0.02)
    stop.set()
    assert await running == 0
    assert seen == [(True, True)]
    assert not is_held(tmp_path / "registry")


async def test_requests_on_the_queue_when_the_worker_stops_are_answered_by_the_next_one(
    processes: Processes, amqp_url: str, rack: str
) -> None:
    settings = {"amqp.url": amqp_url, "rack": rack}
    service = await asyncio.to_thread(processes.start("worker", settings=settings).until_ready)
    data = os.urandom(1000)
    checksum = f"sha256:{hashlib.sha256(data).hexdigest()}"
    async with ModelManagerClient(AmqpCaller(amqp_url, rack), timeout_s=60) as client:
        text = base64.b64encode(data).decode()
        stores = [
            asyncio.create_task(client.store_model(f"model-{number}", {"type": "custom"}, model_data=text))
            for number in range(300)
        ]
        await asyncio.wait(stores, return_when=asyncio.FIRST_COMPLETED)
        service.process.terminate()
        assert await asyncio.to_thread(service.status) == 0
        assert not all(store.done() for store in stores), "some were left for the next process"
        again = await asyncio.to_thread(processes.start("worker", settings=settings).until_ready)
        replies = await asyncio.gather(*stores, return_exceptions=True)
        assert [reply for reply in replies if isinstance(reply, BaseException)] == []
        assert {reply["checksum"] for reply in replies if not isinstance(reply, BaseException)} == {checksum}
        assert (await client.get_storage_stats())["registry"]["models"] == 300
    assert await asyncio.to_thread(again.stop) == 0
