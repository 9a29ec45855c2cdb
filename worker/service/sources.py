"""A stored blob as the validation hooks read it: synchronous, bounded, from a worker thread."""

from __future__ import annotations

import asyncio

from worker.storage.blobstore import BlobStore

_READ_TIMEOUT_S = 60.0


class StoredSource:
    """A stored blob. Made on the event loop, read from a thread."""

    def __init__(self, store: BlobStore, key: str, size: int) -> None:
        self._store = store
        self._key = key
        self._loop = asyncio.get_running_loop()
        self.size = size

    def read_at(self, offset: int, length: int) -> bytes:
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        reading = asyncio.run_coroutine_threadsafe(self._store.read_at(self._key, offset, length), self._loop)
        data: bytes = reading.result(timeout=_READ_TIMEOUT_S)
        return data
