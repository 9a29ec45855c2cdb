"""Jobs: accepted at once, recorded, resumed after a crash, cancelled on request; what validateModel finds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save

from schemas.deadline import deadline
from schemas.errors import ModelManagerError
from tests.rack import LocalRack
from worker.context import Context
from worker.jobs.runner import Commit, Progress
from worker.storage.blobstore import StoredBlob
from worker.storage.disk import DiskStore


class SlowDiskStore(DiskStore):
    """A disk whose verification reads wait until they are let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.let_go = asyncio.Event()

    async def hash(self, key: str, progress: Callable[[int], None] | None = None) -> StoredBlob:
        await self.let_go.wait()
        return await super().hash(key, progress)


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[LocalRack]:
    rack = LocalRack(tmp_path).open()
    yield rack
    await rack.close()


async def ended(rack: LocalRack, job: str) -> Any:
    return await rack.call("getJob", {"jobId": job, "waitMs": 5000})


async def test_a_job_answers_with_its_result_if_it_is_there_in_time(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"x")
    report = await rack.call("validateModel", {"modelId": "net"})
    assert (report["isValid"], report["actualChecksum"]) == (True, report["expectedChecksum"])


async def test_a_job_that_takes_longer_answers_with_its_id(tmp_path: Path) -> None:
    store = SlowDiskStore(tmp_path / "models")
    rack = LocalRack(tmp_path, store=store).open()
    await rack.store_bytes("net", "1.0.0", b"x")
    accepted = await rack.call("validateModel", {"modelId": "net", "waitMs": 10})
    assert set(accepted) == {"success", "jobId", "state"}
    running = await rack.call("getJob", {"jobId": accepted["jobId"]})
    assert (running["state"], running["progress"]["totalBytes"]) == ("running", 1)
    store.let_go.set()
    status = await ended(rack, accepted["jobId"])
    assert status["state"] == "succeeded"
    assert status["result"]["isValid"] is True
    await rack.close()


async def test_a_job_can_be_cancelled(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path, store=SlowDiskStore(tmp_path / "models")).open()
    await rack.store_bytes("net", "1.0.0", b"x")
    job = (await rack.call("validateModel", {"modelId": "net", "waitMs": 0}))["jobId"]
    assert (await rack.call("cancelJob", {"jobId": job}))["state"] == "cancelled"
    assert (await ended(rack, job))["state"] == "cancelled"
    await rack.close()


def pausing(rack: LocalRack, method: str) -> None:
    """Let there be some turns of the loop before such a job comes to its commit."""
    body = rack.service.jobs._bodies[method]

    async def paused(params: dict[str, Any], progress: Progress) -> Commit:
        for _ in range(5):
            await asyncio.sleep(0)
        return await body(params, progress)

    rack.service.jobs._bodies[method] = paused


async def test_a_job_is_cancelled_without_its_effect_or_succeeds_with_it_whenever_it_is_asked(rack: LocalRack) -> None:
    states = set()
    for turns in range(30):
        stored = await rack.store_bytes(f"net-{turns}", "1.0.0", str(turns).encode())
        (rack.folder / "models" / stored["storageKey"]).write_bytes(b"rotten")
        version = {"modelId": f"net-{turns}"}
        begun = await rack.call("validateModel", {**version, "waitMs": 0})
        for _ in range(turns):
            await asyncio.sleep(0.001)  # it reads in a thread
        state = (await rack.call("cancelJob", {"jobId": begun["jobId"]}))["state"]
        assert (await ended(rack, begun["jobId"]))["state"] == state
        found = (await rack.call("getModelMetadata", version))["state"]
        assert (state, found) in {("cancelled", "available"), ("succeeded", "quarantined")}
        states.add(state)
    assert states == {"cancelled", "succeeded"}


async def test_a_job_that_fails_when_it_is_cancelled_ends_once(rack: LocalRack) -> None:
    ends: list[str] = []
    rack.registry.listen(lambda entry: ends.append(entry.record["job"]) if entry.op == "job.end" else None)
    file = {"path": "model.bin", "size": 1, "sha256": "sha256:" + "0" * 64}
    upload = await rack.call("createUpload", {"modelId": "net", "version": "1.0.0", "files": [file]})
    pausing(rack, "completeUpload")
    states = set()
    for turns in range(30):
        begun = await rack.call("completeUpload", {"uploadId": upload["uploadId"], "waitMs": 0})
        for _ in range(turns):
            await asyncio.sleep(0)
        state = (await rack.call("cancelJob", {"jobId": begun["jobId"]}))["state"]
        assert (await ended(rack, begun["jobId"]))["state"] == state
        assert ends.count(begun["jobId"]) == 1
        states.add(state)
    assert states == {"cancelled", "failed"}


async def test_a_job_is_cancelled_though_who_asked_for_it_gave_up_waiting(tmp_path: Path) -> None:
    store = SlowDiskStore(tmp_path / "models")
    gives_up = asyncio.Event()

    async def reluctant(key: str, progress: Callable[[int], None] | None = None) -> StoredBlob:
        try:
            await store.let_go.wait()
        finally:
            await gives_up.wait()
        raise AssertionError("it is cancelled")

    store.hash = reluctant  # type: ignore[method-assign]
    rack = LocalRack(tmp_path, store=store).open()
    await rack.store_bytes("net", "1.0.0", b"x")
    job = (await rack.call("validateModel", {"modelId": "net", "waitMs": 0}))["jobId"]
    with pytest.raises(ModelManagerError, match="ERR_DEADLINE_EXCEEDED"):
        await rack.dispatcher.call("cancelJob", {"jobId": job}, Context(deadline=time.monotonic() + 0.05))
    again = asyncio.create_task(rack.call("cancelJob", {"jobId": job}))
    await asyncio.sleep(0.01)
    gives_up.set()
    assert (await again)["state"] == (await ended(rack, job))["state"] == "cancelled"
    await rack.close()


async def test_a_job_that_was_cut_off_is_done_after_the_next_boot(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path, store=SlowDiskStore(tmp_path / "models")).open()
    await rack.store_bytes("net", "1.0.0", b"x")
    job = (await rack.call("validateModel", {"modelId": "net", "waitMs": 0}))["jobId"]
    await rack.close()
    again = LocalRack(tmp_path).open()
    assert (await ended(again, job))["state"] == "succeeded"
    await again.close()


async def test_a_job_outlives_the_deadline_of_the_request_that_began_it(tmp_path: Path) -> None:
    store = SlowDiskStore(tmp_path / "models")
    known: list[float | None] = []

    async def hash_(key: str, progress: Callable[[int], None] | None = None) -> StoredBlob:
        known.append(deadline.get())
        return await DiskStore.hash(store, key, progress)

    store.hash = hash_  # type: ignore[method-assign]
    rack = LocalRack(tmp_path, store=store).open()
    await rack.store_bytes("net", "1.0.0", b"x")
    limited = Context(deadline=time.monotonic() + 60)
    await rack.dispatcher.call("validateModel", {"modelId": "net", "waitMs": 5000}, limited)
    assert known == [None]
    await rack.close()


async def test_a_job_runs_though_the_request_that_began_it_gave_up_before_its_record(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"x")
    begun = asyncio.Event()
    rack.registry.listen(lambda entry: begun.set() if entry.op == "job.begin" else None)
    request = asyncio.create_task(rack.call("validateModel", {"modelId": "net"}))
    while not rack.registry.journal.stats().queued:
        await asyncio.sleep(0)
    request.cancel()
    await begun.wait()
    (job,) = rack.registry.catalog.jobs
    assert (await ended(rack, job))["state"] == "succeeded"


async def test_no_more_jobs_run_at_once_than_there_are_places(tmp_path: Path) -> None:
    store = SlowDiskStore(tmp_path / "models")
    rack = LocalRack(tmp_path, store=store).open()
    await rack.store_bytes("net", "1.0.0", b"x")
    jobs = [(await rack.call("validateModel", {"modelId": "net", "waitMs": 0}))["jobId"] for _ in range(5)]
    await asyncio.sleep(0.05)
    states = [(await rack.call("getJob", {"jobId": job}))["state"] for job in jobs]
    assert sorted(states) == ["queued"] * 3 + ["running"] * 2
    store.let_go.set()
    assert {(await ended(rack, job))["state"] for job in jobs} == {"succeeded"}
    await rack.close()


async def test_jobs_beyond_a_bound_are_refused_for_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.jobs.runner._OPEN_MOST", 3)
    store = SlowDiskStore(tmp_path / "models")
    rack = LocalRack(tmp_path, store=store).open()
    await rack.store_bytes("net", "1.0.0", b"x")
    jobs = [(await rack.call("validateModel", {"modelId": "net", "waitMs": 0}))["jobId"] for _ in range(3)]
    with pytest.raises(ModelManagerError) as refused:
        await rack.call("validateModel", {"modelId": "net", "waitMs": 0})
    assert (refused.value.code, refused.value.details["retryAfterMs"]) == ("ERR_OVERLOADED", 5000)
    store.let_go.set()
    assert {(await ended(rack, job))["state"] for job in jobs} == {"succeeded"}
    assert (await rack.call("validateModel", {"modelId": "net"}))["isValid"] is True
    await rack.close()


async def test_the_result_of_a_job_is_read_from_its_record_also_after_a_restart(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path).open()
    await rack.store_bytes("net", "1.0.0", b"x")
    job = (await rack.call("validateModel", {"modelId": "net", "waitMs": 0}))["jobId"]
    status = await ended(rack, job)
    await rack.close()
    again = LocalRack(tmp_path).open()
    assert (await ended(again, job))["result"] == status["result"]
    assert status["result"]["isValid"] is True
    await again.close()


async def test_wrong_bytes_quarantine_a_version_until_they_are_right_again(rack: LocalRack) -> None:
    stored = await rack.store_bytes("net", "1.0.0", b"right")
    path = rack.folder / "models" / stored["storageKey"]
    path.write_bytes(b"wrong")
    report = await rack.call("validateModel", {"modelId": "net"})
    assert report["isValid"] is False
    assert report["findings"][0]["code"] == "checksum-mismatch"
    assert (await rack.call("getModelMetadata", {"modelId": "net"}))["state"] == "quarantined"
    for delivery in ("inline", "url"):
        with pytest.raises(ModelManagerError, match="ERR_CHECKSUM_MISMATCH"):
            await rack.call("getModel", {"modelId": "net", "delivery": delivery})
    path.write_bytes(b"right")
    assert (await rack.call("validateModel", {"modelId": "net"}))["isValid"] is True
    assert (await rack.call("getModel", {"modelId": "net"}))["modelData"]


async def test_missing_bytes_are_found(rack: LocalRack) -> None:
    stored = await rack.store_bytes("net", "1.0.0", b"x")
    (rack.folder / "models" / stored["storageKey"]).unlink()
    report = await rack.call("validateModel", {"modelId": "net"})
    assert (report["isValid"], report["actualChecksum"]) == (False, None)
    assert report["findings"][0]["code"] == "bytes-missing"


async def test_validation_looks_into_files_that_were_stored_without(tmp_path: Path) -> None:
    careless = LocalRack(tmp_path, check_formats=False).open()
    broken = save({"w": numpy.zeros(4, dtype=numpy.float32)})[:-1]
    await careless.store_bytes("net", "1.0.0", broken, type="safetensors")
    await careless.close()
    rack = LocalRack(tmp_path).open()
    report = await rack.call("validateModel", {"modelId": "net"})
    assert report["isValid"] is False
    assert all(file["isValid"] for file in report["files"])
    assert {finding["severity"] for finding in report["findings"]} >= {"error"}
    await rack.close()


async def test_replication_is_recorded_announced_and_honest(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"x")
    head = rack.registry.journal.head
    reply = await rack.call("replicateModel", {"modelId": "net", "peers": ["rack-7", "rack-8", "rack-7", "rack-1"]})
    assert (reply["totalPeers"], reply["successfulReplications"], reply["failedReplications"]) == (2, 0, 0)
    assert {result["state"] for result in reply["results"]} == {"pending"}
    assert {"rack-7", "rack-8"} <= set((await rack.call("getModelMetadata", {"modelId": "net"}))["replicas"])
    changes = await rack.call("getChanges", {"epoch": 1, "after": head})
    assert set(changes["changes"][0]["data"]["replicas"]) >= {"rack-7", "rack-8"}
