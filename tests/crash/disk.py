"""A disk that forgets: what was written lives in a cache, and a power cut keeps any part of it that was not synced.

The model, which is harsher than any one file system:

- A write is kept or lost by sectors of 512 bytes, in any order; a size may be kept without the bytes it was made for,
  which then read as NUL. Without its size a write still reaches as far as its last sector that is kept.
- `fdatasync` makes the bytes and the size of that file durable, and nothing else: not its name.
- A name that was made, moved or taken away is kept or lost by itself, in any order, until its folder is synced. A move
  is one change, except that syncing one of two folders settles only its side.
- A failed `fdatasync` keeps any part of what it was for and marks all of it clean: no later sync writes it, unless it
  is written to the file again. A failed `fsync_dir` leaves names as they were, neither lost nor safe.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from worker.journal import Files, JournalLocked

SECTOR_BYTES = 512


@dataclass(frozen=True, slots=True)
class Change:
    """Bytes at `offset`, or a new `size` if there are none. `clean`: no sync will ever write it."""

    number: int
    offset: int = 0
    data: bytes | None = None
    size: int = 0
    grows: bool = False
    clean: bool = False
    settled: bool = False

    def sectors(self) -> range:
        if self.data is None:
            return range(0)
        return range(self.offset // SECTOR_BYTES, (self.offset + len(self.data) - 1) // SECTOR_BYTES + 1)


@dataclass(slots=True, eq=False)
class File:
    """`changes` came after `durable`, in order; together they make `cache`."""

    cache: bytes = b""
    durable: bytes = b""
    changes: list[Change] = field(default_factory=list)

    def change(self, change: Change) -> None:
        self.cache = _changed(self.cache, change)
        self.changes.append(change)

    def settle(self) -> None:
        self.changes = [change if change.clean else replace(change, settled=True) for change in self.changes]
        if all(change.settled for change in self.changes):
            self.durable, self.changes = self.cache, []

    def after_cut(self, keeps: Callable[[Unit], bool]) -> File:
        content = self.durable
        for change in self.changes:
            if change.settled:
                content = _changed(content, change)
            else:
                kept = [sector for sector in change.sectors() if keeps(Unit(change.number, "sector", sector))]
                sized = keeps(Unit(change.number, "size")) if change.data is None or change.grows else False
                content = _changed_in_part(content, change, kept, sized)
        return File(content, content)


@dataclass(slots=True, eq=False)
class Folder:
    cache: dict[str, Node] = field(default_factory=dict)
    durable: dict[str, Node] = field(default_factory=dict)


Node = File | Folder


@dataclass(frozen=True, slots=True)
class Naming:
    """One change of names: in each folder the name now stands for the node, or for nothing."""

    number: int
    parts: tuple[tuple[Folder, str, Node | None], ...]


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    """The smallest thing a power cut keeps or loses: of the operation `number` one sector, the size, or the name."""

    number: int
    kind: str
    sector: int = 0


class Disk(Files):
    """`before` is told of each operation that changes something, by name, before it happens. It may raise OSError in
    its place, or return how many bytes of a write are written at most.
    """

    def __init__(self) -> None:
        self.before: Callable[[str], int | None] = lambda name: None
        self.room = 2**40
        """What `free` tells; nothing else looks at it."""
        self._root = Folder()
        self._namings: list[Naming] = []
        self._number = 0
        self._open: dict[int, File] = {}
        self._next_fd = 1000
        self._locked: set[Folder] = set()
        # The writer's thread and the event loop's may look at the same time.
        self._guard = threading.RLock()

    # --- what a crash leaves ---

    def copy(self) -> Disk:
        """The same disk a moment later, without the processes that used it: the cache is still there."""
        twin = Disk()
        nodes: dict[Node, Node] = {}

        def copied(node: Node) -> Node:
            if node not in nodes:
                if isinstance(node, File):
                    nodes[node] = File(node.cache, node.durable, list(node.changes))
                else:
                    nodes[node] = folder = Folder()
                    folder.cache = {name: copied(inner) for name, inner in node.cache.items()}
                    folder.durable = {name: copied(inner) for name, inner in node.durable.items()}
            return nodes[node]

        def folder_copied(folder: Folder) -> Folder:
            found = copied(folder)
            assert isinstance(found, Folder)
            return found

        with self._guard:
            twin._root = folder_copied(self._root)
            twin._number = self._number
            twin._namings = [
                Naming(
                    naming.number,
                    tuple(
                        (folder_copied(folder), name, None if node is None else copied(node))
                        for folder, name, node in naming.parts
                    ),
                )
                for naming in self._namings
            ]
        return twin

    def units(self) -> list[Unit]:
        """Everything that a power cut now may keep or lose, in the order it was done."""
        files: dict[File, None] = {}

        def walk(node: Node) -> None:
            if isinstance(node, File):
                files[node] = None
            else:
                for inner in (*node.cache.values(), *node.durable.values()):
                    walk(inner)

        walk(self._root)
        found = [Unit(naming.number, "name") for naming in self._namings]
        for file in files:
            for change in file.changes:
                if not change.settled:
                    found += [Unit(change.number, "sector", sector) for sector in change.sectors()]
                    if change.data is None or change.grows:
                        found.append(Unit(change.number, "size"))
        return sorted(set(found))

    def after_cut(self, kept: Iterable[Unit]) -> Disk:
        """What is found after a power cut that kept just these of `units`."""
        keeps = frozenset(kept).__contains__
        names: dict[Folder, dict[str, Node]] = {}

        def entries(folder: Folder) -> dict[str, Node]:
            return names.setdefault(folder, dict(folder.durable))

        for naming in self._namings:
            if keeps(Unit(naming.number, "name")):
                for folder, name, node in naming.parts:
                    if node is None:
                        entries(folder).pop(name, None)
                    else:
                        entries(folder)[name] = node
        twin = Disk()
        nodes: dict[Node, Node] = {}

        def rebuilt(node: Node) -> Node:
            if node not in nodes:
                if isinstance(node, File):
                    nodes[node] = node.after_cut(keeps)
                else:
                    nodes[node] = folder = Folder()
                    folder.cache = {name: rebuilt(inner) for name, inner in entries(node).items()}
                    folder.durable = dict(folder.cache)
            return nodes[node]

        root = rebuilt(self._root)
        assert isinstance(root, Folder)
        twin._root = root
        return twin

    # --- the file operations ---

    def list(self, folder: Path) -> list[str]:
        with self._guard:
            return sorted(self._folder(folder).cache)

    def is_dir(self, path: Path) -> bool:
        with self._guard:
            return isinstance(self._find(path), Folder)

    def lock(self, folder: Path) -> DiskLock:  # type: ignore[override]
        self.close(self.open(folder / "LOCK", os.O_RDWR | os.O_CREAT))
        with self._guard:
            node = self._folder(folder)
            if node in self._locked:
                raise JournalLocked("another life")
            self._locked.add(node)
        return DiskLock(self._locked, node)

    def owned(self, folder: Path) -> bool:
        with self._guard:
            return self._find(folder) in self._locked

    def mkdir(self, folder: Path) -> None:
        self.before("mkdir")
        with self._guard:
            if self._find(folder) is not None:
                raise _error(errno.EEXIST)
            self._name((self._folder(folder.parent), folder.name, Folder()))

    def reader(self, path: Path) -> BinaryIO:
        with self._guard:
            return io.BytesIO(self._file(path).cache)

    def open(self, path: Path, flags: int) -> int:
        found = self._find(path)
        if (found is None and flags & os.O_CREAT) or flags & os.O_TRUNC:
            self.before("open")
        with self._guard:
            if found is None and flags & os.O_CREAT:
                self._name((self._folder(path.parent), path.name, File()))
            file = self._file(path)
            if flags & os.O_TRUNC and file.cache:
                file.change(Change(self._count(), size=0))
            self._next_fd += 1
            self._open[self._next_fd] = file
            return self._next_fd

    def close(self, fd: int) -> None:
        with self._guard:
            self._of(fd)
            del self._open[fd]

    def pread(self, fd: int, length: int, offset: int, *, wait: bool = True) -> bytes:
        with self._guard:
            return self._of(fd).cache[offset : offset + length]

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        limit = self.before("pwrite")
        with self._guard:
            file = self._of(fd)
            written = bytes(data[:limit])
            if written:
                grows = offset + len(written) > len(file.cache)
                file.change(Change(self._count(), offset, written, size=offset + len(written), grows=grows))
            return len(written)

    def ftruncate(self, fd: int, size: int) -> None:
        self.before("ftruncate")
        with self._guard:
            file = self._of(fd)
            if size != len(file.cache):
                file.change(Change(self._count(), size=size))

    def allocate(self, fd: int, size: int) -> None:
        self.before("allocate")
        with self._guard:
            file = self._of(fd)
            if size > len(file.cache):
                file.change(Change(self._count(), size=size))

    def allocated(self, path: Path) -> int:
        with self._guard:
            return len(self._file(path).cache)

    def free(self, folder: Path) -> int:
        return self.room

    def fdatasync(self, fd: int) -> None:
        with self._guard:
            file = self._of(fd)
        try:
            self.before("fdatasync")
        except OSError:
            file.changes = [change if change.settled else replace(change, clean=True) for change in file.changes]
            raise
        with self._guard:
            file.settle()

    def fsync_dir(self, folder: Path) -> None:
        with self._guard:
            node = self._folder(folder)
        self.before("fsync_dir")
        with self._guard:
            node.durable = dict(node.cache)
            left = (
                Naming(naming.number, tuple(part for part in naming.parts if part[0] is not node))
                for naming in self._namings
            )
            self._namings = [naming for naming in left if naming.parts]

    def rename(self, old: Path, new: Path) -> None:
        self.before("rename")
        with self._guard:
            node = self._find(old)
            if node is None:
                raise _error(errno.ENOENT)
            self._name((self._folder(old.parent), old.name, None), (self._folder(new.parent), new.name, node))

    def unlink(self, path: Path) -> None:
        self.before("unlink")
        with self._guard:
            self._file(path)
            self._name((self._folder(path.parent), path.name, None))

    def link(self, old: Path, new: Path) -> None:
        self.before("link")
        with self._guard:
            if self._find(new) is not None:
                raise _error(errno.EEXIST)
            self._name((self._folder(new.parent), new.name, self._file(old)))

    def rmdir(self, folder: Path) -> None:
        self.before("rmdir")
        with self._guard:
            if self._folder(folder).cache:
                raise _error(errno.ENOTEMPTY)
            self._name((self._folder(folder.parent), folder.name, None))

    # --- within ---

    def _count(self) -> int:
        self._number += 1
        return self._number

    def _name(self, *parts: tuple[Folder, str, Node | None]) -> None:
        for folder, name, node in parts:
            if node is None:
                del folder.cache[name]
            else:
                folder.cache[name] = node
        self._namings.append(Naming(self._count(), parts))

    def _find(self, path: Path) -> Node | None:
        node: Node | None = self._root
        for name in path.parts[1:]:
            if not isinstance(node, Folder):
                return None
            node = node.cache.get(name)
        return node

    def _folder(self, path: Path) -> Folder:
        found = self._find(path)
        if not isinstance(found, Folder):
            raise _error(errno.ENOENT if found is None else errno.ENOTDIR)
        return found

    def _file(self, path: Path) -> File:
        found = self._find(path)
        if not isinstance(found, File):
            raise _error(errno.ENOENT if found is None else errno.EISDIR)
        return found

    def _of(self, fd: int) -> File:
        if fd not in self._open:
            raise _error(errno.EBADF)
        return self._open[fd]


class DiskLock:
    def __init__(self, locked: set[Folder], folder: Folder) -> None:
        self._locked = locked
        self._folder = folder

    def release(self) -> None:
        self._locked.discard(self._folder)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _changed(content: bytes, change: Change) -> bytes:
    if change.data is None:
        return content[: change.size].ljust(change.size, b"\0")
    end = change.offset + len(change.data)
    return content[: change.offset].ljust(change.offset, b"\0") + change.data + content[end:]


def _changed_in_part(content: bytes, change: Change, kept: list[int], sized: bool) -> bytes:
    if change.data is None:
        return _changed(content, change) if sized else content
    if sized:
        content = content.ljust(change.size, b"\0")
    end = change.offset + len(change.data)
    for sector in kept:
        first, last = max(change.offset, sector * SECTOR_BYTES), min(end, (sector + 1) * SECTOR_BYTES)
        piece = change.data[first - change.offset : last - change.offset]
        content = _changed(content, Change(change.number, first, piece))
    return content
