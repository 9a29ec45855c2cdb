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
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from schemas.errors import ModelManagerError
from schemas.ids import new_ulid
from worker.storage.blobstore import (
    READ_CHUNK_BYTES,
    UNOBSERVED,
    BlobInfo,
    BlobMissing,
    BlobStat,
    Document,
    StoredBlob,
    StoreObserver,
    Usage,
)
from worker.storage.hashing import Expectation, blocks

_T = TypeVar("_T")

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_BLOCK_BYTES = 1024 * 1024
_HASH_BLOCK_BYTES = 4 * 1024 * 1024
_THREADS = 8


class DiskStore:
    """The embedded backend. All file work is done in its own bounded threads."""

    backend = "disk"
    direct_uploads = None

    def __init__(self, root: Path, *, observe: StoreObserver = UNOBSERVED) -> None:
        self._root = root
        self._observe = observe
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="disk")
        # Hashing and writing of one put overlap, so they must not wait for each other's threads.
        self._hashers = ThreadPoolExecutor(_THREADS, thread_name_prefix="sha256")

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
        with self._observed("put"):
            expectation = Expectation(size, sha256, max_size)
            path = self._path(key)
            file = await self._run(lambda: _create(path))
            try:
                await self._fill(file, chunks, expectation)
                digest = expectation.finish()
                await self._run(lambda: _sync_and_close(file, path.parent))
            except BaseException:
                # Shielded: a cancelled caller must not leave the file behind.
                await asyncio.shield(self._run(lambda: _discard(file, path)))
                raise
            self._observe.bytes_moved("in", expectation.seen)
            return StoredBlob(key, expectation.seen, digest)

    async def _fill(self, file: BinaryIO, chunks: AsyncIterator[bytes], expectation: Expectation) -> None:
        """Read the next block while the one before is hashed and written."""
        loop = asyncio.get_running_loop()
        working: list[asyncio.Future[object]] = []
        try:
            async for block in blocks(chunks, _BLOCK_BYTES, expectation):
                await _all(working)
                working = [
                    loop.run_in_executor(self._hashers, expectation.update, block),
                    loop.run_in_executor(self._threads, _write_all, file, block),
                ]
            await _all(working)
        except OSError as error:
            raise _translated(error) from error
        finally:
            await asyncio.gather(*working, return_exceptions=True)

    # --- bytes out ---

    async def read(self, key: str, start: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        file = await self._run(lambda: _open(self._path(key), key))
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
            with _open(self._path(key), key) as file:
                return os.pread(file.fileno(), length, offset)

        return await self._run(read)

    async def _pread(self, file: BinaryIO, length: int, offset: int) -> bytes:
        return await self._run(lambda: os.pread(file.fileno(), length, offset))

    async def hash(self, key: str, progress: Callable[[int], None] | None = None) -> StoredBlob:
        loop = asyncio.get_running_loop()

        def tell(seen: int) -> None:
            if progress is not None:
                loop.call_soon_threadsafe(progress, seen)

        stop = False

        def work() -> StoredBlob:
            digest, seen, block = hashlib.sha256(), 0, memoryview(bytearray(_HASH_BLOCK_BYTES))
            with _open(self._path(key), key) as file:
                # Bytes that went bad on the disk are not seen through the page cache.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while (count := file.readinto(block)) and not stop:  # type: ignore[attr-defined]
                    digest.update(block[:count])
                    seen += count
                    tell(seen)
            return StoredBlob(key, seen, digest.hexdigest())

        with self._observed("hash"):
            try:
                return await self._run(work)
            finally:
                stop = True

    # --- the rest ---

    async def stat(self, key: str) -> BlobStat:
        def work() -> BlobStat:
            with _open(self._path(key), key) as file:
                found = os.fstat(file.fileno())
            return BlobStat(key, found.st_size, found.st_mtime)

        return await self._run(work)

    async def delete(self, key: str) -> None:
        def work() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._path(key).unlink()

        with self._observed("delete"):
            await self._run(work)

    async def list(self, prefix: str) -> AsyncIterator[BlobStat]:
        folder = self._root / "blobs"

        def work() -> list[BlobStat]:
            found = []
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    key = f"blobs/{entry.name}"
                    if key.startswith(prefix) and entry.is_file(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):  # deleted since
                            status = entry.stat(follow_symlinks=False)
                            found.append(BlobStat(key, status.st_size, status.st_mtime))
            return found

        for blob in await self._run(work):
            yield blob

    async def usage(self) -> Usage:
        def work() -> Usage:
            self._root.mkdir(parents=True, exist_ok=True)
            space = os.statvfs(self._root)
            return Usage(space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize)

        return await self._run(work)

    async def probe(self) -> None:
        def work() -> None:
            folder = self._root / "blobs"
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        await self._run(work)

    async def get_document(self, name: str) -> Document | None:
        def work() -> Document | None:
            with contextlib.suppress(FileNotFoundError):
                return _document(self._document_path(name).read_bytes())
            return None

        return await self._run(work)

    async def put_document(self, name: str, data: bytes, *, etag: str | None) -> Document:
        def work() -> Document:
            path = self._document_path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with (self._root / ".documents.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the whole look-and-write is one step
                current = _document(path.read_bytes()).etag if path.exists() else None
                if current != etag:
                    raise ModelManagerError("ERR_CONFLICT", f"{name} is not as expected.")
                _replace(path, data)
            return _document(data)

        return await self._run(work)

    async def close(self) -> None:
        self._threads.shutdown(wait=True)
        self._hashers.shutdown(wait=True)

    def _path(self, key: str) -> Path:
        return self._root / key

    def _document_path(self, name: str) -> Path:
        return self._root / name

    async def _run(self, work: Callable[[], _T]) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except OSError as error:
            raise _translated(error) from error

    @contextlib.contextmanager
    def _observed(self, op: str) -> Iterator[None]:
        started, code = time.monotonic(), None
        try:
            yield
        except ModelManagerError as error:
            code = error.code
            raise
        finally:
            self._observe.operation(op, time.monotonic() - started, code)


def _translated(error: OSError) -> ModelManagerError:
    """Our error for the system's: where the meaning of an errno is known."""
    reason = error.strerror or type(error).__name__
    if error.errno in _FULL:
        return ModelManagerError("ERR_STORAGE_FULL")
    if error.errno == errno.EEXIST:
        return ModelManagerError("ERR_INTERNAL", "A storage key was used twice.")
    return ModelManagerError("ERR_STORAGE_UNAVAILABLE", f"The disk says: {reason}.")


async def _all(futures: list[asyncio.Future[object]]) -> None:
    for future in futures:
        await future


def _create(path: Path) -> BinaryIO:
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        _sync_folder(path.parent.parent)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0)


def _write_all(file: BinaryIO, block: bytes | bytearray) -> None:
    view = memoryview(block)
    while view:
        view = view[file.write(view) :]


def _sync_and_close(file: BinaryIO, folder: Path) -> None:
    os.fsync(file.fileno())
    file.close()
    _sync_folder(folder)


def _discard(file: BinaryIO, path: Path) -> None:
    file.close()
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _open(path: Path, key: str) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise BlobMissing(key) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", "A stored blob is not a regular file.")
    return os.fdopen(descriptor, "rb", buffering=0)


def _replace(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _document(data: bytes) -> Document:
    return Document(data, hashlib.sha256(data).hexdigest())
