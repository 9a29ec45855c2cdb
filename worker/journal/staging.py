"""A journal that is made in a folder where there was none, or none with records: it is there whole, or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path

from worker.journal.failures import JournalDamaged
from worker.journal.files import Files, sync_folder, sync_path
from worker.journal.inspection import verify
from worker.journal.manifest import MANIFEST, is_base, segment_first

_DISK = Files()
_STAGING = "rebuilding"


class FolderTaken(Exception):
    """The folder holds something that must not be replaced; str() tells what."""


class Staging:
    """Put the files of the journal into `path`, durably and MANIFEST last, and `commit`. The folder is locked until
    `close`, which leaves it as it was if nothing was committed.
    """

    def __init__(self, folder: Path, *, files: Files = _DISK) -> None:
        """Raises JournalLocked if a process owns the folder, FolderTaken if there is a journal with records in it."""
        self._folder = folder
        self._files = files
        self.path = folder / _STAGING
        _make(files, folder)
        self._lock = files.lock(folder)
        try:
            self._check_free()
            if self._is_half_committed():
                self._remove_old()
                # Only then may the MANIFEST go that tells of it.
                sync_folder(files, folder)
            self._empty()
            _make(files, self.path)
        except BaseException:
            self._lock.release()
            raise

    def commit(self) -> None:
        """Let the folder be the journal that was made. MANIFEST is the last to come, and the first to go."""
        names = self._files.list(self.path)
        sync_path(self._files, self._folder)
        # With the name of `path`, where MANIFEST is found if this is cut short.
        sync_folder(self._files, self._folder)
        self._remove_old()
        for name in (name for name in names if name != MANIFEST):
            self._files.rename(self.path / name, self._folder / name)
        sync_folder(self._files, self._folder)
        self._files.rename(self.path / MANIFEST, self._folder / MANIFEST)
        sync_folder(self._files, self._folder)

    def close(self) -> None:
        """Give the folder free."""
        with contextlib.suppress(OSError):  # else the next one empties it, and no boot minds it
            if not self._is_half_committed():
                self._empty()
                self.path.rmdir()
        self._lock.release()

    def _check_free(self) -> None:
        names = self._files.list(self._folder)
        if MANIFEST not in names:
            if any(_is_journal_file(name) for name in names) and not self._is_half_committed():
                raise FolderTaken("the folder has files of a journal and no MANIFEST; move it away first")
            return
        try:
            report = verify(self._folder, files=self._files)
        except JournalDamaged as error:
            raise FolderTaken(f"the folder holds a damaged journal, move it away first: {error.reason}") from None
        if report.damage is not None:
            raise FolderTaken(f"the folder holds a damaged journal, move it away first: {report.damage.reason}")
        if report.records:
            raise FolderTaken(
                f"the folder holds a journal with {report.records} records (registry {report.registry_id}, epoch"
                f" {report.epoch}); move it away first"
            )

    def _remove_old(self) -> None:
        """The journal without records, or what an earlier commit that was cut short had moved."""
        names = self._files.list(self._folder)
        if MANIFEST in names:
            self._files.unlink(self._folder / MANIFEST)
            sync_folder(self._files, self._folder)
        for name in names:
            if _is_journal_file(name):
                self._files.unlink(self._folder / name)

    def _is_half_committed(self) -> bool:
        """Whether a commit was cut short: MANIFEST is the last name to move."""
        return MANIFEST not in self._files.list(self._folder) and MANIFEST in self._staged()

    def _staged(self) -> list[str]:
        return self._files.list(self.path) if self._files.is_dir(self.path) else []

    def _empty(self) -> None:
        for name in self._staged():
            self._files.unlink(self.path / name)


def _is_journal_file(name: str) -> bool:
    return is_base(name) or segment_first(name) is not None


def _make(files: Files, folder: Path) -> None:
    if not files.is_dir(folder):
        _make(files, folder.parent)
        files.mkdir(folder)
