"""The bytes that are stored and fetched, and the plain ways to move them that ours are compared with."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from worker.storage.blobstore import BlobInfo, BlobStore, StoredBlob

BLOCK_BYTES = 1024 * 1024
INFO = BlobInfo(format="custom", model="bench/model", version="1.0.0", rack="bench")


def random_file(path: Path, size: int) -> Path:
    """`size` bytes that do not compress, read once so that they are in the page cache."""
    with path.open("wb") as file:
        for _ in range(size // BLOCK_BYTES):
            file.write(os.urandom(BLOCK_BYTES))
    plain_read(path)
    return path


def sparse_file(path: Path, size: int, mark: str) -> Path:
    """`size` bytes that take no room on the disk: `mark`, then zeros."""
    with path.open("wb") as file:
        file.write(mark.encode())
        file.truncate(size)
    return path


def plain_read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        block = bytearray(BLOCK_BYTES)
        while file.readinto(block):
            pass


def sha256_alone(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def copy_and_sync(source: Path, target: Path) -> None:
    """Read, write, fsync."""
    with source.open("rb", buffering=0) as file, target.open("wb", buffering=0) as copy:
        block = memoryview(bytearray(BLOCK_BYTES))
        while count := file.readinto(block):
            copy.write(block[:count])
        os.fsync(copy.fileno())


async def chunks_of(path: Path) -> AsyncIterator[bytes]:
    """The file in chunks, as a fast sender's arrive."""
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(BLOCK_BYTES):
            yield chunk
            await asyncio.sleep(0)


async def put(store: BlobStore, source: Path, *, sha256: str | None = None) -> StoredBlob:
    """Store a file under a new key; its size and, if given, its digest are declared."""
    size = source.stat().st_size
    return await store.put(
        store.new_key(), chunks_of(source), info=INFO, size=size, sha256=sha256, max_size=max(size, 1)
    )


def per_second(size: int, work: Callable[[], object]) -> float:
    """Bytes a second of `work`, which moves `size` bytes; what others left to be written is written before."""
    os.sync()
    began = time.perf_counter()
    work()
    return size / (time.perf_counter() - began)
