"""A real process that owns a journal, forked from one that has all modules loaded; and who listens to it outside.

What it tells goes through a pipe, a line each, so that what was told before it died is known:

    found <dropped> <sequence>:<n>,...   its boot is over
    ack <sequence> <n>                   that record was acknowledged
    no <n>                               that record was refused for good
    step <word>                          it came by
    broken <reason>                      it saw a promise broken
"""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from schemas.errors import ModelManagerError
from tests.crash.ledger import LIFE, Book, Found, Ledger, found_in, record_of, rewrite
from worker.journal import Files, Journal, JournalFailed, base_name
from worker.journal.files import SyncFailed

_PATIENCE_S = 60.0

FAILED = 3
"""Exit status of an owner whose disk failed: its journal stopped, or did not open."""


class Voice:
    """The owner's end of the pipe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def say(self, *words: object) -> None:
        data = memoryview(" ".join(map(str, words)).encode() + b"\n")
        while data:
            data = data[os.write(self._fd, data) :]


class Store:
    """One life of a journal inside the owner, from its boot to `close`; every outcome is told."""

    def __init__(self, folder: Path, voice: Voice, *, life: int, files: Files, segment_bytes: int) -> None:
        self._files = files
        self._voice = voice
        self._next = life * LIFE
        ledger = Ledger()
        self.journal = Journal.open(folder, replay=ledger, files=files, segment_bytes=segment_bytes)
        found = found_in(self.journal, ledger)
        voice.say("found", found.dropped, ",".join(f"{sequence}:{n}" for sequence, n in found.pairs))

    def start(self) -> None:
        self.journal.start(lambda _: None)

    async def put(self, count: int = 1) -> None:
        """So many at once. Raises JournalFailed once the journal has stopped."""
        await asyncio.gather(*(self._one() for _ in range(count)))

    async def _one(self) -> None:
        n, self._next = self._next, self._next + 1
        try:
            entry = await self.journal.append(*record_of(n))
        except ModelManagerError:
            self._voice.say("no", n)
        else:
            self._voice.say("ack", entry.sequence, n)

    async def compact(self, step: Callable[[str], None] = lambda word: None) -> None:
        """As worker/upkeep/compaction.py does it, but in this process; `step` is told before each part.

        Raises JournalFailed once the journal has stopped. If it is the rewriting that fails, nothing has happened.
        """
        try:
            step("rotate")
            manifest = await self.journal.rotate()
            step("rewrite")
            base = await asyncio.to_thread(
                rewrite, self._files, self.journal.folder, base_name(manifest.generation + 1)
            )
            step("adopt")
            await self.journal.adopt(base)
            step("compacted")
        except (ModelManagerError, SyncFailed, OSError, ValueError):
            step("not compacted")

    async def close(self) -> None:
        """Raises JournalFailed if the journal has stopped, be it now."""
        await self.journal.close()
        if not self.journal.healthy:
            raise JournalFailed(self.journal.failure)


class Owner:
    """The process, from outside. What it tells goes into `book`."""

    def __init__(self, book: Book, live: Callable[[Voice], None]) -> None:
        """Fork, and call `live` there; this process must have one thread."""
        self.book = book
        self.broken: list[str] = []
        self.booted = False
        self.place = "boot"
        """Where it told to be last."""
        self._rest = b""
        self._fd, writing = os.pipe()
        gc.freeze()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._fd)
            os._exit(_lived(live, Voice(writing)))
        os.close(writing)
        self._ended = False

    def listen(self, *, until: float | None = None, unless: Callable[[], bool] = lambda: False) -> bool:
        """Until that moment (monotonic; else for a minute), the end of the process, or `unless`: whether it lives."""
        until = time.monotonic() + _PATIENCE_S if until is None else until
        while not self._ended and not unless():
            left = max(0.0, until - time.monotonic())
            if not select.select([self._fd], [], [], left)[0]:
                return True
            data = os.read(self._fd, 1 << 20)
            self._ended = not data
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(line.decode())
        return not self._ended

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def end(self, *, deaf: bool = False) -> int:
        """Wait for its end, `deaf` to what it tells until then; the exit status, negative after a signal."""
        if not deaf and self.listen():
            self.broken.append("it hangs")
            self.kill()
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _take(self, line: str) -> None:
        kind, _, text = line.partition(" ")
        if kind == "ack":
            sequence, n = map(int, text.split())
            self.book.acknowledge(sequence, n)
        elif kind == "no":
            self.book.refused.add(int(text))
        elif kind == "found":
            dropped, _, pairs = text.partition(" ")
            listed = [pair.partition(":") for pair in pairs.split(",") if pair]
            self.broken += self.book.check(Found([(int(a), int(b)) for a, _, b in listed], int(dropped)))
            self.booted, self.place = True, "appends"
        elif kind == "step":
            self.place = text
        else:
            self.broken.append(text)


def _lived(live: Callable[[Voice], None], voice: Voice) -> int:
    try:
        live(voice)
    except (JournalFailed, OSError):
        return FAILED
    except BaseException as error:  # noqa: BLE001 - nothing may come back into the parent's code
        voice.say("broken", f"{type(error).__name__}: {error}")
        return 1
    return 0
