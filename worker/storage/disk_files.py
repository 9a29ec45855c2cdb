"""Single files, made durable: blocking, for threads."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from schemas.errors import ModelManagerError
from worker.storage.blobstore import BlobMissing


class NewFile:
    """A file on its way to `path`, which must not exist. It counts once `keep` returned."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def create(self) -> None:
        """ERR_INTERNAL if there is something already, a symbolic link included."""
        make_folder(self._path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(self._path, flags, 0o600)
        except FileExistsError:
            raise ModelManagerError("ERR_INTERNAL", "A storage key was used twice.") from None
        self._file = os.fdopen(descriptor, "wb", buffering=0)

    def write(self, block: bytes | bytearray) -> None:
        assert self._file is not None
        view = memoryview(block)
        while view:
            view = view[self._file.write(view) :]

    def keep(self) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._file.close()
        sync_folder(self._path.parent)

    def discard(self) -> None:
        """Remove the file if `create` made it."""
        if self._file is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)


def open_blob(path: Path, key: str) -> BinaryIO:
    """Raises BlobMissing. Neither follows a link nor waits for a pipe that someone put there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise BlobMissing(key) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelManagerError("ERR_STORAGE_UNAVAILABLE", "A stored blob is not a regular file.")
    return os.fdopen(descriptor, "rb", buffering=0)


def open_private(path: Path, flags: int) -> int:
    """A descriptor; a file that is made by this is, as the journal's are, not for everybody: it may tell of models."""
    return os.open(path, flags | os.O_CLOEXEC, 0o640)


def replace(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    try:
        with os.fdopen(open_private(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make the folder and those above it, each as durable as what will lie in it."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=0o750, exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
