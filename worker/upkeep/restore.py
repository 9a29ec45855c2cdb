"""A registry put back from a backup of its journal, under a new epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from worker.journal import Files, JournalDamaged, Reconstructed, Reconstruction, Staging, Until
from worker.journal.manifest import read_manifest
from worker.storage.blobstore import BlobStore
from worker.upkeep.ownership import read_owner

_COPY_BYTES = 4 * 1024 * 1024


async def next_epoch(store: BlobStore, source: Path) -> int:
    """One that is higher than that of the backup in `source`, and than what `owner.json` says.

    Raises FileNotFoundError, JournalDamaged if there is no journal in `source`; NotOwner, ModelManagerError.
    """
    owner, _ = await read_owner(store)
    return 1 + max(read_manifest(Files(), source).epoch, 0 if owner is None else owner.epoch)


def restore(
    source: Path, folder: Path, *, epoch: int, until: Until, progress: Callable[[str, int, int], None]
) -> Reconstructed:
    """Make the journal in `folder` from the backup in `source`, which is only read. Blocks.

    Raises JournalLocked, FolderTaken, FileNotFoundError, JournalDamaged (the backup is), PointUnreachable, OSError.
    """
    manifest = read_manifest(Files(), source)
    staging = Staging(folder)
    try:
        work = Reconstruction(staging.path, epoch=epoch, until=until)
        total = sum((source / name).stat().st_size for name in manifest.names)
        seen = 0
        for name in manifest.names:
            with (source / name).open("rb") as old, (staging.path / name).open("wb") as new:
                while block := old.read(_COPY_BYTES):
                    new.write(block)
                    seen += len(block)
                    progress("journal", seen, total)
            if not work.take(name):
                break
        done = work.finish()
        staging.commit()
    finally:
        staging.close()
    if done.registry_id != manifest.registry_id:
        raise JournalDamaged("MANIFEST", offset=0, sequence=0, reason="it is of another registry than its files")
    return done
