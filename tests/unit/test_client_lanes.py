"""Work in lanes ends with its first failure, and with a cancellation that comes just then."""

from __future__ import annotations

import asyncio

import pytest

from worker.client.transfer import in_lanes


async def test_the_first_failure_ends_the_others_and_is_raised() -> None:
    ended: list[int] = []

    async def work(item: int) -> None:
        if item == 2:
            raise KeyError(item)
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(item)

    with pytest.raises(KeyError):
        await in_lanes(range(10), work, lanes=3)
    assert ended == [0, 1]


async def test_a_cancellation_counts_although_the_work_fails_at_the_same_moment() -> None:
    fails = asyncio.Event()

    async def work(item: int) -> None:
        await fails.wait()
        raise KeyError(item)

    task = asyncio.create_task(in_lanes(range(3), work))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    fails.set()
    task.cancel()
    await asyncio.wait([task], timeout=5)
    assert task.cancelled()


async def test_every_item_is_done_once_and_so_many_at_a_time() -> None:
    running, most, done = 0, 0, []

    async def work(item: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        done.append(item)

    await in_lanes(range(20), work, lanes=5)
    assert (sorted(done), most) == (list(range(20)), 5)
