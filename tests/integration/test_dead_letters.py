"""Dead letters on the command line: why each is there, back on the queue, or gone; never lost, never out of order."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiormq
import pytest
from aiormq.abc import AbstractConnection, DeliveredMessage
from pamqp.commands import Basic

from tests.amqp import Caller, calling, delete_queues, eventually, serving
from tests.process import nobodys_environment
from worker.transport import topology
from worker.transport.dead_letters import dead_letters
from worker.transport.topology import dead_letter_queue, provision, request_queue

pytestmark = pytest.mark.broker


class Operator:
    """Runs `model-manager dead ...` on one rack."""

    def __init__(self, folder: Path, url: str, rack: str) -> None:
        self._folder = folder
        self._address = {"--rack": rack, "--amqp-url": url}

    def start(self, *words: str) -> subprocess.Popen[str]:
        flags = [part for pair in self._address.items() for part in pair]
        return subprocess.Popen(
            [sys.executable, "-m", "worker", "dead", *words, *flags],
            cwd=self._folder,
            env=nobodys_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    async def run(self, *words: str, status: int = 0) -> str:
        process = self.start(*words)
        out, err = await asyncio.to_thread(process.communicate, timeout=60)
        assert process.returncode == status, err
        return out if status == 0 else err

    async def letters(self, *words: str) -> list[dict[str, Any]]:
        return list(json.loads(await self.run("list", *words, "-o", "json"))["deadLetters"])


@pytest.fixture
async def connection(amqp_url: str, rack: str) -> AsyncIterator[AbstractConnection]:
    """A connection to a broker that has the rack's queues, without a worker."""
    async with aiormq.connect(amqp_url) as connection:
        assert await provision(connection, rack) == []
        yield connection
    await delete_queues(amqp_url, rack)


@pytest.fixture
def operator(tmp_path: Path, amqp_url: str, rack: str) -> Operator:
    return Operator(tmp_path, amqp_url, rack)


async def bury(connection: AbstractConnection, rack: str, count: int, **properties: Any) -> None:
    """Put `count` dead letters there, numbered in their bodies."""
    channel = await connection.channel()
    for number in range(count):
        await channel.basic_publish(
            b'{"number":%d}' % number,
            exchange=topology.DEAD_EXCHANGE,
            routing_key=rack,
            mandatory=True,
            properties=Basic.Properties(
                message_type="count", message_id=f"m-{number}", headers={"x-error-code": "ERR_INTERNAL"}, **properties
            ),
        )
    await channel.close()


async def bodies(amqp_url: str, rack: str) -> list[int]:
    async with dead_letters(amqp_url, rack) as letters:
        return [json.loads(letter.body)["number"] async for letter in letters.read()]


async def taken(connection: AbstractConnection, rack: str, count: int, *, keep: bool = False) -> list[DeliveredMessage]:
    """That many requests from the rack's queue, which is no queue to `get` from; to `keep` them is to give them back."""
    messages: list[DeliveredMessage] = []

    async def take(message: DeliveredMessage) -> None:
        messages.append(message)

    channel = await connection.channel()
    await channel.basic_consume(request_queue(rack), take, no_ack=not keep)
    await eventually(lambda: len(messages) >= count, f"{count} requests")
    await channel.close()
    return messages


async def settled(connection: AbstractConnection, rack: str, queue: str, count: int) -> None:
    await Caller(connection, rack).until_depth(queue, count)


async def test_each_reason_is_told_and_each_letter_replayed(amqp_url: str, rack: str, operator: Operator) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.publish("fail", b'{"n":1}', reply_to=None, user_id="guest", message_id="refused")
        await caller.until_depth(dead_letter_queue(rack), 1)
        await served.transport.drain(5)
        await caller.publish("count", b'{"n":2}', expiration="1", user_id="guest", message_id="expired")
        await caller.until_depth(dead_letter_queue(rack), 2)
        await caller.publish("count", b'{"n":3}', reply_to=None, headers={"x-deadline": 1, "x-mine": [bytearray(b"\xff")]})
        for _ in range(topology.DELIVERY_LIMIT + 1):
            await taken(caller.connection, rack, 1, keep=True)
        await caller.until_depth(dead_letter_queue(rack), 3)

        found = await operator.letters()
        assert [(each["code"], each["method"], each["caller"], each["messageId"]) for each in found] == [
            ("ERR_MODEL_NOT_FOUND", "fail", "guest", "refused"),
            ("expired", "count", "guest", "expired"),
            ("delivery_limit", "count", "", found[2]["messageId"]),
        ]
        assert "no worker took it" in found[1]["reason"] and "too often" in found[2]["reason"]
        assert all(each["diedAt"] > "2026" and each["size"] == 7 for each in found)
        assert found == await operator.letters()
        shown = json.loads(await operator.run("show", found[2]["id"], "-o", "json"))
        assert (shown["body"], shown["headers"]["x-mine"]) == ('{"n":3}', ["\\xff"])
        assert shown["headers"]["x-death"][0]["reason"] == "delivery_limit"
        table = await operator.run("list")
        assert [line.split()[0] for line in table.splitlines()] == ["ID", *(each["id"] for each in found)]

        assert "3 replayed" in await operator.run("replay", "--all")
        await caller.until_depth(request_queue(rack), 3)
        back = await taken(caller.connection, rack, 3, keep=True)
        assert [message.body for message in back] == [b'{"n":1}', b'{"n":2}', b'{"n":3}']
        assert [message.routing_key for message in back] == [f"{rack}.fail", f"{rack}.count", f"{rack}.count"]
        properties = [message.header.properties for message in back]
        assert [each.message_id for each in properties[:2]] == ["refused", "expired"]
        assert [each.expiration for each in properties] == [None] * 3
        assert [each.user_id for each in properties] == [None, "guest", None]
        assert properties[1].headers is None or not properties[1].headers
        assert properties[2].headers == {"x-mine": [b"\xff"]}

        async with serving(amqp_url, rack, delete=False) as again:
            await caller.until_depth(request_queue(rack), 0)
            await caller.until_depth(dead_letter_queue(rack), 1)  # `fail` fails again
            assert sorted(again.dispatcher.effects.values()) == [1, 1]


async def test_a_letter_without_a_key_gets_one_so_that_a_second_replay_has_no_second_effect(
    amqp_url: str, rack: str, connection: AbstractConnection
) -> None:
    channel = await connection.channel(publisher_confirms=False)
    await channel.basic_publish(
        b"{}",
        exchange=topology.DEAD_EXCHANGE,
        routing_key=rack,
        properties=Basic.Properties(headers={"x-error-code": "ERR_INTERNAL", "x-error-routing-key": f"{rack}.count"}),
    )
    await settled(connection, rack, dead_letter_queue(rack), 1)
    async with serving(amqp_url, rack, delete=False) as served:
        async with dead_letters(amqp_url, rack) as letters:
            async for letter in letters.read():
                drop, letters.drop = letters.drop, _nothing  # type: ignore[method-assign]
                await letters.replay(letter)
                letters.drop = drop  # type: ignore[method-assign]
                await letters.replay(letter)
        await settled(connection, rack, request_queue(rack), 0)
        await served.transport.drain(5)
        assert list(served.dispatcher.effects.values()) == [1]
        assert len(served.dispatcher.contexts) == 2


async def _nothing(_letter: object) -> None:
    return


async def test_reading_keeps_the_order_however_often_and_whatever_is_taken_out(
    connection: AbstractConnection, rack: str, operator: Operator
) -> None:
    await bury(connection, rack, 60)
    for limit in (1, 7, 60):
        async with dead_letters(amqp_url, rack) as letters:
            assert len([letter async for letter in letters.read(limit)]) == limit
    assert await bodies(amqp_url, rack) == list(range(60))
    found = await operator.letters("--limit", "30")
    assert len(found) == 30
    await operator.run("drop", found[3]["id"], found[20]["id"], "--yes")
    left = [number for number in range(60) if number not in (3, 20)]
    assert await bodies(amqp_url, rack) == left
    for _ in range(topology.DELIVERY_LIMIT + 5):
        async with dead_letters(amqp_url, rack) as letters:
            assert len([letter async for letter in letters.read(3)]) == 3
    assert await bodies(amqp_url, rack) == left


@pytest.mark.parametrize("words", [("list", "--limit", "100000"), ("replay", "--all"), ("drop", "--all", "--yes")])
async def test_a_command_that_is_killed_in_the_middle_loses_nothing(
    connection: AbstractConnection, rack: str, operator: Operator, words: tuple[str, ...]
) -> None:
    count = 400
    await bury(connection, rack, count)
    caller = Caller(connection, rack)
    process = operator.start(*words)
    while await caller.depth(dead_letter_queue(rack)) > count - 20:
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    async with aiormq.connect(str(connection.url)) as fresh:  # the broker gives back once the dead connection is seen
        depth = await Caller(fresh, rack).depth(request_queue(rack))
        replayed = [json.loads(each.body)["number"] for each in await taken(fresh, rack, depth)]
        deadline = asyncio.get_running_loop().time() + 20
        while True:
            left = await bodies(amqp_url, rack)
            lost = set(range(count)) - set(left) - set(replayed)
            if not lost or (words[0] == "drop" and left == list(range(count - len(left), count))):
                break
            assert asyncio.get_running_loop().time() < deadline, f"{sorted(lost)} are nowhere"
    assert left == sorted(left)
    assert replayed == sorted(replayed)
    assert len(left) > 0
    assert len(set(left) & set(replayed)) <= 1  # the one between its confirm and its end


async def test_a_letter_that_the_queue_does_not_take_stays_dead(
    connection: AbstractConnection, rack: str, operator: Operator
) -> None:
    await bury(connection, rack, 2)
    channel = await connection.channel()
    await channel.queue_delete(request_queue(rack))
    assert "no request queue" in await operator.run("replay", "--all", status=4)
    assert await bodies(amqp_url, rack) == [0, 1]
    await channel.queue_declare(
        request_queue(rack), durable=True, arguments={"x-max-length": 0, "x-overflow": "reject-publish"}
    )
    await channel.queue_bind(request_queue(rack), topology.RPC_EXCHANGE, f"{rack}.*")
    assert "is full" in await operator.run("replay", "--all", status=4)
    assert await bodies(amqp_url, rack) == [0, 1]


async def test_what_is_not_named_or_not_there_is_refused(
    connection: AbstractConnection, rack: str, operator: Operator
) -> None:
    await bury(connection, rack, 1)
    assert "--all" in await operator.run("replay", status=2)
    assert "--yes" in await operator.run("drop", "--all", status=2)
    assert "0123456789abcdef" in await operator.run("drop", "0123456789abcdef", "--yes", status=3)
    assert "0123456789abcdef" in await operator.run("show", "0123456789abcdef", status=3)
    assert await bodies(amqp_url, rack) == [0]
    await (await connection.channel()).queue_delete(dead_letter_queue(rack))
    assert rack in await operator.run("list", status=3)


async def test_another_users_id_is_left_behind_and_the_letter_replayed(
    connection: AbstractConnection, rack: str, amqp_url: str
) -> None:
    """Only a death by the broker keeps the id; a letter in whose name nobody here may speak is such a one."""
    async with calling(amqp_url, rack) as caller:
        await caller.publish("count", expiration="1", user_id="guest", message_id="m")
        await caller.until_depth(dead_letter_queue(rack), 1)
    async with dead_letters(amqp_url, rack) as letters:
        async for letter in letters.read():
            letter.properties.user_id = "somebody"
            await letters.replay(letter)
    (back,) = await taken(connection, rack, 1)
    assert back.header.properties.user_id is None
    assert await Caller(connection, rack).depth(dead_letter_queue(rack)) == 0
