"""Which records compaction keeps: those that the catalog, the change feed and repeated requests still need; and which
free room.

A replay of the kept records gives the catalog that all records give. For that a version keeps its `store`, its last
`update`, and its last `delete` or `restore`; those of a version that is gone may go too, since a record about what is
not there changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.catalog.catalog import KEPT_MS, Catalog
from worker.catalog.entries import JobEntry, UploadEntry
from worker.catalog.requests import REMEMBERED_MS
from worker.catalog.table import FORGOTTEN

TOMBSTONE_MS = 30 * 24 * 3600 * 1000

Sequences = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True, slots=True)
class Retained:
    """`sequences` of the records to keep, ascending. A reader of the change feed that has not seen `changes_from` (a
    sequence) would miss what was taken away since."""

    sequences: Sequences
    changes_from: int


def frees_room(op: str, record: dict[str, Any]) -> bool:
    """Whether the record ends something: by itself, or once its time is over, bytes or other records go with it."""
    return op in ("delete", "purge", "job.end") or (op == "upload.end" and record["state"] != "completed")


def retained(catalog: Catalog, *, tombstone_ms: int = TOMBSTONE_MS) -> Retained:
    """What to keep. Ages are counted back from the newest record, so that only the journal decides."""
    table, now = catalog.table, catalog.time_ms
    present = (np.frombuffer(bytes(table.state), np.uint8) & FORGOTTEN) == 0
    updated = np.frombuffer(table.updated.tobytes(), np.uint64)[present]
    tombstones = np.frombuffer(catalog.tombstones.tobytes(), np.uint64)
    times = np.frombuffer(catalog.tombstone_times.tobytes(), np.uint64)
    young = times >= max(0, now - tombstone_ms)
    few = [
        *(deletion.sequence for deletion in catalog.deleted.values()),
        *catalog.restored.values(),
        *(sequence for aliases in catalog.aliases.values() for _, sequence in aliases.values()),
        *catalog.requests.sequences(now - REMEMBERED_MS),
    ]
    entries: list[UploadEntry | JobEntry] = [*catalog.uploads.values(), *catalog.jobs.values()]
    for entry in entries:
        if entry.over is None or entry.over >= now - KEPT_MS:
            few += entry.sequences
    sequences = np.unique(
        np.concatenate(
            [
                np.frombuffer(table.stored.tobytes(), np.uint64)[present],
                updated[updated > 0],
                tombstones[young],
                np.array(few, np.uint64),
            ]
        )
    )
    return Retained(sequences, int(tombstones[~young].max(initial=0)))
