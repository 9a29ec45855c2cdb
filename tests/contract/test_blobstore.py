"""The contract of `worker.storage.blobstore`, kept by every backend and by the retrying wrapper around each."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deploy.local import ObjectStore
from schemas.errors import ModelManagerError
from tests.stores import (
    INFO,
    MIB,
    DiskPlace,
    MemoryPlace,
    Place,
    S3Place,
    chunked,
    content,
    keys,
    put,
    read,
    sha256,
)
from worker.storage.blobstore import BlobMissing, BlobStore
from worker.storage.retrying import RetryingStore
from worker.storage.s3_layout import PART_BYTES_MIN

SOURCE_FAILURES = [RuntimeError("gone"), ConnectionResetError("gone")]


@pytest.fixture
def s3_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Place:
    service: ObjectStore = request.getfixturevalue("object_store")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", service.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", service.secret_key)
    return S3Place(service.endpoint_url, request.getfixturevalue("s3_bucket"), request.getfixturevalue("s3_client"))


@pytest.fixture(params=["memory", "disk", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "memory":
        return MemoryPlace()
    if request.param == "disk":
        return DiskPlace(tmp_path / "storage")
    found: S3Place = request.getfixturevalue("s3_place")
    return found


@pytest.fixture(params=["plain", "retrying"])
async def store(request: pytest.FixtureRequest, place: Place) -> AsyncIterator[BlobStore]:
    inner = place.store()
    yield RetryingStore(inner, wait_max_s=0.01) if request.param == "retrying" else inner
    await inner.close()


# --- bytes in and out ---


@pytest.mark.parametrize("size", [0, 1, 70_000, PART_BYTES_MIN, PART_BYTES_MIN + 1], ids=lambda size: f"{size}-bytes")
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "undeclared"])
async def test_what_was_put_is_read_back(store: BlobStore, size: int, declared: bool) -> None:
    data, key = content(size), store.new_key()
    stored = await store.put(
        key,
        chunked(data),
        info=INFO,
        size=size if declared else None,
        sha256=sha256(data) if declared else None,
        max_size=size,
    )
    assert (stored.key, stored.size, stored.sha256) == (key, size, sha256(data))
    assert await read(store, key) == data
    assert await store.hash(key) == stored
    assert (await store.stat(key)).size == size


async def test_two_keys_are_never_the_same(store: BlobStore) -> None:
    made = [store.new_key() for _ in range(1000)]
    assert len(set(made)) == 1000
    assert all(key.startswith("blobs/") for key in made)


async def test_a_range_is_a_slice(store: BlobStore) -> None:
    size = 2 * MIB + 100
    data = content(size)
    key = (await put(store, data)).key
    for start in (0, 5, MIB - 1, 2 * MIB, size - 1, size, size + 1):
        assert await read(store, key, start) == data[start:]
        for length in (0, 1, 2, MIB + 1, size):
            expected = data[start : start + length]
            assert await read(store, key, start, length) == expected, (start, length)
            assert await store.read_at(key, start, length) == expected, (start, length)


async def test_one_chunk_may_be_larger_than_a_part(store: BlobStore) -> None:
    data, key = content(PART_BYTES_MIN * 2 + 17), store.new_key()
    stored = await store.put(key, chunked(data, len(data)), info=INFO, size=None, sha256=None, max_size=len(data))
    assert stored.sha256 == sha256(data)
    assert await read(store, key) == data


async def test_a_missing_blob_is_missing_in_every_way(store: BlobStore) -> None:
    key = store.new_key()
    for call in (
        lambda: read(store, key),
        lambda: read(store, key, 5, 5),
        lambda: read(store, key, 0, 0),
        lambda: store.read_at(key, 0, 5),
        lambda: store.read_at(key, 0, 0),
        lambda: store.stat(key),
        lambda: store.hash(key),
    ):
        with pytest.raises(BlobMissing) as missing:
            await call()
        assert missing.value.key == key
    await store.delete(key)


async def test_a_deleted_blob_is_gone_and_others_stay(store: BlobStore) -> None:
    first, second = (await put(store, b"one")).key, (await put(store, b"two")).key
    await store.delete(first)
    with pytest.raises(BlobMissing):
        await store.stat(first)
    assert await read(store, second) == b"two"
    await store.delete(first)


async def test_the_list_has_the_blobs_with_the_prefix_and_no_documents(store: BlobStore) -> None:
    assert await keys(store) == set()
    first, second = (await put(store, b"one")).key, (await put(store, b"four")).key
    await store.put_document("owner.json", b"{}", etag=None)
    assert await keys(store) == {first, second}
    assert await keys(store, first) == {first}
    assert await keys(store, "blobs/zzz") == set()
    assert {blob.key: blob.size async for blob in store.list("blobs/")} == {first: 3, second: 4}


async def test_a_document_can_be_listed_and_removed_wherever_it_lies(store: BlobStore) -> None:
    for name in ("journal/1/MANIFEST", "journal/1/tail/seg/0-5", "journal/10/MANIFEST"):
        await store.put_document(name, b"12345", etag=None)
    listed = {stat.key: stat.size async for stat in store.list("journal/1/")}
    assert listed == {"journal/1/MANIFEST": 5, "journal/1/tail/seg/0-5": 5}
    await store.delete("journal/1/MANIFEST")
    assert await store.get_document("journal/1/MANIFEST") is None
    assert await keys(store, "journal/") == {"journal/1/tail/seg/0-5", "journal/10/MANIFEST"}


async def test_an_early_end_of_a_read_frees_what_it_holds(store: BlobStore) -> None:
    data = content(8 * MIB)
    key = (await put(store, data)).key
    held = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the entries are not paths to follow
    for _ in range(30):
        chunks = store.read(key)
        assert data.startswith(await anext(chunks))
        await chunks.aclose()  # type: ignore[attr-defined]
    # A connection that is kept for the next call may be there; one for each read is not.
    assert len(os.listdir("/proc/self/fd")) <= held + 2  # noqa: PTH208
    assert await read(store, key) == data


async def test_many_puts_at_once_do_not_mix(store: BlobStore) -> None:
    all_data = [content(size) for size in range(100_000, 100_020)]
    stored = await asyncio.gather(*(put(store, data) for data in all_data))
    for blob, data in zip(stored, all_data, strict=True):
        assert await read(store, blob.key) == data


# --- what is refused leaves nothing ---


@pytest.mark.parametrize("size", [1000, PART_BYTES_MIN + 1000], ids=["one-part", "two-parts"])
@pytest.mark.parametrize("by", [-1, 1], ids=["more", "fewer"])
async def test_another_size_than_declared_is_refused(store: BlobStore, place: Place, size: int, by: int) -> None:
    key = store.new_key()
    with pytest.raises(ModelManagerError) as refused:
        await store.put(
            key, chunked(content(size)), info=INFO, size=size + by, sha256=None, max_size=2 * PART_BYTES_MIN
        )
    assert refused.value.code == "ERR_CHECKSUM_MISMATCH"
    assert refused.value.details["expectedSize"] == size + by
    assert place.traces(key) == []


@pytest.mark.parametrize("size", [0, 1000, PART_BYTES_MIN + 1000], ids=["empty", "one-part", "two-parts"])
async def test_another_sha256_than_declared_is_refused(store: BlobStore, place: Place, size: int) -> None:
    data, key = content(size), store.new_key()
    with pytest.raises(ModelManagerError) as refused:
        await store.put(
            key, chunked(data), info=INFO, size=size, sha256=sha256(b"another"), max_size=2 * PART_BYTES_MIN
        )
    assert refused.value.code == "ERR_CHECKSUM_MISMATCH"
    assert refused.value.details["actual"] == f"sha256:{sha256(data)}"
    assert place.traces(key) == []


async def test_a_put_over_the_limit_ends_at_the_first_byte_over(store: BlobStore, place: Place) -> None:
    taken, key = 0, store.new_key()

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 100
            yield bytes(100)

    with pytest.raises(ModelManagerError) as refused:
        await store.put(key, endless(), info=INFO, size=None, sha256=None, max_size=1000)
    assert refused.value.code == "ERR_MODEL_TOO_LARGE"
    assert taken == 1100
    assert place.traces(key) == []


async def test_a_declared_size_over_the_limit_is_refused_before_the_first_byte(store: BlobStore) -> None:
    begun = False

    async def watched() -> AsyncIterator[bytes]:
        nonlocal begun
        begun = True
        yield bytes(1001)

    with pytest.raises(ModelManagerError) as refused:
        await store.put(store.new_key(), watched(), info=INFO, size=1001, sha256=None, max_size=1000)
    assert refused.value.code == "ERR_MODEL_TOO_LARGE"
    assert not begun


@pytest.mark.parametrize("size", [0, PART_BYTES_MIN * 2 + 1], ids=["at-once", "three-parts"])
@pytest.mark.parametrize("failure", SOURCE_FAILURES, ids=lambda error: type(error).__name__)
async def test_an_exception_of_the_source_passes_through(
    store: BlobStore, place: Place, size: int, failure: Exception
) -> None:
    async def breaking() -> AsyncIterator[bytes]:
        async for chunk in chunked(content(size)):
            yield chunk
        raise failure

    key = store.new_key()
    with pytest.raises(type(failure)) as passed:
        await store.put(key, breaking(), info=INFO, size=None, sha256=None, max_size=4 * PART_BYTES_MIN)
    assert passed.value is failure
    assert place.traces(key) == []


@pytest.mark.parametrize("size", [0, 1000, PART_BYTES_MIN * 2 + 1], ids=["at-once", "one-part", "three-parts"])
async def test_a_put_cancelled_while_its_source_waits_leaves_nothing(store: BlobStore, place: Place, size: int) -> None:
    stuck, key = asyncio.Event(), store.new_key()

    async def stalling() -> AsyncIterator[bytes]:
        async for chunk in chunked(content(size)):
            yield chunk
        stuck.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(
        store.put(key, stalling(), info=INFO, size=None, sha256=None, max_size=4 * PART_BYTES_MIN)
    )
    await stuck.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert place.traces(key) == []


@pytest.mark.parametrize("size", [1000, 3 * PART_BYTES_MIN], ids=["one-part", "three-parts"])
async def test_a_put_cancelled_at_any_moment_leaves_nothing_or_the_blob(
    store: BlobStore, place: Place, size: int
) -> None:
    data, key = content(size), store.new_key()
    turns = 0
    while True:
        task = asyncio.create_task(put(store, data, key))
        for _ in range(turns):
            await asyncio.sleep(0 if size < MIB else 0.01)
        if not task.cancel():
            break
        with pytest.raises(asyncio.CancelledError):
            await task
        assert place.traces(key) == []
        turns = turns * 2 + 1
    assert (await task).sha256 == sha256(data)
    assert len(place.traces(key)) == 1


@pytest.mark.parametrize("second", [b"second", content(PART_BYTES_MIN + 1)], ids=["one-part", "two-parts"])
async def test_a_key_used_twice_is_refused_and_keeps_its_blob(store: BlobStore, second: bytes) -> None:
    key = (await put(store, b"first")).key
    with pytest.raises(ModelManagerError) as refused:
        await put(store, second, key)
    assert refused.value.code == "ERR_INTERNAL"
    with pytest.raises(ModelManagerError):
        await store.put(key, chunked(second), info=INFO, size=1, sha256=None, max_size=2 * PART_BYTES_MIN)
    assert await read(store, key) == b"first"


# --- reading back ---


@pytest.mark.parametrize("size", [1000, PART_BYTES_MIN + 1000], ids=["one-part", "two-parts"])
async def test_reading_back_finds_one_flipped_bit(store: BlobStore, place: Place, size: int) -> None:
    data = content(size)
    stored = await put(store, data)
    flipped = bytearray(data)
    flipped[size // 2] ^= 1
    place.spoil(stored.key, bytes(flipped))
    found = await store.hash(stored.key)
    assert found.size == stored.size
    assert found.sha256 == sha256(bytes(flipped)) != stored.sha256


async def test_reading_back_finds_a_missing_tail(store: BlobStore, place: Place) -> None:
    stored = await put(store, content(1000))
    place.spoil(stored.key, content(1000)[:900])
    assert (await store.hash(stored.key)).size == 900


async def test_progress_of_reading_back_grows_to_the_size(store: BlobStore) -> None:
    seen: list[int] = []
    stored = await put(store, content(PART_BYTES_MIN + 1000))
    await store.hash(stored.key, seen.append)
    assert seen == sorted(set(seen))
    assert seen[-1] == stored.size


# --- documents ---


async def test_a_document_is_written_only_over_what_was_seen(store: BlobStore) -> None:
    assert await store.get_document("owner.json") is None
    with pytest.raises(ModelManagerError, match="ERR_CONFLICT"):
        await store.put_document("owner.json", b"0", etag='"no such tag"')
    first = await store.put_document("owner.json", b"1", etag=None)
    assert await store.get_document("owner.json") == first
    second = await store.put_document("owner.json", b"2", etag=first.etag)
    for stale in (None, first.etag):
        with pytest.raises(ModelManagerError, match="ERR_CONFLICT"):
            await store.put_document("owner.json", b"3", etag=stale)
    assert await store.get_document("owner.json") == second
    assert second.data == b"2"


@pytest.mark.parametrize("exists", [False, True], ids=["absent", "existing"])
async def test_of_twenty_writers_of_a_document_one_wins(store: BlobStore, exists: bool) -> None:
    etag = (await store.put_document("owner.json", b"old", etag=None)).etag if exists else None
    outcomes = await asyncio.gather(
        *(store.put_document("owner.json", f"writer {number}".encode(), etag=etag) for number in range(20)),
        return_exceptions=True,
    )
    lost = [outcome for outcome in outcomes if isinstance(outcome, ModelManagerError)]
    won = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert {error.code for error in lost} == {"ERR_CONFLICT"}
    assert len(won) == 1
    assert await store.get_document("owner.json") == won[0]


# --- the place itself ---


async def test_the_probe_is_silent_where_all_is_well(store: BlobStore) -> None:
    await store.probe()
    usage = await store.usage()
    assert (usage.free_bytes is None) == (usage.total_bytes is None)


async def test_a_local_path_leads_to_the_bytes(store: BlobStore) -> None:
    key = (await put(store, b"bytes")).key
    path = store.local_path(key)
    assert (path is not None) == (store.backend == "disk")
    assert path is None or path.read_bytes() == b"bytes"
