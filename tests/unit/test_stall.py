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


async def test_an_absence_is_in_doubt_until_the_storage_was_looked_at(watch: LoopWatch) -> None:
    assert not watch.doubtful
    be_away()
    assert watch.doubtful
    assert watch.doubtful, "asking is not looking"
    watch.trust(watch.absences)
    assert not watch.doubtful


async def test_what_was_seen_before_another_absence_ends_no_doubt(watch: LoopWatch) -> None:
    be_away()
    assert watch.doubtful
    absences = watch.absences
    be_away()
    watch.trust(absences)
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
