"""Whether an event loop stood still for so long that what it knew of the storage may be over."""

from __future__ import annotations

import asyncio
import time

import pytest

from worker import stall
from worker.stall import LoopWatch, Supervisor

DOUBT_S = 0.05


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> LoopWatch:
    monkeypatch.setattr(stall, "_DOUBT_S", DOUBT_S)
    monkeypatch.setattr(stall, "_BEAT_S", DOUBT_S / 5)
    return LoopWatch(60.0, Supervisor({}))


def be_away() -> None:
    time.sleep(2 * DOUBT_S)


class Looks:
    """Looks at the storage, during the first of which there is an absence."""

    def __init__(self, absences: int = 0) -> None:
        self.made = 0
        self._absences = absences

    async def __call__(self) -> None:
        self.made += 1
        if self.made <= self._absences:
            be_away()


async def test_an_absence_is_in_doubt_until_the_storage_was_looked_at(watch: LoopWatch) -> None:
    looks = Looks()
    await watch.settle(looks)
    assert not looks.made, "there is nothing to doubt"
    be_away()
    assert watch.doubtful
    assert watch.doubtful, "asking is not looking"
    await watch.settle(looks)
    assert looks.made == 1
    assert not watch.doubtful


async def test_what_was_seen_before_another_absence_ends_no_doubt(watch: LoopWatch) -> None:
    looks = Looks(absences=2)
    be_away()
    await watch.settle(looks)
    assert looks.made == 3
    assert not watch.doubtful


async def test_a_look_that_finds_another_owner_leaves_the_doubt(watch: LoopWatch) -> None:
    async def look() -> None:
        raise PermissionError

    be_away()
    with pytest.raises(PermissionError):
        await watch.settle(look)
    assert watch.doubtful


async def test_an_absence_is_noticed_though_nobody_asked_meanwhile(watch: LoopWatch) -> None:
    beating = asyncio.create_task(watch.run())
    await asyncio.sleep(0)
    be_away()
    async with asyncio.timeout(10):
        while not watch.absences:
            await asyncio.sleep(0.01)
    assert watch.doubtful
    beating.cancel()
    await asyncio.wait([beating])
