"""One small story that shows every method at work, read by the generated documents and by the tests.

It can be played to a new worker in the order of `STORY`: each request finds what those before it have left, once
`LABELS` is put to its address before `completeUpload`. Bytes, sizes and digests are real. What the worker gives itself
(`uploadId`, `jobId`, storage keys, times, its version) differs from run to run.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

from schemas.ids import digest_of
from schemas.journal_examples import (
    HINT_EXAMPLES,
    HOUR_MS,
    JOB,
    JSON,
    LABELS,
    METADATA,
    MODEL,
    RACK,
    REPLICATION_JOB,
    START_MS,
    UPLOAD,
    WEIGHTS,
    WEIGHTS_KEY,
    sha256_of,
)
from schemas.model import version_digest
from schemas.wire import timestamp


@dataclass(frozen=True, slots=True)
class Example:
    """A request and the reply it gets. `title` is unique among the examples of its method."""

    method: str
    title: str
    params: JSON
    reply: JSON


ABANDONED = "01KAR61B3F5G7H9J1K3M5N7P9Q"

_STORED_AT = timestamp(START_MS)
_LATER = timestamp(START_MS + HOUR_MS)
_NEXT_DAY = timestamp(START_MS + 24 * HOUR_MS)
_NEXT_WEEK = timestamp(START_MS + 7 * 24 * HOUR_MS)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _file(path: str, data: bytes, key: str, media_type: str = "application/octet-stream") -> JSON:
    return {
        "path": path,
        "size": len(data),
        "checksum": digest_of(sha256_of(data)),
        "mediaType": media_type,
        "storageKey": key,
    }


_WEIGHTS_FILE = _file("model.safetensors", WEIGHTS, WEIGHTS_KEY)
_LABELS_FILE = _file("labels.json", LABELS, "blobs/01KAR5Z9D4M8P2B6H7S1K3V5RC", "application/json")
_CHECKSUM = digest_of(sha256_of(WEIGHTS))
_BOTH = [("labels.json", len(LABELS), sha256_of(LABELS)), ("model.safetensors", len(WEIGHTS), sha256_of(WEIGHTS))]
_DIGEST = digest_of(version_digest(_BOTH))
_BOTH_SIZE = len(WEIGHTS) + len(LABELS)

_REGISTRY = "d2a1f0c48b6e4d7c9f3a5e7b1c0d8f64"
_UPDATED: JSON = {**METADATA, "description": "Tells digits apart, a little better.", "accuracy": 0.98}
_METADATA_11: JSON = {"type": "safetensors", "version": "1.1.0", "description": "", "tags": ["vision"]}

_STORED: JSON = {
    "success": True,
    "modelId": MODEL,
    "version": "1.0.0",
    "storageKey": _WEIGHTS_FILE["storageKey"],
    "checksum": _CHECKSUM,
    "size": len(WEIGHTS),
    "files": [_WEIGHTS_FILE],
    "createdAt": _STORED_AT,
    "created": True,
}
_STORED_11: JSON = {
    "success": True,
    "modelId": MODEL,
    "version": "1.1.0",
    "checksum": _DIGEST,
    "size": _BOTH_SIZE,
    "files": [_LABELS_FILE, _WEIGHTS_FILE],
    "createdAt": _LATER,
    "created": True,
}
_LISTED: JSON = {
    "modelId": MODEL,
    "version": "1.0.0",
    "type": "safetensors",
    "checksum": _CHECKSUM,
    "size": len(WEIGHTS),
    "createdAt": _STORED_AT,
    "modelCreatedAt": _STORED_AT,
    "revision": 1,
    "aliases": [],
    "origin": RACK,
    "replicas": [],
    "state": "available",
    "metadata": METADATA,
}
_KNOWN: JSON = {
    "success": True,
    "modelId": MODEL,
    "version": "1.0.0",
    "metadata": METADATA,
    "revision": 1,
    "checksum": _CHECKSUM,
    "size": len(WEIGHTS),
    "files": [_WEIGHTS_FILE],
    "aliases": [],
    "origin": RACK,
    "replicas": [],
    "state": "available",
    "createdAt": _STORED_AT,
    "modelCreatedAt": _STORED_AT,
}
_OPENED: JSON = {
    "success": True,
    "uploadId": UPLOAD,
    "modelId": MODEL,
    "version": "1.1.0",
    "state": "open",
    "expiresAt": _NEXT_DAY,
    "files": [
        {"path": "model.safetensors", "size": len(WEIGHTS), "sha256": _CHECKSUM, "present": True},
        {
            "path": "labels.json",
            "size": len(LABELS),
            "sha256": _LABELS_FILE["checksum"],
            "present": False,
            "url": f"http://127.0.0.1:8002/api/uploads/{UPLOAD}/files/labels.json?expires=1793606400&signature=3f0c",
        },
    ],
}
_PLANNED = [{member: file[member] for member in ("path", "size", "sha256")} for file in _OPENED["files"]]
_PRESENT = [{**file, "present": True} for file in _PLANNED]
_VALIDATED: JSON = {
    "success": True,
    "modelId": MODEL,
    "version": "1.0.0",
    "isValid": True,
    "expectedChecksum": _CHECKSUM,
    "actualChecksum": _CHECKSUM,
    "files": [
        {"path": "model.safetensors", "expectedChecksum": _CHECKSUM, "actualChecksum": _CHECKSUM, "isValid": True}
    ],
    "findings": [],
}
_JOB_DONE: JSON = {
    "success": True,
    "jobId": JOB,
    "method": "validateModel",
    "state": "succeeded",
    "progress": {"bytes": len(WEIGHTS), "totalBytes": len(WEIGHTS)},
    "result": _VALIDATED,
}

STORY: tuple[Example, ...] = (
    Example(
        "ping",
        "Is it there",
        {},
        {
            "success": True,
            "rack": RACK,
            "version": "0.1.0",
            "registryId": _REGISTRY,
            "epoch": 1,
            "head": 1,
            "ready": True,
        },
    ),
    Example(
        "storeModel",
        "Inside the message",
        {"modelId": MODEL, "metadata": METADATA, "modelData": _text(WEIGHTS), "checksum": _CHECKSUM},
        _STORED,
    ),
    Example("getModelMetadata", "The latest version", {"modelId": MODEL}, _KNOWN),
    Example(
        "getModel",
        "Inside the reply",
        {"modelId": MODEL, "version": "latest", "delivery": "inline"},
        {
            "success": True,
            "modelId": MODEL,
            "version": "1.0.0",
            "metadata": METADATA,
            "checksum": _CHECKSUM,
            "size": len(WEIGHTS),
            "files": [{**_WEIGHTS_FILE, "data": _text(WEIGHTS)}],
            "modelData": _text(WEIGHTS),
        },
    ),
    Example(
        "listModels",
        "The first page",
        {"type": "safetensors", "limit": 10},
        {"success": True, "models": [_LISTED], "count": 1},
    ),
    Example(
        "searchModels",
        "By tag, size and words",
        {"criteria": {"tags": ["vision"], "size": {"max": 1_000_000}, "text": "digits"}, "sort": "-createdAt"},
        {"success": True, "models": [_LISTED], "count": 1},
    ),
    Example(
        "updateModelMetadata",
        "A merge patch",
        {
            "modelId": MODEL,
            "version": "1.0.0",
            "metadata": {"description": _UPDATED["description"], "accuracy": 0.98},
            "expectedRevision": 1,
        },
        {**_KNOWN, "metadata": _UPDATED, "revision": 2},
    ),
    Example(
        "setAlias",
        "A new alias",
        {"modelId": MODEL, "alias": "stable", "version": "1.0.0", "expectedVersion": None},
        {"success": True, "modelId": MODEL, "alias": "stable", "version": "1.0.0", "previous": None},
    ),
    Example(
        "deleteAlias",
        "Only if it has not moved",
        {"modelId": MODEL, "alias": "stable", "expectedVersion": "1.0.0"},
        {"success": True, "modelId": MODEL, "alias": "stable", "version": None, "previous": "1.0.0"},
    ),
    Example(
        "replicateModel",
        "To one rack, whose copy takes a while",
        {"modelId": MODEL, "version": "1.0.0", "peers": ["rack-2"], "waitMs": 0},
        {"success": True, "jobId": REPLICATION_JOB, "state": "running"},
    ),
    Example(
        "validateModel",
        "Done in time",
        {"modelId": MODEL, "version": "1.0.0", "waitMs": 5000},
        _VALIDATED,
    ),
    Example(
        "validateModel",
        "As a job",
        {"modelId": MODEL, "version": "1.0.0", "waitMs": 0},
        {"success": True, "jobId": JOB, "state": "running"},
    ),
    Example("getJob", "Its result", {"jobId": JOB, "waitMs": 5000}, _JOB_DONE),
    Example("cancelJob", "Too late", {"jobId": JOB}, _JOB_DONE),
    Example(
        "createUpload",
        "Two files, one of them known",
        {"modelId": MODEL, "version": "1.1.0", "files": _PLANNED},
        _OPENED,
    ),
    Example("getUpload", "What is missing", {"uploadId": UPLOAD}, _OPENED),
    Example(
        "completeUpload", "All is there", {"uploadId": UPLOAD}, {**_OPENED, "state": "completed", "files": _PRESENT}
    ),
    Example(
        "storeModel",
        "From an upload",
        {"modelId": MODEL, "metadata": _METADATA_11, "uploadId": UPLOAD},
        _STORED_11,
    ),
    Example(
        "createUpload",
        "One file, known already",
        {"modelId": MODEL, "version": "1.2.0", "files": _PLANNED[:1]},
        {**_OPENED, "uploadId": ABANDONED, "version": "1.2.0", "files": _PRESENT[:1]},
    ),
    Example(
        "abortUpload",
        "Given up",
        {"uploadId": ABANDONED},
        {"success": True, "uploadId": ABANDONED, "state": "aborted"},
    ),
    Example(
        "deleteModel",
        "One version",
        {"modelId": MODEL, "version": "1.0.0"},
        {
            "success": True,
            "modelId": MODEL,
            "deletedAt": _LATER,
            "versions": ["1.0.0"],
            "restorableUntil": _NEXT_WEEK,
        },
    ),
    Example(
        "restoreModel",
        "Undone",
        {"modelId": MODEL, "version": "1.0.0"},
        {"success": True, "modelId": MODEL, "versions": ["1.0.0"]},
    ),
    Example(
        "getChanges",
        "From the beginning",
        {"epoch": 1, "after": 0, "limit": 1},
        {
            "success": True,
            "registryId": _REGISTRY,
            "epoch": 1,
            "head": 20,
            "changes": [HINT_EXAMPLES[0]],
            "next": 2,
        },
    ),
    Example(
        "getStorageStats",
        "All there is",
        {},
        {
            "success": True,
            "storage": {
                "backend": "disk",
                "blobs": 2,
                "blobBytes": _BOTH_SIZE,
                "freeBytes": 52_000_000_000,
                "totalBytes": 100_000_000_000,
            },
            "registry": {
                "models": 1,
                "versions": 2,
                "bytes": len(WEIGHTS) + _BOTH_SIZE,
                "deleted": 0,
                "epoch": 1,
                "sequence": 20,
                "archivedSequence": 19,
                "archiveLagSeconds": 0.4,
            },
            "cache": {"entries": 0, "bytes": 0, "hits": 1, "misses": 0},
            "replication": {
                "factor": 1,
                "peers": [],
                "copies": 0,
                "pending": 0,
                "failing": 0,
                "conflicts": 0,
                "following": [],
            },
        },
    ),
)


def examples_of(method: str) -> list[Example]:
    """The examples of a method, in the order of the story."""
    return [example for example in STORY if example.method == method]
