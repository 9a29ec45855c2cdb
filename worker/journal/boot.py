"""The boot: what of a folder is kept, what is cut, and what refuses."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from uuid import uuid4
from zlib import crc32

import orjson

from worker.journal.base_index import index_name, read_index
from worker.journal.blocks import CheckedBlocks
from worker.journal.failures import JournalDamaged
from worker.journal.files import Files, publish, sync, sync_folder, sync_path, write_all
from worker.journal.format import (
    FORMAT_VERSION,
    OPEN,
    SEAL,
    CheckedLines,
    Entry,
    checks,
    line_decoder,
    make_line,
)
from worker.journal.helpers import Extraction
from worker.journal.manifest import (
    MANIFEST,
    Manifest,
    SealedFile,
    is_base,
    read_manifest,
    segment_first,
    segment_name,
)
from worker.journal.portions import Chunk, Portion, chunks_of, portions
from worker.journal.replay import EachEntry, Replay
from worker.journal.segment import Segment
from worker.journal.tidying import free_name, tidy
from worker.journal.torn import judge

FIRST_EPOCH = 1
STALE_MANIFEST = "MANIFEST does not name this file, so it is not the newest one; or the end of its last file is missing"

# Between two blocks the thread that checks has to wait for the interpreter.
_CHECKED_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Place:
    """Where the next file goes on: behind the line `sequence` with `crc`, the last of the file `name`."""

    sequence: int = 0
    crc: int = 0
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Sealed:
    """The sealed files: where their lines are, and the `place` behind them."""

    manifest: Manifest
    segments: list[Segment]
    place: Place
    changes_from: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """A journal as a boot leaves it. The next line follows `sequence` and `crc`."""

    manifest: Manifest
    segments: list[Segment]
    sequence: int
    crc: int
    last_op: str
    torn_bytes: int
    changes_from: int


def replay_sealed(files: Files, folder: Path, replay: Replay[Any, Any]) -> Sealed:
    """Hand the records of all sealed files to `replay`, and change nothing: the owner may go on meanwhile.

    Raises JournalDamaged, OSError.
    """
    return _Boot(files, folder, replay).read_sealed()


def replay_base(files: Files, path: Path, replay: Replay[Any, Any]) -> Segment:
    """Hand the records of a base that is not adopted yet to `replay`: where its lines are."""
    segment = Segment(path.name, 0, sequences=array("Q"))
    with files.reader(path) as stream:
        decoder = line_decoder(replay.record)
        lines = CheckedLines(stream, decoder, sequence=-1, crc=0, gapless=False)
        for portion in portions(CheckedBlocks(stream, decoder, lines), 0, replay.extract):
            segment.add(portion)
            replay.take(portion.content)
    if lines.fault:
        raise JournalDamaged(path.name, offset=lines.offset, sequence=lines.sequence + 1, reason=lines.fault)
    return segment


def open_line(sequence: int, seed: int, *, time_ms: int, manifest: Manifest, previous: str | None) -> tuple[bytes, int]:
    """The first line of a segment that follows the segment `previous`, and its crc."""
    record = {
        "format": FORMAT_VERSION,
        "registryId": manifest.registry_id,
        "epoch": manifest.epoch,
        "previous": None if previous is None else {"name": previous, "crc": f"{seed:08x}"},
    }
    return make_line(sequence, sequence, time_ms, b'"op":"open","rec":%b' % orjson.dumps(record), seed)


def recover(
    files: Files, folder: Path, replay: Replay[Any, Any] | Callable[[Entry], object], clock: Callable[[], float]
) -> Recovered:
    """Verify the journal in `folder`, hand its records to `replay` in order, and make durable what is kept.

    A folder without a journal gets a new one. Raises JournalDamaged, with nothing changed, if a durable record is not
    as it was written; OSError and SyncFailed as the disk does.
    """
    if MANIFEST not in files.list(folder):
        _create(files, folder, clock)
    return _Boot(files, folder, EachEntry(replay) if callable(replay) else replay).run()


def _create(files: Files, folder: Path, clock: Callable[[], float]) -> None:
    for name in files.list(folder):
        # A lone `open` line is what an interrupted creation leaves; it is written anew.
        first = segment_first(name)
        if is_base(name) or (first is not None and not _is_lone_line(files, folder / name)):
            raise JournalDamaged(MANIFEST, offset=0, sequence=first or 0, reason="the file is missing")
    sync_path(files, folder)
    manifest = Manifest(uuid4().hex, FIRST_EPOCH, 1, (), segment_name(1))
    line, _ = open_line(1, 0, time_ms=int(clock() * 1000), manifest=manifest, previous=None)
    publish(files, folder, manifest.active, line)
    manifest.publish(files, folder)


def _is_lone_line(files: Files, path: Path) -> bool:
    with files.reader(path) as stream:
        stream.readline()
        return not stream.read(1)


def open_fault(manifest: Manifest, before: Place, op: str, record: dict[str, Any]) -> str | None:
    """What is wrong with the first line of the segment that should follow `before`; None if nothing."""
    previous = None if before.name is None else {"name": before.name, "crc": f"{before.crc:08x}"}
    if op != OPEN or record["previous"] != previous:
        return "the first line does not follow the file before"
    if record["registryId"] != manifest.registry_id or record["epoch"] > manifest.epoch:
        return "the file belongs to another registry"
    return None


def place_of_base(record: dict[str, Any]) -> Place:
    """Where the files behind a base go on, by the record of its first line."""
    replaces = record["replaces"]
    return Place(replaces["sequence"], int(replaces["crc"], 16), replaces["name"])


def newer_segment(files: Files, folder: Path, manifest: Manifest, sequence: int, last_op: str) -> str | None:
    """The name of a segment that is newer than all in `manifest`, so that it may hold acknowledged records; or None.

    What the first step of a rotation leaves does not count: the lone `open` line that follows the seal.
    """
    active = segment_first(manifest.active) or 0
    for name in files.list(folder):
        first = segment_first(name)
        if first is None or first <= active:
            continue
        begun = last_op == SEAL and first == sequence + 1
        if not (begun and _is_lone_line(files, folder / name)):
            return name
    return None


def check_size_and_crc(files: Files, folder: Path, file: SealedFile) -> bool:
    """Whether the file is, as a whole, what was sealed."""
    with files.reader(folder / file.name) as stream:
        size, crc = 0, 0
        buffer = memoryview(bytearray(min(_CHECKED_BYTES, file.size + 1)))  # one for all: new memory costs page faults
        while count := stream.readinto(buffer):  # type: ignore[attr-defined]
            size += count
            crc = crc32(buffer[:count], crc)
    return (size, crc) == (file.size, file.crc32)


class _Boot:
    """One pass over the files that MANIFEST names."""

    def __init__(self, files: Files, folder: Path, replay: Replay[Any, Any]) -> None:
        self._files = files
        self._folder = folder
        self._names = files.list(folder)
        self._replay = replay
        self._decoder = line_decoder(replay.record)
        self._manifest = read_manifest(files, folder)
        self._extraction = Extraction(files, folder, self._decoder, replay.extract)
        self._segments: list[Segment] = []
        self._place = Place()
        self._changes_from = 0
        self._stands_for = 0  # the last sequence the base does
        self._last_op = ""

    def _chunks(self) -> list[Chunk]:
        """All that will be read; a base may be loaded from its index instead."""
        chunks: list[Chunk] = []
        for file in self._manifest.sealed:
            if not is_base(file.name):
                chunks += chunks_of(file.name, file.size, checked=False)
        if self._manifest.active in self._names:
            with self._files.reader(self._folder / self._manifest.active) as stream:
                chunks += chunks_of(self._manifest.active, stream.seek(0, os.SEEK_END), checked=True)[1:]
        return chunks

    def read_sealed(self) -> Sealed:
        """All files but the active one; nothing is changed."""
        # Checksums are taken beside all else: a file's own while its index is loaded, or the one before it is folded.
        check = partial(check_size_and_crc, self._files, self._folder)
        with ThreadPoolExecutor(1, thread_name_prefix="journal-check") as beside:
            verdicts = [beside.submit(check, file) for file in self._manifest.sealed]
            try:
                for file, sound in zip(self._manifest.sealed, verdicts, strict=True):
                    (self._read_base if is_base(file.name) else self._read_segment)(file, sound)
            finally:
                beside.shutdown(cancel_futures=True)
        return Sealed(self._manifest, self._segments, self._place, self._changes_from)

    def run(self) -> Recovered:
        with closing(self._extraction):
            self._extraction.expect(self._chunks())
            if self._replay.help is not None:
                self._extraction.help(self._replay.help)
            self.read_sealed()
            lines, cut = self._read_active(self._manifest.active)
        newer = newer_segment(self._files, self._folder, self._manifest, self._place.sequence, self._last_op)
        if newer:
            self._refuse(newer, 0, STALE_MANIFEST)
        # All is known to be well; from here on the folder is changed.
        tidy(
            self._files,
            self._folder,
            self._manifest,
            sequence=self._place.sequence,
            stands_for=self._stands_for,
        )
        self._settle(lines, cut)
        return Recovered(
            manifest=self._manifest,
            segments=self._segments,
            sequence=self._place.sequence,
            crc=self._place.crc,
            last_op=self._last_op,
            torn_bytes=len(cut),
            changes_from=self._changes_from,
        )

    # --- a base ---

    def _read_base(self, file: SealedFile, sound: Future[bool]) -> None:
        if file.name not in self._names:
            self._refuse(file.name, 0, "the file is missing")
        if self._segments:
            self._refuse(file.name, 0, "a base that is not the first file")
        replaces = self._base_header(file)
        segment = Segment(file.name, 0, sequences=array("Q"))
        index = read_index(self._files, self._folder / index_name(file.name), file)
        loaded = index is not None and self._replay.load(index.parts)
        if not sound.result():
            self._refuse(file.name, 0, "the sealed file does not have its size and checksum")
        if index is not None and loaded:
            segment.adopt(index.sequences, index.offsets, records=file.lines - 2)
            segment.size = file.size
            self._segments.append(segment)
        else:
            self._extraction.expect(chunks_of(file.name, file.size, checked=False))
            self._fold_sealed(file, segment)
        self._place = replaces

    def _base_header(self, file: SealedFile) -> Place:
        with self._files.reader(self._folder / file.name) as stream:
            first = stream.readline()
        if not checks(first, 0):
            self._refuse(file.name, 0, "the first line does not have its checksum")
        record = orjson.loads(first)["rec"]
        if record["registryId"] != self._manifest.registry_id or record["epoch"] > self._manifest.epoch:
            self._refuse(file.name, 0, "the file belongs to another registry")
        self._changes_from = record["changesFrom"]
        replaces = place_of_base(record)
        self._stands_for = replaces.sequence
        return replaces

    # --- segments ---

    def _begin(self, name: str) -> Segment:
        if name not in self._names:
            self._refuse(name, 0, "the file is missing")
        if segment_first(name) != self._place.sequence + 1:
            self._refuse(name, 0, "the file is not the one that comes next")
        return Segment.after(self._place.sequence)

    def _read_segment(self, file: SealedFile, sound: Future[bool]) -> None:
        segment = self._begin(file.name)
        if not sound.result():
            self._refuse(file.name, 0, "the sealed file does not have its size and checksum")
        self._fold_sealed(file, segment)

    def _fold_sealed(self, file: SealedFile, segment: Segment) -> None:
        chunks = chunks_of(file.name, file.size, checked=False)
        self._fold(chain.from_iterable(map(self._extraction.of, chunks)), segment)
        if self._last_op != SEAL:
            self._refuse(file.name, segment.size, "the sealed file does not end in its seal")

    def _read_active(self, name: str) -> tuple[CheckedLines[Any], bytes]:
        """The state after the last good line, and the bytes of an unfinished write behind it."""
        segment = self._begin(name)
        cut = b""
        with self._files.reader(self._folder / name) as stream:
            lines = CheckedLines(stream, self._decoder, sequence=self._place.sequence, crc=self._place.crc)
            self._fold(self._checked(stream, lines, name), segment)
            if lines.fault:
                stream.seek(lines.offset)
                cut = stream.read()
        if lines.fault and lines.foreign:
            self._refuse(name, lines.offset, lines.fault)
        if lines.offset == 0:
            self._refuse(name, 0, "the first line, which was durable before MANIFEST named the file, does not check")
        reason = judge(cut, offset=lines.offset, sequence=lines.sequence + 1, crc=lines.crc) if cut else None
        if reason:
            self._refuse(name, lines.offset, f"{lines.fault}; {reason}")
        return lines, cut

    def _checked(self, stream: BinaryIO, lines: CheckedLines[Any], name: str) -> Iterator[Portion[Any]]:
        """The portions of the active file, for as long as its lines check: `lines` tell how far that is."""
        extract = self._replay.extract
        chunks = chunks_of(name, stream.seek(0, os.SEEK_END), checked=True)
        if chunks:
            stream.seek(0)
            yield from portions(CheckedBlocks(stream, self._decoder, lines).whole(chunks[0].end), 0, extract)
        # Not those behind a line that does not check: of what is no line each would be read to its end.
        left = takewhile(lambda chunk: chunk.start <= lines.offset, chunks[1:])
        for portion in chain.from_iterable(map(self._extraction.of, left)):
            if (portion.offset, portion.first) != (lines.offset, lines.sequence + 1):
                break
            lines.sequence, lines.batch, lines.crc = portion.last, portion.batch, portion.crc
            lines.offset += portion.size
            yield portion
        stream.seek(lines.offset)  # where the file ends, or a line does not check
        yield from portions(CheckedBlocks(stream, self._decoder, lines), lines.offset, extract)

    def _fold(self, made: Iterable[Portion[Any]], segment: Segment) -> None:
        """Hand what was made of one file to the replay and take up the place behind its last line."""
        self._last_op = ""
        sequence, crc = self._place.sequence, self._place.crc
        for portion in made:
            if self._last_op == SEAL:
                self._refuse_after_seal(segment, portion, 0)
            if segment.size == 0:
                self._check_first(portion, segment)
            if portion.behind_seal is not None:
                self._refuse_after_seal(segment, portion, portion.behind_seal)
            self._replay.take(portion.content)
            segment.add(portion)
            segment.records += portion.records
            self._last_op = portion.last_op
            sequence, crc = portion.last, portion.crc
        self._segments.append(segment)
        self._place = Place(sequence, crc, segment.name)

    def _check_first(self, portion: Portion[Any], segment: Segment) -> None:
        if is_base(segment.name):
            return  # looked at already
        line = orjson.loads(portion.first_line or b'{"op":"","rec":{}}')
        fault = open_fault(self._manifest, self._place, line["op"], line["rec"])
        if fault:
            self._refuse(segment.name, 0, fault)

    def _refuse_after_seal(self, segment: Segment, portion: Portion[Any], index: int) -> NoReturn:
        starts, sequences = (memoryview(column).cast("Q") for column in (portion.starts, portion.sequences))
        self._refuse(segment.name, segment.size + starts[index], "a line follows the seal", sequences[index])

    # --- the folder ---

    def _settle(self, lines: CheckedLines[Any], cut: bytes) -> None:
        """Cut an unfinished write, and make sure that the last batch kept is on the disk, not only in its cache."""
        path = self._folder / self._manifest.active
        if cut:
            copy = free_name(f"{path.name}.{lines.offset}", ".torn", self._names)
            publish(self._files, self._folder, copy, cut)
        start, _ = self._segments[-1].span(lines.batch) or (0, 0)
        with self._files.reader(path) as stream:
            stream.seek(start)
            batch = stream.read(lines.offset - start)
        fd = self._files.open(path, os.O_RDWR)
        try:
            self._files.ftruncate(fd, lines.offset)
            write_all(self._files, fd, batch, start)
            sync(self._files, fd)
        finally:
            self._files.close(fd)
        sync_folder(self._files, self._folder)

    def _refuse(self, name: str, offset: int, reason: str, sequence: int | None = None) -> NoReturn:
        raise JournalDamaged(name, offset=offset, sequence=sequence or self._place.sequence + 1, reason=reason)
