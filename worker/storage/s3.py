"""Blobs as objects in an S3-compatible store.

Objects are created only (`If-None-Match: *`), and carry their sha256 as metadata. `s3_stream` has how a stream goes up.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from schemas.errors import ModelManagerError
from schemas.ids import new_ulid
from worker.storage.allocator import give_back_large_blocks
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
    observed,
)
from worker.storage.hashing import Expectation, blocks
from worker.storage.retrying import attempts
from worker.storage.s3_client import PartRefused, S3Calls, UploadGone, make_client
from worker.storage.s3_layout import part_size_for
from worker.storage.s3_stream import PARTS_OF_ALL, StreamUpload
from worker.storage.s3_uploads import S3DirectUploads

_RANGE_BYTES = 8 * 1024 * 1024
_RANGES_AHEAD = 3


class S3Store:
    """The object store backend. All keys lie under `prefix`, which belongs to one rack."""

    backend = "s3"

    def __init__(
        self,
        *,
        endpoint_url: str | None,
        bucket: str,
        prefix: str,
        region: str | None = None,
        public_endpoint_url: str | None = None,
        clean_up_profile: str | None = None,
        timeout_s: float = 30.0,
        observe: StoreObserver = UNOBSERVED,
    ) -> None:
        give_back_large_blocks()
        self._calls = S3Calls(
            endpoint_url=endpoint_url,
            bucket=bucket,
            region=region,
            clean_up_profile=clean_up_profile,
            timeout_s=timeout_s,
            observe=observe,
        )
        self._observe = observe
        self._parts = asyncio.Semaphore(PARTS_OF_ALL)
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._signer = make_client(public_endpoint_url or endpoint_url, region, timeout_s)
        self.direct_uploads = S3DirectUploads(self._calls, self._prefix, self._signer)

    def new_key(self) -> str:
        return f"blobs/{new_ulid()}"

    def local_path(self, key: str) -> Path | None:
        return None

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

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
        with observed(self._calls.observe, "put"):
            expectation = Expectation(size, sha256, max_size)
            part_size = part_size_for(max_size if size is None else size)
            upload = StreamUpload(
                self._calls, self._prefix + key, info, expectation, declared=(size, sha256), shared=self._parts
            )
            try:
                async for block in blocks(chunks, part_size, expectation):
                    await upload.add(block)
                stored = await upload.finish()
                return StoredBlob(key, stored.size, stored.sha256)
            except BaseException as error:
                await self._calls.leave(upload.discard())  # a store that hangs must not hold up the caller
                if isinstance(error, UploadGone | PartRefused):
                    raise ModelManagerError(
                        "ERR_STORAGE_UNAVAILABLE", "The object store dropped the upload."
                    ) from error
                raise

    # --- bytes out ---

    async def read(self, key: str, start: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        if length == 0:
            await self.stat(key)
            return
        body = await self._calls.run(lambda: self._get(key, start, length), key=key)
        if body is None:
            return
        try:
            while chunk := await self._calls.run(lambda: body.read(READ_CHUNK_BYTES), key=key):
                self._observe.bytes_moved("out", len(chunk))
                yield chunk
        finally:
            body.close()

    def _get(self, key: str, start: int, length: int | None) -> Any:
        """The body of a range, or None when the range begins at or beyond the end."""
        end = "" if length is None else str(start + length - 1)
        options = {} if start == 0 and length is None else {"Range": f"bytes={start}-{end}"}
        client = self._calls.client
        try:
            return client.get_object(**self._object(key), **options)["Body"]  # type: ignore[arg-type]
        except client.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") == "InvalidRange":
                return None
            raise

    async def read_at(self, key: str, offset: int, length: int) -> bytes:
        def call() -> bytes:
            body = self._get(key, offset, length)
            if body is None:
                return b""
            with contextlib.closing(body):
                data: bytes = body.read()
                return data

        if length == 0:
            await self.stat(key)
            return b""
        return await self._calls.run(call, key=key)

    async def hash(self, key: str, progress: Callable[[int], None] | None = None) -> StoredBlob:
        with observed(self._calls.observe, "hash"):
            digest, seen = hashlib.sha256(), 0
            async with contextlib.aclosing(self._ranges(key, (await self.stat(key)).size)) as ranges:
                async for block in ranges:
                    await self._calls.in_thread(digest.update, block)
                    seen += len(block)
                    if progress is not None:
                        progress(seen)
            return StoredBlob(key, seen, digest.hexdigest())

    async def _ranges(self, key: str, size: int) -> AsyncGenerator[bytes, None]:
        """All bytes in order, some ranges ahead: one stream alone is slower than its hashing."""
        starts = iter(range(0, size, _RANGE_BYTES))
        ahead = deque(asyncio.ensure_future(self._range(key, at)) for at in itertools.islice(starts, _RANGES_AHEAD))
        try:
            while ahead:
                block = await ahead.popleft()
                ahead.extend(asyncio.ensure_future(self._range(key, at)) for at in itertools.islice(starts, 1))
                self._observe.bytes_moved("out", len(block))
                yield block
        finally:
            for left in ahead:
                left.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    async def _range(self, key: str, start: int) -> bytes:
        async for attempt in attempts("read", self._observe):
            with attempt:
                return await self.read_at(key, start, _RANGE_BYTES)
        raise AssertionError("tenacity returns or raises")

    # --- the rest ---

    async def stat(self, key: str) -> BlobStat:
        def call() -> BlobStat:
            head = self._calls.client.head_object(Bucket=self._bucket, Key=self._prefix + key)
            return BlobStat(key, head["ContentLength"], head["LastModified"].timestamp())

        return await self._calls.run(call, key=key)

    async def delete(self, key: str) -> None:
        with observed(self._calls.observe, "delete"), contextlib.suppress(BlobMissing):
            await self._calls.run(
                lambda: self._calls.remover.delete_object(Bucket=self._bucket, Key=self._prefix + key), key=key
            )

    async def list(self, prefix: str) -> AsyncIterator[BlobStat]:
        pages = iter(
            self._calls.client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + prefix
            )
        )
        while (page := await self._calls.run(lambda: next(pages, None))) is not None:
            for found in page.get("Contents", []):
                yield BlobStat(
                    found["Key"].removeprefix(self._prefix), found["Size"], found["LastModified"].timestamp()
                )

    async def usage(self) -> Usage:
        return Usage()

    async def probe(self) -> None:
        try:
            await self._calls.run(lambda: self._calls.client.head_bucket(Bucket=self._bucket))
        except BlobMissing:
            raise ModelManagerError(
                "ERR_STORAGE_UNAVAILABLE", f"There is no bucket {self._bucket}.", bucket=self._bucket
            ) from None

    async def presign_get(self, key: str, *, expires_s: int, filename: str | None = None) -> str | None:
        params: dict[str, str] = self._object(key)
        if filename is not None:
            params["ResponseContentDisposition"] = f"attachment; filename*=UTF-8''{quote(filename)}"
        return await self._calls.run(
            lambda: self._signer.generate_presigned_url("get_object", Params=params, ExpiresIn=expires_s)
        )

    async def get_document(self, name: str) -> Document | None:
        def call() -> Document:
            found = self._calls.client.get_object(Bucket=self._bucket, Key=self._prefix + name)
            return Document(found["Body"].read(), found["ETag"])

        try:
            return await self._calls.run(call, key=name)
        except BlobMissing:
            return None

    async def put_document(self, name: str, data: bytes, *, etag: str | None) -> Document:
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}

        def call() -> Document:
            put = self._calls.client.put_object(**self._object(name), Body=data, **condition)  # type: ignore[arg-type]
            return Document(data, put["ETag"])

        try:
            return await self._calls.run(call, key=name)
        except BlobMissing:  # S3's answer to If-Match on what is absent
            raise ModelManagerError("ERR_CONFLICT", f"{name} is not as expected.") from None

    async def close(self) -> None:
        await self._calls.close()
        self._signer.close()
