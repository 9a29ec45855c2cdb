"""A file system of its own on a loop device, whose power can be cut: everything that was not synced is gone."""

from __future__ import annotations

import array
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_IMAGE_BYTES = 512 * 1024 * 1024
_MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}
# FS_IOC_SHUTDOWN, _IOR('X', 125, __u32), and its flag "do not flush the log": what a power cut does.
_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2


def missing(kind: str) -> str | None:
    """What this machine lacks for such a disk; None if nothing."""
    if os.geteuid() != 0:
        return "needs root, for mount and the shutdown of a file system"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lacking = [tool for tool in (_MAKE[kind][0], "mount", "umount") if shutil.which(tool, path=path) is None]
    return f"needs {' and '.join(lacking)}" if lacking else None


class LoopDisk:
    def __init__(self, kind: str, image: Path, mounted: Path) -> None:
        self.kind = kind
        self._image = image
        self.mounted = mounted
        _run("mount", "-o", "loop", str(image), str(mounted))

    def cut(self) -> None:
        """The power goes. What is mounted fails from now on, until `restore`."""
        fd = os.open(self.mounted, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, array.array("I", [_NO_LOG_FLUSH]))
        finally:
            os.close(fd)

    def restore(self) -> None:
        """The power is back: what reached the disk is there. No process may use it."""
        self.unmount()
        _run("mount", "-o", "loop", str(self._image), str(self.mounted))

    def unmount(self) -> None:
        _run("umount", str(self.mounted))


@contextmanager
def loop_disk(kind: str) -> Iterator[LoopDisk]:
    """A new one. Raises OSError, with the reason, if it cannot be made or mounted here."""
    with tempfile.TemporaryDirectory(prefix="cuts-") as name:
        image, mounted = Path(name) / "image", Path(name) / "disk"
        mounted.mkdir()
        with image.open("wb") as stream:
            stream.truncate(_IMAGE_BYTES)
        _run(*_MAKE[kind], str(image))
        disk = LoopDisk(kind, image, mounted)
        try:
            yield disk
        finally:
            disk.unmount()


def _run(*command: str) -> None:
    environment = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise OSError(f"{command[0]} ended with status {ran.returncode}: {ran.stderr.strip()}")
