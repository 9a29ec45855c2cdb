"""Blobs as files under one folder.

A blob is written at its final path: keys are never reused and no one looks for a blob that the catalog does not name,
so there is nothing to rename. It counts once the file, and the folder that names it, are synced.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from schemas.errors import ModelManagerError
from schemas.ids import new_ulid
from worker.storage.blobstore import (
    READ_CHUNK_BYTES,
    UNOBSERVED,
    BlobInfo,
    BlobStat,
    Document,
    StoredBlob,
    StoreObserver,
    Usage,
    observed,
)
from worker.storage.disk_files import NewFile, make_folder, open_blob, open_private, replace
from worker.storage.hashing import Expectation, pieces
from worker.storage.pending import Pending
from worker.threads import byte_threads, processor_threads

_T = TypeVar("_T")

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_PIECE_BYTES = 1024 * 1024
_HASH_BLOCK_BYTES = 4 * 1024 * 1024
_HASH_TURN_BYTES = 16 * 1024 * 1024
_LOCK_S = 5.0
_LOCK_POLL_S = 0.02


class DiskStore:
    """The embedded backend. All file work is done in its own bounded threads."""

    backend = "disk"
    direct_uploads = None

    def __init__(self, root: Path, *, observe: StoreObserver = UNOBSERVED) -> None:
        self._root = root
        self._observe = observe
        self._threads = byte_threads("disk")
        # Hashing and writing of one put overlap, so they must not wait for each other's threads.
        self._hashers = processor_threads()

    def new_key(self) -> str:
        return f"blobs/{new_ulid()}"

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    async def presign_get(self, key: str, *, expires_s: int, filename: str | None = None) -> str | None:
        return None

    # --- bytes in ---

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
        with observed(self._observe, "put"):
            expectation = Expectation(size, sha256, max_size)
            file, pending = NewFile(self._path(key)), Pending()
            try:
                await pending.result(self._submit(file.create))
                await self._fill(file, chunks, expectation, pending)
                digest = expectation.finish()
                await pending.result(self._submit(file.keep))
            except BaseException:
                # Shielded: a caller that is cancelled again must not leave the file behind.
                await asyncio.shield(self._discard(file, pending))
                raise
            self._observe.bytes_moved("in", expectation.seen)
            return StoredBlob(key, expectation.seen, digest)

    async def _fill(
        self, file: NewFile, chunks: AsyncIterator[bytes], expectation: Expectation, pending: Pending
    ) -> None:
        """Read the next piece while the one before is hashed and written."""
        loop = asyncio.get_running_loop()
        working: list[asyncio.Future[None]] = []
        async for piece in pieces(chunks, _PIECE_BYTES, expectation):
            for call in working:
                await pending.result(call)
            working = [
                pending.started(loop.run_in_executor(self._hashers, expectation.update, piece)),
                pending.started(self._submit(partial(file.write, piece))),
            ]
        for call in working:
            await pending.result(call)

    async def _discard(self, file: NewFile, pending: Pending) -> None:
        await pending.ended()
        await self._run(file.discard)

    # --- bytes out ---

    async def read(self, key: str, start: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        file = await self._run(lambda: open_blob(self._path(key), key))
        try:
            left = length
            offset = start
            while left is None or left > 0:
                wanted = READ_CHUNK_BYTES if left is None else min(left, READ_CHUNK_BYTES)
                chunk = await self._pread(file, wanted, offset)
                if not chunk:
                    break
                offset += len(chunk)
                left = None if left is None else left - len(chunk)
                self._observe.bytes_moved("out", len(chunk))
                yield chunk
        finally:
            file.close()

    async def read_at(self, key: str, offset: int, length: int) -> bytes:
        def read() -> bytes:
            with open_blob(self._path(key), key) as file:
                return os.pread(file.fileno(), length, offset)

        return await self._run(read)

    async def _pread(self, file: BinaryIO, length: int, offset: int) -> bytes:
        return await self._run(lambda: os.pread(file.fileno(), length, offset))

    async def hash(self, key: str, progress: Callable[[int], None] | None = None) -> StoredBlob:
        digest, seen, block = hashlib.sha256(), 0, bytearray(_HASH_BLOCK_BYTES)

        def cold() -> BinaryIO:
            file = open_blob(self._path(key), key)
            # Bytes that went bad on the disk are not seen through the page cache.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return file

        def turn() -> int:
            done = 0
            while done < _HASH_TURN_BYTES and (count := os.preadv(file.fileno(), [block], seen + done)):
                digest.update(memoryview(block)[:count])
                done += count
            return done

        with observed(self._observe, "hash"):
            file = await self._run(cold)
            try:
                # In turns, so that who wants a few bytes meanwhile does not wait for the whole.
                while count := await self._run(turn):
                    seen += count
                    if progress is not None:
                        progress(seen)
            finally:
                file.close()
            return StoredBlob(key, seen, digest.hexdigest())

    # --- the rest ---

    async def stat(self, key: str) -> BlobStat:
        def work() -> BlobStat:
            with open_blob(self._path(key), key) as file:
                found = os.fstat(file.fileno())
            return BlobStat(key, found.st_size, found.st_mtime)

        return await self._run(work)

    async def delete(self, key: str) -> None:
        def work() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._path(key).unlink()

        with observed(self._observe, "delete"):
            await self._run(work)

    async def list(self, prefix: str) -> AsyncIterator[BlobStat]:
        folder = self._root / prefix.rpartition("/")[0]

        def work() -> list[BlobStat]:
            found = []
            for parent, _, names in os.walk(folder):
                for path in (Path(parent, name) for name in names):
                    key = path.relative_to(self._root).as_posix()
                    if not key.startswith(prefix):
                        continue
                    with contextlib.suppress(FileNotFoundError):  # deleted since
                        status = path.lstat()
                        if stat.S_ISREG(status.st_mode):
                            found.append(BlobStat(key, status.st_size, status.st_mtime))
            return found

        for blob in await self._run(work):
            yield blob

    async def usage(self) -> Usage:
        def work() -> Usage:
            make_folder(self._root)
            space = os.statvfs(self._root)
            return Usage(space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize)

        return await self._run(work)

    async def probe(self) -> None:
        def work() -> None:
            folder = self._root / "blobs"
            make_folder(folder)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        await self._run(work)

    async def get_document(self, name: str) -> Document | None:
        def work() -> Document | None:
            with contextlib.suppress(FileNotFoundError):
                return _document(self._path(name).read_bytes())
            return None

        return await self._run(work)

    async def put_document(self, name: str, data: bytes, *, etag: str | None) -> Document:
        def work() -> Document | None:
            path = self._path(name)
            make_folder(path.parent)
            with os.fdopen(open_private(self._root / ".documents.lock", os.O_WRONLY | os.O_CREAT), "wb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the whole look-and-write is one step
                except BlockingIOError:
                    return None
                current = _document(path.read_bytes()).etag if path.exists() else None
                if current != etag:
                    raise ModelManagerError("ERR_CONFLICT", f"{name} is not as expected.")
                replace(path, data)
            return _document(data)

        give_up = time.monotonic() + _LOCK_S
        while (document := await self._run(work)) is None:
            # Not for ever: who holds the lock may be frozen, and nothing can be taken from it while it may go on.
            if time.monotonic() > give_up:
                text = "Another process is writing to this storage and does not end; if it hangs, end it."
                raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", text)
            await asyncio.sleep(_LOCK_POLL_S)
        return document

    async def close(self) -> None:
        await asyncio.to_thread(self._threads.shutdown)

    def _path(self, key: str) -> Path:
        return self._root / key

    def _submit(self, work: Callable[[], _T]) -> asyncio.Future[_T]:
        return asyncio.get_running_loop().run_in_executor(self._threads, _translating, work)

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await self._submit(work)


def _translated(error: OSError) -> ModelManagerError:
    """Our error for the system's: where the meaning of an errno is known."""
    reason = error.strerror or type(error).__name__
    if error.errno in _FULL:
        return ModelManagerError("ERR_STORAGE_FULL")
    return ModelManagerError("ERR_STORAGE_UNAVAILABLE", f"The disk says: {reason}.")


def _translating(work: Callable[[], _T]) -> _T:
    try:
        return work()
    except OSError as error:
        raise _translated(error) from error


def _document(data: bytes) -> Document:
    return Document(data, hashlib.sha256(data).hexdigest())
