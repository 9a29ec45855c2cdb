"""A registry put back from a backup of its journal, under a new epoch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from worker.journal import Files, Reconstructed, Reconstruction, Staging, Until
from worker.journal.files import write_all
from worker.journal.manifest import read_manifest
from worker.storage.blobstore import BlobStore
from worker.upkeep.ownership import read_owner

_DISK = Files()
_COPY_BYTES = 4 * 1024 * 1024


async def next_epoch(store: BlobStore, source: Path) -> int:
    """One that is higher than that of the backup in `source`, and than what `owner.json` says.

    Raises FileNotFoundError, JournalDamaged if there is no journal in `source`; NotOwner, ModelManagerError.
    """
    owner, _ = await read_owner(store)
    return 1 + max(read_manifest(_DISK, source).epoch, 0 if owner is None else owner.epoch)


def restore(
    source: Path,
    folder: Path,
    *,
    epoch: int,
    until: Until,
    progress: Callable[[str, int, int], None],
    files: Files = _DISK,
) -> Reconstructed:
    """Make the journal in `folder` from the backup in `source`, which is only read. Blocks.

    Raises JournalLocked, FolderTaken, FileNotFoundError, JournalDamaged (the backup is), PointUnreachable, OSError,
    SyncFailed.
    """
    manifest = read_manifest(files, source)
    staging = Staging(folder, files=files)
    try:
        work = Reconstruction(staging.path, epoch=epoch, until=until, files=files)
        total = sum(file.size for file in manifest.sealed)
        seen = 0
        for name in manifest.names:
            for size in _copy(files, source / name, staging.path / name):
                seen += size
                progress("journal", seen, max(total, seen))
            if not work.take(name):
                break
        done = work.finish()
        staging.commit()
    finally:
        staging.close()
    return done


def _copy(files: Files, old: Path, new: Path) -> Iterator[int]:
    """Not durable yet: who takes the file in sees to that."""
    fd = files.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        with files.reader(old) as stream:
            offset = 0
            while block := stream.read(_COPY_BYTES):
                write_all(files, fd, block, offset)
                offset += len(block)
                yield len(block)
    finally:
        files.close(fd)
