"""Which records compaction keeps: those that the catalog, the change feed and repeated requests still need; and which
free room.

A replay of the kept records gives the catalog that all records give. For that a version keeps its `store`, its last
`update`, and its last `delete` or `restore`; those of a version that is gone may go too, since a record about what is
not there changes nothing. If its `store` is kept for the request that made it or the upload that brought it, what ended
the version is: it came later, and is kept for longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.catalog.catalog import Catalog
from worker.catalog.entries import JobEntry, UploadEntry
from worker.catalog.requests import REMEMBERED_MS
from worker.catalog.table import FORGOTTEN
from worker.catalog.work import KEPT_MS

TOMBSTONE_MS = 30 * 24 * 3600 * 1000  # no shorter than what any other record is kept for
_NEVER = 2**63

Sequences = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True, slots=True)
class Retained:
    """`sequences` of the records to keep, ascending. A reader of the change feed that has not seen `changes_from` (a
    sequence) would miss what was taken away since."""

    sequences: Sequences
    changes_from: int


def frees_room(op: str, record: dict[str, Any]) -> bool:
    """Whether the record ends something: by itself, or once its time is over, bytes or other records go with it."""
    return (
        op in ("delete", "purge", "job.end", "pull.end")
        or (op == "upload.end" and record["state"] != "completed")
        or (op == "pull.bring" and record["file"] is None)
    )


def retained(catalog: Catalog) -> Retained:
    """What to keep. Only the journal decides what is old."""
    table = catalog.table
    present = (np.frombuffer(bytes(table.state), np.uint8) & FORGOTTEN) == 0
    updated = np.frombuffer(table.updated.tobytes(), np.uint64)[present]
    tombstones = np.frombuffer(catalog.tombstones.tobytes(), np.uint64)
    times = np.frombuffer(catalog.tombstone_times.tobytes(), np.uint64)
    requests = catalog.requests.records()
    entries: list[UploadEntry | JobEntry] = [*catalog.uploads.values(), *catalog.jobs.values()]
    ends = [(entry.sequences[-1], entry.over) for entry in entries if entry.over is not None]
    others = np.array([*requests, *ends], np.uint64).reshape(-1, 2)
    ages = _Ages(
        np.concatenate([tombstones, others[:, 0]]), np.concatenate([times, others[:, 1]]), last_ms=catalog.last_ms
    )
    young = tombstones >= ages.since(TOMBSTONE_MS)
    remembered, ended = ages.since(REMEMBERED_MS), ages.since(KEPT_MS)
    few = [
        *(deletion.sequence for deletion in catalog.deleted.values()),
        *catalog.restored.values(),
        *(sequence for *_, sequence in catalog.aliases.items()),
        *(pull.sequence for pull in catalog.replicas.pulls()),
        *(sequence for *_, sequence in catalog.replicas.brought()),
        *(cursor.sequence for cursor in catalog.replicas.cursors.values()),
        *(sequence for sequence, _ in requests if sequence >= remembered),
    ]
    for entry in entries:
        if entry.over is None or entry.sequences[-1] >= ended:
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


class _Ages:
    """How long before the last record, at `last_ms`, the records `sequences` were written, at `times` (unix ms).

    A clock may be wrong for a while. If it was ahead, a record is no later than each that follows; if it was behind, no
    earlier than each before it. What is young by either is young: for a time too much is kept. So no record is older
    than one that came before it.
    """

    def __init__(self, sequences: Sequences, times: Sequences, *, last_ms: int) -> None:
        order = np.argsort(sequences)
        told = np.append(times[order].astype(np.int64), last_ms)
        after_ahead = last_ms - np.minimum.accumulate(told[::-1])[::-1]
        after_behind = told.max() - np.maximum.accumulate(told)
        self._sequences = sequences[order]
        self._ages = np.minimum(after_ahead, after_behind)[:-1]

    def since(self, age_ms: int) -> int:
        """The sequence of the first that is no older: all that came later are no older either."""
        young = self._sequences[self._ages <= age_ms]
        return int(young[0]) if len(young) else _NEVER
