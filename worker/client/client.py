"""The whole table of methods, with types, and the two long ones: push and pull."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, cast

from schemas.errors import ModelManagerError
from schemas.model import MAX_WAIT_MS
from schemas.rpc import (
    AliasReply,
    ChangesReply,
    DeleteReply,
    GetModelReply,
    JobReply,
    JobStatus,
    ListReply,
    MetadataReply,
    PingReply,
    ReplicateReply,
    RestoreReply,
    StatsReply,
    StoreReply,
    ValidateReply,
)
from schemas.uploads import AbortReply, GetUploadReply, UploadReply
from worker.client.caller import Caller, error_of
from worker.client.progress import Report, silent
from worker.client.pull import Pulled, pull
from worker.client.push import push


class _Absent:
    """Says that a parameter is left out, where null has a meaning of its own."""


ABSENT: Final = _Absent()
DEFAULT_TIMEOUT_S = 30.0
_PAUSE_S = 1.0


class ModelManagerClient:
    """The methods of one rack, as coroutines; any number may be in flight at once, on one connection.

    `timeout_s` is for each answer, retries included; transfers of bytes and jobs take as long as they take. Every
    method raises ModelManagerError, whose `code` is one of `schemas.errors.ERRORS`; ERR_DEADLINE_EXCEEDED if no answer
    came in time. What is retryable has been retried by then, always with the same idempotency key, so that a change
    happens once at most. Name a key yourself to repeat a call after your own restart: for 24 hours the answer is the
    same.

    The client owns `caller` and closes it; calls that are in flight then end with ERR_SHUTTING_DOWN.

        async with ModelManagerClient(AmqpCaller("amqp://guest:guest@127.0.0.1/", "rack-1")) as rack:
            print(await rack.ping())
    """

    def __init__(self, caller: Caller, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._caller = caller
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection, and with an error every call in flight. Closing twice is harmless."""
        await self._caller.close()

    def within(self, timeout_s: float) -> ModelManagerClient:
        """The same rack over the same connection, with another time for each answer. Only one of them is closed."""
        return ModelManagerClient(self._caller, timeout_s=timeout_s)

    async def call(self, method: str, /, *, idempotency_key: str | None = None, **params: Any) -> dict[str, Any]:
        """Any method by its name and the parameters of the contract, in camelCase; None or ABSENT are left out."""
        given = {name: value for name, value in params.items() if value is not None and value is not ABSENT}
        return await self._caller.call(method, given, timeout_s=self._timeout_s, idempotency_key=idempotency_key)

    # --- storing and looking up ---

    async def store_model(
        self,
        model_id: str,
        metadata: Mapping[str, Any],
        *,
        model_data: str | None = None,
        filename: str | None = None,
        checksum: str | None = None,
        files: Sequence[Mapping[str, Any]] | None = None,
        upload_id: str | None = None,
        idempotency_key: str | None = None,
    ) -> StoreReply:
        """Store a version, from exactly one of `model_data`, `files` and `upload_id`.

        `metadata` needs `type`; `version` in it is 1.0.0 if it is left out. `model_data` and each file's `data` are
        base64, for small models; `push` takes a path and any size. `checksum` is `sha256:` and 64 hex digits, and is
        checked. A version that exists with the same files is a success with `created` false; with others it is
        ERR_MODEL_ALREADY_EXISTS. ERR_MODEL_TOO_LARGE tells `maxInlineSize` in its details.
        """
        reply = await self.call(
            "storeModel",
            modelId=model_id,
            metadata=dict(metadata),
            modelData=model_data,
            filename=filename,
            checksum=checksum,
            files=None if files is None else [dict(file) for file in files],
            uploadId=upload_id,
            idempotency_key=idempotency_key,
        )
        return cast("StoreReply", reply)

    async def get_model(
        self, model_id: str, version: str | None = None, *, delivery: Literal["auto", "inline", "url"] | None = None
    ) -> GetModelReply:
        """A version or alias with its bytes.

        `delivery`: `inline` as base64, `url` to fetch them from, `auto` (the default) inline when they are small.
        Addresses end at `expiresAt`. `pull` does it all, and verifies.
        """
        return cast("GetModelReply", await self.call("getModel", modelId=model_id, version=version, delivery=delivery))

    async def list_models(
        self, *, model_type: str | None = None, limit: int | None = None, cursor: str | None = None
    ) -> ListReply:
        """A page of the versions in the catalog, by id and version; also a short one may have a `nextCursor`."""
        return cast("ListReply", await self.call("listModels", type=model_type, limit=limit, cursor=cursor))

    async def search_models(
        self,
        criteria: Mapping[str, Any] | None = None,
        *,
        sort: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> ListReply:
        """A page of the versions that meet all `criteria`.

        Any metadata member equals, `tags` has all, `size` is in `{min, max}`, `createdAt` in `{from, to}`, `text` has
        all words. `sort`: `modelId`, `size`, `createdAt`, `-` for descending. A page may be short, or empty, and still
        have a `nextCursor`.
        """
        given = None if criteria is None else dict(criteria)
        reply = await self.call("searchModels", criteria=given, sort=sort, limit=limit, cursor=cursor)
        return cast("ListReply", reply)

    async def get_model_metadata(self, model_id: str, version: str | None = None) -> MetadataReply:
        """What is known of a version or alias (absent: the latest): metadata, `revision`, files, aliases, state."""
        return cast("MetadataReply", await self.call("getModelMetadata", modelId=model_id, version=version))

    # --- changing ---

    async def update_model_metadata(
        self,
        model_id: str,
        metadata: Mapping[str, Any],
        *,
        version: str | None = None,
        expected_revision: int | None = None,
        idempotency_key: str | None = None,
    ) -> MetadataReply:
        """Change metadata by JSON merge patch: None removes a member; `type` and `version` cannot change.

        With `expected_revision` it is ERR_CONFLICT if somebody else was first.
        """
        reply = await self.call(
            "updateModelMetadata",
            modelId=model_id,
            version=version,
            metadata=dict(metadata),
            expectedRevision=expected_revision,
            idempotency_key=idempotency_key,
        )
        return cast("MetadataReply", reply)

    async def delete_model(
        self, model_id: str, version: str | None = None, *, purge: bool = False, idempotency_key: str | None = None
    ) -> DeleteReply:
        """Delete a version, or all of them.

        `restore_model` undoes it until `restorableUntil`; with `purge` nothing does, and the bytes are freed at once.
        """
        reply = await self.call(
            "deleteModel", modelId=model_id, version=version, purge=purge or None, idempotency_key=idempotency_key
        )
        return cast("DeleteReply", reply)

    async def restore_model(
        self, model_id: str, version: str | None = None, *, idempotency_key: str | None = None
    ) -> RestoreReply:
        """Undo a delete within its window (7 days, unless the rack is set otherwise)."""
        reply = await self.call("restoreModel", modelId=model_id, version=version, idempotency_key=idempotency_key)
        return cast("RestoreReply", reply)

    async def set_alias(
        self,
        model_id: str,
        alias: str,
        version: str,
        *,
        expected_version: str | _Absent | None = ABSENT,
        idempotency_key: str | None = None,
    ) -> AliasReply:
        """Point an alias at a version; `previous` tells where it pointed.

        `expected_version` makes it a compare-and-set, ERR_CONFLICT if it points elsewhere; None: it must not exist yet.
        """
        params: dict[str, Any] = {"modelId": model_id, "alias": alias, "version": version}
        if not isinstance(expected_version, _Absent):
            params["expectedVersion"] = expected_version
        reply = await self._caller.call("setAlias", params, timeout_s=self._timeout_s, idempotency_key=idempotency_key)
        return cast("AliasReply", reply)

    async def delete_alias(
        self, model_id: str, alias: str, *, expected_version: str | None = None, idempotency_key: str | None = None
    ) -> AliasReply:
        """Remove an alias; with `expected_version` only if it still points there. An absent one is ERR_NOT_FOUND."""
        reply = await self.call(
            "deleteAlias",
            modelId=model_id,
            alias=alias,
            expectedVersion=expected_version,
            idempotency_key=idempotency_key,
        )
        return cast("AliasReply", reply)

    # --- jobs ---

    async def replicate_model(
        self,
        model_id: str,
        version: str | None = None,
        *,
        peers: Sequence[str] | None = None,
        wait_ms: int | None = None,
        idempotency_key: str | None = None,
    ) -> ReplicateReply | JobReply:
        """Name the racks that should hold a version; without `peers` the rack's own placement. A job, see `outcome`."""
        reply = await self.call(
            "replicateModel",
            modelId=model_id,
            version=version,
            peers=None if peers is None else list(peers),
            waitMs=wait_ms,
            idempotency_key=idempotency_key,
        )
        return cast("ReplicateReply | JobReply", reply)

    async def validate_model(
        self,
        model_id: str,
        version: str | None = None,
        *,
        wait_ms: int | None = None,
        idempotency_key: str | None = None,
    ) -> ValidateReply | JobReply:
        """Read every byte back and compare; wrong bytes quarantine the version. A job, see `outcome`."""
        reply = await self.call(
            "validateModel", modelId=model_id, version=version, waitMs=wait_ms, idempotency_key=idempotency_key
        )
        return cast("ValidateReply | JobReply", reply)

    async def get_job(self, job_id: str, *, wait_ms: int | None = None) -> JobStatus:
        """The state of a job, with its `result` or `error` once it has ended; waits for that up to `wait_ms`."""
        return cast("JobStatus", await self.call("getJob", jobId=job_id, waitMs=wait_ms))

    async def cancel_job(self, job_id: str) -> JobStatus:
        """Ask a job to end; one that has ended already keeps its state."""
        return cast("JobStatus", await self.call("cancelJob", jobId=job_id))

    async def outcome(self, reply: Mapping[str, Any], report: Report = silent, *, step: str = "Working") -> Any:
        """The result of a job from the answer that began it, however long it takes; any other answer as it is.

        Raises the job's own error, and ERR_CONFLICT if it was cancelled.
        """
        if "jobId" not in reply:
            return reply
        while True:
            asked_at = time.monotonic()
            status = await self.get_job(reply["jobId"], wait_ms=self._wait_ms)
            report(step, status["progress"].get("bytes", 0), status["progress"].get("totalBytes", 0))
            if status["state"] == "succeeded":
                return status.get("result", {})
            if status["state"] == "failed":
                raise error_of(status)
            if status["state"] == "cancelled":
                raise ModelManagerError("ERR_CONFLICT", "The job was cancelled.", jobId=reply["jobId"])
            await self._pause(asked_at)

    # --- uploads ---

    async def create_upload(
        self,
        model_id: str,
        version: str,
        files: Sequence[Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
    ) -> UploadReply:
        """Begin to bring the bytes of a version: `files` are `{path, size, sha256}`.

        The reply tells which of them the rack has already, and for the others where to put them or how to cut them
        into parts. `push` does it all.
        """
        reply = await self.call(
            "createUpload",
            modelId=model_id,
            version=version,
            files=[dict(file) for file in files],
            idempotency_key=idempotency_key,
        )
        return cast("UploadReply", reply)

    async def get_upload(
        self, upload_id: str, *, path: str | None = None, parts: Sequence[Mapping[str, Any]] | None = None
    ) -> GetUploadReply:
        """How far an upload is; with `path` and `parts` (`{number, sha256}`) the signed addresses of those parts."""
        given = None if parts is None else [dict(part) for part in parts]
        return cast("GetUploadReply", await self.call("getUpload", uploadId=upload_id, path=path, parts=given))

    async def complete_upload(
        self, upload_id: str, *, wait_ms: int | None = None, idempotency_key: str | None = None
    ) -> UploadReply | JobReply:
        """Have what was uploaded verified; then `store_model` with the `upload_id` makes the version. A job."""
        reply = await self.call("completeUpload", uploadId=upload_id, waitMs=wait_ms, idempotency_key=idempotency_key)
        return cast("UploadReply | JobReply", reply)

    async def abort_upload(self, upload_id: str, *, idempotency_key: str | None = None) -> AbortReply:
        """Give an upload up, and free what has arrived."""
        reply = await self.call("abortUpload", uploadId=upload_id, idempotency_key=idempotency_key)
        return cast("AbortReply", reply)

    # --- the rack ---

    async def get_storage_stats(self) -> StatsReply:
        """How much is stored, how far the registry is, what the cache holds."""
        return cast("StatsReply", await self.call("getStorageStats"))

    async def get_changes(
        self, epoch: int, after: int, *, limit: int | None = None, wait_ms: int | None = None
    ) -> ChangesReply:
        """The changes beyond `after`, each the object that its hint was; waits for one up to `wait_ms`.

        ERR_CHANGES_GONE: that epoch is over, or the feed no longer reaches back so far; list, and begin at the head
        that `ping` told before. `follow` asks again and again.
        """
        reply = await self.call("getChanges", epoch=epoch, after=after, limit=limit, waitMs=wait_ms)
        return cast("ChangesReply", reply)

    async def follow(self, epoch: int, after: int) -> AsyncIterator[dict[str, Any]]:
        """Every change beyond `after`, in order and without gaps, for ever; its `rackseq` is the next `after`.

        Raises as `get_changes` does. A rack that is away for longer than `timeout_s` ends it: begin again where it was.
        """
        while True:
            asked_at = time.monotonic()
            page = await self.get_changes(epoch, after, wait_ms=self._wait_ms)
            for change in page["changes"]:
                yield change
            after = page["next"]
            if not page["changes"]:
                await self._pause(asked_at)

    async def _pause(self, asked_at: float) -> None:
        """After an answer with nothing in it: where no place to wait is free, one question a second is enough."""
        await asyncio.sleep(asked_at + min(_PAUSE_S, self._wait_ms / 1000) - time.monotonic())

    @property
    def _wait_ms(self) -> int:
        """How long an answer may be waited for at the worker, so that it still comes in time."""
        return min(MAX_WAIT_MS, int(self._timeout_s * 500))

    async def ping(self) -> PingReply:
        """Who answers: `rack`, `version`, `ready`, and the `epoch` and `head` of its journal."""
        return cast("PingReply", await self.call("ping"))

    # --- bytes ---

    def headers_for(self, url: str) -> dict[str, str]:
        """The headers that a transfer of bytes to or from `url` needs besides its own."""
        return self._caller.headers_for(url)

    async def push(
        self,
        path: Path,
        model_id: str,
        version: str,
        *,
        metadata: Mapping[str, Any],
        progress: Report = silent,
    ) -> StoreReply:
        """Store the file or folder at `path` as a version; see `worker.client.push`."""
        return await push(self, path, model_id, version, metadata=metadata, report=progress)

    async def pull(
        self,
        model_id: str,
        version: str | None = None,
        destination: Path | None = None,
        *,
        force: bool = False,
        progress: Report = silent,
    ) -> Pulled:
        """Fetch the files of a version; see `worker.client.pull`."""
        return await pull(self, model_id, version, destination, force=force, report=progress)
