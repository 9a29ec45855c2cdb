"""An object store that restarts or hangs in the middle of a transfer."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.local import ObjectStore, object_store
from schemas.deadline import deadline
from tests.conftest import connect
from tests.stores import INFO, MIB, S3Place, content, put, sha256
from worker.storage.blobstore import UNOBSERVED
from worker.storage.retrying import RetryingStore
from worker.storage.s3 import S3Store
from worker.storage.s3_client import LEAVE_S, S3Calls

DATA = content(96 * MIB)


@pytest.fixture
def service(tmp_path: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A store of this test's own, to be killed; asked for after the shared one, so that it is skipped with it."""
    with own_store(tmp_path) as mine:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", mine.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", mine.secret_key)
        yield mine


def own_store(folder: Path) -> ObjectStore:
    return object_store(folder / "own")


@pytest.fixture
async def place(service: ObjectStore) -> S3Place:
    client = connect(service)
    client.create_bucket(Bucket="faults")
    return S3Place(service.endpoint_url, "faults", client)


@pytest.fixture
async def store(place: S3Place) -> AsyncIterator[S3Store]:
    found = S3Store(endpoint_url=place.endpoint_url, bucket=place.bucket, prefix="racks/r1", timeout_s=3)
    yield found
    await found.close()


async def interrupted(data: bytes, after: int, act: Callable[[], None]) -> AsyncIterator[bytes]:
    acted = False
    for start in range(0, len(data), MIB):
        if start >= after and not acted:
            acted = True
            await asyncio.to_thread(act)
        yield data[start : start + MIB]
        await asyncio.sleep(0)


async def put_through(store: S3Store, key: str, act: Callable[[], None]) -> str:
    chunks = interrupted(DATA, 40 * MIB, act)
    stored = await store.put(key, chunks, info=INFO, size=len(DATA), sha256=sha256(DATA), max_size=len(DATA))
    return stored.sha256


async def test_a_put_goes_on_when_the_store_is_back_soon(service: ObjectStore, store: S3Store) -> None:
    def restart() -> None:
        service.kill()
        threading.Thread(target=service.start).start()

    assert await put_through(store, store.new_key(), restart) == sha256(DATA)


async def test_a_read_goes_on_at_the_byte_where_it_broke(service: ObjectStore, store: S3Store) -> None:
    key = (await put(store, DATA)).key
    retrying, got, restarted = RetryingStore(store), bytearray(), False
    async for chunk in retrying.read(key):
        got += chunk
        if len(got) >= 8 * MIB and not restarted:
            restarted = True
            await asyncio.to_thread(service.kill)
            threading.Thread(target=service.start).start()
    assert sha256(bytes(got)) == sha256(DATA)


@pytest.fixture
def hanging(service: ObjectStore) -> Iterator[Callable[[], None]]:
    """Makes the store hang: it accepts connections and answers nothing."""
    port = int(service.endpoint_url.rpartition(":")[2])
    [pid] = {
        one.pid
        for one in psutil.net_connections("tcp")
        if one.laddr.port == port and one.status == "LISTEN" and one.pid
    }
    yield lambda: os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGCONT)


async def test_a_cancelled_put_does_not_wait_for_a_store_that_hangs(
    store: S3Store, hanging: Callable[[], None]
) -> None:
    putting = asyncio.create_task(put_through(store, store.new_key(), hanging))
    await asyncio.wait({putting}, timeout=1)
    assert not putting.done()
    putting.cancel()
    await asyncio.wait({putting}, timeout=LEAVE_S + 3)
    assert putting.done()


async def test_what_a_request_leaves_to_be_removed_does_not_have_its_deadline() -> None:
    calls = S3Calls(
        endpoint_url="http://127.0.0.1:9",
        bucket="b",
        region=None,
        clean_up_profile=None,
        timeout_s=1,
        observe=UNOBSERVED,
    )
    known: list[float | None] = []

    async def removal() -> None:
        known.append(deadline.get())

    token = deadline.set(time.monotonic() - 1)
    await calls.leave(removal())
    deadline.reset(token)
    await calls.close()
    assert known == [None]
