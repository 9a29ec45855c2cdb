"""A catalog with no journal: records are folded into it as they are."""

from __future__ import annotations

from typing import Any

from worker.catalog.catalog import Catalog
from worker.journal import Entry


class Folded:
    """A catalog, and the records it was folded from."""

    def __init__(self) -> None:
        self._records: dict[int, dict[str, Any]] = {}
        self.catalog = Catalog(lambda sequence, wait: (self._records[sequence], 100))
        self.catalog.settle()

    def fold(self, op: str, *records: dict[str, Any]) -> None:
        entries = [Entry(len(self._records) + n, 0, op, record) for n, record in enumerate(records, 1)]
        self._records |= {entry.sequence: entry.record for entry in entries}
        self.catalog.apply(entries)


def store(model: str, version: str = "1", *, size: int = 1, **metadata: Any) -> dict[str, Any]:
    """The record of a version with one file."""
    return {
        "model": model,
        "version": version,
        "type": "onnx",
        "files": [{"path": "m", "size": size, "sha256": "0" * 64, "mediaType": "x", "key": f"blobs/{0:026d}"}],
        "metadata": {"type": "onnx", "version": version, **metadata},
        "checksum": "0" * 64,
        "size": size,
        "created": 1,
        "origin": "rack-1",
        "replicas": [],
    }
