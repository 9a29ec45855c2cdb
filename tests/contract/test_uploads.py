"""Uploads on disk and on a real object store: nothing is visible before every byte is there and right."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from deploy.local import ObjectStore
from schemas.errors import ModelManagerError
from tests.rack import LocalRack
from worker.context import Context
from worker.storage.retrying import RetryingStore
from worker.storage.s3 import S3Store

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

PART = 16 * 1024 * 1024


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


def s3_store(store: ObjectStore, bucket: str) -> RetryingStore:
    return RetryingStore(S3Store(endpoint_url=store.endpoint_url, bucket=bucket, prefix="rack-1"))


@pytest.fixture
async def disk(tmp_path: Path) -> AsyncIterator[LocalRack]:
    rack = LocalRack(tmp_path).open()
    yield rack
    await rack.close()


@pytest.fixture
async def s3(
    tmp_path: Path, object_store: ObjectStore, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[LocalRack]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", object_store.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", object_store.secret_key)
    rack = LocalRack(tmp_path / "s3", store=s3_store(object_store, s3_bucket)).open()
    yield rack
    await rack.close()


async def create(rack: LocalRack, **contents: bytes) -> Any:
    files = [{"path": path, "size": len(data), "sha256": digest(data)} for path, data in contents.items()]
    return await rack.call("createUpload", {"modelId": "net", "version": "1.0.0", "files": files})


async def receive(rack: LocalRack, upload: str, path: str, data: bytes) -> None:
    await rack.service.receive_file(upload, path, chunks(data), len(data), context=Context())


async def send_parts(rack: LocalRack, upload: str, path: str, data: bytes, *, part_size: int = PART) -> None:
    """What a caller does: sign each part with its sha256, PUT it."""
    pieces = [data[at : at + part_size] for at in range(0, len(data), part_size)]
    parts = [{"number": n, "sha256": digest(piece)} for n, piece in enumerate(pieces, 1)]
    signed = await rack.call("getUpload", {"uploadId": upload, "path": path, "parts": parts})
    async with aiohttp.ClientSession() as session:
        for address, piece in zip(signed["urls"], pieces, strict=True):
            async with session.put(address["url"], data=piece, headers=address["headers"]) as reply:
                assert reply.status == 200, await reply.text()


async def complete(rack: LocalRack, upload: str) -> Any:
    return await rack.call("completeUpload", {"uploadId": upload, "waitMs": 5000})


async def store(rack: LocalRack, upload: str) -> Any:
    return await rack.call("storeModel", {"modelId": "net", "metadata": {"type": "custom"}, "uploadId": upload})


async def code(call: Any) -> str:
    with pytest.raises(ModelManagerError) as error:
        await call
    return error.value.code


async def listed(rack: LocalRack) -> int:
    count: int = (await rack.call("listModels", {}))["count"]
    return count


async def stored_keys(rack: LocalRack) -> set[str]:
    return {blob.key async for blob in rack.store.list("blobs/")}


async def test_on_disk_files_are_put_to_this_worker(disk: LocalRack) -> None:
    upload = await create(disk, a=b"one", b=b"")
    assert [("url" in file, "parts" in file) for file in upload["files"]] == [(True, False)] * 2
    await receive(disk, upload["uploadId"], "a", b"one")
    await receive(disk, upload["uploadId"], "b", b"")
    assert await listed(disk) == 0
    assert (await complete(disk, upload["uploadId"]))["state"] == "completed"
    assert await listed(disk) == 0
    stored = await store(disk, upload["uploadId"])
    assert stored["created"] is True
    assert [file["path"] for file in stored["files"]] == ["a", "b"]


async def test_an_upload_that_was_stored_is_no_way_around_what_a_store_promises(disk: LocalRack) -> None:
    upload = (await create(disk, a=b"one"))["uploadId"]
    await receive(disk, upload, "a", b"one")
    await complete(disk, upload)
    assert (await store(disk, upload))["created"] is True
    assert (await store(disk, upload))["created"] is False
    other = {"modelId": "net", "metadata": {"type": "ncnn"}, "uploadId": upload}
    assert await code(disk.call("storeModel", other)) == "ERR_MODEL_ALREADY_EXISTS"
    await disk.call("deleteModel", {"modelId": "net"})
    assert (await store(disk, upload))["created"] is False
    assert (await disk.call("getModelMetadata", {"modelId": "net"}))["state"] == "available"
    await disk.call("deleteModel", {"modelId": "net", "purge": True})
    assert await code(store(disk, upload)) == "ERR_CONFLICT"


async def test_in_an_object_store_parts_go_straight_to_it(s3: LocalRack) -> None:
    data = os.urandom(PART + 1000)
    upload = await create(s3, big=data, empty=b"")
    assert upload["files"][0]["parts"] == 2
    await send_parts(s3, upload["uploadId"], "big", data)
    state = await s3.call("getUpload", {"uploadId": upload["uploadId"]})
    assert state["files"][0]["received"] == [1, 2]
    await receive(s3, upload["uploadId"], "empty", b"")
    assert (await complete(s3, upload["uploadId"]))["state"] == "completed"
    stored = await store(s3, upload["uploadId"])
    assert stored["size"] == len(data)
    got = await s3.call("getModel", {"modelId": "net", "delivery": "url"})
    async with aiohttp.ClientSession() as session, session.get(got["files"][0]["url"]) as reply:
        assert digest(await reply.read()) == digest(data)


async def test_bytes_that_are_there_already_are_not_asked_for(disk: LocalRack) -> None:
    await disk.store_bytes("other", "1.0.0", b"shared")
    upload = await create(disk, a=b"shared", b=b"new")
    assert [file["present"] for file in upload["files"]] == [True, False]
    await receive(disk, upload["uploadId"], "b", b"new")
    await complete(disk, upload["uploadId"])
    await store(disk, upload["uploadId"])
    assert len(await stored_keys(disk)) == 2


async def test_other_bytes_than_declared_are_refused_as_they_come(disk: LocalRack) -> None:
    upload = (await create(disk, a=b"one"))["uploadId"]
    assert await code(receive(disk, upload, "a", b"two")) == "ERR_CHECKSUM_MISMATCH"
    assert await code(receive(disk, upload, "a", b"longer")) == "ERR_CHECKSUM_MISMATCH"
    assert await stored_keys(disk) == set()
    await receive(disk, upload, "a", b"one")
    assert (await complete(disk, upload))["state"] == "completed"


async def test_right_parts_of_a_wrong_whole_are_found_and_removed(s3: LocalRack) -> None:
    declared, sent = b"a" * 1000, b"b" * 1000
    upload = (await create(s3, big=declared))["uploadId"]
    await send_parts(s3, upload, "big", sent)
    assert await code(complete(s3, upload)) == "ERR_CHECKSUM_MISMATCH"
    assert await code(store(s3, upload)) == "ERR_CONFLICT"
    assert await listed(s3) == 0
    await s3.clean_up.round()
    assert await stored_keys(s3) == set()


async def test_a_missing_file_or_part_is_named(disk: LocalRack, s3: LocalRack) -> None:
    upload = (await create(disk, a=b"one"))["uploadId"]
    assert await code(complete(disk, upload)) == "ERR_CONFLICT"
    upload = (await create(s3, big=bytes(PART + 1)))["uploadId"]
    assert await code(complete(s3, upload)) == "ERR_CONFLICT"
    await send_parts(s3, upload, "big", bytes(PART))
    with pytest.raises(ModelManagerError) as error:
        await complete(s3, upload)
    assert error.value.details["missingParts"] == [2]


async def test_an_upload_is_stored_once_it_is_completed_and_for_its_own_version(disk: LocalRack) -> None:
    upload = (await create(disk, a=b"one"))["uploadId"]
    assert await code(store(disk, upload)) == "ERR_CONFLICT"
    await receive(disk, upload, "a", b"one")
    await complete(disk, upload)
    other = {"modelId": "other", "metadata": {"type": "custom"}, "uploadId": upload}
    assert await code(disk.call("storeModel", other)) == "ERR_CONFLICT"
    assert (await store(disk, upload))["created"] is True
    assert (await store(disk, upload))["created"] is False


async def test_an_aborted_upload_leaves_nothing(disk: LocalRack, s3: LocalRack) -> None:
    for rack in (disk, s3):
        upload = (await create(rack, a=b"one"))["uploadId"]
        if rack is disk:
            await receive(rack, upload, "a", b"one")
        else:
            await send_parts(rack, upload, "a", b"one")
        assert (await rack.call("abortUpload", {"uploadId": upload}))["state"] == "aborted"
        assert (await rack.call("abortUpload", {"uploadId": upload}))["state"] == "aborted"
        assert await code(complete(rack, upload)) == "ERR_CONFLICT"
        await rack.clean_up.round()
        assert await stored_keys(rack) == set()


async def test_an_upload_that_is_aborted_after_its_bytes_were_verified_is_not_completed(disk: LocalRack) -> None:
    upload = (await create(disk, a=b"one"))["uploadId"]
    await receive(disk, upload, "a", b"one")
    end = await disk.service.uploads.complete(upload, lambda name, value: None)
    await disk.call("abortUpload", {"uploadId": upload})
    await disk.clean_up.round()
    assert await code(end()) == "ERR_CONFLICT"
    assert (await disk.call("getUpload", {"uploadId": upload}))["state"] == "aborted"
    assert await stored_keys(disk) == set()


async def test_an_overdue_upload_is_ended_and_its_bytes_go(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path, upload_s=-1.0).open()
    upload = (await create(rack, a=b"one"))["uploadId"]
    await receive(rack, upload, "a", b"one")
    await rack.clean_up.round()
    assert (await rack.call("getUpload", {"uploadId": upload}))["state"] == "expired"
    assert await stored_keys(rack) == set()
    await rack.close()


async def test_an_upload_survives_a_restart(s3: LocalRack, object_store: ObjectStore, s3_bucket: str) -> None:
    data = os.urandom(1000)
    upload = (await create(s3, big=data))["uploadId"]
    await send_parts(s3, upload, "big", data)
    await s3.close()
    again = LocalRack(s3.folder, store=s3_store(object_store, s3_bucket)).open()
    await again.clean_up.sweep()
    await complete(again, upload)
    await again.clean_up.sweep()
    assert (await store(again, upload))["created"] is True
    report = await again.call("validateModel", {"modelId": "net", "waitMs": 5000})
    assert report["isValid"] is True
    await again.close()
    s3.open()


async def test_parts_of_blobs_that_no_record_names_are_swept(
    s3: LocalRack, s3_bucket: str, s3_client: S3Client
) -> None:
    def left() -> set[str]:
        return {upload["Key"] for upload in s3_client.list_multipart_uploads(Bucket=s3_bucket).get("Uploads", [])}

    await create(s3, big=b"x" * 1000)
    (named,) = left()
    others = {"rack-1/journal/1/base", "rack-2/blobs/other"}
    for key in ("rack-1/blobs/left-by-a-crash", *others):
        s3_client.create_multipart_upload(Bucket=s3_bucket, Key=key)
    await s3.clean_up.sweep_parts()
    assert left() == {named, *others}


async def test_on_disk_a_file_can_be_sent_again_after_a_restart(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path).open()
    upload = (await create(rack, a=b"one"))["uploadId"]
    await receive(rack, upload, "a", b"one")
    await rack.close()
    again = LocalRack(tmp_path).open()
    await again.clean_up.sweep()
    assert await stored_keys(again) == set()
    await receive(again, upload, "a", b"one")
    await complete(again, upload)
    assert (await store(again, upload))["created"] is True
    await again.close()


async def test_an_upload_that_is_over_has_its_files_in_the_journal_alone(disk: LocalRack) -> None:
    aborted = await create(disk, a=b"one")
    await receive(disk, aborted["uploadId"], "a", b"one")
    await disk.call("abortUpload", {"uploadId": aborted["uploadId"]})
    stored = await create(disk, a=b"two", b=b"three")
    for path, data in (("a", b"two"), ("b", b"three")):
        await receive(disk, stored["uploadId"], path, data)
    await disk.call("completeUpload", {"uploadId": stored["uploadId"]})
    metadata = {"type": "custom", "version": "1.0.0"}
    await disk.call("storeModel", {"modelId": "net", "metadata": metadata, "uploadId": stored["uploadId"]})
    assert [upload.files for upload in disk.registry.catalog.uploads.values()] == [(), ()]
    assert [upload.stored_files for upload in disk.registry.catalog.uploads.values()] == [(), ()]
    for begun, state in ((aborted, "aborted"), (stored, "stored")):
        now = await disk.call("getUpload", {"uploadId": begun["uploadId"]})
        assert now["state"] == state
        assert [file["sha256"] for file in now["files"]] == [file["sha256"] for file in begun["files"]]
    assert not disk.service.uploads._received


async def test_too_many_uploads_that_are_not_over_are_refused_for_now(
    disk: LocalRack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.uploads.plan._OPEN_FILES_MOST", 3)
    first = await create(disk, a=b"one", b=b"two")
    with pytest.raises(ModelManagerError) as refused:
        await create(disk, c=b"three", d=b"four")
    assert (refused.value.code, refused.value.details["retryAfterMs"]) == ("ERR_OVERLOADED", 60_000)
    await disk.call("abortUpload", {"uploadId": first["uploadId"]})
    assert (await create(disk, c=b"three", d=b"four"))["state"] == "open"
