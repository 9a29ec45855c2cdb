"""What a blob store promises. A new backend can be written from these comments alone.

A blob is written once under a key that was never used before and will never be used again; it appears whole and
verified, or not at all. Whether the rack has some bytes is for the catalog to say, never for the store.

Errors: `BlobMissing` is "no such blob". All else is a `ModelManagerError`: ERR_STORAGE_UNAVAILABLE may be tried again,
ERR_STORAGE_FULL needs an operator, the others are about what the caller gave. Cancelling any call leaves what a failure
leaves.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from schemas.errors import ModelManagerError

READ_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """What a blob is, for people who look into the store; the catalog alone is trusted."""

    format: str
    model: str
    version: str
    rack: str


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """Bytes that were hashed: `size` in bytes, `sha256` in hex."""

    key: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class BlobStat:
    """A stored blob as the store lists it; `modified` in unix seconds."""

    key: str
    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Room in bytes; None where the backend cannot tell."""

    free_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A small named document with the tag of its content, for compare-and-set."""

    data: bytes
    etag: str


class BlobMissing(Exception):
    """There is no blob under this key."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(key)


class StoreObserver:
    """What a store tells about itself, for metrics. Does nothing; override what is of interest. Never raises."""

    def operation(self, op: str, seconds: float, error: str | None) -> None:
        """One operation ended; `error` is its code."""

    def retried(self, op: str) -> None:
        """One operation, or one part of one, is tried again."""

    def bytes_moved(self, direction: str, count: int) -> None:
        """Bytes went `in` or `out`."""


UNOBSERVED = StoreObserver()


@contextlib.contextmanager
def observed(observe: StoreObserver, op: str) -> Iterator[None]:
    """Tell the observer how long the operation inside took, and the code of the error that ended it."""
    started, code = time.monotonic(), None
    try:
        yield
    except ModelManagerError as error:
        code = error.code
        raise
    finally:
        observe.operation(op, time.monotonic() - started, code)


@dataclass(frozen=True, slots=True)
class PartPlan:
    """How a direct upload is cut: every part has `part_size` bytes but the last."""

    upload_id: str
    part_size: int
    parts: int


def part_count(size: int, part_size: int) -> int:
    return max(1, -(-size // part_size))


@dataclass(frozen=True, slots=True)
class BegunUpload:
    """An upload in parts that is not over; `since` in unix seconds."""

    key: str
    upload_id: str
    since: float


@dataclass(frozen=True, slots=True)
class SignedPart:
    """An address to PUT one part to, with the headers that must go along as they are."""

    url: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class UploadedPart:
    size: int
    sha256: str
    etag: str


class DirectUploads(Protocol):
    """Uploads whose parts the caller PUTs straight to the store."""

    # Set up an upload under a new key. The blob's metadata is set here.
    async def begin(self, key: str, *, info: BlobInfo, size: int, sha256: str) -> PartPlan: ...

    # Sign part `number` (from 1) with its length and sha256 (hex): late, altered or wrongly sized bytes are refused by
    # the store. Touches no network.
    async def sign(
        self, key: str, upload_id: str, number: int, *, sha256: str, length: int, expires_s: int
    ) -> SignedPart: ...

    # The parts that have arrived, by number; none for an upload that is over or was never begun.
    async def parts(self, key: str, upload_id: str) -> dict[int, UploadedPart]: ...

    # Make the parts the blob. Succeeds again when it had succeeded. Says nothing of the whole sha256: `hash` does.
    # ERR_CONFLICT if a part is missing or the upload is gone without a blob.
    async def complete(self, key: str, upload_id: str, parts: Mapping[int, UploadedPart]) -> BlobStat: ...

    # Drop the parts. Does nothing for an upload that is over.
    async def abort(self, key: str, upload_id: str) -> None: ...

    # All uploads in parts of blobs that are not over, those of a `put` that is under way among them, in no order.
    def begun(self) -> AsyncIterator[BegunUpload]: ...


class BlobStore(Protocol):
    """Streams in and out; no call holds more than a few parts in memory, whatever the size."""

    backend: str

    # None where parts cannot go straight to the store.
    @property
    def direct_uploads(self) -> DirectUploads | None: ...

    # A key that no one has had and no one will have: `blobs/<ulid>`.
    def new_key(self) -> str: ...

    # Take the bytes, make them durable under `key`, and give their size and sha256. What was declared is checked:
    # ERR_CHECKSUM_MISMATCH for another size or sha256; ERR_MODEL_TOO_LARGE at the first byte over `max_size`. An
    # exception of `chunks` passes through. After any failure there is nothing under the key. Never tried again as a
    # whole, since `chunks` can be read once.
    async def put(
        self,
        key: str,
        chunks: AsyncIterator[bytes],
        *,
        info: BlobInfo,
        size: int | None,
        sha256: str | None,
        max_size: int,
    ) -> StoredBlob: ...

    # The bytes from `start`, `length` of them or to the end. An early `aclose` frees what it holds. BlobMissing before
    # the first byte.
    def read(self, key: str, start: int = 0, length: int | None = None) -> AsyncIterator[bytes]: ...

    # Up to `length` bytes at `offset`; fewer at the end of the blob.
    async def read_at(self, key: str, offset: int, length: int) -> bytes: ...

    async def stat(self, key: str) -> BlobStat: ...

    # Read every byte back from the store and hash it; `progress` is told the bytes so far.
    async def hash(self, key: str, progress: Callable[[int], None] | None = None) -> StoredBlob: ...

    # Remove the blob or document; nothing happens if there is none.
    async def delete(self, key: str) -> None: ...

    # The blobs and documents whose key begins with `prefix`, in no order. Those put or deleted meanwhile may be seen or
    # not.
    def list(self, prefix: str) -> AsyncIterator[BlobStat]: ...

    async def usage(self) -> Usage: ...

    # Is the store there? ERR_STORAGE_UNAVAILABLE says why not.
    async def probe(self) -> None: ...

    # Where the bytes lie, if they lie in a local file.
    def local_path(self, key: str) -> Path | None: ...

    # An address that gives the bytes until it expires, if the store has such; `filename` names the download.
    async def presign_get(self, key: str, *, expires_s: int, filename: str | None = None) -> str | None: ...

    # A document, or None.
    async def get_document(self, name: str) -> Document | None: ...

    # Write a document if it is as expected: absent (`etag` None) or with that tag; else ERR_CONFLICT. Of concurrent
    # writers one wins.
    async def put_document(self, name: str, data: bytes, *, etag: str | None) -> Document: ...

    async def close(self) -> None: ...
