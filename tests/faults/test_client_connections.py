"""The client's connection under every fault: it is found out in seconds, and each call ends with its one answer."""

from __future__ import annotations

import asyncio
import time

import aiormq
import pytest
from aio_pika import Connection

from schemas.errors import ModelManagerError
from tests.amqp import calling as bystander
from tests.amqp import eventually, serving
from tests.amqp_caller import calling
from tests.ledger.proxy import Proxy
from worker.client import amqp_caller
from worker.client import hints as listening
from worker.transport import topology

pytestmark = pytest.mark.broker

SOON_S = 0.3


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amqp_caller, "_WATCH_S", SOON_S)


async def test_a_connection_whose_other_end_is_gone_is_found_while_calls_wait(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, Proxy(amqp_url) as proxy, calling(proxy.url, rack) as caller:
        calls = [asyncio.create_task(caller.call("slow", {}, timeout_s=30, idempotency_key=f"K{n}")) for n in range(20)]
        await eventually(lambda: served.dispatcher.started["slow"] >= 20, "all calls to arrive")
        proxy.half_open("far")
        await eventually(lambda: served.dispatcher.started["slow"] >= 40, "all calls to arrive again")
        served.dispatcher.released.set()
        assert [reply["effects"] for reply in await asyncio.gather(*calls)] == [1] * 20
        assert proxy.counts["connections"] == 2


async def test_a_frozen_broker_costs_the_connection_and_no_call(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, Proxy(amqp_url) as proxy, calling(proxy.url, rack) as caller:
        await caller.call("echo", {}, timeout_s=10)
        freezing = asyncio.create_task(proxy.freeze(4 * SOON_S))
        await asyncio.sleep(0)
        reply = await caller.call("count", {}, timeout_s=30, idempotency_key="K")
        await freezing
        assert reply["effects"] == served.dispatcher.effects.total() == 1
        assert proxy.counts["frozen"] == 1


async def test_a_connection_on_which_calls_wait_for_long_is_kept(amqp_url: str, rack: str) -> None:
    async with serving(amqp_url, rack) as served, Proxy(amqp_url) as proxy, calling(proxy.url, rack) as caller:
        call = asyncio.create_task(caller.call("slow", {}, timeout_s=30, idempotency_key="K"))
        done, _ = await asyncio.wait([call], timeout=4 * SOON_S)
        assert not done
        served.dispatcher.released.set()
        assert (await call)["effects"] == 1
        assert proxy.counts["connections"] == served.dispatcher.started["slow"] == 1


async def test_a_blocked_connection_is_waited_for(rabbitmq, rack: str) -> None:
    async with serving(rabbitmq.url, rack), Proxy(rabbitmq.url) as proxy, calling(proxy.url, rack) as caller:
        await caller.call("echo", {}, timeout_s=10)
        await asyncio.to_thread(rabbitmq.ctl, "set_vm_memory_high_watermark", "0.00001")
        try:
            call = asyncio.create_task(caller.call("count", {}, timeout_s=60, idempotency_key="K"))
            done, _ = await asyncio.wait([call], timeout=6 * SOON_S)
            assert not done
            assert proxy.counts["connections"] == 1
        finally:
            await asyncio.to_thread(rabbitmq.ctl, "set_vm_memory_high_watermark", "0.4")
        assert (await call)["effects"] == 1
        assert proxy.counts["connections"] == 1


async def test_a_request_that_is_lost_with_its_queue_is_sent_again(
    amqp_url: str, rack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amqp_caller, "_RESEND_S", SOON_S)
    async with aiormq.connect(amqp_url) as connection, calling(amqp_url, rack) as caller:
        await topology.provision(connection, rack)
        call = asyncio.create_task(caller.call("count", {}, timeout_s=30, idempotency_key="K"))
        async with bystander(amqp_url, rack) as seen:
            await seen.until_depth(topology.request_queue(rack), 1)
        channel = await connection.channel()
        deleted = await channel.queue_delete(topology.request_queue(rack))
        assert (deleted.message_count or 0) >= 1
        done, _ = await asyncio.wait([call], timeout=6 * SOON_S)  # it is sent again while there is no queue
        assert not done
        async with serving(amqp_url, rack) as served:
            assert (await call)["effects"] == 1
            assert served.dispatcher.effects.total() == 1


async def test_a_queue_that_is_away_for_a_moment_is_waited_for_by_who_was_answered_before(
    amqp_url: str, rack: str
) -> None:
    async with calling(amqp_url, rack) as caller:
        async with serving(amqp_url, rack):
            await caller.call("echo", {}, timeout_s=10)
        call = asyncio.create_task(caller.call("echo", {"n": 1}, timeout_s=30))
        done, _ = await asyncio.wait([call], timeout=SOON_S)
        assert not done
        async with serving(amqp_url, rack):
            assert (await call)["params"] == {"n": 1}


async def test_without_an_answer_a_call_that_was_sent_again_ends_at_its_deadline(
    amqp_url: str, rack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amqp_caller, "_RESEND_S", SOON_S)
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        with pytest.raises(ModelManagerError) as caught:
            await caller.call("slow", {}, timeout_s=1.5, idempotency_key="K")
        assert caught.value.code == "ERR_DEADLINE_EXCEEDED"
        assert served.dispatcher.started["slow"] >= 2
        served.dispatcher.released.set()
        await eventually(lambda: served.dispatcher.effects.total() == 1)


async def test_a_listener_leaves_a_connection_that_does_not_close_in_its_time(
    amqp_url: str, rack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, closings = Connection.close, iter([60.0])

    async def hesitant(connection: Connection) -> None:
        await asyncio.sleep(next(closings, 0))
        await close(connection)

    monkeypatch.setattr(listening, "_CLOSE_S", SOON_S)
    async with serving(amqp_url, rack):
        async with listening.hints(amqp_url, rack):
            monkeypatch.setattr(Connection, "close", hesitant)
            left = time.monotonic()
        assert time.monotonic() - left < 10 * SOON_S
