"""The registry made anew from the rack's storage alone, under a new epoch.

First the new epoch is written to `owner.json`, so that whoever wrote the old one stops and can never come back. Then
the files are fetched and checked line by line; the folder is a journal once it is complete. What was acknowledged and
not archived yet is not known to anybody: the lag was its bound.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import orjson

from schemas.errors import ModelManagerError
from schemas.ids import new_ulid
from worker.catalog.catalog import Catalog
from worker.journal import FolderTaken, PointUnreachable, Reconstructed, Reconstruction, Staging, Until
from worker.journal.manifest import segment_name
from worker.journal.segment import Digest
from worker.registry import Change, Registry
from worker.storage.blobstore import BlobMissing, BlobStat, BlobStore
from worker.upkeep.archive import Archive
from worker.upkeep.archive_layout import (
    ROOT,
    ArchivedFile,
    ArchiveManifest,
    Piece,
    Tails,
    closed_key,
    epoch_of,
    file_key,
    manifest_key,
    parse_manifest,
    piece_key,
    tails,
)
from worker.upkeep.ownership import DOCUMENT, NotOwner, Owner, confirm_ownership, read_owner

Report = Callable[[str, int, int], None]

PATIENCE_S = 10.0
_MISSING_TOLD = 20
_ALIVE_S = 60.0  # since it last wrote into its archive


class CannotRebuild(Exception):
    """Nothing was changed but, perhaps, the epoch in `owner.json`; str() says why."""


@dataclass(frozen=True, slots=True)
class Archived:
    """What the store holds of one epoch; `modified` is when anything of it was written last, in unix seconds."""

    manifest: ArchiveManifest
    tails: Tails
    modified: float


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """`from_epoch` is the epoch whose archive was read, `other_epochs` are the others that were there. `closed` is the
    sequence at which its owner stopped in peace (nothing behind it is missing); None: it did not, or nobody knows.

    `missing_versions`, of which `missing` are the first (`model:version`), have no bytes in the store any more; a job
    that looks into each is recorded. `unknown_blobs` of `unknown_bytes` are named by no record: what was stored after
    the point, or never finished.
    """

    journal: Reconstructed
    from_epoch: int
    closed: int | None
    other_epochs: tuple[int, ...]
    models: int
    versions: int
    open_uploads: int
    open_jobs: int
    missing_versions: int
    missing: tuple[str, ...]
    unknown_blobs: int
    unknown_bytes: int


async def archives(store: BlobStore) -> dict[int, Archived]:
    """What is archived in the store, by epoch. Raises ModelManagerError."""
    objects: dict[int, list[BlobStat]] = {}
    async for stat in store.list(ROOT):
        epoch = epoch_of(stat.key)
        if epoch is not None:
            objects.setdefault(epoch, []).append(stat)
    found = {}
    for epoch, stats in sorted(objects.items()):
        document = await store.get_document(manifest_key(epoch))
        manifest = ArchiveManifest("", epoch) if document is None else parse_manifest(document.data)
        pieces = tails(epoch, (stat.key for stat in stats), manifest)
        found[epoch] = Archived(manifest, pieces, max(stat.modified for stat in stats))
    return found


async def rebuild(
    store: BlobStore,
    folder: Path,
    *,
    rack: str,
    until: Until,
    progress: Report,
    epoch: int | None = None,
    patience_s: float = PATIENCE_S,
) -> Rebuilt:
    """Make the journal of `rack` in `folder`, from the archive of `epoch` (None: the newest one that is complete).

    An owner that may be alive is given `patience_s` to notice that it is the owner no more.

    Raises JournalLocked if a worker runs on the folder, CannotRebuild, NotOwner, JournalDamaged (what was archived is),
    ModelManagerError, OSError.
    """
    try:
        staging = await asyncio.to_thread(Staging, folder)
    except FolderTaken as error:
        raise CannotRebuild(str(error)) from None
    try:
        found = await archives(store)
        source = _chosen(found, epoch)
        owner = await _fence(store, rack, found)
        closed = await _closed(store, source, found[source], patience_s, progress)
        found = await archives(store)
        work = Reconstruction(staging.path, epoch=owner.epoch, until=until)
        if not await _fetch(_Source(store, source, found[source], staging.path, progress), work, until):
            _check_end(found[source].manifest.last, work.head, until)
        done = await asyncio.to_thread(work.finish)
        await confirm_ownership(store, owner)  # or another rebuild has begun since, and this one's would never boot
        await asyncio.to_thread(staging.commit)
    except PointUnreachable as error:
        raise CannotRebuild(f"the archive of epoch {source} does not go back so far: {error}") from None
    finally:
        await asyncio.to_thread(staging.close)
    registry = Registry(folder)
    await asyncio.to_thread(registry.open)
    registry.start()
    try:
        compared = await _compare(registry, store, progress)
        for model, version in compared.missing:
            await _begin_validation(registry, model, version)
        await _archive(registry, store, rack, progress)
    finally:
        await registry.close()
    return Rebuilt(
        journal=done,
        from_epoch=source,
        closed=closed,
        other_epochs=tuple(sorted(set(found) - {source})),
        models=registry.catalog.totals.models,
        versions=registry.catalog.totals.versions,
        open_uploads=sum(upload.state in ("open", "completed") for upload in registry.catalog.uploads.values()),
        open_jobs=sum(not job.ended for job in registry.catalog.jobs.values()) - len(compared.missing),
        missing_versions=len(compared.missing),
        missing=tuple(f"{model}:{version}" for model, version in compared.missing[:_MISSING_TOLD]),
        unknown_blobs=compared.unknown_blobs,
        unknown_bytes=compared.unknown_bytes,
    )


# --- before ---


def _chosen(found: dict[int, Archived], epoch: int | None) -> int:
    if epoch is not None:
        if epoch not in found:
            raise CannotRebuild(f"there is no archive of epoch {epoch}; there is {sorted(found) or 'none'}")
        return epoch
    if not found:
        raise CannotRebuild("there is no archive in this storage")
    complete = [each for each, archived in found.items() if archived.manifest.complete_ms is not None]
    # The archive of a journal's first moments is complete as soon as there is one.
    return max(complete or found)


async def _fence(store: BlobStore, rack: str, found: dict[int, Archived]) -> Owner:
    """Take a new epoch, higher than any before."""
    current, etag = await read_owner(store)
    if current is not None and current.rack != rack:
        raise NotOwner(f"the storage belongs to rack {current.rack}, not to {rack}")
    newest = max(found)
    registry_id = found[newest].manifest.registry_id if current is None else current.registry_id
    epoch = 1 + max(newest, 0 if current is None else current.epoch)
    owner = Owner(rack, registry_id, epoch, time.time_ns() // 1_000_000)
    try:
        await store.put_document(DOCUMENT, owner.encoded(), etag=etag)
    except ModelManagerError as error:
        if error.code != "ERR_CONFLICT":
            raise
        raise NotOwner("another process is taking the storage at this moment") from None
    return owner


async def _closed(store: BlobStore, epoch: int, archived: Archived, patience_s: float, progress: Report) -> int | None:
    """The sequence at which the owner of the epoch stopped in peace; None if it did not, or not in time."""
    alive = time.time() - archived.modified < _ALIVE_S
    deadline = time.monotonic() + (patience_s if alive else 0.0)
    while True:
        document = await store.get_document(closed_key(epoch))
        if document is not None:
            return int(orjson.loads(document.data)["sequence"])
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        progress("old owner", int(patience_s - left), int(patience_s))
        await asyncio.sleep(min(0.25, left))


# --- the files ---


async def _fetch(source: _Source, work: Reconstruction, until: Until) -> bool:
    """Bring the files one by one, the pieces of a tail last: whether a record was found that lies behind the point."""
    for each in source.archived.manifest.leading_to(until):
        await source.fetch_file(each)
        if not await asyncio.to_thread(work.take, each.file.name):
            return True
    while pieces := source.archived.tails.pieces.get(name := segment_name(work.head + 1)):
        await source.fetch_tail(name, pieces)
        if not await asyncio.to_thread(work.take, name):
            return True
    return False


def _check_end(last: int, head: int, until: Until) -> None:
    """What is known ends at `head`, and of the files the last one at `last`: is it the point that was asked for?"""
    if until.sequence is not None and head < until.sequence and last <= head:
        raise CannotRebuild(f"the archive ends at sequence {head}")
    if head < (until.sequence or last) and head < last:
        raise CannotRebuild(f"the archive has nothing behind sequence {head} up to that point; it has later ones")


@dataclass(slots=True)
class _Source:
    """The archive of one epoch, and the folder its files are brought to."""

    store: BlobStore
    epoch: int
    archived: Archived
    folder: Path
    progress: Report
    fetched: int = 0

    async def fetch_file(self, each: ArchivedFile) -> None:
        total = sum(each.file.size for each in self.archived.manifest.files)
        digest = Digest()
        with (self.folder / each.file.name).open("wb") as target:
            try:
                async for chunk in self.store.read(file_key(self.epoch, each.file.name)):
                    await asyncio.to_thread(target.write, chunk)
                    await asyncio.to_thread(digest.update, chunk)
                    self.fetched += len(chunk)
                    self.progress("journal", self.fetched, total)
            except BlobMissing:
                raise CannotRebuild(f"{each.file.name} was archived and is gone from the storage") from None
        if digest.sealed(each.file.name) != each.file:
            raise CannotRebuild(f"{each.file.name} is not as it was archived")

    async def fetch_tail(self, name: str, pieces: list[Piece]) -> None:
        with (self.folder / name).open("wb") as target:
            for piece in pieces:
                document = await self.store.get_document(piece_key(self.epoch, name, piece))
                if document is None or len(document.data) != piece.size:
                    raise CannotRebuild(f"{name} at byte {piece.start} is not as it was archived")
                await asyncio.to_thread(target.write, document.data)
                self.progress("tail", piece.end, pieces[-1].end)


# --- what could not be known ---


@dataclass(frozen=True, slots=True)
class _Compared:
    missing: list[tuple[str, str]]
    unknown_blobs: int
    unknown_bytes: int


async def _compare(registry: Registry, store: BlobStore, progress: Report) -> _Compared:
    """Compare what the records name with what the store holds."""
    sizes: dict[str, int] = {}
    async for stat in store.list("blobs/"):
        sizes[stat.key] = stat.size
    missing = await asyncio.to_thread(without_bytes, registry.catalog, sizes, progress)
    unknown = [size for key, size in sizes.items() if not registry.wanted(key)]
    return _Compared(missing, len(unknown), sum(unknown))


def without_bytes(catalog: Catalog, sizes: dict[str, int], progress: Report) -> list[tuple[str, str]]:
    """The versions with a file that is not in the storage, whose `sizes` are by key. Blocks: it reads every record."""
    table, missing = catalog.table, []
    rows = len(table.model)
    for row in range(rows):
        if catalog.has_row(row) and any(
            sizes.get(file["key"]) != file["size"] for file in catalog.entry(row, wait=True).files
        ):
            missing.append((table.model[row], table.version[row]))
        if row % 1024 == 0 or row == rows - 1:
            progress("versions", row + 1, rows)
    return missing


async def _begin_validation(registry: Registry, model: str, version: str) -> None:
    """Let the worker look into the version when it starts: what is known to be bad is refused, never served."""
    job = new_ulid()
    record = {
        "job": job,
        "method": "validateModel",
        "params": {"modelId": model, "version": version},
        "created": time.time_ns() // 1_000_000,
    }
    await registry.transact(job, lambda: Change("job.begin", record))


async def _archive(registry: Registry, store: BlobStore, rack: str, progress: Report) -> None:
    """Archive the new epoch whole, before anybody relies on it."""
    archive = Archive(registry.journal, store, rack=rack)
    progress("archive", 0, 1)
    await archive.begin()
    await archive.round()
    progress("archive", 1, 1)
