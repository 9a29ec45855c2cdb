"""The whole table of methods, with types, and the two long ones: push and pull."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class ModelManagerClient:
    """The methods of one rack. `timeout_s` is for each answer; transfers of bytes and jobs take as long as they take.

    Every method raises ModelManagerError. The client owns `caller` and closes it.
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
        await self._caller.close()

    async def call(self, method: str, /, *, idempotency_key: str | None = None, **params: Any) -> dict[str, Any]:
        """Any method by its name; parameters that are None or ABSENT are left out."""
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
        return cast("GetModelReply", await self.call("getModel", modelId=model_id, version=version, delivery=delivery))

    async def list_models(
        self, *, model_type: str | None = None, limit: int | None = None, cursor: str | None = None
    ) -> ListReply:
        return cast("ListReply", await self.call("listModels", type=model_type, limit=limit, cursor=cursor))

    async def search_models(
        self,
        criteria: Mapping[str, Any] | None = None,
        *,
        sort: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> ListReply:
        given = None if criteria is None else dict(criteria)
        reply = await self.call("searchModels", criteria=given, sort=sort, limit=limit, cursor=cursor)
        return cast("ListReply", reply)

    async def get_model_metadata(self, model_id: str, version: str | None = None) -> MetadataReply:
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
        reply = await self.call(
            "deleteModel", modelId=model_id, version=version, purge=purge or None, idempotency_key=idempotency_key
        )
        return cast("DeleteReply", reply)

    async def restore_model(
        self, model_id: str, version: str | None = None, *, idempotency_key: str | None = None
    ) -> RestoreReply:
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
        """`expected_version` makes it a compare-and-set; None means that the alias must not exist yet."""
        params: dict[str, Any] = {"modelId": model_id, "alias": alias, "version": version}
        if not isinstance(expected_version, _Absent):
            params["expectedVersion"] = expected_version
        reply = await self._caller.call("setAlias", params, timeout_s=self._timeout_s, idempotency_key=idempotency_key)
        return cast("AliasReply", reply)

    async def delete_alias(
        self, model_id: str, alias: str, *, expected_version: str | None = None, idempotency_key: str | None = None
    ) -> AliasReply:
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
        reply = await self.call(
            "validateModel", modelId=model_id, version=version, waitMs=wait_ms, idempotency_key=idempotency_key
        )
        return cast("ValidateReply | JobReply", reply)

    async def get_job(self, job_id: str, *, wait_ms: int | None = None) -> JobStatus:
        return cast("JobStatus", await self.call("getJob", jobId=job_id, waitMs=wait_ms))

    async def cancel_job(self, job_id: str) -> JobStatus:
        return cast("JobStatus", await self.call("cancelJob", jobId=job_id))

    async def outcome(self, reply: Mapping[str, Any], report: Report = silent, *, step: str = "Working") -> Any:
        """The result of a job from the answer that began it, however long it takes; any other answer as it is.

        Raises the job's own error, and ERR_CONFLICT if it was cancelled.
        """
        if "jobId" not in reply:
            return reply
        while True:
            status = await self.get_job(reply["jobId"], wait_ms=MAX_WAIT_MS)
            report(step, status["progress"].get("bytes", 0), status["progress"].get("totalBytes", 0))
            if status["state"] == "succeeded":
                return status.get("result", {})
            if status["state"] == "failed":
                raise error_of(status)
            if status["state"] == "cancelled":
                raise ModelManagerError("ERR_CONFLICT", "The job was cancelled.", jobId=reply["jobId"])

    # --- uploads ---

    async def create_upload(
        self,
        model_id: str,
        version: str,
        files: Sequence[Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
    ) -> UploadReply:
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
        given = None if parts is None else [dict(part) for part in parts]
        return cast("GetUploadReply", await self.call("getUpload", uploadId=upload_id, path=path, parts=given))

    async def complete_upload(
        self, upload_id: str, *, wait_ms: int | None = None, idempotency_key: str | None = None
    ) -> UploadReply | JobReply:
        reply = await self.call("completeUpload", uploadId=upload_id, waitMs=wait_ms, idempotency_key=idempotency_key)
        return cast("UploadReply | JobReply", reply)

    async def abort_upload(self, upload_id: str) -> AbortReply:
        return cast("AbortReply", await self.call("abortUpload", uploadId=upload_id))

    # --- the rack ---

    async def get_storage_stats(self) -> StatsReply:
        return cast("StatsReply", await self.call("getStorageStats"))

    async def get_changes(
        self, epoch: int, after: int, *, limit: int | None = None, wait_ms: int | None = None
    ) -> ChangesReply:
        reply = await self.call("getChanges", epoch=epoch, after=after, limit=limit, waitMs=wait_ms)
        return cast("ChangesReply", reply)

    async def ping(self) -> PingReply:
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
