"""The fold: records in, indexes out.

The journal has the records, the catalog where they are: columns with a row a version, and what finds a row. What else
is asked of a version is read from its records when it is asked for.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import orjson

from schemas.errors import ModelManagerError
from schemas.ids import LATEST
from schemas.journal import StoredFile
from schemas.wire import timestamp
from worker.catalog.aliases import Aliases
from worker.catalog.blobs import BlobIndex
from worker.catalog.entries import Deletion, ModelEntry, VersionEntry
from worker.catalog.entry_cache import EntryCache
from worker.catalog.extracts import Extract, Run
from worker.catalog.order import Order, Rows
from worker.catalog.records import AppendedEntry
from worker.catalog.replicas import Replicas
from worker.catalog.requests import RememberedRequest, RememberedRequests
from worker.catalog.table import DELETED, DISPUTED, FORGOTTEN, NO_ROW, QUARANTINED, REPLICA, VersionTable
from worker.catalog.versions import Versions
from worker.catalog.work import Work

_CACHED_BYTES = 16 * 1024 * 1024  # of lines; their entries, with a reply each, take some five times as much


class Records(Protocol):
    """Where the catalog reads records."""

    # The record at a sequence, and the bytes its line has. Without `wait` it may raise instead of waiting for the disk.
    def __call__(self, sequence: int, *, wait: bool) -> tuple[Any, int]: ...


@dataclass(slots=True)
class Totals:
    """Running sums over what is not deleted; a model counts while it has such a version."""

    models: int = 0
    versions: int = 0
    bytes: int = 0


class Catalog:
    """The registry's state after the records applied so far. Reads never change it.

    What gives a VersionEntry reads records, and raises as `records` does.
    """

    def __init__(self, records: Records) -> None:
        self.totals = Totals()
        self.table = VersionTable()
        self.requests = RememberedRequests()
        self.deleted: dict[int, Deletion] = {}  # by row
        self.restored: dict[int, int] = {}  # row -> sequence of the last `restore`
        self.aliases = Aliases()
        self.by_tag: defaultdict[str, array[int]] = defaultdict(_no_rows)  # rows, ascending; see `tagged`
        # What versions need, deleted ones inside their undo window included, and uploads, and pulls.
        self.blobs = BlobIndex(self)
        self.replicas = Replicas(self.blobs)
        self._work = Work(self.blobs)
        self.uploads, self.jobs = self._work.uploads, self._work.jobs
        self.orders: dict[str, Order] = {}
        self.tombstones = array("Q")  # sequences of what took something away or back
        self.tombstone_times = array("Q")  # their times, unix ms
        self.time_ms = 0  # the latest of all records' times
        self.last_ms = 0  # that of the last record: earlier, if the clock was put back
        self._records = records
        self._entries = EntryCache(_CACHED_BYTES)
        self._replaying = True
        self._apply: dict[str, Callable[[Any, int, int], None]] = {
            "store": self._store,
            "update": self._update,
            "delete": self._delete,
            "restore": self._restore,
            "purge": self._purge,
            "alias": self._alias,
            "upload.begin": self._work.begin_upload,
            "upload.end": self._work.end_upload,
            "job.begin": self._work.begin_job,
            "job.end": self._work.end_job,
            "pull.begin": self.replicas.begin_pull,
            "pull.bring": self.replicas.bring,
            "pull.end": self.replicas.end_pull,
            "follow": self.replicas.follow,
        }

    # --- reading ---

    def model(self, model_id: str) -> ModelEntry | None:
        """The model with exactly this id."""
        row = self.table.newest(model_id)
        if row == NO_ROW or self.table.model[row] != model_id:
            return None
        return ModelEntry(model_id, Versions(self.table, model_id, self.entry), self.aliases.of(model_id))

    def records_of(self, model_id: str) -> list[int]:
        """The sequences of the records that tell of the model's versions, deleted ones included."""
        table = self.table
        rows = list(table.rows(model_id))
        return [table.stored[row] for row in rows] + [table.updated[row] for row in rows if table.updated[row]]

    def versions_of(self, model_id: str, limit: int) -> tuple[list[int], int]:
        """The rows of the model's visible versions, newest first and at most `limit`, and how many more there are."""
        table = self.table
        row = table.newest(model_id)
        if row == NO_ROW or table.model[row] != model_id:
            return [], 0
        visible = (row for row in table.rows(model_id) if not table.state[row] & DELETED)
        rows = list(islice(visible, limit))
        return rows, table.count_visible(model_id) - len(rows)

    def case_twin(self, model_id: str) -> str | None:
        """The id of a model that differs from `model_id` in case only."""
        row = self.table.newest(model_id)
        return None if row == NO_ROW or self.table.model[row] == model_id else self.table.model[row]

    def find(self, model_id: str, version: str) -> VersionEntry | None:
        """That very version, deleted ones included; no alias."""
        row = self.table.find(model_id, version)
        return None if row == NO_ROW else self.entry(row)

    def resolve(self, model_id: str, reference: str) -> VersionEntry:
        """The version that a version, an alias or `latest` means; ERR_MODEL_NOT_FOUND, also for a deleted one."""
        table = self.table
        row = table.newest(model_id)
        if row == NO_ROW or table.model[row] != model_id:
            raise ModelManagerError("ERR_MODEL_NOT_FOUND", f"There is no model {model_id}.", modelId=model_id)
        if reference == LATEST:
            row = self._latest(model_id)
        else:
            row = table.find(model_id, self.aliases.version(model_id, reference) or reference)
        if row == NO_ROW:
            raise ModelManagerError(
                "ERR_MODEL_NOT_FOUND",
                f"{model_id} has no version or alias {reference}.",
                modelId=model_id,
                version=reference,
            )
        deletion = self.deleted.get(row)
        if deletion is not None:
            version = table.version[row]
            details = {"modelId": model_id, "version": version, "deletedAt": timestamp(deletion.at)}
            if deletion.until is not None:
                details["restorableUntil"] = timestamp(deletion.until)
            raise ModelManagerError("ERR_MODEL_NOT_FOUND", f"{model_id}:{version} is deleted.", **details)
        return self.entry(row)

    def _latest(self, model_id: str) -> int:
        """The row of the model's visible version that was stored last; of a copy's, at its origin."""
        table = self.table
        visible = (row for row in table.rows(model_id) if not table.state[row] & DELETED)
        if table.state[table.newest(model_id)] & REPLICA:
            return max(visible, key=lambda row: (table.created[row], row), default=NO_ROW)
        return next(visible, NO_ROW)

    def origin_of(self, model_id: str) -> str | None:
        """The rack that owns the model with this id in any case, if it is known to be another one."""
        row = self.table.newest(model_id)
        if row != NO_ROW:
            return self.replicas.owner_of(row) if self.table.state[row] & REPLICA else None
        return next((pull.origin for pull in self.replicas.pulls_of(model_id)), None)

    def check_own(self, model_id: str) -> None:
        """ERR_NOT_ORIGIN if the model is known to be another rack's: only that one changes it."""
        origin = self.origin_of(model_id)
        if origin is not None:
            raise ModelManagerError(
                "ERR_NOT_ORIGIN", f"{model_id} belongs to {origin}; here is a copy.", modelId=model_id, origin=origin
            )

    def newest(self, model_id: str) -> VersionEntry | None:
        """The version stored last of the model with this id in any case, deleted ones included."""
        row = self.table.newest(model_id)
        return None if row == NO_ROW else self.entry(row)

    def entry(self, row: int, *, wait: bool = False) -> VersionEntry:
        """The version in a row that is there."""
        entry = self._entries.get(row)
        if entry is not None:
            return entry
        stored, updated = self.table.stored[row], self.table.updated[row]
        store, size = self._records(stored, wait=wait)
        update, update_size = self._records(updated, wait=wait) if updated else (None, 0)
        entry = VersionEntry.of(stored, store, update, self.deleted.get(row))
        self._entries.put(row, entry, size + update_size)
        return entry

    def aliases_of(self, entry: VersionEntry) -> list[str]:
        return self.aliases.naming(entry.model, entry.version)

    def deleted_versions(self) -> Iterator[tuple[str, str, Deletion]]:
        """Model, version and deletion of what is inside its undo window."""
        for row, deletion in list(self.deleted.items()):
            yield self.table.model[row], self.table.version[row], deletion

    @property
    def deleted_bytes(self) -> int:
        return sum(self.table.size[row] for row in self.deleted)

    def has_row(self, row: int) -> bool:
        """Whether the version in the row is there, deleted or not."""
        return not self.table.state[row] & FORGOTTEN

    def files_of(self, row: int) -> Sequence[StoredFile]:
        return self.entry(row).files

    def doubting(self, keys: Set[str]) -> list[tuple[str, str]]:
        """Model and version of those that were found to be bad for one of these blobs."""
        rows = [row for row, wrong in self.blobs.wrong.items() if not keys.isdisjoint(wrong)]
        return [(self.table.model[row], self.table.version[row]) for row in rows]

    def having(self, keys: Set[str]) -> list[tuple[str, str]]:
        """Model and version of those that may have one of these blobs."""
        rows = {row for key in keys for row in self.blobs.rows_of(key)}
        return [(self.table.model[row], self.table.version[row]) for row in sorted(rows)]

    def tagged(self, tag: str) -> Rows:
        """Ascending, all visible rows with this tag; and some that had it, or are not visible any more."""
        return np.frombuffer(self.by_tag.get(tag, array("I")).tobytes(), np.uint32)

    # --- folding ---

    def apply(self, entries: Sequence[AppendedEntry]) -> None:
        """Fold records that came after the replay. One about what is not there changes nothing."""
        for entry in entries:
            self._apply[entry.op](entry.record, entry.sequence, entry.time_ms)
            self.last_ms = entry.time_ms
            if entry.time_ms > self.time_ms:
                self.time_ms = entry.time_ms
            idem = entry.record.get("idem")
            if idem is not None:
                request = RememberedRequest(idem["hash"], entry.sequence, entry.time_ms)
                self.requests.add(idem["key"], request)

    def take(self, extract: Extract) -> None:
        """Fold what a replay extracted of some lines."""
        if extract.runs:
            self.last_ms = extract.last_ms
            self.time_ms = max(self.time_ms, extract.latest_ms)
        for run in extract.runs:
            if run.models:
                self._take_stores(run)
            if run.other:
                line = orjson.loads(run.other)
                record, sequence, time_ms = line["rec"], line["seq"], line["t"]
                self._apply[line["op"]](record, sequence, time_ms)
                if "idem" in record:
                    self._take_request(record["idem"]["key"], record["idem"]["hash"], sequence, time_ms)

    def _take_stores(self, run: Run) -> None:
        """Fold `store` records, column by column: the bulk of a boot."""
        first, by_tag = len(self.table), self.by_tag
        self.totals.models += self.table.extend(run)
        self.totals.versions += len(run.models)
        self.totals.bytes += sum(memoryview(run.sizes).cast("Q"))
        for order in self.orders.values():
            order.add(range(first, len(self.table)))
        self.blobs.replay(first, run.file_counts, run.file_sizes, run.sha_hashes, run.key_hashes)
        for tag, rows in run.tags.items():
            by_tag[tag].extend([first + row for row in memoryview(rows).cast("I")])
        for row, origin in run.replicas:
            self._take_replica(first + row, origin)
        for upload, sequence, time_ms in run.uploads:
            self._work.store_upload(upload, sequence, time_ms)
        for key, hash_, sequence, time_ms in run.requests:
            self._take_request(key, hash_, sequence, time_ms)

    def _take_request(self, key: str, hash_: str, sequence: int, time_ms: int) -> None:
        self.requests.add(key, RememberedRequest(hash_, sequence, time_ms))

    def _take_replica(self, row: int, origin: str) -> None:
        self.table.state[row] |= REPLICA
        self.replicas.store(row, origin)

    def settle(self) -> None:
        """The replay is over."""
        # A version is stored where there is none: of these the records that ended them were lost with a damage.
        self._end(self.table.stored_again())
        self.blobs.settle((np.frombuffer(bytes(self.table.state), np.uint8) & FORGOTTEN) == 0)
        self._replaying = False

    def _store(self, record: Any, sequence: int, time_ms: int) -> None:
        totals, row, size = self.totals, len(self.table), record["size"]
        totals.models += self.table.append(
            record["model"], record["version"], record["type"], size, record["created"], sequence
        )
        totals.versions += 1
        totals.bytes += size
        for order in self.orders.values():
            order.add((row,))
        self.blobs.use(record["files"], row)
        self._tag(row, record["metadata"])
        if "upload" in record:
            self._work.store_upload(record["upload"], sequence, time_ms)
        if "replicaOf" in record:
            self._take_replica(row, record["replicaOf"])

    def _update(self, record: Any, sequence: int, time_ms: int) -> None:
        row = self.table.find(record["model"], record["version"])
        if row != NO_ROW:
            table = self.table
            table.updated[row] = sequence
            table.state[row] &= ~(QUARANTINED | DISPUTED)
            if record["state"] == "quarantined":
                table.state[row] |= QUARANTINED
            if "conflict" in record:
                table.state[row] |= DISPUTED
            self._entries.drop(row)
            self._tag(row, record["metadata"])
            self.blobs.note(row, record.get("wrong", ()), record.get("moved", ()))
        if "upload" in record:
            self._work.store_upload(record["upload"], sequence, time_ms)

    def _delete(self, record: Any, sequence: int, time_ms: int) -> None:
        self._note_tombstone(sequence, time_ms)
        rows = self._rows_of(record)
        if "until" not in record:
            self._end(rows)
            return
        for row in rows:
            if row not in self.deleted:
                self._hide(row)
            self.deleted[row] = Deletion(record["deleted"], record["until"], sequence)
            self._entries.drop(row)

    def _restore(self, record: Any, sequence: int, time_ms: int) -> None:
        self._note_tombstone(sequence, time_ms)
        for row in self._rows_of(record):
            if self.deleted.pop(row, None) is not None:
                self.restored[row] = sequence
                self._show(row)
                self._entries.drop(row)

    def _purge(self, record: Any, sequence: int, time_ms: int) -> None:
        self._note_tombstone(sequence, time_ms)
        self._end(self._rows_of(record))

    def _note_tombstone(self, sequence: int, time_ms: int) -> None:
        self.tombstones.append(sequence)
        self.tombstone_times.append(time_ms)

    def _rows_of(self, record: Any) -> list[int]:
        found = [self.table.find(record["model"], version) for version in record["versions"]]
        return [row for row in found if row != NO_ROW]

    def _end(self, rows: Sequence[int]) -> None:
        """The versions are gone for good, and so is what names them."""
        for row in rows:
            if row not in self.deleted:
                self._hide(row)
            self._forget(row)
        table = self.table
        gone = {(table.model[row], table.version[row]) for row in rows}
        for model, version in gone:
            if table.find(model, version) == NO_ROW:  # those of one that was stored later are its own
                self.aliases.drop(model, self.aliases.naming(model, version))

    def _forget(self, row: int) -> None:
        # A fold cannot be put off; most often the version was read just before, for the decision.
        files = () if self._replaying else self._stored_files(row)
        self.deleted.pop(row, None)
        self.restored.pop(row, None)
        self._entries.drop(row)
        self.table.forget(row)
        if not self._replaying:
            self.blobs.forget(row, files)
        self.blobs.note(row, (), ())

    def _stored_files(self, row: int) -> Sequence[StoredFile]:
        """As they were when the version was stored."""
        if row not in self.blobs.moved:
            return self.entry(row, wait=True).files
        files: Sequence[StoredFile] = self._records(self.table.stored[row], wait=True)[0]["files"]
        return files

    def _alias(self, record: Any, sequence: int, time_ms: int) -> None:
        if record["version"] is None:
            self._note_tombstone(sequence, time_ms)
            self.aliases.drop(record["model"], [record["alias"]])
        elif self.table.newest(record["model"]) != NO_ROW:
            self.aliases.set(record["model"], record["alias"], record["version"], sequence)

    # --- what is seen ---

    def _show(self, row: int) -> None:
        self.totals.models += self.table.show(row)
        self.totals.versions += 1
        self.totals.bytes += self.table.size[row]

    def _hide(self, row: int) -> None:
        self.totals.models -= self.table.hide(row)
        self.totals.versions -= 1
        self.totals.bytes -= self.table.size[row]

    def _tag(self, row: int, metadata: dict[str, Any]) -> None:
        for tag in metadata.get("tags", ()):
            rows = self.by_tag[tag]
            if not rows or rows[-1] < row:
                rows.append(row)
                continue
            place = bisect_left(rows, row)
            if rows[place] != row:
                rows.insert(place, row)


def _no_rows() -> array[int]:
    return array("I")
