"""Disks that can be filled: a real one, and one made of the journal's own seam, for those who may not mount."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from worker.journal import Files

MIB = 1024 * 1024


class SmallDisk(Protocol):
    """`folder` lies on it, and `files` reach it."""

    folder: Path
    files: Files

    def fill(self, leave: int = 0) -> None:
        """Somebody takes all the room but `leave` bytes."""

    def empty(self) -> None:
        """And gives it back."""


class MountedDisk:
    """A tmpfs of its own."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "registry"
        self.files = Files()
        self._filler = root / "filler"

    @property
    def free(self) -> int:
        return self.files.free(self.folder.parent)

    def fill(self, leave: int = 0) -> None:
        with self._filler.open("ab", buffering=0) as filler, contextlib.suppress(OSError):
            os.posix_fallocate(filler.fileno(), filler.tell(), max(1, self.free - leave))
        assert self.free <= leave

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)


class CountedDisk(Files):
    """A folder of the real disk with a bound of its own: what its files have, and others take, is `size` at most."""

    def __init__(self, root: Path, size: int) -> None:
        self.folder = root / "registry"
        self.files = self
        self._size = size
        self._taken = 0

    def fill(self, leave: int = 0) -> None:
        self._taken += self.free(self.folder) - leave

    def empty(self) -> None:
        self._taken = 0

    def free(self, folder: Path) -> int:
        used = sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0
        return max(0, self._size - self._taken - used)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        room = self._room(fd, offset)
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().pwrite(fd, memoryview(data)[:room], offset)

    def allocate(self, fd: int, size: int) -> None:
        if self._room(fd, 0) < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().allocate(fd, size)

    def _room(self, fd: int, offset: int) -> int:
        """What may be written there: over bytes the file has, and into the room that is free."""
        return max(0, os.fstat(fd).st_size - offset) + self.free(self.folder)


@contextmanager
def mounted(root: Path, size: int) -> Iterator[MountedDisk]:
    """A tmpfs of `size` bytes at `root`; the test is skipped where none can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("A FULL DISK WAS NOT TRIED: only root can mount one")
    root.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", root], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"A FULL DISK WAS NOT TRIED: {done.stderr.strip()}")
    try:
        yield MountedDisk(root)
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)
