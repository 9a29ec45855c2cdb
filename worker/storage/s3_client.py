"""boto3, driven from bounded threads, with its errors in our words.

Retries are not its own (one attempt a call): tenacity owns the policy, else attempts multiply.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.loaders import Loader
from botocore.session import Session
from urllib3.exceptions import HTTPError

from schemas.deadline import deadline
from schemas.errors import ModelManagerError
from worker.storage.blobstore import BlobMissing, StoreObserver
from worker.threads import byte_threads, processor_threads

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

_T = TypeVar("_T")

THREADS = 16
LEAVE_S = 5.0
_MODELS = Loader()  # keeps the description of the service, which takes 0.1 s to parse

_MISSING = frozenset({"NoSuchKey", "404", "NotFound"})
_PARTS = frozenset({"InvalidPart", "InvalidPartOrder", "EntityTooSmall"})
_CONDITION = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict"})
_FULL = frozenset(
    {"XMinioStorageFull", "InsufficientStorage", "507", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded"}
)
_REFUSED = frozenset({"AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"})


class UploadGone(Exception):
    """The multipart upload is over, or never was."""


class PartRefused(Exception):
    """A multipart upload does not have a part that it is to be completed with."""


class S3Calls:
    """The client and the way to call it from the event loop.

    `remover` is what objects are removed with: the client itself, or one with the credentials of `clean_up_profile`.
    """

    def __init__(
        self,
        *,
        endpoint_url: str | None,
        bucket: str,
        region: str | None,
        clean_up_profile: str | None,
        timeout_s: float,
        observe: StoreObserver,
    ) -> None:
        self.bucket = bucket
        self.observe = observe
        self.client = self.remover = make_client(endpoint_url, region, timeout_s)
        if clean_up_profile is not None:
            self.remover = make_client(endpoint_url, region, timeout_s, profile=clean_up_profile)
        self._threads = byte_threads("s3", THREADS)
        self._workers = processor_threads()
        self._left: set[asyncio.Task[None]] = set()

    async def run(self, call: Callable[[], _T], *, key: str = "") -> _T:
        """Run a blocking call in a thread. Raises BlobMissing, UploadGone, PartRefused or ModelManagerError."""
        return await self.submit(call, key=key)

    def submit(self, call: Callable[[], _T], *, key: str = "") -> asyncio.Future[_T]:
        """`run` for who wants to know when the call has ended, even if nobody waits for it any more."""
        return asyncio.get_running_loop().run_in_executor(self._threads, self._translated, call, key)

    def in_thread(self, work: Callable[..., _T], *arguments: Any) -> asyncio.Future[_T]:
        """Run work that is not a call to the store in a thread of its own pool, so that calls cannot starve it."""
        return asyncio.get_running_loop().run_in_executor(self._workers, work, *arguments)

    def _translated(self, call: Callable[[], _T], key: str) -> _T:
        try:
            return call()
        except ClientError as error:
            raise self._error(error, key) from error
        except (BotoCoreError, HTTPError, OSError) as error:
            # The text would name the host.
            kind = type(error).__name__
            raise ModelManagerError(
                "ERR_STORAGE_UNAVAILABLE", f"The object store cannot be reached: {kind}."
            ) from error

    def _error(self, error: ClientError, key: str) -> Exception:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "NoSuchBucket":
            return ModelManagerError(
                "ERR_STORAGE_UNAVAILABLE", f"There is no bucket {self.bucket}.", bucket=self.bucket
            )
        if code == "NoSuchUpload":
            return UploadGone(key)
        if code in _PARTS:
            return PartRefused(key)
        if code in _MISSING:
            return BlobMissing(key)
        if code in _CONDITION:
            return ModelManagerError("ERR_CONFLICT", "The object store holds something else under that name.")
        if code in _FULL or status == 507:
            return ModelManagerError("ERR_STORAGE_FULL")
        if code in _REFUSED:
            return ModelManagerError(
                "ERR_STORAGE_UNAVAILABLE", f"The object store refuses this worker: {code}.", reason=code
            )
        if 400 <= status < 500 and code not in ("SlowDown", "RequestTimeout", "TooManyRequests", "429"):
            return ModelManagerError("ERR_INTERNAL", f"The object store answers {code or status}.")
        return ModelManagerError("ERR_STORAGE_UNAVAILABLE", f"The object store answers {code or status}.")

    async def leave(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for `work`, but not for long and not when cancelled; it goes on by itself, until `close` at most."""
        context = contextvars.copy_context()
        context.run(deadline.set, None)  # it is done all the more when the request has no time left
        task = asyncio.create_task(work, context=context)
        self._left.add(task)
        task.add_done_callback(self._left.discard)
        await asyncio.wait({task}, timeout=LEAVE_S)

    async def close(self) -> None:
        if self._left:
            await asyncio.wait(self._left)
        await asyncio.to_thread(self._threads.shutdown)
        self.client.close()
        self.remover.close()


def make_client(
    endpoint_url: str | None, region: str | None, timeout_s: float, *, profile: str | None = None
) -> S3Client:
    """A client with the credentials of the standard chain, or of a profile; ProfileNotFound if there is none."""
    config: dict[str, Any] = {
        "signature_version": "s3v4",  # a custom endpoint would else presign the old way
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "connect_timeout": min(timeout_s, 5.0),
        "read_timeout": timeout_s,
        "max_pool_connections": THREADS,
        # Parts carry a CRC of ours and the whole its sha256: a second sha256 a part would cost a fifth of the rate.
        "s3": {"addressing_style": "path" if endpoint_url else "auto", "payload_signing_enabled": False},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "user_agent_extra": "wrk-model-manager",
    }
    # boto3's default session would keep, for the whole process, the keys that it saw first.
    session = Session(profile=profile)
    session.register_component("data_loader", _MODELS)
    return boto3.Session(botocore_session=session).client(
        "s3", endpoint_url=endpoint_url, region_name=region or "us-east-1", config=Config(**config)
    )
