"""What a blob store tells of a blob on S3, how little memory it takes, and that it never holds up the event loop."""

from __future__ import annotations

import asyncio
import fcntl
import sys
import threading
from pathlib import Path

import pytest

from deploy.local import ObjectStore
from schemas.errors import ModelManagerError
from tests.stores import INFO, MIB, DiskPlace, Place, S3Place, chunked, content, read, sha256, zeros
from worker.storage import disk
from worker.storage.s3_layout import PART_BYTES_MIN
from worker.storage.s3_stream import PARTS_OF_ALL


@pytest.fixture
def s3_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Place:
    service: ObjectStore = request.getfixturevalue("object_store")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", service.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", service.secret_key)
    return S3Place(service.endpoint_url, request.getfixturevalue("s3_bucket"), request.getfixturevalue("s3_client"))


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "disk":
        return DiskPlace(tmp_path / "storage")
    found: S3Place = request.getfixturevalue("s3_place")
    return found


@pytest.mark.parametrize("size", [0, 1000, PART_BYTES_MIN + 1], ids=["empty", "one-part", "two-parts"])
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "undeclared"])
@pytest.mark.s3
async def test_the_object_tells_what_it_is(s3_place: S3Place, size: int, declared: bool) -> None:
    data, store = content(size), s3_place.store()
    stored = await store.put(
        store.new_key(),
        chunked(data),
        info=INFO,
        size=size if declared else None,
        sha256=sha256(data) if declared else None,
        max_size=2 * PART_BYTES_MIN,
    )
    assert s3_place.metadata(stored.key) == {
        "model-manager-sha256": sha256(data),
        "model-manager-size": str(size),
        "model-manager-format": "onnx",
        "model-manager-model": "vision/m%C3%BCller",
        "model-manager-version": "1.0.0",
        "model-manager-rack": "r1",
    }
    assert await read(store, stored.key) == data
    await store.close()


@pytest.mark.s3
async def test_the_probe_names_a_bucket_that_is_not_there(s3_place: S3Place) -> None:
    store = S3Place(s3_place.endpoint_url, "no-such-bucket-here", s3_place.client).store()
    with pytest.raises(ModelManagerError) as refused:
        await store.probe()
    assert refused.value.code == "ERR_STORAGE_UNAVAILABLE"
    assert refused.value.details == {"bucket": "no-such-bucket-here"}
    await store.close()


# --- bounds ---

CHILD = """
import asyncio, pathlib, sys
from tests.stores import INFO, MIB, zeros
from worker.storage.disk import DiskStore
from worker.storage.s3 import S3Store

async def main(kind, *where):
    store = DiskStore(pathlib.Path(where[0])) if kind == "disk" else S3Store(
        endpoint_url=where[0], bucket=where[1], prefix="racks/r1"
    )
    stored = await store.put(
        store.new_key(), zeros(400 * MIB, 64 * 1024), info=INFO, size=None, sha256=None, max_size=500 * MIB
    )
    assert await store.hash(stored.key) == stored
    async for _ in store.read(stored.key):
        pass
    await store.delete(stored.key)
    await store.close()
    status = pathlib.Path("/proc/self/status").read_text()
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))

asyncio.run(main(*sys.argv[1:]))
"""


async def peak_kib(*where: str) -> int:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, *where, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    out, _ = await child.communicate()
    assert child.returncode == 0
    return int(out)


async def test_a_large_blob_on_disk_takes_little_memory(tmp_path: Path) -> None:
    assert await peak_kib("disk", str(tmp_path)) < 200 * 1024


@pytest.mark.s3
async def test_a_large_blob_on_s3_takes_little_memory(s3_place: S3Place) -> None:
    assert await peak_kib("s3", s3_place.endpoint_url, s3_place.bucket) < 200 * 1024


@pytest.mark.s3
async def test_parts_of_many_streams_on_their_way_are_bounded_together(s3_place: S3Place) -> None:
    store, lock = s3_place.store(), threading.Lock()
    now = most = 0

    def begun(**_: object) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)

    def ended(**_: object) -> None:
        nonlocal now
        with lock:
            now -= 1

    events = store._calls.client.meta.events
    events.register("before-send.s3.UploadPart", begun)
    events.register("after-call.s3.UploadPart", ended)
    size = 5 * PART_BYTES_MIN
    sources = [zeros(size) for _ in range(6)]
    puts = (store.put(store.new_key(), zero, info=INFO, size=None, sha256=None, max_size=size) for zero in sources)
    await asyncio.gather(*puts)
    assert PARTS_OF_ALL // 2 < most <= PARTS_OF_ALL
    await store.close()


async def test_nothing_blocks_the_event_loop(place: Place) -> None:
    """The best of three: a busy machine delays one of them now and then, a call that blocks delays each."""
    assert min([await worst_delay(place) for _ in range(3)]) < 0.3


async def worst_delay(place: Place) -> float:
    """The longest that the loop kept a timer waiting, in seconds, while 200 MiB went in and were hashed."""
    loop, store, worst = asyncio.get_running_loop(), place.store(), 0.0

    async def watch() -> None:
        nonlocal worst
        while True:
            due = loop.time() + 0.005
            await asyncio.sleep(0.005)
            worst = max(worst, loop.time() - due)

    watching = asyncio.create_task(watch())
    stored = await store.put(store.new_key(), zeros(200 * MIB), info=INFO, size=None, sha256=None, max_size=200 * MIB)
    await store.hash(stored.key)
    await store.delete(stored.key)
    await store.close()
    watching.cancel()
    return worst


async def test_a_document_is_not_waited_for_without_end_when_its_writer_is_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_LOCK_S", 0.1)
    store = disk.DiskStore(tmp_path)
    with (tmp_path / ".documents.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ModelManagerError) as caught:
            await store.put_document("owner.json", b"{}", etag=None)
    assert caught.value.code == "ERR_STORAGE_UNAVAILABLE"
    assert (await store.put_document("owner.json", b"{}", etag=None)).data == b"{}"
    await store.close()


async def test_a_few_bytes_are_read_while_more_large_blobs_than_there_are_threads_are_hashed(tmp_path: Path) -> None:
    store = disk.DiskStore(tmp_path)
    small = await store.put(store.new_key(), chunked(b"small"), info=INFO, size=5, sha256=None, max_size=5)
    large = [tmp_path / store.new_key() for _ in range(10)]
    for path in large:
        with path.open("wb") as file:
            file.truncate(1024 * MIB)
    hashing = [asyncio.create_task(store.hash(path.relative_to(tmp_path).as_posix())) for path in large]
    await asyncio.sleep(0)
    assert await store.read_at(small.key, 0, 5) == b"small"
    assert not any(task.done() for task in hashing)
    for task in hashing:
        task.cancel()
    await asyncio.wait(hashing)
    await store.close()


async def test_a_few_bytes_are_read_while_documents_wait_for_a_writer_that_is_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_LOCK_S", 60.0)
    store = disk.DiskStore(tmp_path)
    small = await store.put(store.new_key(), chunked(b"small"), info=INFO, size=5, sha256=None, max_size=5)
    with (tmp_path / ".documents.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = [asyncio.create_task(store.put_document(f"{n}.json", b"{}", etag=None)) for n in range(10)]
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            assert await store.read_at(small.key, 0, 5) == b"small"
        assert not any(task.done() for task in waiting)
    await asyncio.gather(*waiting)
    await store.close()
