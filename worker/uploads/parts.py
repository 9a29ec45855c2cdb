"""Files of uploads whose parts callers PUT straight to the object store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

import structlog

from schemas.errors import ModelManagerError
from schemas.journal import PlannedFile
from schemas.uploads import SignedPartUrl
from worker.storage.blobstore import BlobInfo, DirectUploads, part_count
from worker.uploads.plan import incomplete

_log = structlog.get_logger()

_AT_ONCE = 8

_T = TypeVar("_T")
_R = TypeVar("_R")


class FilesInParts:
    """What is asked of the store for the files of an upload; for many of them, a few at once."""

    def __init__(self, direct: DirectUploads) -> None:
        self._direct = direct
        self._leaving: set[asyncio.Task[None]] = set()

    async def begin(self, files: Sequence[PlannedFile], info: BlobInfo) -> None:
        """Begin the upload of each of these, whose `key` is known, and note in it how. After a failure none is kept."""
        try:
            await _few_at_once(partial(self._begin, info), files)
        except BaseException:
            self.leave(files)
            raise

    async def _begin(self, info: BlobInfo, file: PlannedFile) -> None:
        plan = await self._direct.begin(file["key"], info=info, size=file["size"], sha256=file["sha256"])
        file["multipart"] = plan.upload_id
        file["partSize"] = plan.part_size

    def leave(self, files: Iterable[PlannedFile]) -> None:
        """Drop the parts of these, for a caller who does not wait for that."""
        task = asyncio.create_task(self.abort(files))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def abort(self, files: Iterable[PlannedFile]) -> None:
        """Drop the parts of these. A sweep finds what is left because the store is away."""
        await _few_at_once(self._abort, [file for file in files if "multipart" in file])

    async def _abort(self, file: PlannedFile) -> None:
        try:
            await self._direct.abort(file["key"], file["multipart"])
        except ModelManagerError as error:
            _log.warning("upload_parts_not_aborted", key=file["key"], code=error.code)

    async def arrived(self, files: Iterable[PlannedFile]) -> dict[str, list[int]]:
        """The numbers of the parts that are there, by path, of those of the files that come in parts."""
        asked = [file for file in files if "multipart" in file]
        return dict(zip((file["path"] for file in asked), await _few_at_once(self._arrived, asked), strict=True))

    async def _arrived(self, file: PlannedFile) -> list[int]:
        return sorted(await self._direct.parts(file["key"], file["multipart"]))

    async def finish(self, file: PlannedFile) -> None:
        """Make the parts the blob. ERR_CONFLICT if some are missing."""
        parts = await self._direct.parts(file["key"], file["multipart"])
        count = part_count(file["size"], file["partSize"])
        missing = [number for number in range(1, count + 1) if number not in parts]
        if parts and missing:
            raise incomplete(file["path"], missing)
        try:
            await self._direct.complete(file["key"], file["multipart"], parts)
        except ModelManagerError as error:
            if not parts and error.code == "ERR_CONFLICT":
                raise incomplete(file["path"], missing) from None
            raise

    async def sign(self, file: PlannedFile, parts: Sequence[tuple[int, str]], *, expires_s: int) -> list[SignedPartUrl]:
        """Addresses for parts by number and sha256 (hex). ERR_INVALID_REQUEST if the file has no such part."""
        path, count = file["path"], part_count(file["size"], file["partSize"])
        urls: list[SignedPartUrl] = []
        for number, sha256 in parts:
            if number > count:
                raise ModelManagerError("ERR_INVALID_REQUEST", f"{path} has {count} parts.", path=path, parts=count)
            last = file["size"] - (count - 1) * file["partSize"]
            signed = await self._direct.sign(
                file["key"],
                file["multipart"],
                number,
                sha256=sha256,
                length=last if number == count else file["partSize"],
                expires_s=expires_s,
            )
            urls.append({"number": number, "url": signed.url, "headers": dict(signed.headers)})
        return urls

    async def stop(self) -> None:
        """Leave what is still to be dropped to a sweep."""
        for task in self._leaving:
            task.cancel()
        if self._leaving:
            await asyncio.wait(self._leaving)


async def _few_at_once(work: Callable[[_T], Awaitable[_R]], items: Iterable[_T]) -> list[_R]:
    """What `work` gives for each, in order. The first error ends it, also for those that had begun."""
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(item: _T) -> _R:
        async with places:
            return await work(item)

    tasks = [asyncio.create_task(one(item)) for item in items]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
