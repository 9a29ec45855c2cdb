"""When the files of credentials change: which connections go over to new ones, and how often."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from worker.transport import rotation
from worker.transport.connections import LinkLostError
from worker.transport.link import Link
from worker.transport.rotation import Rotation

INTERVAL_S = 0.01


class Renewals:
    """Stands for a link: counts its renewals, and refuses the first few."""

    def __init__(self, refusals: int = 0) -> None:
        self.done = self.asked = 0
        self._refusals = refusals

    async def renew(self) -> None:
        self.asked += 1
        if self.asked <= self._refusals:
            raise LinkLostError("the broker refused the login")
        self.done += 1


@contextlib.asynccontextmanager
async def watching(file: Path, *links: Renewals) -> AsyncIterator[None]:
    task = asyncio.create_task(Rotation([file], [cast(Link, link) for link in links]).run())
    await asyncio.sleep(0.3)  # it has looked at the file as it is
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def replace(file: Path, text: str) -> None:
    """At once: a file that is half written would be a change of its own."""
    written = file.with_name("new")
    written.write_text(text)
    written.replace(file)


async def until_renewed(*links: Renewals) -> None:
    async with asyncio.timeout(10):
        while not all(link.done for link in links):
            await asyncio.sleep(INTERVAL_S)
    await asyncio.sleep(INTERVAL_S * 5)  # time for one renewal too many


@pytest.fixture
def password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(rotation, "WATCH_INTERVAL_S", INTERVAL_S)
    file = tmp_path / "password"
    file.write_text("old")
    return file


async def test_each_connection_is_renewed_once_for_a_change(password: Path) -> None:
    first, second = Renewals(), Renewals()
    async with watching(password, first, second):
        assert first.asked == second.asked == 0
        replace(password, "the new one")
        await until_renewed(first, second)
        assert (first.asked, second.asked) == (1, 1)
        replace(password, "one newer still")
        async with asyncio.timeout(10):
            while second.done < 2:
                await asyncio.sleep(INTERVAL_S)
        assert (first.asked, second.asked) == (2, 2)


async def test_one_that_is_refused_is_tried_again_and_the_others_are_left_alone(password: Path) -> None:
    taken, refused = Renewals(), Renewals(refusals=5)
    async with watching(password, taken, refused):
        replace(password, "the new one")
        await until_renewed(taken, refused)
    assert (taken.asked, refused.asked) == (1, 6)


async def test_files_that_are_back_as_they_were_leave_the_connections_alone(password: Path) -> None:
    refused = Renewals(refusals=1_000_000)
    kept = password.rename(password.with_name("kept"))
    async with watching(kept, refused):
        kept.rename(password)
        async with asyncio.timeout(10):
            while not refused.asked:
                await asyncio.sleep(INTERVAL_S)
        password.rename(kept)
        await asyncio.sleep(INTERVAL_S * 5)
        asked = refused.asked
        await asyncio.sleep(INTERVAL_S * 10)
        assert refused.asked == asked
