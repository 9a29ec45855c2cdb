"""The process that compacts: it reads sealed files only, and writes a base and its index beside them.

A process of its own, so that neither the interpreter's lock nor the memory of the fold is the owner's. The owner adopts
what was written, or not; this process renames nothing. It prints one JSON object, what it wrote or how many bytes it
would need, and ends with its parent.

    python -m worker.upkeep.compaction_child FOLDER BASE_NAME
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from worker.catalog.catalog import Catalog
from worker.catalog.retention import retained
from worker.catalog.snapshot import dump_catalog
from worker.journal.base_index import index_name, write_index
from worker.journal.boot import replay_base, replay_sealed
from worker.journal.compaction import Base, kept_bytes, write_base
from worker.journal.files import Files
from worker.registry import CatalogReplay

# Where the system knows no class below all others.
_NICENESS = 19


class _PacedFiles(Files):
    """Rests after each sync as long as it took, so that half of the disk's time is left to the owner."""

    def fdatasync(self, fd: int) -> None:
        began = time.monotonic()
        super().fdatasync(fd)
        time.sleep(time.monotonic() - began)


# Of the index, for each line of the base, and beside all lines: more than it has.
_INDEX_BYTES = 256
_AROUND_BYTES = 64 * 1024


class NoRoom(Exception):
    """The disk has not the `needed` bytes; nothing was written."""

    def __init__(self, needed: int) -> None:
        self.needed = needed
        super().__init__(needed)


class CompactionWrong(Exception):
    """The base does not give the catalog that the files give: a fault of this program. Nothing is adopted."""


def compact(folder: Path, name: str, *, files: Files | None = None) -> Base:
    """Write `<name>.tmp`, a base that stands for the sealed files of the journal in `folder`, and its index.

    Raises NoRoom, JournalDamaged, CompactionWrong, OSError, SyncFailed.
    """
    disk = files or _PacedFiles()
    catalog = _catalog()
    sealed = replay_sealed(disk, folder, CatalogReplay(catalog))
    catalog.settle()
    keep = retained(catalog)
    needed = kept_bytes(sealed, keep.sequences) + _INDEX_BYTES * len(keep.sequences) + _AROUND_BYTES
    if disk.free(folder) < needed:
        raise NoRoom(needed)
    wanted = _summary(catalog)
    time_ms = catalog.time_ms
    del catalog  # the second fold needs the room
    base = write_base(
        disk,
        folder,
        name,
        sealed,
        keep.sequences,
        changes_from=max(sealed.changes_from, keep.changes_from),
        time_ms=time_ms,
    )
    again = _catalog()
    segment = replay_base(disk, folder / f"{name}.tmp", CatalogReplay(again))
    again.settle()
    if _summary(again) != wanted:
        raise CompactionWrong(f"the base has {_summary(again)}, the files have {wanted}")
    parts = {**segment.dumped(), **dump_catalog(again)}
    write_index(disk, folder / f"{index_name(name)}.tmp", base.file, parts)
    return base


def _catalog() -> Catalog:
    def no_record(sequence: int, *, wait: bool) -> tuple[Any, int]:
        raise KeyError(sequence)

    return Catalog(no_record)


def _summary(catalog: Catalog) -> dict[str, Any]:
    """What must be the same before and after."""
    return {
        **asdict(catalog.totals),
        "models": catalog.table.models,
        "deleted": len(catalog.deleted),
        "deletedBytes": catalog.deleted_bytes,
        "aliases": len(catalog.aliases),
        "blobs": len(catalog.blobs),
        "blobBytes": catalog.blobs.bytes,
        "openUploads": sum(upload.over is None for upload in catalog.uploads.values()),
        "openJobs": sum(job.over is None for job in catalog.jobs.values()),
        "fingerprint": catalog.table.fingerprint(),
    }


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not sys.stdin, whose lock an ending interpreter asks for
        continue
    os._exit(1)


def _give_way() -> None:
    """Run when nobody else wants the processor, and be served by the disk last. A nice process would still keep one
    that wakes waiting for the rest of its slice, some milliseconds."""
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError):
        with contextlib.suppress(OSError):
            os.nice(_NICENESS)


def main() -> None:
    _give_way()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder, name = sys.argv[1:]
    try:
        result = asdict(compact(Path(folder), name))
    except NoRoom as error:
        result = {"needed": error.needed}
    sys.stdout.buffer.write(orjson.dumps(result))


if __name__ == "__main__":
    main()
