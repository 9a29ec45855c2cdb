"""What an upload was planned to bring, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from schemas.errors import ModelManagerError
from schemas.journal import PlannedFile
from worker.catalog.entries import UploadEntry

Progress = Callable[[str, int], None]


def advance(progress: Progress, before: int, seen: int) -> None:
    progress("bytes", before + seen)


def planned_file(upload: UploadEntry, path: str) -> PlannedFile:
    for file in upload.files:
        if file["path"] == path:
            return file
    raise ModelManagerError("ERR_NOT_FOUND", f"The upload has no file {path}.", path=path)


def part_count(size: int, part_size: int) -> int:
    return max(1, -(-size // part_size))


def incomplete(path: str, missing: list[int] | None = None) -> ModelManagerError:
    details: dict[str, Any] = {"path": path}
    if missing:
        details["missingParts"] = missing[:100]
    return ModelManagerError("ERR_CONFLICT", f"The bytes of {path} are not all there yet.", **details)
