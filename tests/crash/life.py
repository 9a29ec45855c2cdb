"""A journal through one life of its owner, driven call by call through what the rest of the program uses."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from schemas.errors import ModelManagerError
from worker.journal import SEGMENT_BYTES, EachEntry, Entry, Files, Journal, JournalFailed, base_name
from worker.journal.base_index import index_name, write_index
from worker.journal.boot import replay_base, replay_sealed
from worker.journal.compaction import write_base

Record = dict[str, Any]

RESERVE_BYTES = 4096


def boot(folder: Path, files: Files) -> list[Entry]:
    """What a boot finds. Its owner is gone at once, without a word: on a fake disk, whose `copy` frees the folder."""
    found: list[Entry] = []
    Journal.open(folder, replay=found.append, files=files)
    return found


async def compact(journal: Journal, files: Files) -> None:
    """Rewrite the sealed files with every record they have, step by step as a compaction does."""
    folder = journal.folder
    manifest = await journal.rotate()
    name = base_name(manifest.generation + 1)
    sequences: list[int] = []
    sealed = replay_sealed(files, folder, EachEntry(lambda entry: sequences.append(entry.sequence)))
    keep = np.array(sequences, np.uint64)
    base = write_base(files, folder, name, sealed, keep, changes_from=0, time_ms=0)
    segment = replay_base(files, folder / f"{name}.tmp", EachEntry(lambda entry: None))
    write_index(files, folder / f"{index_name(name)}.tmp", base.file, segment.dumped())
    await journal.adopt(base)


class Life:
    """From a boot to `close`. Each record is `put` and answered before the next call."""

    def __init__(self, folder: Path, files: Files, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._files = files
        self.found: list[Entry] = []
        self.journal = Journal.open(
            folder,
            replay=self.found.append,
            frees=lambda op, record: bool(record.get("frees")),
            files=files,
            segment_bytes=segment_bytes,
            reserve_bytes=RESERVE_BYTES,
        )
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self._runner.run(self._start())

    async def _start(self) -> None:
        self.journal.start(lambda _: None)

    def put(
        self, records: Sequence[Record], answered: Callable[[Record, Entry | Exception], None] = lambda *_: None
    ) -> list[Entry | Exception]:
        """Append these at once: what became of each. `answered` is told the moment it is known."""

        async def one(record: Record) -> Entry | Exception:
            outcome: Entry | Exception
            try:
                outcome = await self.journal.append("put", record)
            except (ModelManagerError, JournalFailed) as error:
                outcome = error
            answered(record, outcome)
            return outcome

        async def all_of_them() -> list[Entry | Exception]:
            return await asyncio.gather(*map(one, records))

        return self._runner.run(all_of_them())

    def compact(self) -> None:
        self._runner.run(compact(self.journal, self._files))

    def catch_up(self) -> None:
        """Called on the writer's thread: wait until everything it has reported so far was answered."""
        done = threading.Event()

        def hop(left: int) -> None:
            if left:
                self._loop.call_soon(hop, left - 1)
            else:
                done.set()

        if not self._loop.is_running():
            return
        # More turns of the loop than an answer takes from the report over the future to whoever awaits it.
        self._loop.call_soon_threadsafe(hop, 4)
        while self._loop.is_running() and not done.wait(0.001):
            pass

    def close(self) -> None:
        self._runner.run(self.journal.close())
        self._runner.close()
