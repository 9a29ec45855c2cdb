"""The file operations a journal is built on: the one seam where tests put a disk that fails or forgets."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import BinaryIO

from worker.journal.lock import FolderLock, is_held

_READ_BUFFER = 256 * 1024


class SyncFailed(Exception):
    """An fsync or fdatasync returned an error. What the disk holds is unknown, and a second try would not tell."""


class Files:
    """The real disk. Every method raises OSError as the system call does; `pwrite` may write less than it is given."""

    def list(self, folder: Path) -> list[str]:
        return sorted(os.listdir(folder))  # noqa: PTH208 - names are what is wanted, not paths

    def is_dir(self, path: Path) -> bool:
        return path.is_dir()

    def lock(self, folder: Path) -> FolderLock:
        """Raises JournalLocked at once if another process holds it."""
        return FolderLock(folder)

    def owned(self, folder: Path) -> bool:
        """Whether a process holds the lock of `folder` now."""
        return is_held(folder)

    def mkdir(self, folder: Path) -> None:
        folder.mkdir(mode=0o750)

    def reader(self, path: Path) -> BinaryIO:
        """The caller closes it."""
        return path.open("rb", buffering=_READ_BUFFER)

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags, 0o640)

    def close(self, fd: int) -> None:
        os.close(fd)

    def pread(self, fd: int, length: int, offset: int, *, wait: bool = True) -> bytes:
        """Up to `length` bytes. Without `wait` those that are in memory; BlockingIOError if there are none."""
        if wait:
            return os.pread(fd, length, offset)
        buffer = bytearray(length)
        try:
            count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):  # this file system cannot tell
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
            raise
        return bytes(memoryview(buffer)[:count])

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def ftruncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def allocate(self, fd: int, size: int) -> None:
        """Make the file `size` bytes long, with room on the disk for each of them. It has any part of it, or none,
        after an error."""
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            write_all(self, fd, bytes(size), 0)

    def allocated(self, path: Path) -> int:
        """Bytes of the file that have room on the disk: a copy may have holes in it."""
        status = path.stat()
        return min(status.st_size, status.st_blocks * 512)

    def free(self, folder: Path) -> int:
        """Bytes that may be written on the disk of `folder`; none if no file can be made there any more."""
        room = os.statvfs(folder)
        return room.f_bavail * room.f_frsize if room.f_favail or not room.f_files else 0

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fsync_dir(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)

    def link(self, old: Path, new: Path) -> None:
        """Another name for the same file."""
        new.hardlink_to(old)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def rmdir(self, folder: Path) -> None:
        folder.rmdir()


def write_all(files: Files, fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`; a short write is gone on with until the system says why."""
    rest = memoryview(data)
    while rest:
        written = files.pwrite(fd, rest, offset)
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rest = rest[written:]
        offset += written


def sync(files: Files, fd: int) -> None:
    """Make the bytes of `fd` and its size durable. Raises SyncFailed."""
    try:
        files.fdatasync(fd)
    except OSError as error:
        raise SyncFailed(os.strerror(error.errno or 0)) from error


def sync_folder(files: Files, folder: Path) -> None:
    """Make the names in `folder` durable. Raises SyncFailed; PermissionError if it may not be read."""
    try:
        files.fsync_dir(folder)
    except PermissionError:
        raise
    except OSError as error:
        raise SyncFailed(os.strerror(error.errno or 0)) from error


def sync_path(files: Files, folder: Path) -> None:
    """Make the names of `folder` and of all folders above it durable: a process that died may have made them."""
    for parent in reversed(folder.parents):
        # One that may not be read is not one of ours.
        with contextlib.suppress(PermissionError):
            sync_folder(files, parent)


def publish(files: Files, folder: Path, name: str, data: bytes) -> None:
    """Put a complete, durable file under `name`, in place of an older one; readers see the old or the new one.

    Raises OSError if nothing happened, SyncFailed if it is unknown what the disk holds.
    """
    temporary = folder / f"{name}.tmp"
    try:
        fd = files.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            write_all(files, fd, data, 0)
            sync(files, fd)
        finally:
            files.close(fd)
        files.rename(temporary, folder / name)
    except OSError:
        # Only tidiness: the next boot removes what is left.
        with contextlib.suppress(OSError):
            files.unlink(temporary)
        raise
    sync_folder(files, folder)
