"""Uploads and jobs: those that are not over, and for a while those that are."""

from __future__ import annotations

from typing import Any, TypeVar

from worker.catalog.blobs import BlobIndex
from worker.catalog.entries import JobEntry, UploadEntry

KEPT_MS = 7 * 24 * 3600 * 1000  # after they ended
_KEPT_MOST = 10_000

_Entry = TypeVar("_Entry", UploadEntry, JobEntry)


class Work:
    """The fold of their records. Storage keys are held in `blobs` for as long as an upload needs them."""

    def __init__(self, blobs: BlobIndex) -> None:
        self.uploads: dict[str, UploadEntry] = {}
        self.jobs: dict[str, JobEntry] = {}
        self._blobs = blobs

    def begin_upload(self, record: Any, sequence: int, time_ms: int) -> None:
        upload = UploadEntry(
            record["upload"], record["model"], record["version"], tuple(record["files"]), record["expires"]
        )
        upload.sequences.append(sequence)
        self.uploads[upload.id] = upload
        self._blobs.hold(upload.keys)
        _drop_over(self.uploads, time_ms)

    def end_upload(self, record: Any, sequence: int, time_ms: int) -> None:
        upload = self.uploads.get(record["upload"])
        if upload is None:
            return
        before = upload.keys
        upload.state = record["state"]
        upload.stored_files = tuple(record.get("files", ()))
        upload.sequences.append(sequence)
        self._blobs.use(upload.stored_files)
        self._blobs.release(before)
        if upload.state != "completed":
            upload.end(time_ms)

    def store_upload(self, upload_id: str, sequence: int, time_ms: int) -> None:
        """A version was made of it, by the record at `sequence`."""
        upload = self.uploads.get(upload_id)
        if upload is not None:
            self._blobs.release(upload.keys)
            upload.state = "stored"
            upload.sequences.append(sequence)
            upload.end(time_ms)

    def begin_job(self, record: Any, sequence: int, time_ms: int) -> None:
        job = JobEntry(record["job"], record["method"], record["params"], record["created"])
        job.sequences.append(sequence)
        self.jobs[job.id] = job
        _drop_over(self.jobs, time_ms)

    def end_job(self, record: Any, sequence: int, time_ms: int) -> None:
        job = self.jobs.get(record["job"])
        if job is not None:
            job.state = record["state"]
            job.error = record.get("error")
            job.sequences.append(sequence)
            job.over = time_ms


def _drop_over(entries: dict[str, _Entry], now_ms: int) -> None:
    """Drop the oldest entries that are over, while their time is, or there are more than are kept."""
    while (oldest := next((entry for entry in entries.values() if entry.over is not None), None)) is not None:
        if len(entries) <= _KEPT_MOST and (oldest.over or 0) >= now_ms - KEPT_MS:
            return
        del entries[oldest.id]
