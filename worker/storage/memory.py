"""Blobs in memory: the smallest implementation of the contract, for tests and trials. Nothing outlives the process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from schemas.errors import ModelManagerError
from schemas.ids import new_ulid
from worker.storage.blobstore import (
    READ_CHUNK_BYTES,
    BlobInfo,
    BlobMissing,
    BlobStat,
    Document,
    StoredBlob,
    Usage,
)
from worker.storage.hashing import Expectation, blocks


class MemoryStore:
    """`blobs` and `documents` are open to tests that want to see them or to spoil them."""

    backend = "memory"
    direct_uploads = None

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.documents: dict[str, bytes] = {}
        self._modified: dict[str, float] = {}

    def new_key(self) -> str:
        return f"blobs/{new_ulid()}"

    def local_path(self, key: str) -> Path | None:
        return None

    async def presign_get(self, key: str, *, expires_s: int, filename: str | None = None) -> str | None:
        return None

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
        expectation = Expectation(size, sha256, max_size)
        data = bytearray()
        async for block in blocks(chunks, READ_CHUNK_BYTES, expectation):
            expectation.update(block)
            data += block
        digest = expectation.finish()
        if key in self.blobs:
            raise ModelManagerError("ERR_INTERNAL", "A storage key was used twice.")
        self.blobs[key] = bytes(data)
        self._modified[key] = time.time()
        return StoredBlob(key, len(data), digest)

    async def read(self, key: str, start: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        data = memoryview(self._blob(key))[start : None if length is None else start + length]
        for at in range(0, len(data), READ_CHUNK_BYTES):
            yield bytes(data[at : at + READ_CHUNK_BYTES])

    async def read_at(self, key: str, offset: int, length: int) -> bytes:
        return self._blob(key)[offset : offset + length]

    async def stat(self, key: str) -> BlobStat:
        return BlobStat(key, len(self._blob(key)), self._modified[key])

    async def hash(self, key: str, progress: Callable[[int], None] | None = None) -> StoredBlob:
        data = self._blob(key)
        if progress is not None:
            progress(len(data))
        return StoredBlob(key, len(data), hashlib.sha256(data).hexdigest())

    async def delete(self, key: str) -> None:
        self.blobs.pop(key, None)
        self.documents.pop(key, None)

    async def list(self, prefix: str) -> AsyncIterator[BlobStat]:
        stored = self.blobs | self.documents
        for key in [key for key in stored if key.startswith(prefix)]:
            yield BlobStat(key, len(stored[key]), self._modified[key])

    async def usage(self) -> Usage:
        return Usage()

    async def probe(self) -> None:
        return

    async def get_document(self, name: str) -> Document | None:
        data = self.documents.get(name)
        return None if data is None else _document(data)

    async def put_document(self, name: str, data: bytes, *, etag: str | None) -> Document:
        current = await self.get_document(name)
        if (current and current.etag) != etag:
            raise ModelManagerError("ERR_CONFLICT", f"{name} is not as expected.")
        self.documents[name] = data
        self._modified[name] = time.time()
        return _document(data)

    async def close(self) -> None:
        return

    def _blob(self, key: str) -> bytes:
        try:
            return self.blobs[key]
        except KeyError:
            raise BlobMissing(key) from None


def _document(data: bytes) -> Document:
    return Document(data, hashlib.sha256(data).hexdigest())
