"""The use cases put together: what the dispatcher calls by method name, and what HTTP streams call directly."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

from schemas.journal import StoredFile
from schemas.model import Metadata, VersionsOfModel
from schemas.rpc import CancelJob, GetJob, ReplicateModel, StoreReply, ValidateModel
from schemas.uploads import CompleteUpload
from worker.answers import answer_of, store_reply
from worker.cache import ModelCache
from worker.catalog.entries import VersionEntry
from worker.content import OpenedFile
from worker.context import Context
from worker.jobs.runner import Commit, Jobs
from worker.journal import Entry
from worker.policy import Policy
from worker.readiness import Readiness
from worker.registry import Registry
from worker.service.checking import Checking
from worker.service.editing import Editing
from worker.service.examining import Examining
from worker.service.reading import Reading
from worker.service.replicating import Replicating
from worker.service.storing import Storing
from worker.storage.blobstore import BlobStore
from worker.uploads.sessions import UploadSessions

Handler = Callable[[Any, Context], Awaitable[Any]]


class ModelService:
    """One rack's catalog and its bytes. `get_url` and `put_url` make signed addresses of ours for a path."""

    def __init__(
        self,
        registry: Registry,
        store: BlobStore,
        policy: Policy,
        cache: ModelCache,
        readiness: Readiness,
        *,
        get_url: Callable[[str, int], str],
        put_url: Callable[[str, int], str],
        job_places: int,
    ) -> None:
        self.max_model_size = policy.max_model_size
        self.uploads = UploadSessions(registry, store, policy, put_url)
        self.reading = Reading(registry, store, policy, cache, readiness, get_url)
        self._registry = registry
        self._examining = Examining(store, policy)
        self._storing = Storing(registry, store, policy, cache, self.uploads, self._examining)
        editing = Editing(registry, policy, cache)
        self.checking = checking = Checking(registry, store, policy, cache, self._examining)
        self.replicating = Replicating(registry, policy)
        self.jobs = Jobs(
            registry,
            {
                "validateModel": checking.validate,
                "replicateModel": self.replicating.watch,
                "completeUpload": self._complete_upload,
            },
            places=job_places,
            patient={"replicateModel"},
        )
        reading, uploads = self.reading, self.uploads
        self.handlers: dict[str, Handler] = {
            "storeModel": self._storing.store_model,
            "getModel": reading.get_model,
            "listModels": reading.list_models,
            "searchModels": reading.search_models,
            "getModelMetadata": reading.get_model_metadata,
            "updateModelMetadata": editing.update_model_metadata,
            "deleteModel": editing.delete_model,
            "restoreModel": editing.restore_model,
            "setAlias": editing.set_alias,
            "deleteAlias": editing.delete_alias,
            "replicateModel": self._replicate_model,
            "validateModel": self._validate_model,
            "getStorageStats": reading.get_storage_stats,
            "createUpload": uploads.create,
            "getUpload": uploads.get,
            "completeUpload": self._begin_complete,
            "abortUpload": uploads.abort,
            "getChanges": reading.get_changes,
            "getJob": self._get_job,
            "cancelJob": self._cancel_job,
            "ping": reading.ping,
        }

    async def stop(self) -> None:
        """Stop the jobs, which go on at the next boot, and the threads."""
        await self.jobs.stop()
        await self.uploads.stop()
        self._examining.close()

    # --- jobs ---

    async def _validate_model(self, params: ValidateModel, context: Context) -> dict[str, Any]:
        entry = await self._resolve(params.model_id, params.version)
        return await self._accept("validateModel", {"modelId": entry.model, "version": entry.version}, context)

    async def _replicate_model(self, params: ReplicateModel, context: Context) -> dict[str, Any]:
        entry = await self._resolve(params.model_id, params.version)
        peers = await self.replicating.name(entry.model, entry.version, params.peers)
        work = {"modelId": entry.model, "version": entry.version, "peers": peers}
        return await self._accept("replicateModel", work, context)

    async def _begin_complete(self, params: CompleteUpload, context: Context) -> dict[str, Any]:
        self.uploads.find(params.upload_id)  # refuses an unknown one before a job is recorded
        return await self._accept("completeUpload", {"uploadId": params.upload_id}, context)

    async def _complete_upload(self, params: dict[str, Any], progress: Callable[[str, int], None]) -> Commit:
        return cast(Commit, await self.uploads.complete(params["uploadId"], progress))

    async def _resolve(self, model_id: str, reference: str) -> VersionEntry:
        return await self._registry.look(lambda: self._registry.catalog.resolve(model_id, reference))

    async def _accept(self, method: str, work: dict[str, Any], context: Context) -> dict[str, Any]:
        return {"success": True, "jobId": await self.jobs.begin(method, work, context), "state": "queued"}

    async def outcome(self, job_id: str, params: Any) -> dict[str, Any]:
        """The reply to the request that began this job, once `waitMs` are over or the job is."""
        return await self.jobs.result(job_id, params.wait_ms / 1000)

    async def _get_job(self, params: GetJob, context: Context) -> Any:
        return await self.jobs.status(params.job_id, params.wait_ms / 1000)

    async def _cancel_job(self, params: CancelJob, context: Context) -> Any:
        return await self.jobs.cancel(params.job_id)

    # --- repeated requests ---

    async def repeat(self, method: str, entry: Entry, params: Any) -> dict[str, Any] | None:
        """The answer to a request whose effect is recorded in `entry`; None if it came to nothing and may be tried
        again."""
        record = entry.record
        if entry.op == "job.begin":
            return None if self.jobs.may_be_tried_again(record["job"]) else await self.outcome(record["job"], params)
        if entry.op == "upload.begin":
            return cast(dict[str, Any], await self.uploads.describe(record["upload"]))
        if entry.op == "upload.end":
            return {"success": True, "uploadId": record["upload"], "state": record["state"]}
        if method == "storeModel" and entry.op in ("restore", "update"):
            version = record["version"] if entry.op == "update" else record["versions"][0]
            stored = await self._registry.look(lambda: self._registry.catalog.find(record["model"], version))
            if stored is not None:
                return cast(dict[str, Any], store_reply(stored, created=False))
        return await self._registry.look(lambda: answer_of(entry, self._registry.catalog))

    # --- streams ---

    async def refuse_stored(self, model_type: str, files: Sequence[StoredFile]) -> None:
        """Raise the error of a store of these files, if they hold what this rack does not take."""
        await self._examining.refuse(model_type, self._examining.stored(files))

    async def open_file(self, model_id: str, ref: str, path: str | None, *, redirect: bool = False) -> OpenedFile:
        return await self.reading.open_file(model_id, ref, path, redirect=redirect)

    async def store_stream(
        self,
        model_id: str,
        metadata: Metadata,
        *,
        filename: str,
        chunks: AsyncIterator[bytes],
        size: int | None,
        sha256: str | None,
        context: Context,
    ) -> StoreReply:
        return await self._storing.store_stream(
            model_id, metadata, filename=filename, chunks=chunks, size=size, sha256=sha256, context=context
        )

    async def receive_file(
        self, upload_id: str, path: str, chunks: AsyncIterator[bytes], size: int | None, *, context: Context
    ) -> dict[str, Any]:
        return await self.uploads.receive(upload_id, path, chunks, size)

    async def versions_of(self, model_id: str) -> VersionsOfModel:
        return await self.reading.versions_of(model_id)
