"""Retries around any blob store, with the same contract: tenacity decides when, the request's deadline when to stop.

What can be repeated is repeated. A `put` is not, since its stream can be read once (a backend retries its parts); a
broken `read` goes on at the byte where it broke.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar, cast

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential_jitter

from schemas.deadline import remaining
from schemas.errors import ModelManagerError
from worker.storage.blobstore import (
    UNOBSERVED,
    BegunUpload,
    BlobInfo,
    BlobStat,
    BlobStore,
    DirectUploads,
    Document,
    PartPlan,
    SignedPart,
    StoredBlob,
    StoreObserver,
    UploadedPart,
    Usage,
)

_T = TypeVar("_T")

ATTEMPTS = 7  # some seven seconds in all: a store that restarts costs no transfer
WAIT_MAX_S = 5.0


def worth_retrying(error: BaseException) -> bool:
    """Whether the same call may succeed a moment later."""
    return isinstance(error, ModelManagerError) and error.code == "ERR_STORAGE_UNAVAILABLE" and not error.details


def attempts(op: str, observe: StoreObserver, *, wait_max_s: float = WAIT_MAX_S) -> AsyncRetrying:
    """The policy: a few attempts with growing random waits, none that could not begin before the deadline."""

    def give_up(state: RetryCallState) -> bool:
        left = remaining()
        return state.attempt_number >= ATTEMPTS or (left is not None and left <= state.upcoming_sleep)

    return AsyncRetrying(
        retry=retry_if_exception(worth_retrying),
        wait=wait_exponential_jitter(multiplier=0.1, max=wait_max_s, jitter=0.1),
        stop=give_up,
        before_sleep=lambda _: observe.retried(op),
        reraise=True,
    )


class RetryingStore:
    """A blob store that repeats what failed for a moment."""

    def __init__(
        self, inner: BlobStore, *, observe: StoreObserver = UNOBSERVED, wait_max_s: float = WAIT_MAX_S
    ) -> None:
        self._inner = inner
        self._observe = observe
        self._wait_max_s = wait_max_s
        self.backend = inner.backend
        direct = inner.direct_uploads
        self.direct_uploads: DirectUploads | None = None if direct is None else _RetryingUploads(direct, self._repeat)

    async def _repeat(self, op: str, call: Callable[[], Awaitable[_T]]) -> _T:
        async for attempt in attempts(op, self._observe, wait_max_s=self._wait_max_s):
            with attempt:
                return await call()
        raise AssertionError("tenacity returns or raises")

    def new_key(self) -> str:
        return self._inner.new_key()

    def local_path(self, key: str) -> Path | None:
        return self._inner.local_path(key)

    async def put(
        self,
        key: str,
        chunks: AsyncIterator[bytes],
        *,
        info: BlobInfo,
        size: int | None,
        sha256: str | None,
        max_size: int,
    ) -> StoredBlob:
        return await self._inner.put(key, chunks, info=info, size=size, sha256=sha256, max_size=max_size)

    async def read(self, key: str, start: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        seen = 0
        async for attempt in attempts("read", self._observe, wait_max_s=self._wait_max_s):
            with attempt:
                left = None if length is None else length - seen
                # Closed by hand: the collector would free what the backend holds at some later time.
                inner = self._inner.read(key, start + seen, left)
                async with contextlib.aclosing(cast(AsyncGenerator[bytes, None], inner)) as chunks:
                    async for chunk in chunks:
                        seen += len(chunk)
                        attempt.retry_state.attempt_number = 1  # only failures without progress count
                        yield chunk

    async def read_at(self, key: str, offset: int, length: int) -> bytes:
        return await self._repeat("read_at", lambda: self._inner.read_at(key, offset, length))

    async def stat(self, key: str) -> BlobStat:
        return await self._repeat("stat", lambda: self._inner.stat(key))

    async def hash(self, key: str, progress: Callable[[int], None] | None = None) -> StoredBlob:
        return await self._repeat("hash", lambda: self._inner.hash(key, progress))

    async def delete(self, key: str) -> None:
        await self._repeat("delete", lambda: self._inner.delete(key))

    def list(self, prefix: str) -> AsyncIterator[BlobStat]:
        return self._inner.list(prefix)

    async def usage(self) -> Usage:
        return await self._repeat("usage", self._inner.usage)

    async def probe(self) -> None:
        await self._inner.probe()  # it is asked again anyway, and must tell the truth at once

    async def presign_get(self, key: str, *, expires_s: int, filename: str | None = None) -> str | None:
        return await self._inner.presign_get(key, expires_s=expires_s, filename=filename)

    async def get_document(self, name: str) -> Document | None:
        return await self._repeat("get_document", lambda: self._inner.get_document(name))

    async def put_document(self, name: str, data: bytes, *, etag: str | None) -> Document:
        # Not repeated: after a lost answer the condition would fail on our own write. The caller looks again.
        return await self._inner.put_document(name, data, etag=etag)

    async def close(self) -> None:
        await self._inner.close()


class _RetryingUploads:
    """The same for direct uploads, all of whose operations can be repeated but `begin`."""

    def __init__(self, inner: DirectUploads, repeat: Callable[..., Awaitable[object]]) -> None:
        self._inner = inner
        self._repeat = repeat

    async def begin(self, key: str, *, info: BlobInfo, size: int, sha256: str) -> PartPlan:
        return await self._inner.begin(key, info=info, size=size, sha256=sha256)

    async def sign(
        self, key: str, upload_id: str, number: int, *, sha256: str, length: int, expires_s: int
    ) -> SignedPart:
        return await self._inner.sign(key, upload_id, number, sha256=sha256, length=length, expires_s=expires_s)

    async def parts(self, key: str, upload_id: str) -> dict[int, UploadedPart]:
        return await self._repeat("parts", lambda: self._inner.parts(key, upload_id))  # type: ignore[return-value]

    async def complete(self, key: str, upload_id: str, parts: Mapping[int, UploadedPart]) -> BlobStat:
        return await self._repeat("complete", lambda: self._inner.complete(key, upload_id, parts))  # type: ignore[return-value]

    async def abort(self, key: str, upload_id: str) -> None:
        await self._repeat("abort", lambda: self._inner.abort(key, upload_id))

    def begun(self) -> AsyncIterator[BegunUpload]:
        return self._inner.begun()
