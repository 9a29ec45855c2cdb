"""An object store that dies, or a network that cuts, in the middle of a blob."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Self
from urllib.parse import urlsplit

import pytest

from deploy.local import NotStarted, ObjectStore, Source, Unavailable, object_store
from schemas.errors import ModelManagerError
from tests.conftest import connect
from tests.stores import INFO, MIB, PREFIX, S3Place, chunked, content, keys, put, read, sha256
from worker.storage import s3_stream
from worker.storage.blobstore import BlobMissing, StoreObserver
from worker.storage.retrying import ATTEMPTS, RetryingStore
from worker.storage.s3_layout import PART_BYTES_MIN

pytestmark = pytest.mark.s3


@dataclass
class Proxy:
    """A TCP proxy before the store.

    It cuts a connection after `cut_after` bytes from the store, once `on_cut` has run; and in place of the answer to
    a request that `loses` is true for, whose work is done.
    """

    target: str
    cut_after: int | None = None
    on_cut: Callable[[], None] = lambda: None
    loses: Callable[[bytes], bool] = lambda request: False
    cuts: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        where = urlsplit(self.target)
        with suppress(OSError):
            store_reader, store_writer = await asyncio.open_connection(where.hostname, where.port)
            lost = asyncio.Event()
            self._writers.add(store_writer)
            sending = asyncio.create_task(self._send(reader, store_writer, lost))
            with suppress(OSError):
                await self._answer(store_reader, writer, lost)
            sending.cancel()
            store_writer.close()
        writer.close()
        self._tasks.discard(task)

    async def _send(self, reader: asyncio.StreamReader, store: asyncio.StreamWriter, lost: asyncio.Event) -> None:
        while data := await reader.read(MIB):
            if self.loses(data.partition(b"\r\n")[0]):
                lost.set()
            store.write(data)
            await store.drain()

    async def _answer(self, store: asyncio.StreamReader, writer: asyncio.StreamWriter, lost: asyncio.Event) -> None:
        passed = 0
        while data := await store.read(64 * 1024):
            limit = self.cut_after
            if lost.is_set() and not data.startswith(b"HTTP/1.1 100"):
                self.cuts += 1
                return
            if limit is not None and passed + len(data) > limit:
                writer.write(data[: limit - passed])
                await writer.drain()
                self.cuts += 1
                await asyncio.to_thread(self.on_cut)
                return
            passed += len(data)
            writer.write(data)
            await writer.drain()


class Retries(StoreObserver):
    def __init__(self) -> None:
        self.ops: list[str] = []

    def retried(self, op: str) -> None:
        self.ops.append(op)


@pytest.fixture(scope="module")
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A store of these tests alone, which they may kill."""
    source = Source(os.environ.get("LOCAL_SERVICES", Source.AUTO))
    try:
        with object_store(tmp_path_factory.mktemp("own-object-store"), source=source) as service:
            if service.source is Source.GIVEN:
                pytest.skip("a store that the environment gave cannot be killed")
            yield service
    except (Unavailable, NotStarted) as error:
        pytest.skip(f"s3: {error}")


@pytest.fixture
def place(own_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Place]:
    """A new bucket in the store of these tests; the store runs again afterwards."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", own_store.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", own_store.secret_key)
    client = connect(own_store)
    bucket = f"test-{secrets.token_hex(8)}"
    client.create_bucket(Bucket=bucket)
    yield S3Place(own_store.endpoint_url, bucket, client)
    own_store.start()


@pytest.fixture
async def proxy(place: S3Place) -> AsyncIterator[Proxy]:
    async with Proxy(place.endpoint_url) as running:
        yield running


def behind(proxy: Proxy, place: S3Place) -> S3Place:
    return replace(place, endpoint_url=proxy.url)


# --- the store dies ---


@pytest.mark.parametrize("parts", [0, 3], ids=["in-the-only-part", "after-three-parts"])
async def test_a_put_fails_when_the_store_is_killed_and_nothing_is_under_its_key(
    own_store: ObjectStore, place: S3Place, parts: int
) -> None:
    async def interrupted() -> AsyncIterator[bytes]:
        for _ in range(parts):
            yield bytes(PART_BYTES_MIN)
        await asyncio.to_thread(own_store.kill)
        yield b"the rest"

    store = place.store()
    key = store.new_key()
    with pytest.raises(ModelManagerError) as failed:
        await store.put(key, interrupted(), info=INFO, size=None, sha256=None, max_size=100 * MIB)
    assert failed.value.code == "ERR_STORAGE_UNAVAILABLE"
    with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
        await store.probe()
    await asyncio.to_thread(own_store.start)
    await store.probe()
    assert await keys(store) == set()
    with pytest.raises(BlobMissing):
        await store.stat(key)
    assert (await put(store, b"works again")).size == 11
    await store.close()


async def test_a_read_fails_when_the_store_is_killed_and_works_when_it_is_back(
    own_store: ObjectStore, place: S3Place, proxy: Proxy
) -> None:
    data, store = content(8 * MIB), behind(proxy, place).store()
    key = (await put(store, data)).key
    proxy.cut_after, proxy.on_cut = 3 * MIB, own_store.kill
    seen = bytearray()
    with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
        async for chunk in RetryingStore(store, wait_max_s=0.01).read(key):
            seen += chunk
    assert data.startswith(seen)
    assert 0 < len(seen) < len(data)
    proxy.cut_after = None
    await asyncio.to_thread(own_store.start)
    assert await read(store, key) == data
    await store.close()


async def test_a_hash_fails_when_the_store_is_killed_and_works_when_it_is_back(
    own_store: ObjectStore, place: S3Place, proxy: Proxy
) -> None:
    data, store = content(8 * MIB), behind(proxy, place).store()
    stored = await put(store, data)
    proxy.cut_after, proxy.on_cut = 3 * MIB, own_store.kill
    with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
        await RetryingStore(store, wait_max_s=0.01).hash(stored.key)
    proxy.cut_after = None
    await asyncio.to_thread(own_store.start)
    assert await store.hash(stored.key) == stored
    await store.close()


async def test_no_failure_names_the_store_s_address(own_store: ObjectStore, place: S3Place) -> None:
    store = place.store()
    await asyncio.to_thread(own_store.kill)
    with pytest.raises(ModelManagerError) as failed:
        await store.stat("blobs/any")
    assert "127.0.0.1" not in failed.value.message
    assert place.bucket not in failed.value.message
    await store.close()


# --- the network cuts ---


@pytest.mark.parametrize(("start", "length"), [(0, None), (MIB + 7, None), (MIB + 7, 5 * MIB)])
async def test_a_read_goes_on_where_it_broke_however_often(
    place: S3Place, proxy: Proxy, start: int, length: int | None
) -> None:
    data, retries = content(9 * MIB), Retries()
    key = (await put(place.store(), data)).key
    proxy.cut_after = MIB // 2
    store = RetryingStore(behind(proxy, place).store(), observe=retries, wait_max_s=0.01)
    expected = data[start : None if length is None else start + length]
    assert await read(store, key, start, length) == expected
    assert proxy.cuts >= len(expected) // proxy.cut_after > 5
    assert set(retries.ops) == {"read"}
    await store.close()


async def test_a_read_without_progress_ends_after_a_few_attempts(place: S3Place, proxy: Proxy) -> None:
    retries = Retries()
    key = (await put(place.store(), content(MIB))).key
    proxy.cut_after = 0
    store = RetryingStore(behind(proxy, place).store(), observe=retries, wait_max_s=0.01)
    with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
        await read(store, key)
    assert retries.ops == ["read"] * (ATTEMPTS - 1)
    await store.close()


async def test_a_hash_goes_on_after_a_break(place: S3Place, proxy: Proxy) -> None:
    stored = await put(place.store(), content(9 * MIB))
    progress: list[int] = []

    def heal() -> None:
        proxy.cut_after = None

    proxy.cut_after, proxy.on_cut = 3 * MIB, heal
    store = RetryingStore(behind(proxy, place).store(), wait_max_s=0.01)
    assert await store.hash(stored.key, progress.append) == stored
    assert proxy.cuts >= 1
    assert progress[-1] == stored.size
    await store.close()


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "undeclared"])
@pytest.mark.parametrize(
    ("size", "request_line"),
    [
        (1000, rb"PUT (?!.*partNumber)"),
        (PART_BYTES_MIN + 1, rb"PUT .*partNumber=1"),
        (PART_BYTES_MIN + 1, rb"POST .*uploadId="),
    ],
    ids=["put", "part", "complete"],
)
async def test_a_put_whose_answer_was_lost_succeeds(
    place: S3Place, proxy: Proxy, size: int, request_line: bytes, declared: bool
) -> None:
    def loses(request: bytes) -> bool:
        return proxy.cuts == 0 and re.match(request_line, request) is not None

    proxy.loses = loses
    data, store = content(size), behind(proxy, place).store()
    key = store.new_key()
    stored = await store.put(
        key,
        chunked(data),
        info=INFO,
        size=size if declared else None,
        sha256=sha256(data) if declared else None,
        max_size=2 * PART_BYTES_MIN,
    )
    assert proxy.cuts == 1
    assert (await place.store().hash(key)) == stored
    assert place.traces(key) == [f"{PREFIX}/{key}"]
    assert place.metadata(key)["model-manager-sha256"] == sha256(data)
    await store.close()


@pytest.mark.parametrize("size", [1000, PART_BYTES_MIN + 1], ids=["put", "complete"])
async def test_a_lost_answer_does_not_make_another_s_blob_ours(place: S3Place, proxy: Proxy, size: int) -> None:
    key = (await put(place.store(), b"another's")).key
    proxy.loses = lambda request: proxy.cuts == 0 and re.match(rb"PUT (?!.*part)|POST .*uploadId=", request) is not None
    store = behind(proxy, place).store()
    with pytest.raises(ModelManagerError, match="ERR_INTERNAL"):
        await put(store, content(size), key)
    assert proxy.cuts == 1
    assert await read(place.store(), key) == b"another's"
    await store.close()


async def test_a_put_that_is_never_answered_leaves_nothing(place: S3Place, proxy: Proxy) -> None:
    """The store did the work each time, so that there is something to remove."""
    proxy.loses = lambda request: request.startswith(b"PUT")
    store = behind(proxy, place).store()
    key = store.new_key()
    with pytest.raises(ModelManagerError):
        await store.put(key, chunked(b"bytes"), info=INFO, size=None, sha256=sha256(b"other"), max_size=5)
    proxy.loses = lambda request: request.startswith((b"PUT", b"HEAD"))
    with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
        await put(store, b"bytes", key)
    assert proxy.cuts > 1
    assert place.traces(key) == []
    await store.close()


async def test_an_upload_that_someone_aborts_fails_and_leaves_nothing(place: S3Place) -> None:
    store = place.store()
    key = store.new_key()
    name = f"{PREFIX}/{key}"

    async def interrupted() -> AsyncIterator[bytes]:
        yield bytes(2 * PART_BYTES_MIN)
        while not (found := place.client.list_multipart_uploads(Bucket=place.bucket, Prefix=name).get("Uploads")):
            await asyncio.sleep(0.01)
        place.client.abort_multipart_upload(Bucket=place.bucket, Key=name, UploadId=found[0]["UploadId"])
        yield bytes(PART_BYTES_MIN)

    with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
        await store.put(key, interrupted(), info=INFO, size=None, sha256=None, max_size=100 * MIB)
    assert place.traces(key) == []
    await store.close()


async def test_a_blob_too_large_for_one_copy_is_described_in_parts(
    place: S3Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_stream, "_COPY_BYTES_MAX", PART_BYTES_MIN)
    monkeypatch.setattr(s3_stream, "_COPY_PART_BYTES", 7 * MIB)
    data, store = content(PART_BYTES_MIN + 1), place.store()
    key = store.new_key()
    stored = await store.put(key, chunked(data), info=INFO, size=None, sha256=None, max_size=len(data))
    assert place.metadata(key)["model-manager-sha256"] == sha256(data)
    assert await store.hash(key) == stored
    assert place.traces(key) == [f"{PREFIX}/{key}"]
    await store.close()
