"""Uploads: sessions that bring the bytes of one version.

A file's bytes come in parts straight to the object store (signed addresses), or, on disk, in one PUT to this worker.
Bytes that the rack has already are not sent again. Nothing becomes visible before every file's whole sha256 was
verified (`complete`), and then only by `storeModel` with the upload's id. Only begin and end are recorded; what has
arrived is asked of the store.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast
from urllib.parse import quote

from schemas.errors import ModelManagerError
from schemas.ids import digest_of, hex_of, new_ulid
from schemas.journal import PlannedFile, StoredFile, UploadBeginRecord, UploadEndRecord
from schemas.model import media_type
from schemas.uploads import (
    AbortReply,
    AbortUpload,
    CreateUpload,
    GetUpload,
    GetUploadReply,
    SignedPartUrl,
    UploadFile,
    UploadFileState,
    UploadReply,
)
from schemas.wire import timestamp
from worker.catalog.entries import UploadEntry
from worker.context import Context
from worker.journal import Entry
from worker.policy import Policy
from worker.registry import Change, Registry
from worker.storage.blobstore import BlobInfo, BlobMissing, BlobStore, StoredBlob, part_count
from worker.uploads.parts import FilesInParts
from worker.uploads.plan import Progress, advance, check_open, check_plan, incomplete, planned_file


class UploadSessions:
    """createUpload, getUpload, abortUpload, the receiving of files on disk, and the body of the completeUpload job.

    `file_url` makes a signed address of ours for a path, to PUT a file to.
    """

    def __init__(
        self, registry: Registry, store: BlobStore, policy: Policy, file_url: Callable[[str, int], str]
    ) -> None:
        self._registry = registry
        self._store = store
        self._policy = policy
        self._file_url = file_url
        direct = store.direct_uploads
        self._parts = None if direct is None else FilesInParts(direct)
        self._received: dict[tuple[str, str], StoredBlob] = {}  # (upload, path) -> verified bytes on disk
        self._receiving: set[tuple[str, str]] = set()

    # --- the methods ---

    async def create(self, params: CreateUpload, context: Context) -> UploadReply:
        self._policy.check_size(sum(file.size for file in params.files))
        twin = self._registry.catalog.case_twin(params.model_id)
        if twin is not None:
            raise ModelManagerError("ERR_CONFLICT", f"The model {twin} differs in case only.", modelId=twin)
        self._registry.catalog.check_own(params.model_id)
        check_plan(params.files, in_parts=self._parts is not None)
        check_open(self._registry.catalog.uploads.values(), len(params.files))
        upload_id = new_ulid()
        held: list[str] = []
        try:
            planned = [await self._plan(file, held) for file in params.files]
            if self._parts is not None:
                begun = [file for file in planned if "key" in file and "present" not in file]
                await self._parts.begin(begun, self._info(params.model_id, params.version))
            record: UploadBeginRecord = {
                "upload": upload_id,
                "model": params.model_id,
                "version": params.version,
                "files": planned,
                "expires": int((time.time() + self._policy.upload_s) * 1000),
            }
            if context.idempotency is not None:
                record["idem"] = context.idempotency
            await self._begin(record, held)
        finally:
            self._registry.unpin(held)
        # No part can have arrived.
        return self._reply(self.find(upload_id), planned, {file["path"]: [] for file in planned})

    async def _begin(self, record: UploadBeginRecord, held: list[str]) -> None:
        try:
            await self._registry.transact(record["upload"], lambda: Change("upload.begin", record), pins=held)
        except ModelManagerError:
            # After a failure of the journal it may be there; a caller that gave up does not stop it either.
            if self._parts is not None and self._registry.journal.healthy:
                self._parts.leave(record["files"])
            raise

    async def get(self, params: GetUpload, context: Context) -> GetUploadReply:
        if params.path is None or params.parts is None:
            return cast(GetUploadReply, await self.describe(params.upload_id))
        upload = self._open(params.upload_id)
        planned = planned_file(upload, params.path)
        reply = cast(GetUploadReply, self._reply(upload, upload.files, await self._arrived(upload, [planned])))
        reply["urls"] = await self._sign(upload, planned, [(p.number, hex_of(p.sha256)) for p in params.parts])
        return reply

    async def abort(self, params: AbortUpload, context: Context) -> AbortReply:
        reply: AbortReply = {"success": True, "uploadId": params.upload_id, "state": "aborted"}

        def decide() -> Change | AbortReply:
            upload = self.find(params.upload_id)
            if upload.state == "aborted":
                return reply
            if upload.state not in ("open", "completed"):
                raise ModelManagerError("ERR_CONFLICT", f"The upload is {upload.state}.", state=upload.state)
            record: UploadEndRecord = {"upload": upload.id, "state": "aborted"}
            if context.idempotency is not None:
                record["idem"] = context.idempotency
            return Change("upload.end", record)

        if isinstance(await self._registry.transact(params.upload_id, decide), Entry):
            await self.discard(self.find(params.upload_id))
        return reply

    async def describe(self, upload_id: str) -> UploadReply:
        """The reply of createUpload, as the upload is now."""
        return await self._describe(self.find(upload_id))

    def completed(self, upload_id: str, model_id: str, version: str) -> UploadEntry:
        """The upload, if it is completed (or already stored) and for that version; a coded error otherwise."""
        upload = self.find(upload_id)
        if (upload.model, upload.version) != (model_id, version):
            raise ModelManagerError(
                "ERR_CONFLICT",
                f"The upload is for {upload.model}:{upload.version}.",
                modelId=upload.model,
                version=upload.version,
            )
        if upload.state not in ("completed", "stored"):
            raise ModelManagerError("ERR_CONFLICT", f"The upload is {upload.state}, not completed.", state=upload.state)
        return upload

    # --- bytes ---

    async def receive(
        self, upload_id: str, path: str, chunks: AsyncIterator[bytes], size: int | None
    ) -> dict[str, Any]:
        """Take the whole bytes of one file, on disk; verified against the declared size and sha256 on the way."""
        upload = self._open(upload_id)
        planned = planned_file(upload, path)
        if self._parts is not None and "multipart" in planned:
            raise ModelManagerError("ERR_CONFLICT", "This file goes to the object store in parts; see getUpload.")
        place = (upload_id, path)
        if place in self._receiving:
            raise ModelManagerError("ERR_CONFLICT", f"{path} is being uploaded already.", path=path)
        if "key" not in planned and place not in self._received:
            self._receiving.add(place)
            try:
                await self._receive(upload, planned, chunks, size)
            finally:
                self._receiving.discard(place)
        return {"success": True, "uploadId": upload_id, "path": path, "size": planned["size"]} | {
            "sha256": digest_of(planned["sha256"])
        }

    async def _receive(
        self, upload: UploadEntry, planned: PlannedFile, chunks: AsyncIterator[bytes], size: int | None
    ) -> None:
        if size is not None and size != planned["size"]:
            raise ModelManagerError(
                "ERR_CHECKSUM_MISMATCH",
                f"{planned['path']} was declared with {planned['size']} bytes.",
                expectedSize=planned["size"],
                size=size,
            )
        key = self._store.new_key()
        self._registry.pin([key])
        try:
            stored = await self._store.put(
                key,
                chunks,
                info=self._info(upload.model, upload.version),
                size=planned["size"],
                sha256=planned["sha256"],
                max_size=self._policy.max_model_size,
            )
            if self.find(upload.id).state != "open":
                raise ModelManagerError("ERR_CONFLICT", "The upload ended meanwhile.")
        except BaseException:
            self._registry.unpin([key])
            raise
        self._received[(upload.id, planned["path"])] = stored  # pinned until the upload ends

    async def complete(self, upload_id: str, progress: Progress) -> Callable[[], Awaitable[UploadReply]]:
        """The body of the job: every file verified, the end yet to be recorded. A failure leaves the upload open."""
        upload = self.find(upload_id)
        if upload.state in ("completed", "stored"):
            return partial(self._describe, upload)
        self._open(upload_id)
        progress("totalBytes", sum(file["size"] for file in upload.files))
        files = []
        done = 0
        for planned in upload.files:
            key = await self._verified_key(upload, planned, partial(advance, progress, done))
            done += planned["size"]
            progress("bytes", done)
            files.append(
                StoredFile(
                    path=planned["path"],
                    size=planned["size"],
                    sha256=planned["sha256"],
                    mediaType=media_type(planned["path"]),
                    key=key,
                )
            )
        return partial(self._end, upload, files)

    async def _end(self, upload: UploadEntry, files: list[StoredFile]) -> UploadReply:
        record: UploadEndRecord = {"upload": upload.id, "state": "completed", "files": files}

        def decide() -> Change:
            self._open(upload.id)
            return Change("upload.end", record)

        await self._registry.transact(upload.id, decide)
        self._forget(upload)
        return await self._describe(upload)

    async def _verified_key(self, upload: UploadEntry, planned: PlannedFile, progress: Callable[[int], None]) -> str:
        received = self._received.get((upload.id, planned["path"]))
        if received is not None:
            return received.key
        if planned.get("present"):
            return planned["key"]
        if "multipart" not in planned or self._parts is None:
            raise incomplete(planned["path"])
        await self._parts.finish(planned)
        try:
            stored = await self._store.hash(planned["key"], progress)
        except BlobMissing:
            raise incomplete(planned["path"]) from None
        if (stored.size, stored.sha256) != (planned["size"], planned["sha256"]):
            await self.expire(upload.id, "aborted")
            raise ModelManagerError(
                "ERR_CHECKSUM_MISMATCH",
                f"The bytes of {planned['path']} are not those that were declared; begin a new upload.",
                path=planned["path"],
                expected=digest_of(planned["sha256"]),
                actual=digest_of(stored.sha256),
            )
        return planned["key"]

    # --- the end ---

    async def expire(self, upload_id: str, state: str = "expired") -> None:
        """End an upload that is not over, and free what it brought."""

        def decide() -> Change | None:
            upload = self._registry.catalog.uploads.get(upload_id)
            if upload is None or upload.state not in ("open", "completed"):
                return None
            return Change("upload.end", {"upload": upload_id, "state": state})

        if isinstance(await self._registry.transact(upload_id, decide), Entry):
            await self.discard(self.find(upload_id))

    async def discard(self, upload: UploadEntry) -> None:
        """Give up the parts of an upload that ended without its bytes being needed; its blobs go with the clean-up."""
        self._forget(upload)
        if self._parts is not None:
            await self._parts.abort(await self._planned(upload))

    def overdue(self) -> list[str]:
        """The uploads that are not over and past their time."""
        now = time.time() * 1000
        uploads = self._registry.catalog.uploads.values()
        return [u.id for u in uploads if u.state in ("open", "completed") and u.expires < now]

    def _forget(self, upload: UploadEntry) -> None:
        for place in [place for place in self._received if place[0] == upload.id]:
            self._registry.unpin([self._received.pop(place).key])

    async def stop(self) -> None:
        """Leave what is still to be tidied up to the clean-up of the next boot."""
        if self._parts is not None:
            await self._parts.stop()

    # --- views ---

    def find(self, upload_id: str) -> UploadEntry:
        """ERR_NOT_FOUND if there is none."""
        upload = self._registry.catalog.uploads.get(upload_id)
        if upload is None:
            raise ModelManagerError("ERR_NOT_FOUND", "There is no such upload.", uploadId=upload_id)
        return upload

    async def stored_files(self, upload: UploadEntry) -> list[StoredFile]:
        """The verified files of an upload that was completed."""
        return list(upload.stored_files if upload.over is None else (await self._record(upload, 1))["files"])

    async def _planned(self, upload: UploadEntry) -> Sequence[PlannedFile]:
        """The files it was to bring."""
        return upload.files if upload.over is None else (await self._record(upload, 0))["files"]

    async def _record(self, upload: UploadEntry, number: int) -> Any:
        """One of its records, which are all that has the files of an upload that is over."""
        try:
            return await self._registry.record(upload.sequences[number])
        except KeyError:
            raise ModelManagerError("ERR_NOT_FOUND", "The upload is over for long.", uploadId=upload.id) from None

    def _open(self, upload_id: str) -> UploadEntry:
        upload = self.find(upload_id)
        if upload.state != "open":
            raise ModelManagerError("ERR_CONFLICT", f"The upload is {upload.state}.", state=upload.state)
        return upload

    async def _plan(self, file: UploadFile, held: list[str]) -> PlannedFile:
        """What is known of the file before its upload begins. Its key, if it has one already, is pinned and `held`."""
        planned: PlannedFile = {"path": file.path, "size": file.size, "sha256": hex_of(file.sha256)}
        known = await self._registry.pin_stored(planned["sha256"])
        if known is not None:
            planned["key"] = known
            planned["present"] = True
        elif self._parts is not None and file.size > 0:
            planned["key"] = self._store.new_key()
            self._registry.pin([planned["key"]])
        if "key" in planned:
            held.append(planned["key"])
        return planned

    async def _arrived(self, upload: UploadEntry, files: Iterable[PlannedFile]) -> dict[str, list[int]]:
        """The parts that have arrived of these files, if they may still be sent."""
        return {} if self._parts is None or upload.state != "open" else await self._parts.arrived(files)

    async def _describe(self, upload: UploadEntry) -> UploadReply:
        files = await self._planned(upload)
        return self._reply(upload, files, await self._arrived(upload, files))

    def _reply(
        self, upload: UploadEntry, files: Sequence[PlannedFile], arrived: Mapping[str, list[int]]
    ) -> UploadReply:
        return {
            "success": True,
            "uploadId": upload.id,
            "modelId": upload.model,
            "version": upload.version,
            "state": upload.state,
            "expiresAt": timestamp(upload.expires),
            "files": [self._file_state(upload, file, arrived.get(file["path"])) for file in files],
        }

    def _file_state(self, upload: UploadEntry, file: PlannedFile, arrived: list[int] | None) -> UploadFileState:
        over = upload.state != "open"
        present = bool(file.get("present")) or (upload.id, file["path"]) in self._received
        state: UploadFileState = {
            "path": file["path"],
            "size": file["size"],
            "sha256": digest_of(file["sha256"]),
            "present": present or upload.state in ("completed", "stored"),
        }
        if over or state["present"]:
            return state
        if self._parts is not None and "multipart" in file:
            state["partSize"] = file["partSize"]
            state["parts"] = part_count(file["size"], file["partSize"])
            if arrived is not None:
                state["received"] = arrived
        else:
            seconds = max(1, int(upload.expires / 1000 - time.time()))
            state["url"] = self._file_url(f"/api/uploads/{upload.id}/files/{quote(file['path'])}", seconds)
        return state

    async def _sign(
        self, upload: UploadEntry, planned: PlannedFile, parts: list[tuple[int, str]]
    ) -> list[SignedPartUrl]:
        self._open(upload.id)
        if self._parts is None or "multipart" not in planned:
            raise ModelManagerError("ERR_CONFLICT", f"{planned['path']} has no parts to sign.", path=planned["path"])
        return await self._parts.sign(planned, parts, expires_s=self._policy.url_s)

    def _info(self, model_id: str, version: str) -> BlobInfo:
        return BlobInfo(format="", model=model_id, version=version, rack=self._policy.rack)
