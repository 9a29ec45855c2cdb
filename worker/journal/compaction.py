"""Writing a base: the records of the sealed files that are still needed, once each, with a fresh chain."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import orjson

from worker.journal.base_index import index_name, read_index
from worker.journal.boot import Place, Sealed
from worker.journal.files import Files, sync, write_all
from worker.journal.format import FORMAT_VERSION, TAIL_BYTES, make_line
from worker.journal.manifest import Manifest, SealedFile
from worker.journal.segment import Digest, Segment

_SYNC_BYTES = 256 * 1024
# Of reading it again: short turns, with rests between them that leave the interpreter and a processor to the owner.
_READ_BYTES = 256 * 1024
_REST_S = 0.0005


@dataclass(frozen=True, slots=True)
class Base:
    """A base that was written, and what it stands for: all lines up to the sequence `stands_for`."""

    file: SealedFile
    stands_for: int
    changes_from: int


def write_base(
    files: Files,
    folder: Path,
    name: str,
    sealed: Sealed,
    keep: np.ndarray[Any, np.dtype[np.uint64]],
    *,
    changes_from: int,
    time_ms: int,
) -> Base:
    """Write the lines with the sequences `keep` (ascending) of the sealed files to `<name>.tmp`, durably.

    `name` is the one the base will have. Raises OSError, SyncFailed.
    """
    bodies = (line[:-TAIL_BYTES] for segment in sealed.segments for line in _kept_lines(files, folder, segment, keep))
    return write_bodies(
        files, folder, name, sealed.manifest, sealed.place, bodies, changes_from=changes_from, time_ms=time_ms
    )


def write_bodies(
    files: Files,
    folder: Path,
    name: str,
    manifest: Manifest,
    place: Place,
    bodies: Iterable[bytes],
    *,
    changes_from: int,
    time_ms: int,
) -> Base:
    """Write lines with these bodies (all before the crc), of ascending sequence, to `<name>.tmp`, durably: a base of
    the registry and epoch of `manifest` that stands for all up to `place`. Raises OSError, SyncFailed.
    """
    header = {
        "format": FORMAT_VERSION,
        "registryId": manifest.registry_id,
        "epoch": manifest.epoch,
        "previous": None,
        "replaces": {"sequence": place.sequence, "name": place.name, "crc": f"{place.crc:08x}"},
        "changesFrom": changes_from,
    }
    fd = files.open(folder / f"{name}.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        writer = _ChainWriter(files, fd)
        writer.add(*make_line(0, 0, time_ms, b'"op":"open","rec":%b' % orjson.dumps(header), 0))
        for body in bodies:
            writer.chain(body)
        writer.flush()
        seal = {"lines": writer.digest.lines, "sha256": writer.digest.sha256}
        end = place.sequence
        writer.add(*make_line(end, end, time_ms, b'"op":"seal","rec":%b' % orjson.dumps(seal), writer.crc))
        writer.flush()
    finally:
        files.close(fd)
    return Base(writer.digest.sealed(name), end, changes_from)


def read_written(files: Files, folder: Path, base: Base) -> Segment:
    """Where the lines of a base are that lies under its name and `.tmp`; every byte is read again.

    Raises ValueError if it is not what `base` says, or its index does not check; OSError.
    """
    written = folder / f"{base.file.name}.tmp"
    with files.reader(written) as stream:
        if Digest.of(stream, block_bytes=_READ_BYTES, rest_s=_REST_S).sealed(base.file.name) != base.file:
            raise ValueError("the base that was written is not what was read back")
    index = read_index(files, folder / f"{index_name(base.file.name)}.tmp", base.file)
    if index is None:
        raise ValueError("the index that was written is not what was read back")
    segment = Segment(base.file.name, 0)
    segment.adopt(index.sequences, index.offsets, records=base.file.lines - 2)
    segment.size = base.file.size
    return segment


def kept_bytes(sealed: Sealed, keep: np.ndarray[Any, np.dtype[np.uint64]]) -> int:
    """How many bytes the lines with these sequences have."""
    return sum(int(segment.sizes()[_wanted(segment, keep)].sum()) for segment in sealed.segments)


def _wanted(segment: Segment, keep: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Of each line whether it is kept."""
    sequences = segment.sequences()
    places = np.searchsorted(keep, sequences)
    places[places == len(keep)] = 0
    return keep[places] == sequences if len(keep) else np.zeros(len(sequences), bool)


def _kept_lines(
    files: Files, folder: Path, segment: Segment, keep: np.ndarray[Any, np.dtype[np.uint64]]
) -> Iterator[bytes]:
    wanted = _wanted(segment, keep)
    with files.reader(folder / segment.name) as stream:
        for line, is_wanted in zip(stream, wanted.tolist(), strict=False):
            if is_wanted:
                yield line


class _ChainWriter:
    """Lines out to a file, chained, and synced bit by bit: the owner's own syncs never wait for a mountain of it."""

    def __init__(self, files: Files, fd: int) -> None:
        self._files = files
        self._fd = fd
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self.crc = 0
        self.digest = Digest()

    def chain(self, body: bytes) -> None:
        """A line with this body, which is all before its crc."""
        crc = crc32(body, self.crc)
        self.add(b'%b,"crc":"%08x"}\n' % (body, crc), crc)

    def add(self, line: bytes, crc: int) -> None:
        self.crc = crc
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        if self._waiting_bytes >= _SYNC_BYTES:
            self.flush()

    def flush(self) -> None:
        """Make all of it durable so far."""
        data = b"".join(self._waiting)
        write_all(self._files, self._fd, data, self.digest.size)
        sync(self._files, self._fd)
        self.digest.update(data)
        self._waiting.clear()
        self._waiting_bytes = 0
