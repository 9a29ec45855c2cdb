"""A model to give examples of, and what the journal and the hints say of it.

The records are those of the effects that `examples.py` tells the requests of, one of each kind.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from schemas.hints import Hint, head_hint, hint_of

JSON = dict[str, Any]


def _safetensors() -> bytes:
    """A model with one tensor of two numbers, in a format that every rack can check."""
    header = json.dumps({"bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + bytes(8)


RACK = "rack-1"
MODEL = "acme/digits"
WEIGHTS = _safetensors()
LABELS = b'["zero","one"]\n'
UPLOAD = "01KAR5Z8S0V7M4T2Q9X3C6B1DE"
WEIGHTS_KEY = "blobs/01KAR5Y2C8N6J1V3W7Z5X9Q4TB"
JOB = "01KAR64P7JH5W8R2N4K9Y3T6FA"
REPLICATION_JOB = "01KAR63T2B8M5Q1Z7V4C9X6D3E"

START_MS = 1_793_520_000_000
HOUR_MS = 3_600_000


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


METADATA: JSON = {
    "type": "safetensors",
    "version": "1.0.0",
    "description": "Tells digits apart.",
    "tags": ["vision"],
    "framework": "torch",
}

# What the journal holds of the story, by `op`: the records of its effects and of the ends of its undo windows.
RECORD_EXAMPLES: dict[str, JSON] = {
    "store": {
        "model": MODEL,
        "version": "1.0.0",
        "type": "safetensors",
        "files": [
            {
                "path": "model.safetensors",
                "size": len(WEIGHTS),
                "sha256": sha256_of(WEIGHTS),
                "mediaType": "application/octet-stream",
                "key": WEIGHTS_KEY,
            }
        ],
        "metadata": METADATA,
        "checksum": sha256_of(WEIGHTS),
        "size": len(WEIGHTS),
        "created": START_MS,
        "origin": RACK,
        "replicas": [],
        "idem": {"key": "orchestrator/01KAR5Y1", "hash": sha256_of(b"storeModel")},
    },
    "update": {
        "model": MODEL,
        "version": "1.0.0",
        "checksum": sha256_of(WEIGHTS),
        "size": len(WEIGHTS),
        "metadata": {**METADATA, "accuracy": 0.98},
        "replicas": ["rack-2"],
        "aliases": [],
        "state": "available",
        "revision": 2,
        "created": START_MS,
        "origin": RACK,
        "since": START_MS,
    },
    "delete": {
        "model": MODEL,
        "versions": ["1.0.0"],
        "whole": False,
        "replicas": ["rack-2"],
        "deleted": START_MS,
        "until": START_MS + 7 * 24 * HOUR_MS,
    },
    "restore": {"model": MODEL, "versions": ["1.0.0"], "whole": False, "replicas": ["rack-2"]},
    "purge": {"model": MODEL, "versions": ["1.0.0"]},
    "alias": {"model": MODEL, "alias": "stable", "version": "1.0.0", "previous": None},
    "upload.begin": {
        "upload": UPLOAD,
        "model": MODEL,
        "version": "1.1.0",
        "files": [{"path": "labels.json", "size": len(LABELS), "sha256": sha256_of(LABELS)}],
        "expires": START_MS + 24 * HOUR_MS,
    },
    "upload.end": {"upload": UPLOAD, "state": "aborted"},
    "job.begin": {
        "job": JOB,
        "method": "validateModel",
        "params": {"modelId": MODEL, "version": "1.0.0"},
        "created": START_MS,
    },
    "job.end": {"job": JOB, "state": "succeeded", "result": {"isValid": True}},
    "pull.begin": {
        "model": "acme/words",
        "version": "2.1.0",
        "origin": "rack-2",
        "checksum": sha256_of(b"words"),
        "size": 5,
        "since": START_MS,
        "replicas": [RACK],
        "replicaOf": "rack-2",
    },
    "pull.bring": {
        "model": "acme/words",
        "version": "2.1.0",
        "file": {"size": 5, "sha256": sha256_of(b"words"), "key": f"blobs/{'0' * 26}"},
        "replicaOf": "rack-2",
    },
    "pull.end": {"model": "acme/words", "version": "2.1.0", "replicaOf": "rack-2"},
    "follow": {"origin": "rack-2", "registry": "5f0c1e6a9b7d4c2e8a3f6d1b0c9e7a52", "epoch": 1, "after": 4711},
}


def _hints() -> tuple[Hint, ...]:
    told = (
        hint_of(op, record, rack=RACK, epoch=1, sequence=sequence, time_ms=START_MS)
        for sequence, (op, record) in enumerate(RECORD_EXAMPLES.items(), start=2)  # 1 is the new registry
    )
    head = head_hint(rack=RACK, epoch=1, head=len(RECORD_EXAMPLES) + 1, time_ms=START_MS)
    return (*(hint for hint in told if hint is not None), head)


HINT_EXAMPLES: tuple[Hint, ...] = _hints()
