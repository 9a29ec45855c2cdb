"""A journal's folder to be damaged: a base with its index, a sealed segment, the active one, MANIFEST."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from tests.crash.ledger import Ledger, is_passing, rewrite
from worker.journal import Entry, Files, Journal, JournalObserver, base_name, dump
from worker.journal.appender import Appender
from worker.journal.boot import recover
from worker.journal.compaction import read_written
from worker.journal.format import encode
from worker.journal.reserve import Reserve

SECTOR_BYTES = 512


class Specimen:
    """It is the same again after each damage. `closed`: by its owner, else it ends in its last batch."""

    def __init__(self, folder: Path, batches: Sequence[int], *, text: int, closed: bool) -> None:
        """Each of three files gets batches of these numbers of records with `text` bytes each."""
        self.folder = folder
        _fill(folder, batches, "x" * text, closed)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.entries = self.boot()
        self.restore()
        self._lines = list(dump(folder))

    @property
    def active(self) -> str:
        return max(name for name in self.files if name.startswith("seg-"))

    @property
    def journal_files(self) -> list[str]:
        """Those that hold lines, in order."""
        return sorted(name for name in self.files if name.endswith(".jsonl"))

    @property
    def last_batch(self) -> int:
        """Where in the active file it begins."""
        lines = self.files[self.active].splitlines(keepends=True)
        batches = [line.split(b'"b":')[1].split(b",")[0] for line in lines]
        return sum(map(len, lines[: batches.index(batches[-1])]))

    def kept(self, size: int) -> int:
        """How many records there are if the active file ends at `size`."""
        ends = list(accumulate(map(len, self.files[self.active].splitlines(keepends=True))))
        lost = sum(end > size for end in ends)
        left = self._lines[: len(self._lines) - lost]
        return sum(entry.op in ("put", "pass") for entry in left)

    @contextmanager
    def damaged(self, name: str, data: bytes) -> Iterator[None]:
        """With `data` in place of that file."""
        (self.folder / name).write_bytes(data)
        try:
            yield
        finally:
            self.restore()

    def boot(self) -> list[Entry]:
        """All records that are found. Raises JournalDamaged."""
        ledger = Ledger()
        journal = Journal.open(self.folder, replay=ledger)
        try:
            found = journal.read(0, 2**62)
        finally:
            asyncio.run(journal.close())
        if [(entry.sequence, entry.record["n"]) for entry in found] != ledger.pairs:
            raise AssertionError("the replay has not the records that are read")
        return found

    def content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.name != "LOCK"}

    def restore(self) -> None:
        for name, data in self.content().items():
            if name not in self.files:
                (self.folder / name).unlink()
            elif data != self.files[name]:
                (self.folder / name).write_bytes(self.files[name])


def _fill(folder: Path, batches: Sequence[int], text: str, closed: bool) -> None:
    files = Files()
    recovered = recover(files, folder, lambda _: None, time.time)
    reserve = Reserve(files, folder, size=0, clock=time.time)
    appender = Appender(
        files, folder, recovered, reserve, segment_bytes=2**40, clock=time.time, observe=JournalObserver()
    )
    appender.prepare()
    n = 0
    for part in range(3):
        for size in batches:
            numbers = range(n + 1, n + 1 + size)
            n += size
            appender.append(
                [encode("pass" if is_passing(n) else "put", {"n": n, "text": text}) for n in numbers],
            )
        if part < 2:
            appender.rotate()
        if part == 0:
            base = rewrite(files, folder, base_name(appender.manifest.generation + 1))
            for file in appender.adopt(base, read_written(files, folder, base)):
                files.unlink(folder / file.name)
    if closed:
        appender.mark()
    appender.close()
