"""Direct uploads: multipart uploads whose parts callers PUT to signed addresses.

Each part is signed with its length and sha256, so that the store itself refuses altered, longer and late ones.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

from schemas.errors import ModelManagerError
from worker.storage.blobstore import (
    BegunUpload,
    BlobInfo,
    BlobMissing,
    BlobStat,
    PartPlan,
    SignedPart,
    UploadedPart,
    observed,
    part_count,
)
from worker.storage.s3_client import PartRefused, S3Calls, UploadGone
from worker.storage.s3_layout import blob_metadata, part_size_for

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import CompletedPartTypeDef


class S3DirectUploads:
    """`signer` is a client for the address at which callers reach the store."""

    def __init__(self, calls: S3Calls, prefix: str, signer: S3Client) -> None:
        self._calls = calls
        self._prefix = prefix
        self._signer = signer

    async def begin(self, key: str, *, info: BlobInfo, size: int, sha256: str) -> PartPlan:
        part_size = part_size_for(size)
        metadata = blob_metadata(info, size=size, sha256=sha256)

        def call() -> str:
            return self._calls.client.create_multipart_upload(
                Bucket=self._calls.bucket, Key=self._prefix + key, Metadata=metadata, ChecksumAlgorithm="SHA256"
            )["UploadId"]

        with observed(self._calls.observe, "begin_upload"):
            return PartPlan(await self._calls.run(call, key=key), part_size, part_count(size, part_size))

    async def sign(
        self, key: str, upload_id: str, number: int, *, sha256: str, length: int, expires_s: int
    ) -> SignedPart:
        checksum = base64.b64encode(bytes.fromhex(sha256)).decode()

        def call() -> str:
            return self._signer.generate_presigned_url(
                "upload_part",
                Params={
                    "Bucket": self._calls.bucket,
                    "Key": self._prefix + key,
                    "UploadId": upload_id,
                    "PartNumber": number,
                    "ChecksumSHA256": checksum,
                    "ContentLength": length,
                },
                ExpiresIn=expires_s,
            )

        url = await self._calls.run(call, key=key)
        return SignedPart(url, {"x-amz-checksum-sha256": checksum, "content-length": str(length)})

    async def parts(self, key: str, upload_id: str) -> dict[int, UploadedPart]:
        def call() -> dict[int, UploadedPart]:
            pages = self._calls.client.get_paginator("list_parts").paginate(
                Bucket=self._calls.bucket, Key=self._prefix + key, UploadId=upload_id
            )
            return {
                part["PartNumber"]: UploadedPart(
                    part["Size"], base64.b64decode(part.get("ChecksumSHA256", "")).hex(), part["ETag"]
                )
                for page in pages
                for part in page.get("Parts", [])
            }

        try:
            return await self._calls.run(call, key=key)
        except UploadGone:
            return {}

    async def complete(self, key: str, upload_id: str, parts: Mapping[int, UploadedPart]) -> BlobStat:
        chosen: list[CompletedPartTypeDef] = [
            {
                "PartNumber": number,
                "ETag": part.etag,
                "ChecksumSHA256": base64.b64encode(bytes.fromhex(part.sha256)).decode(),
            }
            for number, part in sorted(parts.items())
        ]
        if [part["PartNumber"] for part in chosen] != list(range(1, len(chosen) + 1)):
            raise ModelManagerError("ERR_CONFLICT", "A part is missing.")
        if not chosen:
            return await self._stat_completed(key, parts)

        def call() -> None:
            self._calls.client.complete_multipart_upload(
                Bucket=self._calls.bucket,
                Key=self._prefix + key,
                UploadId=upload_id,
                MultipartUpload={"Parts": chosen},
                IfNoneMatch="*",
            )

        with observed(self._calls.observe, "complete_upload"):
            try:
                await self._calls.run(call, key=key)
            except PartRefused:
                raise ModelManagerError("ERR_CONFLICT", "A part is missing.") from None
            except UploadGone:
                pass  # an earlier call may have succeeded, and its answer been lost
            except ModelManagerError as error:
                if error.code not in ("ERR_CONFLICT", "ERR_STORAGE_UNAVAILABLE"):
                    raise
            return await self._stat_completed(key, parts)

    async def _stat_completed(self, key: str, parts: Mapping[int, UploadedPart]) -> BlobStat:
        """The blob that `parts` became; ERR_CONFLICT if there is none, or another."""
        digests = b"".join(bytes.fromhex(part.sha256) for _, part in sorted(parts.items()))
        composite = f"{base64.b64encode(hashlib.sha256(digests).digest()).decode()}-{len(parts)}"

        def call() -> BlobStat:
            head = self._calls.client.head_object(
                Bucket=self._calls.bucket, Key=self._prefix + key, ChecksumMode="ENABLED"
            )
            if parts and head.get("ChecksumSHA256", composite) != composite:
                raise BlobMissing(key)
            return BlobStat(key, head["ContentLength"], head["LastModified"].timestamp())

        try:
            return await self._calls.run(call, key=key)
        except BlobMissing:
            raise ModelManagerError("ERR_CONFLICT", "The upload is over, and its bytes are not there.") from None

    async def abort(self, key: str, upload_id: str) -> None:
        def call() -> None:
            self._calls.client.abort_multipart_upload(
                Bucket=self._calls.bucket, Key=self._prefix + key, UploadId=upload_id
            )

        try:
            await self._calls.run(call, key=key)
        except (UploadGone, BlobMissing):
            return

    async def begun(self) -> AsyncIterator[BegunUpload]:
        # Asked for by no prefix: MinIO lists those of one whole key, or all.
        pages = iter(self._calls.client.get_paginator("list_multipart_uploads").paginate(Bucket=self._calls.bucket))
        blobs = f"{self._prefix}blobs/"
        while (page := await self._calls.run(lambda: next(pages, None))) is not None:
            for upload in page.get("Uploads", []):
                if upload["Key"].startswith(blobs):
                    key = upload["Key"].removeprefix(self._prefix)
                    yield BegunUpload(key, upload["UploadId"], upload["Initiated"].timestamp())
