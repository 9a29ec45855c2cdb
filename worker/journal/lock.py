"""LOCK: one process owns a journal's folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from worker.journal.failures import JournalLocked

LOCK = "LOCK"


class FolderLock:
    """Held from construction to `release` or the end of the process, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Raises JournalLocked at once if another process holds it."""
        self._fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o640)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 256, 0).decode("utf-8", "replace").strip()
            os.close(self._fd)
            raise JournalLocked(holder) from None
        # Information only, and a full disk must not keep a worker from deleting.
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_held(folder: Path) -> bool:
    """Whether a process holds it now. An owner that comes in the same moment may find it held, and come again."""
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
