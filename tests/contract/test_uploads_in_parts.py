"""What uploads ask of a store that takes parts: no more than they need, and nothing of it is left behind."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ModelManagerError
from tests.rack import LocalRack
from worker.context import Context
from worker.storage.blobstore import BegunUpload, BlobInfo, BlobStat, PartPlan, SignedPart, UploadedPart
from worker.storage.memory import MemoryStore

FILES = 50


class Parts:
    """Uploads in parts of which none ever comes; `open` has those that were begun, by their id."""

    def __init__(self) -> None:
        self.open: dict[str, BegunUpload] = {}
        self.begins = 0
        self.asked: list[str] = []
        self.going_on = self.most_at_once = 0
        self.begin_s = 0.0
        self.away = False

    async def begin(self, key: str, *, info: BlobInfo, size: int, sha256: str) -> PartPlan:
        self.going_on += 1
        self.most_at_once = max(self.most_at_once, self.going_on)
        try:
            await asyncio.sleep(self.begin_s)
        finally:
            self.going_on -= 1
        self.begins += 1
        upload = BegunUpload(key, f"upload-{self.begins}", time.time())
        self.open[upload.upload_id] = upload
        return PartPlan(upload.upload_id, 10, 1)

    async def sign(
        self, key: str, upload_id: str, number: int, *, sha256: str, length: int, expires_s: int
    ) -> SignedPart:
        return SignedPart(f"http://store/{upload_id}/{number}", {})

    async def parts(self, key: str, upload_id: str) -> dict[int, UploadedPart]:
        self.asked.append(key)
        return {}

    async def complete(self, key: str, upload_id: str, parts: Mapping[int, UploadedPart]) -> BlobStat:
        raise ModelManagerError("ERR_CONFLICT")

    async def abort(self, key: str, upload_id: str) -> None:
        if self.away:
            raise ModelManagerError("ERR_STORAGE_UNAVAILABLE")
        self.open.pop(upload_id, None)

    async def begun(self) -> AsyncIterator[BegunUpload]:
        for upload in list(self.open.values()):
            yield upload


class PartsStore(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.direct_uploads = Parts()  # type: ignore[assignment]


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[LocalRack]:
    rack = LocalRack(tmp_path, store=PartsStore()).open()
    yield rack
    await rack.close()


@pytest.fixture
def parts(rack: LocalRack) -> Parts:
    direct = rack.store.direct_uploads
    assert isinstance(direct, Parts)
    return direct


def wanted(count: int = FILES) -> dict[str, Any]:
    files = [
        {"path": f"f{n}", "size": 5, "sha256": f"sha256:{hashlib.sha256(b'%d' % n).hexdigest()}"} for n in range(count)
    ]
    return {"modelId": "net", "version": "1.0.0", "files": files}


async def create(rack: LocalRack, *, within_s: float | None = None) -> Any:
    deadline = None if within_s is None else time.monotonic() + within_s
    return await rack.dispatcher.call("createUpload", wanted(), Context(deadline=deadline))


async def gone(parts: Parts) -> None:
    async with asyncio.timeout(5):
        while parts.open:
            await asyncio.sleep(0.01)


async def test_an_upload_that_is_cut_off_while_it_begins_leaves_no_parts(rack: LocalRack, parts: Parts) -> None:
    parts.begin_s = 0.05
    with pytest.raises(ModelManagerError, match="ERR_DEADLINE_EXCEEDED"):
        await create(rack, within_s=0.15)
    assert 0 < parts.begins < FILES
    await gone(parts)
    assert not rack.registry.catalog.uploads


async def test_an_upload_that_is_not_recorded_leaves_no_parts(
    rack: LocalRack, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*arguments: Any, **named: Any) -> Any:
        raise ModelManagerError("ERR_STORAGE_FULL")

    monkeypatch.setattr(rack.registry, "transact", full)
    with pytest.raises(ModelManagerError, match="ERR_STORAGE_FULL"):
        await create(rack)
    assert parts.begins == FILES
    await gone(parts)


async def test_an_upload_that_may_be_recorded_keeps_its_parts(
    rack: LocalRack, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    transact = rack.registry.transact

    async def answered_late(scope: str, decide: Any, **named: Any) -> Any:
        await transact(scope, decide, **named)
        await asyncio.sleep(3600)

    with monkeypatch.context() as patch:
        patch.setattr(rack.registry, "transact", answered_late)
        with pytest.raises(ModelManagerError, match="ERR_DEADLINE_EXCEEDED"):
            await create(rack, within_s=0.2)

        async def unknown(scope: str, decide: Any, **named: Any) -> Any:
            rack.registry.journal.stop("the disk failed")
            raise ModelManagerError("ERR_STORAGE_UNAVAILABLE")

        await rack.clean_up.sweep_parts()
        patch.setattr(rack.registry, "transact", unknown)
        with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
            await create(rack)
    await rack.clean_up.sweep_parts()
    assert len(parts.open) == 2 * FILES
    assert len(rack.registry.catalog.uploads) == 1


async def test_many_files_are_begun_a_few_at_once(rack: LocalRack, parts: Parts) -> None:
    parts.begin_s = 0.005
    reply = await create(rack)
    assert [file["path"] for file in reply["files"]] == [f"f{n}" for n in range(FILES)]
    assert 2 <= parts.most_at_once <= 16


async def test_the_store_is_asked_for_the_parts_of_the_file_that_is_meant(rack: LocalRack, parts: Parts) -> None:
    upload = await create(rack)
    assert all((file["parts"], file["received"]) == (1, []) for file in upload["files"])
    assert parts.asked == []

    signing = {"path": "f7", "parts": [{"number": 1, "sha256": f"sha256:{'0' * 64}"}]}
    signed = await rack.call("getUpload", {"uploadId": upload["uploadId"], **signing})
    assert len(signed["urls"]) == len(parts.asked) == 1
    assert [file["path"] for file in signed["files"] if "received" in file] == ["f7"]
    assert len(signed["files"]) == FILES

    whole = await rack.call("getUpload", {"uploadId": upload["uploadId"]})
    assert len(parts.asked) == 1 + FILES
    assert whole["files"] == upload["files"]


async def test_a_job_that_completes_is_begun_without_asking_the_store(rack: LocalRack, parts: Parts) -> None:
    upload = await create(rack)
    with pytest.raises(ModelManagerError, match="ERR_CONFLICT"):
        await rack.call("completeUpload", {"uploadId": upload["uploadId"], "waitMs": 5000})
    assert len(parts.asked) == 1


async def test_parts_that_no_record_names_are_swept_and_others_are_not(rack: LocalRack, parts: Parts) -> None:
    await create(rack)
    for key in ("blobs/streams", "blobs/left"):
        await parts.begin(key, info=BlobInfo("", "net", "1.0.0", "rack-1"), size=5, sha256="0" * 64)
    rack.registry.pin(["blobs/streams"])
    await rack.clean_up.sweep_parts()
    assert len(parts.open) == FILES + 1
    assert "blobs/left" not in {upload.key for upload in parts.open.values()}


async def test_parts_that_could_not_be_dropped_are_swept_later(rack: LocalRack, parts: Parts) -> None:
    upload = await create(rack)
    parts.away = True
    await rack.call("abortUpload", {"uploadId": upload["uploadId"]})
    assert len(parts.open) == FILES
    cleaning = asyncio.create_task(rack.clean_up.run())
    await asyncio.sleep(0.1)
    parts.away = False
    await gone(parts)
    cleaning.cancel()
    await asyncio.wait([cleaning])
