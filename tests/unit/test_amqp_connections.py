"""How the failures of connections are told, and that a cancellation is never lost among them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from aiormq.exceptions import AMQPConnectionError, DeliveryError
from pamqp.commands import Basic

from worker.transport.connections import LinkLostError, link_failures


async def forgets() -> None:
    """As `asyncio.wait_for` does when what it waits for is done in the turn in which it is cancelled."""
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        return


async def tells_another() -> None:
    """As aiormq does when it has a reason of its own."""
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        raise AMQPConnectionError("lost") from None


async def passes_on() -> None:
    await asyncio.sleep(60)


async def guarded(call: Callable[[], Awaitable[None]]) -> None:
    with link_failures():
        await call()


@pytest.mark.parametrize("call", [forgets, tells_another, passes_on])
async def test_who_is_cancelled_ends_whatever_the_library_makes_of_it(call: Callable[[], Awaitable[None]]) -> None:
    task = asyncio.create_task(guarded(call))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.parametrize("call", [forgets, tells_another, passes_on])
async def test_whose_time_is_over_is_told_so_whatever_the_library_makes_of_it(
    call: Callable[[], Awaitable[None]],
) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await guarded(call)


async def test_a_cancellation_that_nobody_sent_is_a_lost_link_also_while_a_cancelled_task_cleans_up() -> None:
    async def cancels_itself() -> None:
        raise asyncio.CancelledError

    async def cleans_up() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            with pytest.raises(LinkLostError):
                await guarded(cancels_itself)
        return "clean"

    with pytest.raises(LinkLostError):
        await guarded(cancels_itself)
    task = asyncio.create_task(cleans_up())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "clean"


async def test_a_message_that_was_returned_is_no_lost_link() -> None:
    async def is_returned() -> None:
        raise DeliveryError(None, Basic.Nack())

    with pytest.raises(DeliveryError):
        await guarded(is_returned)
