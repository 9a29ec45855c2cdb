"""SIGKILL at any moment of a real process: while it boots, appends, rotates and compacts."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.crash.ledger import Book
from tests.crash.owner import Owner, Store, Voice
from tests.crash.tally import Tally, progress
from worker.journal import Files, verify

COUNT = 1000
LIVES = 25
"""So many lives has a folder, then there is a new one: its creation is killed, too."""

_SEGMENT_BYTES = 8192
_WRITERS = 6
_LONGEST_S = 0.06


def work(folder: Path, voice: Voice, *, life: int, choose: random.Random) -> None:
    """What an owner does until it is killed: several writers, small segments, one compaction after the other."""
    store = Store(folder, voice, life=life, files=Files(), segment_bytes=_SEGMENT_BYTES)
    pause = choose.random() * 0.02

    async def writing() -> None:
        while True:
            await store.put(choose.randint(1, 3))

    async def compacting() -> None:
        while True:
            await asyncio.sleep(pause)
            await store.compact(lambda word: voice.say("step", word))

    async def all_of_it() -> None:
        store.start()
        await asyncio.gather(*(writing() for _ in range(_WRITERS)), compacting())

    asyncio.run(all_of_it())


def run(count: int = COUNT, *, seed: int = 1) -> Tally:
    """Kill that many owners, and boot what each leaves."""
    tally = Tally("SIGKILL")
    choose = random.Random(seed)
    during: Counter[str] = Counter()
    while tally.cases < count and not tally.broken:
        folder = Path(tempfile.mkdtemp(prefix="kills-"))
        book = Book()
        for _ in range(min(LIVES, count - tally.cases)):
            owner = next_owner(folder / "registry", book, choose)
            listen_for_a_while(owner, choose)
            owner.kill()
            if (status := owner.end()) != -signal.SIGKILL:
                owner.broken.append(f"it ended by itself, with status {status}")
            during[owner.place] += 1
            tally.cases += 1
            take_up(owner, str(folder), tally)
            if tally.cases % 100 == 0:
                progress("kills", tally.cases, count, tally)
            if tally.broken:
                break
        else:
            boot_again(folder / "registry", book, str(folder), tally)
        tally.acks += book.acks
        tally.lost += book.lost
        if not tally.broken:
            shutil.rmtree(folder)
    tally.also = ", ".join(f"{number} in {place}" for place, number in sorted(during.items()))
    return tally.done()


def next_owner(folder: Path, book: Book, choose: random.Random) -> Owner:
    """The next life of what is in `folder`."""
    book.life += 1
    seed = choose.getrandbits(32)
    return Owner(book, lambda voice: work(folder, voice, life=book.life, choose=random.Random(seed)))


def take_up(owner: Owner, where: str, tally: Tally) -> None:
    tally.boots += owner.booted
    tally.refused += bool(owner.broken) and not owner.booted
    tally.broken += [f"{where}, life {owner.book.life}, {owner.place}: {text}" for text in owner.broken]


def listen_for_a_while(owner: Owner, choose: random.Random) -> None:
    """One in five until it is in its boot or just behind, the others until up to 60 ms behind that."""
    if choose.random() < 0.8:
        owner.listen(unless=lambda: owner.booted)
        owner.listen(until=time.monotonic() + choose.random() * _LONGEST_S)
    else:
        owner.listen(until=time.monotonic() + choose.random() * _LONGEST_S / 3)


def boot_again(folder: Path, book: Book, where: str, tally: Tally, *, count: int = 0) -> None:
    """One more life, in peace: so many records, a close, and every byte checked."""
    book.life += 1

    async def live(voice: Voice) -> None:
        store = Store(folder, voice, life=book.life, files=Files(), segment_bytes=_SEGMENT_BYTES)
        store.start()
        await store.put(count)
        await store.close()
        if (damage := verify(folder).damage) is not None:
            voice.say("broken", f"verify finds {damage}")

    owner = Owner(book, lambda voice: asyncio.run(live(voice)))
    if (status := owner.end()) != 0:
        owner.broken.append(f"it ended with status {status}")
    take_up(owner, where, tally)
