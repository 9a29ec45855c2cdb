"""An error, a short write or a SIGKILL in place of every system call that a journal makes, one at a time.

The owner stops at marks, where strace is attached to it: strace counts calls by thread, and between two marks no two
threads make the same calls.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.crash.kills import boot_again, take_up
from tests.crash.ledger import Book
from tests.crash.owner import FAILED, Owner, Store, Voice
from tests.crash.strace import Strace, inject, mark, missing, record, recorded
from tests.crash.tally import Tally, progress
from worker.journal import Files

_SEGMENT_BYTES = 2500
_PR_SET_PTRACER, _ANY = 0x59616D61, -1
_FAULTS = ("error=EIO", "error=ENOSPC", "signal=KILL")
# Says of a write that nothing of it was done; strace cannot do it in part.
_NOTHING = "retval=0"


@dataclass(frozen=True, slots=True)
class Injection:
    """What happens in place of one call after a mark, in the words of strace."""

    mark: str
    call: str
    ordinal: int
    how: str

    @property
    def stops(self) -> bool:
        """Whether the journal must acknowledge nothing more: not while a base is written, which is nobody's yet."""
        failed_sync = self.call in ("fdatasync", "fsync") and self.how.startswith("error")
        return failed_sync and not self.mark.startswith("rewrite")

    def __str__(self) -> str:
        return f"{self.how} at {self.call} {self.ordinal} after {self.mark!r}"


class ShortFiles(Files):
    """The write `number` (from 1) is done in part; the next one goes on, or finds the disk `full`."""

    def __init__(self, number: int, *, full: bool) -> None:
        self._number = number
        self._full = full
        self.writes = 0

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        self.writes += 1
        if self.writes == self._number:
            return super().pwrite(fd, data[: max(1, len(data) // 2)], offset)
        if self._full and self.writes == self._number + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().pwrite(fd, data, offset)


def script(folder: Path, voice: Voice, reached: Callable[[str], None], disk: Files) -> None:
    """All that a journal does, in three lives. It tells where another thread begins to write."""

    async def first() -> None:
        reached("create")
        store = Store(folder, voice, life=1, files=disk, segment_bytes=_SEGMENT_BYTES)
        reached("append")
        store.start()
        for count in (1, 4, 9, 3, 9):
            await store.put(count)
        reached("close")
        await store.close()

    async def next_one(life: int) -> None:
        reached(f"boot {life}")
        store = Store(folder, voice, life=life, files=disk, segment_bytes=_SEGMENT_BYTES)
        reached(f"append {life}")
        store.start()
        await store.put(3)
        await store.compact(lambda word: reached(f"{word} {life}"))
        await store.put(2)
        reached(f"close {life}")
        await store.close()

    asyncio.run(first())
    asyncio.run(next_one(2))
    asyncio.run(next_one(3))


def play(folder: Path, book: Book, at: str, watch: Callable[[int], Strace]) -> tuple[Owner, int, str]:
    """The script, with a strace from the mark `at` on: its owner, exit status, and what strace wrote.

    Raises OSError if strace could not attach.
    """
    waiting, go = os.pipe()

    def live(voice: Voice) -> None:
        # Any process of this user may trace it; else, in places, only its ancestors could.
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY)

        def reached(name: str) -> None:
            voice.say("step", name)
            if name == at:
                os.read(waiting, 1)
            mark(name)

        script(folder, voice, reached, Files())

    book.life = 3
    owner = Owner(book, live)
    try:
        owner.listen(unless=lambda: owner.place == at)
        strace = watch(owner.pid)
        os.write(go, b"!")
        owner.listen()
    except BaseException:
        owner.kill()
        raise
    finally:
        status = owner.end()
        os.close(waiting)
        os.close(go)
    return owner, status, strace.end()


def sites(base: Path) -> list[tuple[str, str, int]]:
    """Every call on the journal's folder, by mark, name and ordinal."""
    folder = base / "registry"
    _, status, written = play(folder, Book(), "create", record)
    assert status == 0, "the script has to come to its end"
    found: dict[tuple[str, str, int], None] = {}
    for at, calls in recorded(written).items():
        for call in calls:
            if call.name != "openat" or str(folder) in call.arguments:
                found[at, call.name, call.ordinal] = None
    return list(found)


def injections(found: list[tuple[str, str, int]]) -> Iterator[Injection]:
    for at, call, ordinal in found:
        for how in (*_FAULTS, _NOTHING) if call == "pwrite64" else _FAULTS:
            yield Injection(at, call, ordinal, how)


def run(*, every: int = 1) -> Tally:
    """All of them, or one in `every`."""
    tally = Tally("injected faults")
    if (lack := missing()) is not None:
        tally.not_run = lack
        return tally
    with TemporaryDirectory(prefix="injections-") as name:
        chosen = list(injections(sites(Path(name))))[::every]
    missed = 0
    for injection in chosen:
        missed += not _injected(injection, tally)
        if tally.cases % 100 == 0:
            progress("injections", tally.cases, len(chosen), tally)
    if missed:
        tally.also = f"{missed} did not come to their call"
    return tally.done()


def _injected(injection: Injection, tally: Tally) -> bool:
    """Whether the call was made that the injection is for."""

    def watch(pid: int) -> Strace:
        return inject(pid, injection.call, injection.ordinal, injection.how)

    with TemporaryDirectory(prefix="injections-") as name:
        folder, book = Path(name) / "registry", Book()
        owner, status, written = play(folder, book, injection.mark, watch)
        came = "INJECTED" in written or status == -signal.SIGKILL
        if came and injection.stops and status != FAILED:
            owner.broken.append(f"it went on after a failed sync, and ended with status {status}")
        _judge(str(injection), folder, owner, status, tally)
    return came


def run_short(*, every: int = 1) -> Tally:
    """Every write of the script done in part; the next one goes on with it, or finds the disk full."""
    tally = Tally("short writes")
    with TemporaryDirectory(prefix="injections-") as name, Path(os.devnull).open("wb") as silence:
        counted = ShortFiles(0, full=False)
        script(Path(name) / "registry", Voice(silence.fileno()), lambda name: None, counted)
    for number in range(1, counted.writes + 1, every):
        for full in (False, True):
            _cut_short(number, full, tally)
    return tally.done()


def _cut_short(number: int, full: bool, tally: Tally) -> None:
    with TemporaryDirectory(prefix="injections-") as name:
        folder, book, files = Path(name) / "registry", Book(life=3), ShortFiles(number, full=full)
        owner = Owner(book, lambda voice: script(folder, voice, lambda name: None, files))
        status = owner.end()
        _judge(f"write {number} in part{', then a full disk' if full else ''}", folder, owner, status, tally)


def _judge(where: str, folder: Path, owner: Owner, status: int, tally: Tally) -> None:
    """What it left must boot, go on, and boot again."""
    tally.cases += 1
    if status not in (0, FAILED, -signal.SIGKILL):
        owner.broken.append(f"exit status {status}")
    take_up(owner, where, tally)
    for count in (2, 0):
        boot_again(folder, owner.book, where, tally, count=count)
    tally.acks += owner.book.acks
    tally.lost += owner.book.lost
