"""Blob stores as the storage tests want them: each with a way to look, and to spoil, behind its back."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from worker.storage.blobstore import BlobInfo, BlobStore, StoredBlob
from worker.storage.disk import DiskStore
from worker.storage.memory import MemoryStore
from worker.storage.s3 import S3Store

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

MIB = 1024 * 1024
INFO = BlobInfo(format="onnx", model="vision/müller", version="1.0.0", rack="r1")
PREFIX = "racks/r1"


def content(size: int) -> bytes:
    """Bytes that do not repeat, the same for the same size."""
    return random.Random(size).randbytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def chunked(data: bytes, chunk_bytes: int = 64 * 1024) -> AsyncIterator[bytes]:
    for at in range(0, len(data), chunk_bytes):
        yield data[at : at + chunk_bytes]


async def zeros(size: int, chunk_bytes: int = MIB) -> AsyncIterator[bytes]:
    """`size` bytes, a multiple of `chunk_bytes`, of which only one chunk exists."""
    chunk = bytes(chunk_bytes)
    for _ in range(size // chunk_bytes):
        yield chunk


async def put(store: BlobStore, data: bytes, key: str | None = None) -> StoredBlob:
    """Store `data` with everything declared."""
    key = key or store.new_key()
    return await store.put(
        key, chunked(data), info=INFO, size=len(data), sha256=sha256(data), max_size=max(len(data), 1)
    )


async def read(store: BlobStore, key: str, start: int = 0, length: int | None = None) -> bytes:
    return b"".join([chunk async for chunk in store.read(key, start, length)])


async def keys(store: BlobStore, prefix: str = "blobs/") -> set[str]:
    return {blob.key async for blob in store.list(prefix)}


class Place(Protocol):
    """Where a store keeps its blobs, seen from behind."""

    def store(self) -> BlobStore: ...

    # What lies under `key`, finished or not.
    def traces(self, key: str) -> list[str]: ...

    # Replace the bytes under `key`.
    def spoil(self, key: str, data: bytes) -> None: ...


@dataclass(frozen=True)
class MemoryPlace:
    kept: MemoryStore = field(default_factory=MemoryStore)

    def store(self) -> BlobStore:
        return self.kept

    def traces(self, key: str) -> list[str]:
        return [name for name in self.kept.blobs if name.startswith(key)]

    def spoil(self, key: str, data: bytes) -> None:
        self.kept.blobs[key] = data


@dataclass(frozen=True)
class DiskPlace:
    root: Path

    def store(self) -> BlobStore:
        return DiskStore(self.root)

    def traces(self, key: str) -> list[str]:
        return [str(path) for path in (self.root / key).parent.glob(f"{Path(key).name}*")]

    def spoil(self, key: str, data: bytes) -> None:
        (self.root / key).write_bytes(data)


@dataclass(frozen=True)
class S3Place:
    """The keys of the account are taken from the environment, as everywhere with S3."""

    endpoint_url: str
    bucket: str
    client: S3Client

    def store(self) -> S3Store:
        return S3Store(endpoint_url=self.endpoint_url, bucket=self.bucket, prefix=PREFIX, timeout_s=10)

    def traces(self, key: str) -> list[str]:
        name = f"{PREFIX}/{key}"
        objects = self.client.list_objects_v2(Bucket=self.bucket, Prefix=name).get("Contents", [])
        uploads = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=name).get("Uploads", [])
        return [found["Key"] for found in objects] + [f"upload {found['UploadId']}" for found in uploads]

    def spoil(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{PREFIX}/{key}", Body=data)

    def metadata(self, key: str) -> dict[str, str]:
        return self.client.head_object(Bucket=self.bucket, Key=f"{PREFIX}/{key}")["Metadata"]
