"""A stream on its way into an object: in parts, a few at once, while one thread hashes the whole.

Each part goes with its CRC32 and is tried again by itself; the stream never is. s3transfer is not used, as it refuses
conditional writes. A stream that fits into one part is a single put.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

from botocore.exceptions import BotoCoreError, ClientError

from schemas.errors import ModelManagerError
from worker.storage.blobstore import BlobInfo, BlobMissing, StoredBlob
from worker.storage.hashing import Block, Expectation
from worker.storage.pending import Pending
from worker.storage.retrying import attempts
from worker.storage.s3_client import S3Calls, UploadGone
from worker.storage.s3_layout import blob_metadata

if TYPE_CHECKING:
    from types_boto3_s3.type_defs import CompletedPartTypeDef

_T = TypeVar("_T")

_PARTS_AT_ONCE = 4
# Of all streams together: a part lies in memory until the store has it.
PARTS_OF_ALL = 8
_COPY_BYTES_MAX = 5 * 1024**3
_COPY_PART_BYTES = 1024**3


class StreamUpload:
    """One put. `name` is the object's whole key; `declared` are size and sha256 as far as they are known. `shared` are
    the places for parts on their way that all streams of a store have together."""

    def __init__(
        self,
        calls: S3Calls,
        name: str,
        info: BlobInfo,
        expectation: Expectation,
        *,
        declared: tuple[int | None, str | None],
        shared: asyncio.Semaphore,
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
        self._shared = shared
        self._tasks: list[asyncio.Task[CompletedPartTypeDef]] = []
        self._hashing: asyncio.Future[None] | None = None
        self._pending = Pending()
        # Whether there may be an object that this put made.
        self._made = False

    async def _call(self, call: Callable[[], _T]) -> _T:
        return await self._pending.result(self._calls.submit(call, key=self._name))

    async def add(self, block: Block) -> None:
        """Take the next block; waits while enough parts are on their way."""
        if self._hashing is not None:
            await self._hashing
        self._hashing = self._pending.started(self._calls.in_thread(self._expectation.update, block))
        if self._number == 0 and self._first is None:
            self._first = block
            return
        if self._id is None:
            await self._begin()
            first, self._first = self._first, None
            await self._send(first or b"")
        await self._send(block)

    async def _send(self, block: Block) -> None:
        await self._places.acquire()
        failed = next((task for task in self._tasks if task.done() and task.exception() is not None), None)
        if failed is not None:
            await failed
        await self._shared.acquire()
        self._number += 1
        task = asyncio.create_task(self._part(self._number, block))
        task.add_done_callback(self._part_done)  # also of one that is cancelled before it starts
        self._tasks.append(task)

    def _part_done(self, _: asyncio.Task[CompletedPartTypeDef]) -> None:
        self._shared.release()
        self._places.release()

    async def finish(self) -> StoredBlob:
        if self._hashing is not None:
            await self._hashing
        sha256 = self._expectation.finish()
        size = self._expectation.seen
        if self._id is None:
            await self._put_whole(self._first or b"", sha256)
            self._calls.observe.bytes_moved("in", size)
        else:
            await self._complete([await task for task in self._tasks], sha256)
            if self._declared != (size, sha256):
                await self._describe(size, sha256)
        return StoredBlob(self._name, size, sha256)

    async def discard(self) -> None:
        """Leave nothing under the key. What cannot be removed now is garbage that the sweep finds."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._pending.ended()  # a call that is still on its way would else undo the removal
        with contextlib.suppress(ModelManagerError, UploadGone):
            if self._id is not None:
                await self._repeat("abort", self._abort)
        with contextlib.suppress(ModelManagerError):
            if self._made:
                await self._repeat("delete", self._delete)

    def _abort(self) -> None:
        self._calls.client.abort_multipart_upload(Bucket=self._calls.bucket, Key=self._name, UploadId=self._id or "")

    def _delete(self) -> None:
        self._calls.remover.delete_object(Bucket=self._calls.bucket, Key=self._name)

    async def _repeat(self, op: str, call: Callable[[], _T]) -> _T:
        async for attempt in attempts(op, self._calls.observe):
            with attempt:
                return await self._call(call)
        raise AssertionError("tenacity returns or raises")

    async def _create(self, op: str, call: Callable[[], None], sha256: str) -> None:
        """Create the object by `call`. One that is there already is ours if an attempt may have made it before."""

        def making() -> None:
            # Kept in the thread, which goes on when the put is cancelled. What is refused (4xx) makes nothing.
            try:
                call()
            except ClientError as error:
                self._made |= error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500
                raise
            except BaseException:
                self._made = True
                raise
            self._made = True

        async for attempt in attempts(op, self._calls.observe):
            with attempt:
                try:
                    await self._call(making)
                except (UploadGone, ModelManagerError) as error:
                    conflict = isinstance(error, ModelManagerError) and error.code == "ERR_CONFLICT"
                    if not conflict and not isinstance(error, UploadGone):
                        raise
                    if not self._made or not await self._is_ours(sha256):
                        self._made = False
                        raise (_used_twice() if conflict else error) from error

    async def _is_ours(self, sha256: str) -> bool:
        def call() -> bool:
            head = self._calls.client.head_object(Bucket=self._calls.bucket, Key=self._name)
            described = head["Metadata"].get("model-manager-sha256", sha256)
            return head["ContentLength"] == self._expectation.seen and described == sha256

        try:
            return await self._call(call)
        except BlobMissing:
            return False

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

        await self._create("put", call, sha256)

    async def _begin(self) -> None:
        size, sha256 = self._declared
        metadata = {} if size is None or sha256 is None else blob_metadata(self._info, size=size, sha256=sha256)

        def call() -> None:
            # Set here, in the thread: a put that is cancelled meanwhile has to know what to abort.
            self._id = self._calls.client.create_multipart_upload(
                Bucket=self._calls.bucket,
                Key=self._name,
                Metadata=metadata,
                ChecksumAlgorithm="CRC32",
            )["UploadId"]

        await self._call(call)

    async def _part(self, number: int, block: Block) -> CompletedPartTypeDef:
        def call() -> CompletedPartTypeDef:
            crc = base64.b64encode(zlib.crc32(block).to_bytes(4, "big")).decode()
            done = self._calls.client.upload_part(
                Bucket=self._calls.bucket,
                Key=self._name,
                UploadId=self._id or "",
                PartNumber=number,
                Body=cast(bytes, block),  # botocore would copy bytes once more, to send them with the headers
                ChecksumCRC32=crc,
            )
            return {"PartNumber": number, "ETag": done["ETag"], "ChecksumCRC32": crc}

        part = await self._repeat("put_part", call)
        self._calls.observe.bytes_moved("in", len(block))
        return part

    async def _complete(self, parts: list[CompletedPartTypeDef], sha256: str) -> None:
        def call() -> None:
            self._calls.client.complete_multipart_upload(
                Bucket=self._calls.bucket,
                Key=self._name,
                UploadId=self._id or "",
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
            )

        await self._create("complete", call, sha256)

    async def _describe(self, size: int, sha256: str) -> None:
        """Set the metadata of a blob whose digest was not known when it was begun: a copy onto itself."""
        source = {"Bucket": self._calls.bucket, "Key": self._name}
        metadata = blob_metadata(self._info, size=size, sha256=sha256)

        def call() -> None:
            if size > _COPY_BYTES_MAX:
                self._copy_in_parts(metadata, size)
                return
            self._calls.client.copy_object(
                Bucket=source["Bucket"],
                Key=source["Key"],
                CopySource={"Bucket": source["Bucket"], "Key": source["Key"]},
                Metadata=metadata,
                MetadataDirective="REPLACE",
            )

        await self._repeat("describe", call)

    def _copy_in_parts(self, metadata: dict[str, str], size: int) -> None:
        client, bucket, key = self._calls.client, self._calls.bucket, self._name
        upload = client.create_multipart_upload(Bucket=bucket, Key=key, Metadata=metadata)["UploadId"]
        parts: list[CompletedPartTypeDef] = []
        try:
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
        except BaseException:
            with contextlib.suppress(BotoCoreError, ClientError):
                client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)
            raise


def _used_twice() -> ModelManagerError:
    return ModelManagerError("ERR_INTERNAL", "A storage key was used twice.")
