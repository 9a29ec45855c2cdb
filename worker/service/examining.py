"""Running the format hooks: in threads of their own, so that a slow store holds up nothing else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial

from schemas.errors import ModelManagerError
from schemas.findings import Finding
from schemas.journal import StoredFile
from worker.policy import Policy
from worker.storage.blobstore import BlobStore
from worker.threads import byte_threads
from worker.validation.registry import examine, refusal
from worker.validation.source import Source

_THREADS = 4
_READ_TIMEOUT_S = 60.0


class Examining:
    """What the bytes of a version are; does nothing where the policy does not look into files."""

    def __init__(self, store: BlobStore, policy: Policy) -> None:
        self._store = store
        self._policy = policy
        self._threads = byte_threads("validation", _THREADS)

    def stored(self, files: Iterable[StoredFile]) -> list[tuple[str, Source]]:
        """Stored files, as the hooks read them."""
        return [(file["path"], StoredSource(file["key"], file["size"], self._store)) for file in files]

    async def findings(self, model_type: str, files: Sequence[tuple[str, Source]]) -> list[Finding]:
        """What the hooks have to say."""
        if not self._policy.check_formats:
            return []
        stop = threading.Event()
        look = partial(examine, model_type, files, allow_pickle=self._policy.allow_pickle, stopped=stop.is_set)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, look)
        finally:
            stop.set()  # a caller who goes away leaves the thread behind

    async def refuse(self, model_type: str, files: Sequence[tuple[str, Source]]) -> None:
        """Raise the error of a store whose files hold what must not be stored."""
        error = refusal(await self.findings(model_type, files))
        if error is not None:
            raise error

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class StoredSource:
    """A stored blob, read from a thread. Made on the event loop. Raises ERR_STORAGE_UNAVAILABLE for a store that does
    not answer in time: that says nothing about the bytes."""

    key: str
    size: int
    _store: BlobStore = field(compare=False)
    _loop: asyncio.AbstractEventLoop = field(compare=False, default_factory=asyncio.get_running_loop)

    def read_at(self, offset: int, length: int) -> bytes:
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        reading = asyncio.run_coroutine_threadsafe(self._store.read_at(self.key, offset, length), self._loop)
        try:
            return reading.result(timeout=_READ_TIMEOUT_S)
        except (TimeoutError, CancelledError):
            reading.cancel()
            raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", "The storage does not answer.") from None
