"""A catalog in parts, as the index of a base holds it: derived, so parts of another version are simply not used."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import orjson

from worker.catalog.catalog import Catalog, Totals
from worker.catalog.entries import Deletion, JobEntry, UploadEntry
from worker.catalog.replicas import Cursor, Pull
from worker.catalog.sorting import MODEL_ID, make_order

VERSION = 5


def dump_catalog(catalog: Catalog) -> dict[str, Any]:
    """The state of a settled catalog, as buffers by name."""
    order = catalog.orders.get(MODEL_ID) or make_order(catalog.table, MODEL_ID)
    while not order.settle(10_000):
        continue
    rest = {
        "v": VERSION,
        "timeMs": catalog.time_ms,
        "lastMs": catalog.last_ms,
        "totals": asdict(catalog.totals),
        "deleted": [[row, d.at, d.until, d.sequence] for row, d in catalog.deleted.items()],
        "restored": list(catalog.restored.items()),
        "wrong": list(catalog.blobs.wrong.items()),
        "moved": list(catalog.blobs.moved.items()),
        "aliases": list(catalog.aliases.items()),
        "uploads": [asdict(upload) for upload in catalog.uploads.values()],
        "jobs": [asdict(job) for job in catalog.jobs.values()],
        "requests": catalog.requests.dumped(),
        "pulls": [asdict(pull) for pull in catalog.replicas.pulls()],
        "brought": [
            [{"model": pull.model, "version": pull.version, "file": file}, sequence]
            for pull, file, sequence in catalog.replicas.brought()
        ],
        "cursors": {rack: asdict(cursor) for rack, cursor in catalog.replicas.cursors.items()},
        "replicas": [[rack, len(rows)] for rack, rows in catalog.replicas.rows.items()],
        "tags": [[tag, len(rows)] for tag, rows in catalog.by_tag.items()],
    }
    return {
        "rest": orjson.dumps(rest),
        "tagRows": b"".join(rows.tobytes() for rows in catalog.by_tag.values()),
        "replicaRows": b"".join(rows.tobytes() for rows in catalog.replicas.rows.values()),
        "tombstoneTimes": catalog.tombstone_times,
        "tombstones": catalog.tombstones,
        "order": order.dumped(),
        **{f"table.{name}": part for name, part in catalog.table.dumped().items()},
        **{f"blobs.{name}": part for name, part in catalog.blobs.dumped().items()},
    }


def load_catalog(catalog: Catalog, parts: dict[str, memoryview]) -> bool:
    """Take what `dump_catalog` gave, into an empty catalog; False if another program wrote it."""
    rest = orjson.loads(parts["rest"])
    if rest["v"] != VERSION:
        return False
    catalog.time_ms, catalog.last_ms = rest["timeMs"], rest["lastMs"]
    catalog.totals = Totals(**rest["totals"])
    catalog.table.load(_named(parts, "table."))
    catalog.blobs.load(_named(parts, "blobs."))
    catalog.deleted = {row: Deletion(at, until, sequence) for row, at, until, sequence in rest["deleted"]}
    catalog.restored = dict(rest["restored"])
    wrong, moved = dict(rest["wrong"]), dict(rest["moved"])
    for row in wrong.keys() | moved.keys():
        catalog.blobs.note(row, wrong.get(row, ()), moved.get(row, ()))
    for model, alias, version, sequence in rest["aliases"]:
        catalog.aliases.set(model, alias, version, sequence)
    for upload in rest["uploads"]:
        entry = UploadEntry(
            **{**upload, "files": tuple(upload["files"]), "stored_files": tuple(upload["stored_files"])}
        )
        catalog.uploads[entry.id] = entry
        catalog.blobs.hold(entry.keys if entry.state == "open" else ())
        catalog.blobs.use(entry.stored_files if entry.state == "completed" else ())
    catalog.jobs.update((job["id"], JobEntry(**job)) for job in rest["jobs"])
    catalog.requests.load(rest["requests"])
    for pull in rest["pulls"]:
        catalog.replicas.hold(Pull(**{**pull, "replicas": tuple(pull["replicas"])}))
    for record, sequence in rest["brought"]:
        catalog.replicas.bring(record, sequence, catalog.time_ms)
    catalog.replicas.cursors = {rack: Cursor(**cursor) for rack, cursor in rest["cursors"].items()}
    catalog.replicas.rows.update(_rows(parts["replicaRows"], rest["replicas"]))
    catalog.by_tag.update(_rows(parts["tagRows"], rest["tags"]))
    catalog.tombstone_times.frombytes(parts["tombstoneTimes"])
    catalog.tombstones.frombytes(parts["tombstones"])
    order = make_order(catalog.table, MODEL_ID, rows=np.frombuffer(parts["order"], np.uint32))
    catalog.orders[MODEL_ID] = order
    return True


def _rows(part: memoryview, lengths: Iterable[tuple[str, int]]) -> Iterator[tuple[str, array[int]]]:
    """The rows of each name, which lie one after the other."""
    start = 0
    for name, length in lengths:
        yield name, array("I", bytes(part[start : start + 4 * length]))
        start += 4 * length


def _named(parts: dict[str, memoryview], prefix: str) -> dict[str, memoryview]:
    return {name.removeprefix(prefix): part for name, part in parts.items() if name.startswith(prefix)}
