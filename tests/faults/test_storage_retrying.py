"""What is tried again, how often, and when it is not: a store that fails a number of times."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from schemas.deadline import deadline, remaining
from schemas.errors import ModelManagerError
from tests.stores import INFO, chunked, content, put, read
from worker.storage.blobstore import BlobMissing, BlobStat, BlobStore, Document, StoredBlob, StoreObserver, Usage
from worker.storage.memory import MemoryStore
from worker.storage.retrying import ATTEMPTS, RetryingStore

AWAY = ModelManagerError("ERR_STORAGE_UNAVAILABLE")
KEY = "blobs/a"


class FailingStore(MemoryStore):
    """Fails the next `failures` calls, and every read after its first `break_after` bytes while there are some."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = 0
        self.error: Exception = AWAY
        self.calls = 0
        self.break_after: int | None = None

    def _fail(self) -> None:
        self.calls += 1
        if self.failures:
            self.failures -= 1
            raise self.error

    async def read(self, key: str, start: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        self._fail()
        data = await super().read_at(key, start, 2**40 if length is None else length)
        yield data[: self.break_after]
        if self.break_after is not None and len(data) > self.break_after:
            raise self.error

    async def read_at(self, key: str, offset: int, length: int) -> bytes:
        self._fail()
        return await super().read_at(key, offset, length)

    async def stat(self, key: str) -> BlobStat:
        self._fail()
        return await super().stat(key)

    async def hash(self, key: str, progress: Callable[[int], None] | None = None) -> StoredBlob:
        self._fail()
        return await super().hash(key, progress)

    async def delete(self, key: str) -> None:
        self._fail()
        await super().delete(key)

    async def usage(self) -> Usage:
        self._fail()
        return await super().usage()

    async def probe(self) -> None:
        self._fail()

    async def get_document(self, name: str) -> Document | None:
        self._fail()
        return await super().get_document(name)


class Retries(StoreObserver):
    def __init__(self) -> None:
        self.ops: list[str] = []

    def retried(self, op: str) -> None:
        self.ops.append(op)


CALLS: dict[str, Callable[[BlobStore], Awaitable[object]]] = {
    "read": lambda store: read(store, KEY),
    "read_at": lambda store: store.read_at(KEY, 0, 5),
    "stat": lambda store: store.stat(KEY),
    "hash": lambda store: store.hash(KEY),
    "delete": lambda store: store.delete(KEY),
    "usage": lambda store: store.usage(),
    "get_document": lambda store: store.get_document("owner.json"),
}


@pytest.fixture
async def inner() -> FailingStore:
    store = FailingStore()
    await put(store, content(1000), KEY)
    return store


@pytest.fixture
def retries() -> Retries:
    return Retries()


@pytest.fixture
def store(inner: FailingStore, retries: Retries) -> RetryingStore:
    return RetryingStore(inner, observe=retries, wait_max_s=0.001)


@pytest.fixture
def deadline_in() -> Iterator[Callable[[float], None]]:
    before = deadline.get()
    yield lambda seconds: deadline.set(time.monotonic() + seconds) and None
    deadline.set(before)


@pytest.mark.parametrize("op", CALLS)
async def test_a_call_succeeds_at_its_last_attempt(
    store: RetryingStore, inner: FailingStore, retries: Retries, op: str
) -> None:
    inner.failures = ATTEMPTS - 1
    await CALLS[op](store)
    assert retries.ops == [op] * (ATTEMPTS - 1)
    assert inner.calls == ATTEMPTS


@pytest.mark.parametrize("op", CALLS)
async def test_after_the_last_attempt_the_failure_itself_is_raised(
    store: RetryingStore, inner: FailingStore, op: str
) -> None:
    inner.failures = ATTEMPTS
    with pytest.raises(ModelManagerError) as failed:
        await CALLS[op](store)
    assert failed.value is AWAY
    assert inner.calls == ATTEMPTS


@pytest.mark.parametrize(
    "error",
    [
        BlobMissing(KEY),
        ModelManagerError("ERR_STORAGE_FULL"),
        ModelManagerError("ERR_INTERNAL"),
        ModelManagerError("ERR_STORAGE_UNAVAILABLE", "There is no bucket b.", bucket="b"),
        RuntimeError("unknown"),
    ],
    ids=lambda error: f"{type(error).__name__}-{getattr(error, 'code', '')}",
)
@pytest.mark.parametrize("op", CALLS)
async def test_what_will_not_pass_is_not_tried_again(
    store: RetryingStore, inner: FailingStore, op: str, error: Exception
) -> None:
    inner.failures, inner.error = 1, error
    with pytest.raises(type(error)) as failed:
        await CALLS[op](store)
    assert failed.value is error
    assert inner.calls == 1


async def test_the_probe_tells_the_truth_at_once(store: RetryingStore, inner: FailingStore) -> None:
    inner.failures = 1
    with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
        await store.probe()
    assert inner.calls == 1


async def test_a_put_is_never_tried_again(store: RetryingStore) -> None:
    begun = 0

    async def failing() -> AsyncIterator[bytes]:
        nonlocal begun
        begun += 1
        yield b"bytes"
        raise AWAY

    with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
        await store.put("blobs/b", failing(), info=INFO, size=None, sha256=None, max_size=100)
    assert begun == 1


@pytest.mark.parametrize("length", [None, 1000, 500, 1])
async def test_a_read_that_breaks_again_and_again_gives_each_byte_once(
    store: RetryingStore, inner: FailingStore, length: int | None
) -> None:
    inner.break_after = 7
    assert await read(store, KEY, 0, length) == content(1000)[:length]


async def test_a_failure_of_the_reader_itself_is_not_taken_for_one_of_the_store(
    store: RetryingStore, inner: FailingStore
) -> None:
    with pytest.raises(ModelManagerError):
        async for _ in store.read(KEY):
            raise AWAY
    assert inner.calls == 1


async def test_no_attempt_is_made_that_could_not_begin_before_the_deadline(
    inner: FailingStore, deadline_in: Callable[[float], None]
) -> None:
    store = RetryingStore(inner, wait_max_s=60)
    inner.failures = 1000
    deadline_in(0.25)
    with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
        await store.stat(KEY)
    left = remaining()
    assert left is not None
    assert left > -0.2
    assert 1 <= inner.calls <= ATTEMPTS


async def test_after_the_deadline_there_is_one_attempt(
    store: RetryingStore, inner: FailingStore, deadline_in: Callable[[float], None]
) -> None:
    deadline_in(-1)
    inner.failures = 1
    with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
        await store.stat(KEY)
    assert inner.calls == 1
    assert (await store.stat(KEY)).size == 1000


async def test_a_far_deadline_changes_nothing(
    store: RetryingStore, inner: FailingStore, deadline_in: Callable[[float], None]
) -> None:
    deadline_in(3600)
    inner.failures = ATTEMPTS - 1
    assert (await store.stat(KEY)).size == 1000


async def test_documents_are_not_written_twice(store: RetryingStore, inner: FailingStore) -> None:
    inner.failures = 1
    with pytest.raises(ModelManagerError, match="ERR_STORAGE_UNAVAILABLE"):
        await store.put_document("owner.json", b"{}", etag=None)
    assert inner.documents == {}
    assert (await store.put_document("owner.json", b"{}", etag=None)).data == b"{}"


async def test_the_wrapper_gives_what_the_store_gives(store: RetryingStore) -> None:
    stored = await store.put("blobs/b", chunked(b"bytes"), info=INFO, size=5, sha256=None, max_size=5)
    assert {blob.key async for blob in store.list("blobs/")} == {KEY, "blobs/b"}
    assert await store.hash("blobs/b") == stored
    assert store.backend == "memory"
    assert store.direct_uploads is None
    assert store.local_path(KEY) is None
