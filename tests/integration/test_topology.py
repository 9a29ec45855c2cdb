"""The exchanges and queues on RabbitMQ: made once, left alone, compared with what they should be."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiormq
import pytest
from aiormq.abc import AbstractConnection

from tests.amqp import calling, delete_queues, serving
from worker.transport import topology
from worker.transport.topology import Problem, check, dead_letter_queue, provision, request_queue

pytestmark = pytest.mark.broker


@pytest.fixture
async def connection(amqp_url: str, rack: str) -> AsyncIterator[AbstractConnection]:
    async with aiormq.connect(amqp_url) as connection:
        yield connection
    await delete_queues(amqp_url, rack)


async def test_check_names_what_is_missing_and_creates_nothing(connection: AbstractConnection, rack: str) -> None:
    missing = [Problem("missing", dead_letter_queue(rack)), Problem("missing", request_queue(rack))]
    for _ in range(2):
        problems = await check(connection, rack)
        assert [problem for problem in problems if rack in problem.name] == missing


async def test_provision_makes_everything_and_again_changes_nothing(connection: AbstractConnection, rack: str) -> None:
    for _ in range(2):
        assert await provision(connection, rack) == []
        assert await check(connection, rack) == []
    channel = await connection.channel()
    await channel.basic_publish(b"{}", exchange=topology.RPC_EXCHANGE, routing_key=f"{rack}.ping", mandatory=True)
    await channel.basic_publish(b"{}", exchange=topology.DEAD_EXCHANGE, routing_key=rack, mandatory=True)
    for queue in (request_queue(rack), dead_letter_queue(rack)):
        assert (await channel.queue_declare(queue, passive=True)).message_count == 1


async def test_a_queue_that_goes_while_all_is_provisioned_is_made_once_more(
    connection: AbstractConnection, rack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind, deleted = topology._bind, []

    async def delete_and_bind(connection: AbstractConnection, binding: topology.Binding) -> Problem | None:
        if binding.queue == request_queue(rack) and not deleted:
            deleted.append(await (await connection.channel()).queue_delete(binding.queue))
        return await bind(connection, binding)

    monkeypatch.setattr(topology, "_bind", delete_and_bind)
    assert await provision(connection, rack) == []
    assert deleted
    assert await check(connection, rack) == []


async def test_a_queue_of_another_kind_is_reported_and_served(
    connection: AbstractConnection, amqp_url: str, rack: str
) -> None:
    channel = await connection.channel()
    await channel.queue_declare(request_queue(rack), durable=True)
    for examine in (provision, check):
        problems = await examine(connection, rack)
        assert [(problem.kind, problem.name) for problem in problems if problem.kind == "different"] == [
            ("different", request_queue(rack))
        ]
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        assert (await caller.call("echo")).body["success"]
        assert len(served.transport.status.degraded) == 1
        assert request_queue(rack) in served.transport.status.degraded[0]
        assert "x-" in served.transport.status.degraded[0]


async def test_without_the_right_to_provision_a_missing_queue_is_waited_for(
    connection: AbstractConnection, amqp_url: str, rack: str
) -> None:
    async with serving(amqp_url, rack, provision=False, wait=False) as served, calling(amqp_url, rack) as caller:
        while not served.transport.status.degraded:
            await (await connection.channel()).close()
        assert not served.transport.status.consuming
        assert any(request_queue(rack) in problem for problem in served.transport.status.degraded)
        await provision(connection, rack)
        await served.until_consuming()
        assert served.transport.status.degraded == ()
        assert (await caller.call("echo")).body["success"]
