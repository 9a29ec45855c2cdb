"""A blob that a live version needs is never removed; what is deleted stays deleted, and its bytes are freed."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from schemas.errors import ModelManagerError
from tests.rack import LocalRack
from worker.registry import Change
from worker.storage.blobstore import BlobStat


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[LocalRack]:
    rack = LocalRack(tmp_path).open()
    yield rack
    await rack.close()


def blob_names(rack: LocalRack) -> set[str]:
    return {path.name for path in (rack.folder / "models" / "blobs").glob("*")}


async def test_a_purge_frees_the_bytes_and_a_delete_keeps_them_for_its_undo(rack: LocalRack) -> None:
    await rack.store_bytes("one", "1.0.0", b"one")
    await rack.store_bytes("two", "1.0.0", b"two")
    await rack.call("deleteModel", {"modelId": "one"})
    await rack.call("deleteModel", {"modelId": "two", "purge": True})
    await rack.clean_up.round()
    assert len(blob_names(rack)) == 1
    await rack.call("restoreModel", {"modelId": "one"})
    report = await rack.call("validateModel", {"modelId": "one", "waitMs": 5000})
    assert report["isValid"] is True


async def test_shared_bytes_stay_until_the_last_version_goes(rack: LocalRack) -> None:
    await rack.store_bytes("one", "1.0.0", b"shared")
    await rack.store_bytes("two", "1.0.0", b"shared")
    await rack.call("deleteModel", {"modelId": "one", "purge": True})
    await rack.clean_up.round()
    assert len(blob_names(rack)) == 1
    await rack.call("deleteModel", {"modelId": "two", "purge": True})
    await rack.clean_up.round()
    assert blob_names(rack) == set()


async def test_the_end_of_the_undo_window_frees_the_bytes_and_the_name(tmp_path: Path) -> None:
    rack = LocalRack(tmp_path, undo_s=0.0).open()
    await rack.store_bytes("net", "1.0.0", b"old")
    await rack.call("deleteModel", {"modelId": "net"})
    await asyncio.sleep(0.01)
    await rack.clean_up.round()
    assert blob_names(rack) == set()
    with pytest.raises(ModelManagerError, match="ERR_MODEL_NOT_FOUND"):
        await rack.call("restoreModel", {"modelId": "net"})
    assert (await rack.store_bytes("net", "1.0.0", b"new"))["created"] is True
    await rack.close()


async def test_a_restore_of_all_versions_restores_those_whose_window_is_not_over(rack: LocalRack) -> None:
    for version in ("1.0.0", "2.0.0", "3.0.0"):
        await rack.store_bytes("net", version, b"x")
    over = {"model": "net", "versions": ["1.0.0"], "whole": False, "replicas": [], "deleted": 1, "until": 2}
    await rack.registry.transact("net", lambda: Change("delete", over))
    await rack.call("deleteModel", {"modelId": "net"})
    assert (await rack.call("restoreModel", {"modelId": "net"}))["versions"] == ["2.0.0", "3.0.0"]
    for version in ({}, {"version": "1.0.0"}):
        with pytest.raises(ModelManagerError, match="ERR_MODEL_NOT_FOUND") as refused:
            await rack.call("restoreModel", {"modelId": "net", **version})
        assert refused.value.details["restorableUntil"] == "1970-01-01T00:00:00.002Z"


async def test_bytes_that_no_record_names_are_swept(rack: LocalRack) -> None:
    await rack.store_bytes("net", "1.0.0", b"kept")
    kept = blob_names(rack)
    (rack.folder / "models" / "blobs" / "01ARZ3NDEKTSV4RRFFQ69G5FAV").write_bytes(b"left by a crash")
    await rack.clean_up.sweep()
    assert blob_names(rack) == kept


class StoreAway:
    """The store of a rack, which cannot remove what is in `stuck`, and nothing, nor answer, while it is `away`."""

    def __init__(self, rack: LocalRack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.away = False
        self.stuck: set[str] = set()
        store = rack.store
        probe, delete, listing = store.probe, store.delete, store.list

        def answer(key: str = "") -> None:
            if self.away or key.removeprefix("blobs/") in self.stuck:
                raise ModelManagerError("ERR_STORAGE_UNAVAILABLE")

        async def answered_probe() -> None:
            answer()
            await probe()

        async def answered_delete(key: str) -> None:
            answer(key)
            await delete(key)

        async def answered_list(prefix: str) -> AsyncIterator[BlobStat]:
            answer()
            async for stat in listing(prefix):
                yield stat

        monkeypatch.setattr(store, "probe", answered_probe)
        monkeypatch.setattr(store, "delete", answered_delete)
        monkeypatch.setattr(store, "list", answered_list)


async def test_what_could_not_be_removed_is_removed_once_the_store_is_back(
    rack: LocalRack, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StoreAway(rack, monkeypatch)
    for number in range(5):
        await rack.store_bytes(f"net-{number}", "1.0.0", bytes([number]))
        await rack.call("deleteModel", {"modelId": f"net-{number}", "purge": True})
    store.away = True
    for _ in range(2):
        with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
            await rack.clean_up.round()
    store.away = False
    await rack.clean_up.round()
    assert blob_names(rack) == set()


async def test_a_blob_that_cannot_be_removed_does_not_keep_the_others(
    rack: LocalRack, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StoreAway(rack, monkeypatch)
    for number in range(5):
        await rack.store_bytes(f"net-{number}", "1.0.0", bytes([number]))
    left = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
    (rack.folder / "models" / "blobs" / left).write_bytes(b"left by a crash")
    store.stuck = {left, *sorted(blob_names(rack))[:2]}
    for number in range(5):
        await rack.call("deleteModel", {"modelId": f"net-{number}", "purge": True})
    await rack.clean_up.sweep()
    await rack.clean_up.round()
    assert blob_names(rack) == store.stuck
    store.stuck = set()
    await rack.clean_up.round()
    assert blob_names(rack) == set()


async def test_a_sweep_that_failed_is_made_again_until_it_comes_to_its_end(
    rack: LocalRack, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rack.folder / "models" / "blobs").mkdir(parents=True, exist_ok=True)
    (rack.folder / "models" / "blobs" / "01ARZ3NDEKTSV4RRFFQ69G5FAV").write_bytes(b"left by a crash")
    store = StoreAway(rack, monkeypatch)
    store.away = True
    cleaning = asyncio.create_task(rack.clean_up.run())
    await asyncio.sleep(0.2)
    assert len(blob_names(rack)) == 1
    store.away = False
    async with asyncio.timeout(10):
        while blob_names(rack):
            await asyncio.sleep(0.02)
    cleaning.cancel()
    await asyncio.wait([cleaning])


async def test_stores_deletes_and_clean_up_at_the_same_time_lose_nothing(rack: LocalRack) -> None:
    """Sixteen callers share four contents, so that every delete races with stores of the same bytes."""
    contents = [bytes([n]) * 2000 for n in range(4)]
    cleaning = asyncio.create_task(rack.clean_up.run())
    dice = random.Random(7)

    async def caller(name: str) -> None:
        for _ in range(40):
            try:
                if dice.random() < 0.6:
                    await rack.store_bytes(name, "1.0.0", dice.choice(contents))
                else:
                    await rack.call("deleteModel", {"modelId": name, "purge": dice.random() < 0.7})
            except ModelManagerError as error:
                assert error.code in ("ERR_MODEL_NOT_FOUND", "ERR_MODEL_ALREADY_EXISTS")
            await asyncio.sleep(dice.random() * 0.01)
            if dice.random() < 0.1:
                await rack.clean_up.sweep()

    await asyncio.gather(*(caller(f"net-{n}") for n in range(16)))
    cleaning.cancel()
    await asyncio.gather(cleaning, return_exceptions=True)
    await rack.clean_up.round()
    live = (await rack.call("listModels", {"limit": 1000}))["models"]
    assert live
    for entry in live:
        report = await rack.call("validateModel", {"modelId": entry["modelId"], "waitMs": 5000})
        assert report["isValid"] is True, report
    for name in range(16):
        try:
            await rack.call("deleteModel", {"modelId": f"net-{name}", "purge": True})
        except ModelManagerError as error:
            assert error.code == "ERR_MODEL_NOT_FOUND"
    await rack.clean_up.round()
    assert blob_names(rack) == set()


@pytest.mark.parametrize("end", ["abortUpload", "completeUpload", "none"])
async def test_bytes_that_only_an_upload_needs_any_more_are_counted_as_after_a_boot(tmp_path: Path, end: str) -> None:
    rack = LocalRack(tmp_path).open()
    await rack.store_bytes("one", "1.0.0", b"bytes")
    await rack.close()
    rack = LocalRack(tmp_path).open()
    file = {"path": "model.custom", "size": 5, "sha256": "sha256:" + hashlib.sha256(b"bytes").hexdigest()}
    upload = await rack.call("createUpload", {"modelId": "two", "version": "1", "files": [file]})
    assert upload["files"][0]["present"] is True
    await rack.call("deleteModel", {"modelId": "one", "purge": True})
    if end != "none":
        await rack.call(end, {"uploadId": upload["uploadId"]})
    blobs = rack.registry.catalog.blobs
    live = (len(blobs), blobs.bytes)
    assert live == ((1, 5) if end == "completeUpload" else (0, 0))
    await rack.close()
    rack = LocalRack(tmp_path).open()
    blobs = rack.registry.catalog.blobs
    assert (len(blobs), blobs.bytes) == live
    await rack.close()
