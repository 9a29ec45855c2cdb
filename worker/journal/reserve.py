"""RESERVE: room that is held on the disk, so that what frees room can be written when there is none left.

While the disk is full growth is refused. What frees room, and what the journal itself needs, is written with the help
of the reserve: it is given up bit by bit, since others may take what it frees. The disk stays full until there is room
for twice the reserve and all of it is held again, so that the state does not flap.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

from worker.journal.files import Files

RESERVE = "RESERVE"
RESERVE_BYTES = 32 * 1024 * 1024
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})

# One part has room for a batch or a rotation.
_PARTS = 8
_LOOK_SECONDS = 1.0


class Reserve:
    """One thread at a time calls; any may look at `full_since`. No disk can make it raise.

    With `size` 0 there is no reserve, and the disk never counts as full.
    """

    def __init__(self, files: Files, folder: Path, *, size: int, clock: Callable[[], float]) -> None:
        """What an earlier process left tells whether the disk is full: a part of the reserve is gone, and no room."""
        self._files = files
        self._folder = folder
        self._size = size
        self._clock = clock
        self._held = min(size, self._found())
        self._looked = time.monotonic()
        self.full_since: float | None = None
        """Unix seconds; None while there is room."""
        if self._held < size and not self._has_room():
            self.full_since = clock()

    def provide(self) -> None:
        """Hold all of it if there is room for twice as much; while there is not, the disk is full."""
        if self._held < self._size or self.full_since is not None:
            if not self._has_room():
                self._enter()
            elif self._allocate():
                self.full_since = None

    def look(self) -> None:
        """While the disk is full: `provide`, once a second."""
        if self.full_since is not None and time.monotonic() - self._looked >= _LOOK_SECONDS:
            self._looked = time.monotonic()
            self.provide()

    def found_full(self) -> None:
        """A write has found no room. A part is given up, so that a restart knows as well."""
        if self.full_since is None and self._size:
            self.spend()

    def spend(self) -> bool:
        """Give up a part: whether there was one. The disk is full from now on."""
        self._enter()
        if not self._held:
            return False
        left = max(0, self._held - max(1, self._size // _PARTS))
        try:
            if left:
                self._resize(left)
            else:
                self._files.unlink(self._path)  # which frees an inode too
        except OSError:
            left = self._found()
        spent = left < self._held
        self._held = left
        return spent

    def free_up(self, size: int) -> int:
        """Give up as much as it takes for `size` bytes to be free, if all of it would do: how many are free then."""
        free = self._free()
        if free + self._held >= size:
            while free < size and self.spend():
                free = self._free()
        return free

    def for_a_boot(self) -> None:
        """Give up a part if there is hardly any room: a boot may have to write before it can serve."""
        if self._held and self._free() < self._size // _PARTS:
            self.spend()

    @property
    def _path(self) -> Path:
        return self._folder / RESERVE

    def _enter(self) -> None:
        if self.full_since is None and self._size:
            self.full_since = self._clock()
            self._looked = time.monotonic()

    def _has_room(self) -> bool:
        return self._free() + self._held >= 2 * self._size

    def _free(self) -> int:
        try:
            return self._files.free(self._folder)
        except OSError:
            return 0

    def _found(self) -> int:
        try:
            return self._files.allocated(self._path)
        except OSError:
            return 0

    def _resize(self, size: int) -> None:
        fd = self._files.open(self._path, os.O_RDWR)
        try:
            self._files.ftruncate(fd, size)
        finally:
            self._files.close(fd)

    def _allocate(self) -> bool:
        """Whether there is room, as far as the disk tells: one that cannot hold a reserve is used without."""
        try:
            fd = self._files.open(self._path, os.O_RDWR | os.O_CREAT)
            try:
                self._files.allocate(fd, self._size)
            finally:
                self._files.close(fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._resize(self._held)
            return error.errno not in NO_ROOM
        self._held = self._size
        return True
