"""What an upload was planned to bring, and how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from schemas.errors import ModelManagerError
from schemas.ids import MAX_METADATA_BYTES, hex_of
from schemas.journal import PlannedFile
from schemas.model import media_type
from schemas.uploads import UploadFile
from worker.catalog.entries import UploadEntry
from worker.journal import check_record

Progress = Callable[[str, int], None]

# So many fit into any record, however long their paths are.
FEW_FILES = 500
# Of uploads that are not over; a file of theirs takes half a kilobyte of memory.
_OPEN_MOST = 10_000
_OPEN_FILES_MOST = 200_000
_COME_BACK_MS = 60_000
# As long as what the records of an upload have in these places; stores differ in how they name a multipart upload.
_KEY = "blobs/" + "0" * 26
_MULTIPART = "0" * 128
_SIZE = 2**53
_REST = "0" * 8 * 1024
_METADATA = "0" * MAX_METADATA_BYTES


def advance(progress: Progress, before: int, seen: int) -> None:
    progress("bytes", before + seen)


def check_fits(op: str, record: dict[str, Any]) -> None:
    """ERR_INVALID_REQUEST if no line of the journal holds this record of a version's files."""
    try:
        check_record(op, record)
    except ModelManagerError as error:
        message = "The list of the files does not fit into one record: give them shorter paths, or pack them."
        raise ModelManagerError("ERR_INVALID_REQUEST", message, **error.details) from None


def check_plan(files: Sequence[UploadFile], *, in_parts: bool) -> None:
    """As `check_fits` for all records of an upload of these files, up to the version with any metadata.

    `in_parts`: they go to a store that takes them so.
    """
    if len(files) <= FEW_FILES:
        return
    begin, store = [], []
    for file in files:
        told = {"path": file.path, "size": _SIZE, "sha256": hex_of(file.sha256), "key": _KEY}
        begin.append({**told, "multipart": _MULTIPART, "partSize": _SIZE} if in_parts else told)
        store.append({**told, "mediaType": media_type(file.path)})
    check_fits("upload.begin", {"files": begin, "rest": _REST})
    check_fits("store", {"files": store, "metadata": _METADATA, "rest": _REST})


def check_open(uploads: Iterable[UploadEntry], files: int) -> None:
    """ERR_OVERLOADED if too many of these are not over for another one with so many files."""
    counts = [len(upload.files) for upload in uploads if upload.over is None]
    if len(counts) >= _OPEN_MOST or sum(counts) + files > _OPEN_FILES_MOST:
        message = f"{len(counts)} uploads with {sum(counts)} files are not over."
        raise ModelManagerError("ERR_OVERLOADED", message, retryAfterMs=_COME_BACK_MS)


def planned_file(upload: UploadEntry, path: str) -> PlannedFile:
    for file in upload.files:
        if file["path"] == path:
            return file
    raise ModelManagerError("ERR_NOT_FOUND", f"The upload has no file {path}.", path=path)


def incomplete(path: str, missing: list[int] | None = None) -> ModelManagerError:
    details: dict[str, Any] = {"path": path}
    if missing:
        details["missingParts"] = missing[:100]
    return ModelManagerError("ERR_CONFLICT", f"The bytes of {path} are not all there yet.", **details)
