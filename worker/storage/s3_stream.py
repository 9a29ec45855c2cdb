"""A stream on its way into an object: in parts, a few at once, while one thread hashes the whole.

Each part goes with its CRC32 and is tried again by itself; the stream never is. s3transfer is not used, as it refuses
conditional writes. A stream that fits into one part is a single put.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import zlib
from typing import TYPE_CHECKING, cast

from schemas.errors import ModelManagerError
from worker.storage.blobstore import BlobInfo, BlobMissing, StoredBlob
from worker.storage.hashing import Expectation
from worker.storage.retrying import attempts
from worker.storage.s3_client import S3Calls, UploadGone
from worker.storage.s3_layout import blob_metadata

if TYPE_CHECKING:
    from types_boto3_s3.type_defs import CompletedPartTypeDef

_PARTS_AT_ONCE = 4
_COPY_BYTES_MAX = 5 * 1024**3
_COPY_PART_BYTES = 1024**3

Block = bytes | bytearray


class StreamUpload:
    """One put. `name` is the object's whole key; `declared` are size and sha256 as far as they are known."""

    def __init__(
        self,
        calls: S3Calls,
        name: str,
        info: BlobInfo,
        expectation: Expectation,
        *,
        declared: tuple[int | None, str | None],
    ) -> None:
        self._calls = calls
        self._name = name
        self._info = info
        self._expectation = expectation
        self._declared = declared
        self._first: Block | None = None
        self._id: str | None = None
        self._number = 0
        self._places = asyncio.Semaphore(_PARTS_AT_ONCE)
        self._tasks: list[asyncio.Task[CompletedPartTypeDef]] = []
        self._hashing: asyncio.Future[None] | None = None

    async def add(self, block: Block) -> None:
        """Take the next block; waits while enough parts are on their way."""
        if self._hashing is not None:
            await self._hashing
        self._hashing = self._calls.in_thread(self._expectation.update, block)
        if self._number == 0 and self._first is None:
            self._first = block
            return
        if self._id is None:
            self._id = await self._begin()
            first, self._first = self._first, None
            await self._send(first or b"")
        await self._send(block)

    async def _send(self, block: Block) -> None:
        await self._places.acquire()
        failed = next((task for task in self._tasks if task.done() and task.exception() is not None), None)
        if failed is not None:
            await failed
        self._number += 1
        self._tasks.append(asyncio.create_task(self._part(self._number, block)))

    async def finish(self) -> StoredBlob:
        if self._hashing is not None:
            await self._hashing
        sha256 = self._expectation.finish()
        size = self._expectation.seen
        if self._id is None:
            await self._put_whole(self._first or b"", sha256)
            self._calls.observe.bytes_moved("in", size)
        else:
            await self._complete([await task for task in self._tasks])
            if self._declared != (size, sha256):
                await self._describe(size, sha256)
        return StoredBlob(self._name, size, sha256)

    async def discard(self) -> None:
        """Leave nothing under the key. What cannot be removed now is garbage that the sweep finds."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(ModelManagerError):
            if self._id is not None:
                await self._calls.run(self._remove)

    def _remove(self) -> None:
        client, place = self._calls.client, {"Bucket": self._calls.bucket, "Key": self._name}
        with contextlib.suppress(client.exceptions.NoSuchUpload):
            client.abort_multipart_upload(Bucket=place["Bucket"], Key=place["Key"], UploadId=self._id or "")
        client.delete_object(Bucket=place["Bucket"], Key=place["Key"])

    async def _put_whole(self, data: Block, sha256: str) -> None:
        metadata = blob_metadata(self._info, size=len(data), sha256=sha256)
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()

        def call() -> None:
            self._calls.client.put_object(
                Bucket=self._calls.bucket,
                Key=self._name,
                Body=cast(bytes, data),
                Metadata=metadata,
                ChecksumSHA256=checksum,
                IfNoneMatch="*",
            )

        async for attempt in attempts("put", self._calls.observe):
            with attempt:
                try:
                    await self._calls.run(call, key=self._name)
                except ModelManagerError as error:
                    if error.code != "ERR_CONFLICT":
                        raise
                    # Either our own earlier attempt, whose answer was lost, or a key that was used before.
                    if attempt.retry_state.attempt_number == 1:
                        raise _used_twice() from error

    async def _begin(self) -> str:
        size, sha256 = self._declared
        metadata = {} if size is None or sha256 is None else blob_metadata(self._info, size=size, sha256=sha256)

        def call() -> str:
            return self._calls.client.create_multipart_upload(
                Bucket=self._calls.bucket,
                Key=self._name,
                Metadata=metadata,
                ChecksumAlgorithm="CRC32",
            )["UploadId"]

        return await self._calls.run(call, key=self._name)

    async def _part(self, number: int, block: Block) -> CompletedPartTypeDef:
        def call() -> CompletedPartTypeDef:
            crc = base64.b64encode(zlib.crc32(block).to_bytes(4, "big")).decode()
            done = self._calls.client.upload_part(
                Bucket=self._calls.bucket,
                Key=self._name,
                UploadId=self._id or "",
                PartNumber=number,
                Body=cast(bytes, block),
                ChecksumCRC32=crc,
            )
            return {"PartNumber": number, "ETag": done["ETag"], "ChecksumCRC32": crc}

        try:
            async for attempt in attempts("put_part", self._calls.observe):
                with attempt:
                    part = await self._calls.run(call, key=self._name)
                    self._calls.observe.bytes_moved("in", len(block))
                    return part
        finally:
            self._places.release()
        raise AssertionError("tenacity returns or raises")

    async def _complete(self, parts: list[CompletedPartTypeDef]) -> None:
        def call() -> None:
            self._calls.client.complete_multipart_upload(
                Bucket=self._calls.bucket,
                Key=self._name,
                UploadId=self._id or "",
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
            )

        try:
            await self._calls.run(call, key=self._name)
        except (UploadGone, ModelManagerError) as error:
            if isinstance(error, ModelManagerError) and error.code == "ERR_CONFLICT":
                raise _used_twice() from error
            if isinstance(error, ModelManagerError) and error.code != "ERR_STORAGE_UNAVAILABLE":
                raise
            try:  # the answer may have been lost after the work was done
                if await self._calls.run(self._stored_size, key=self._name) != self._expectation.seen:
                    raise ModelManagerError("ERR_STORAGE_UNAVAILABLE") from error
            except BlobMissing:
                raise ModelManagerError("ERR_STORAGE_UNAVAILABLE") from error

    def _stored_size(self) -> int:
        return self._calls.client.head_object(Bucket=self._calls.bucket, Key=self._name)["ContentLength"]

    async def _describe(self, size: int, sha256: str) -> None:
        """Set the metadata of a blob whose digest was not known when it was begun: a copy onto itself."""
        source = {"Bucket": self._calls.bucket, "Key": self._name}
        metadata = blob_metadata(self._info, size=size, sha256=sha256)
        if size > _COPY_BYTES_MAX:
            await self._calls.run(lambda: self._copy_in_parts(source, metadata, size), key=self._name)
            return
        await self._calls.run(
            lambda: self._calls.client.copy_object(
                Bucket=source["Bucket"],
                Key=source["Key"],
                CopySource={"Bucket": source["Bucket"], "Key": source["Key"]},
                Metadata=metadata,
                MetadataDirective="REPLACE",
            ),
            key=self._name,
        )

    def _copy_in_parts(self, source: dict[str, str], metadata: dict[str, str], size: int) -> None:
        client, bucket, key = self._calls.client, source["Bucket"], source["Key"]
        upload = client.create_multipart_upload(Bucket=bucket, Key=key, Metadata=metadata)["UploadId"]
        parts: list[CompletedPartTypeDef] = []
        for number, start in enumerate(range(0, size, _COPY_PART_BYTES), 1):
            copied = client.upload_part_copy(
                Bucket=bucket,
                Key=key,
                UploadId=upload,
                PartNumber=number,
                CopySource={"Bucket": bucket, "Key": key},
                CopySourceRange=f"bytes={start}-{min(start + _COPY_PART_BYTES, size) - 1}",
            )
            parts.append({"PartNumber": number, "ETag": copied["CopyPartResult"]["ETag"]})
        client.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts})


def _used_twice() -> ModelManagerError:
    return ModelManagerError("ERR_INTERNAL", "A storage key was used twice.")
