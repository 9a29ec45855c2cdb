"""Bytes that are known to be wrong: refused whatever has them, never taken for a store, replaced by the next one."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ModelManagerError
from schemas.model import Metadata
from tests.rack import LocalRack
from tests.registry_view import compact_here
from worker.context import Context

GOOD = b"right" * 1000


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[LocalRack]:
    rack = LocalRack(tmp_path).open()
    yield rack
    await rack.close()


def place(rack: LocalRack, key: str) -> Path:
    return rack.folder / "models" / key


async def quarantined(rack: LocalRack, model: str = "a", data: bytes = GOOD) -> str:
    """A version whose bytes went bad, and were found to be: their key."""
    key: str = (await rack.store_bytes(model, "1", data))["storageKey"]
    place(rack, key).write_bytes(b"wrong" * 1000)
    assert (await rack.call("validateModel", {"modelId": model}))["isValid"] is False
    return key


async def state(rack: LocalRack, model: str = "a") -> Any:
    return (await rack.call("getModelMetadata", {"modelId": model}))["state"]


async def served(rack: LocalRack, model: str = "a") -> bytes:
    rack.cache.forget(model, None)
    return base64.b64decode((await rack.call("getModel", {"modelId": model, "delivery": "inline"}))["modelData"])


async def refused(call: Any) -> str:
    with pytest.raises(ModelManagerError) as error:
        await call
    return error.value.code


async def store_by_stream(rack: LocalRack, model: str, data: bytes = GOOD) -> Any:
    metadata = Metadata(type="custom", version="1")
    return await rack.service.store_stream(
        model,
        metadata,
        filename="model.custom",
        chunks=chunks(data),
        size=len(data),
        sha256=None,
        context=Context(),
    )


async def begin_upload(rack: LocalRack, model: str, data: bytes = GOOD) -> Any:
    file = {"path": "model.custom", "size": len(data), "sha256": digest(data)}
    return await rack.call("createUpload", {"modelId": model, "version": "1", "files": [file]})


async def store_by_upload(rack: LocalRack, model: str, data: bytes = GOOD) -> Any:
    upload = await begin_upload(rack, model, data)
    assert upload["files"][0]["present"] is False
    await rack.service.receive_file(upload["uploadId"], "model.custom", chunks(data), len(data), context=Context())
    await rack.call("completeUpload", {"uploadId": upload["uploadId"], "waitMs": 5000})
    return await store_uploaded(rack, model, upload["uploadId"])


async def store_uploaded(rack: LocalRack, model: str, upload: str) -> Any:
    metadata = {"type": "custom", "version": "1"}
    return await rack.call("storeModel", {"modelId": model, "metadata": metadata, "uploadId": upload})


async def store_inline(rack: LocalRack, model: str, data: bytes = GOOD) -> Any:
    return await rack.store_bytes(model, "1", data)


FORMS = pytest.mark.parametrize("store", [store_inline, store_by_stream, store_by_upload])


@FORMS
@pytest.mark.parametrize("booted", [False, True])
async def test_a_new_store_never_takes_bytes_that_are_known_to_be_wrong(
    tmp_path: Path, store: Any, booted: bool
) -> None:
    rack = LocalRack(tmp_path).open()
    bad = await quarantined(rack)
    if booted:
        await rack.close()
        rack = LocalRack(tmp_path).open()
    stored = await store(rack, "b")
    assert stored["created"] is True
    assert stored["storageKey"] != bad
    assert await served(rack, "b") == GOOD
    again = await rack.store_bytes("c", "1", GOOD)
    assert again["storageKey"] == stored["storageKey"]
    assert (await begin_upload(rack, "d"))["files"][0]["present"] is True
    assert len(rack.registry.catalog.blobs) == 2
    await rack.close()


@FORMS
async def test_the_same_files_stored_again_take_the_place_of_bytes_that_are_wrong(rack: LocalRack, store: Any) -> None:
    bad = await quarantined(rack)
    before = await rack.call("getModelMetadata", {"modelId": "a"})
    stored = await store(rack, "a")
    assert stored["created"] is False
    assert stored["storageKey"] != bad
    after = await rack.call("getModelMetadata", {"modelId": "a"})
    moved = {"state": "available", "files": [{**before["files"][0], "storageKey": stored["storageKey"]}]}
    assert after == {**before, **moved}
    assert await served(rack) == GOOD
    assert (await rack.call("validateModel", {"modelId": "a"}))["isValid"] is True


async def test_only_the_files_that_are_wrong_are_asked_for_again(rack: LocalRack) -> None:
    files = [{"path": path, "data": base64.b64encode(path.encode()).decode()} for path in ("x", "y")]
    params = {"modelId": "a", "metadata": {"type": "custom", "version": "1"}, "files": files}
    first = await rack.call("storeModel", params)
    place(rack, first["files"][0]["storageKey"]).unlink()
    await rack.call("validateModel", {"modelId": "a"})
    planned = [{"path": path, "size": 1, "sha256": digest(path.encode())} for path in ("x", "y")]
    upload = await rack.call("createUpload", {"modelId": "a", "version": "1", "files": planned})
    assert [file["present"] for file in upload["files"]] == [False, True]
    again = await rack.call("storeModel", params)
    assert again["files"][0]["storageKey"] != first["files"][0]["storageKey"]
    assert again["files"][1]["storageKey"] == first["files"][1]["storageKey"]
    assert await state(rack) == "available"


async def test_files_with_the_same_bytes_may_lie_under_two_keys_of_which_one_is_wrong(rack: LocalRack) -> None:
    planned = [{"path": path, "size": len(GOOD), "sha256": digest(GOOD)} for path in ("x", "y")]
    upload = (await rack.call("createUpload", {"modelId": "a", "version": "1", "files": planned}))["uploadId"]
    for path in ("x", "y"):
        await rack.service.receive_file(upload, path, chunks(GOOD), len(GOOD), context=Context())
    await rack.call("completeUpload", {"uploadId": upload, "waitMs": 5000})
    x, y = [file["storageKey"] for file in (await store_uploaded(rack, "a", upload))["files"]]
    assert x != y
    place(rack, x).unlink()
    await rack.call("validateModel", {"modelId": "a"})
    assert (await rack.store_bytes("b", "1", GOOD))["storageKey"] == y
    files = [{"path": path, "data": base64.b64encode(GOOD).decode()} for path in ("x", "y")]
    params = {"modelId": "a", "metadata": {"type": "custom", "version": "1"}, "files": files}
    assert {file["storageKey"] for file in (await rack.call("storeModel", params))["files"]} == {y}
    assert (await rack.call("validateModel", {"modelId": "a"}))["isValid"] is True


async def test_bytes_that_are_known_to_be_wrong_are_refused_whichever_version_has_them(rack: LocalRack) -> None:
    await rack.store_bytes("b", "1", GOOD)
    await quarantined(rack)
    for _ in range(2):
        for delivery in ("inline", "url"):
            call = rack.call("getModel", {"modelId": "b", "delivery": delivery})
            assert await refused(call) == "ERR_CHECKSUM_MISMATCH"
        assert await refused(rack.service.open_file("b", "1", None)) == "ERR_CHECKSUM_MISMATCH"
        await store_inline(rack, "a")
        assert await served(rack, "a") == GOOD
    assert (await store_inline(rack, "b"))["created"] is False
    assert await served(rack, "b") == GOOD


async def test_bytes_that_are_found_right_again_are_right_for_all_versions(rack: LocalRack) -> None:
    await rack.store_bytes("b", "1", GOOD)
    key = await quarantined(rack)
    place(rack, key).write_bytes(GOOD)
    assert (await rack.call("validateModel", {"modelId": "b"}))["isValid"] is True
    assert (await state(rack, "a"), await state(rack, "b")) == ("available", "available")
    assert await served(rack, "a") == await served(rack, "b") == GOOD


async def test_an_upload_that_counts_on_bytes_found_wrong_since_is_refused(rack: LocalRack) -> None:
    key = (await rack.store_bytes("a", "1", GOOD))["storageKey"]
    upload = await begin_upload(rack, "b")
    assert upload["files"][0]["present"] is True
    await rack.call("completeUpload", {"uploadId": upload["uploadId"], "waitMs": 5000})
    place(rack, key).write_bytes(b"wrong" * 1000)
    await rack.call("validateModel", {"modelId": "a"})
    assert await refused(store_uploaded(rack, "b", upload["uploadId"])) == "ERR_CONFLICT"
    assert (await store_by_upload(rack, "b"))["created"] is True


async def test_a_deleted_version_whose_bytes_are_wrong_comes_back_with_the_right_ones(rack: LocalRack) -> None:
    await quarantined(rack)
    await rack.call("deleteModel", {"modelId": "a"})
    assert (await store_inline(rack, "a"))["created"] is False
    assert await state(rack) == "available"
    assert await served(rack) == GOOD


async def test_a_repeated_store_that_replaced_wrong_bytes_gets_its_answer_again(rack: LocalRack) -> None:
    await quarantined(rack)
    first = await rack.store_bytes("a", "1", GOOD, key="k")
    head = rack.registry.journal.head
    assert await rack.store_bytes("a", "1", GOOD, key="k") == first
    assert rack.registry.journal.head == head


@pytest.mark.parametrize("compacted", [False, True])
async def test_what_replaced_wrong_bytes_is_known_after_a_boot_and_goes_with_its_version(
    tmp_path: Path, compacted: bool
) -> None:
    rack = LocalRack(tmp_path).open()
    await quarantined(rack)
    await store_inline(rack, "a")
    await rack.call("updateModelMetadata", {"modelId": "a", "metadata": {"note": 1}})
    counted = (len(rack.registry.catalog.blobs), rack.registry.catalog.blobs.bytes)
    assert counted == (2, 2 * len(GOOD))
    if compacted:
        await compact_here(rack.registry)
    for _ in range(2):
        await rack.close()
        rack = LocalRack(tmp_path).open()
    assert (len(rack.registry.catalog.blobs), rack.registry.catalog.blobs.bytes) == counted
    assert await served(rack) == GOOD
    stored = await rack.store_bytes("b", "1", GOOD)
    await rack.call("deleteModel", {"modelId": "a", "purge": True})
    await rack.clean_up.round()
    assert [blob.key async for blob in rack.store.list("blobs/")] == [stored["storageKey"]]
    assert await served(rack, "b") == GOOD
    await rack.call("deleteModel", {"modelId": "b", "purge": True})
    await rack.clean_up.round()
    assert [blob.key async for blob in rack.store.list("blobs/")] == []
    assert (len(rack.registry.catalog.blobs), rack.registry.catalog.blobs.bytes) == (0, 0)
    await rack.close()


async def test_sizes_alone_never_lift_a_quarantine(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path).open()
    await quarantined(rack)
    await rack.close()
    careless = LocalRack(tmp_path, check_checksums=False).open()
    report = await careless.call("validateModel", {"modelId": "a"})
    assert (report["isValid"], report["findings"][0]["code"]) == (False, "checksum-mismatch")
    assert await state(careless) == "quarantined"
    await careless.close()


async def test_a_validation_says_nothing_of_a_version_that_took_the_place_of_the_one_it_read(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path).open()
    key = (await rack.store_bytes("a", "1", GOOD))["storageKey"]
    place(rack, key).write_bytes(b"wrong" * 1000)
    read = rack.store.hash

    async def replaced_meanwhile(*args: Any) -> Any:
        await rack.call("deleteModel", {"modelId": "a", "version": "1", "purge": True})
        await rack.store_bytes("a", "1", b"other")
        return await read(*args)

    rack.store.hash = replaced_meanwhile  # type: ignore[method-assign]
    assert (await rack.call("validateModel", {"modelId": "a"}))["isValid"] is False
    assert await state(rack) == "available"
    await rack.close()


@pytest.mark.parametrize("booted", [False, True])
@pytest.mark.parametrize("compacted", [False, True])
async def test_all_that_share_wrong_bytes_know_it_by_themselves(tmp_path: Path, booted: bool, compacted: bool) -> None:
    rack = LocalRack(tmp_path).open()
    key = (await rack.store_bytes("a", "1", GOOD))["storageKey"]
    if booted:
        await rack.close()
        rack = LocalRack(tmp_path).open()
    for model in "bc":
        assert (await rack.store_bytes(model, "1", GOOD))["storageKey"] == key
    await rack.store_bytes("d", "1", b"others")
    place(rack, key).write_bytes(b"wrong" * 1000)
    assert (await rack.call("validateModel", {"modelId": "b"}))["isValid"] is False
    assert [await state(rack, model) for model in "abcd"] == ["quarantined"] * 3 + ["available"]
    # The one that was looked at goes, and its record with it.
    await rack.call("deleteModel", {"modelId": "b", "purge": True})
    if compacted:
        await compact_here(rack.registry)
    await rack.close()
    rack = LocalRack(tmp_path).open()
    for model in "ac":
        assert await refused(served(rack, model)) == "ERR_CHECKSUM_MISMATCH"
    # Right bytes for one of them are for that one.
    await rack.store_bytes("a", "1", GOOD)
    assert await served(rack, "a") == GOOD
    assert await state(rack, "c") == "quarantined"
    await rack.close()
