"""A journal in numbers, from MANIFEST, first lines and last lines: no file is read through, and no lock is taken."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from worker.journal.failures import JournalDamaged
from worker.journal.files import Files
from worker.journal.format import CONTROL_OPS, checks, stored_crc
from worker.journal.manifest import is_base, read_manifest, segment_first

_WINDOW_BYTES = 64 * 1024
_DISK = Files()


@dataclass(frozen=True, slots=True)
class Part:
    """Some files of a journal."""

    count: int
    bytes: int
    lines: int


@dataclass(frozen=True, slots=True)
class Overview:
    """`head` is the sequence of the last whole line, which may not be durable yet; `written_ms` when the last business
    record that is there was written (unix ms; None if there is none); `compactable_bytes` what a compaction now would
    read of sealed segments; `owned` whether a process has the journal."""

    registry_id: str
    epoch: int
    generation: int
    base: Part
    segments: Part
    head: int
    changes_from: int
    compactable_bytes: int
    written_ms: int | None
    owned: bool


def overview(folder: Path, *, files: Files = _DISK) -> Overview:
    """Raises FileNotFoundError if there is no MANIFEST, JournalDamaged if what is looked at is damaged or missing."""
    seen: int | None = None
    while True:
        look = _Look(files, folder)
        try:
            return look.overview()
        except JournalDamaged:
            # The owner may have replaced the files under our eyes.
            if look.generation == seen:
                raise
            seen = look.generation


class _Look:
    def __init__(self, files: Files, folder: Path) -> None:
        self._files = files
        self._folder = folder
        self._manifest = read_manifest(files, folder)
        self.generation = self._manifest.generation

    def overview(self) -> Overview:
        manifest = self._manifest
        segments = [file for file in manifest.sealed if not is_base(file.name)]
        sealed_bytes = sum(file.size for file in segments)
        first = segment_first(manifest.active) or 0
        with self._opened(manifest.active) as active:
            size = active.seek(0, os.SEEK_END)
            head = next((line["seq"] for line in last_lines(active)), None)
        if head is None:
            raise JournalDamaged(manifest.active, offset=0, sequence=first, reason="it has no whole line")
        base = manifest.base
        return Overview(
            registry_id=manifest.registry_id,
            epoch=manifest.epoch,
            generation=manifest.generation,
            base=Part(0, 0, 0) if base is None else Part(1, base.size, base.lines),
            segments=Part(
                len(segments) + 1, sealed_bytes + size, sum(file.lines for file in segments) + head - first + 1
            ),
            head=head,
            changes_from=0 if base is None else self._changes_from(base.name),
            compactable_bytes=sealed_bytes,
            written_ms=self._written_ms(),
            owned=self._files.owned(self._folder),
        )

    def _opened(self, name: str) -> BinaryIO:
        try:
            return self._files.reader(self._folder / name)
        except FileNotFoundError:
            sequence = segment_first(name) or 0
            raise JournalDamaged(name, offset=0, sequence=sequence, reason="the file is missing") from None

    def _changes_from(self, base: str) -> int:
        with self._opened(base) as stream:
            line = stream.readline()
        if not checks(line, 0):
            raise JournalDamaged(base, offset=0, sequence=0, reason="the first line does not have its checksum")
        return int(orjson.loads(line)["rec"]["changesFrom"])

    def _written_ms(self) -> int | None:
        for name in reversed(self._manifest.names):
            with self._opened(name) as stream:
                for line in last_lines(stream):
                    if line["op"] not in CONTROL_OPS:
                        return int(line["t"])
        return None


def last_lines(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """The lines of a file that check, from the last one back; the very first one if it is a line at all."""
    end = stream.seek(0, os.SEEK_END)
    behind = b""
    while end:
        start = max(0, end - _WINDOW_BYTES)
        stream.seek(start)
        lines = (stream.read(end - start) + behind).splitlines(keepends=True)
        # The first of them may begin further back.
        for line, before in pairwise(reversed(lines)):
            seed = stored_crc(before)
            if seed is not None and checks(line, seed):
                yield orjson.loads(line)
        behind, end = lines[0], start
    if behind.endswith(b"\n"):
        with suppress(orjson.JSONDecodeError):
            yield orjson.loads(behind)
