"""Dead letters on the command line: why each is there, back on the queue, or gone; never lost, never out of order."""

from __future__ import annotations

import asyncio
import json
import os
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

from schemas import wire
from schemas.errors import ModelManagerError
from tests.amqp import Caller, calling, delete_queues, eventually, serving
from tests.process import free_port, nobodys_environment
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

    async def peak_bytes(self, *words: str) -> tuple[int, str]:
        """The most memory that such a command needed, and what it printed."""
        process = self.start(*words)

        def ended() -> tuple[int, str]:
            assert process.stdout is not None
            out = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_maxrss * 1024, out

        peak, out = await asyncio.to_thread(ended)
        assert process.returncode == 0
        process.communicate()
        return peak, out

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


async def bury(connection: AbstractConnection, rack: str, count: int, *, filling: int = 0, **properties: Any) -> None:
    """Put `count` dead letters there, numbered in their bodies."""
    channel = await connection.channel()

    async def publish(number: int) -> None:
        body = wire.dump({"number": number, "filling": "x" * filling})
        told = {"message_type": "count", "message_id": f"m-{number}", "headers": {"x-error-code": "ERR_INTERNAL"}}
        await channel.basic_publish(
            body,
            exchange=topology.DEAD_EXCHANGE,
            routing_key=rack,
            mandatory=True,
            properties=Basic.Properties(**{**told, **properties}),
        )

    for first in range(0, count, 100):
        await asyncio.gather(*map(publish, range(first, min(first + 100, count))))
    await channel.close()


async def numbers(amqp_url: str, rack: str) -> list[int]:
    async with dead_letters(amqp_url, rack) as letters:
        return [json.loads(letter.body)["number"] async for letter in letters.read()]


async def look(amqp_url: str, rack: str, count: int) -> None:
    """Look at the oldest few, as `list --limit` does."""
    async with dead_letters(amqp_url, rack) as letters:
        reading = letters.read()
        for _ in range(count):
            await anext(reading)


async def taken(connection: AbstractConnection, rack: str, *, keep: bool = False) -> list[DeliveredMessage]:
    """All requests in the rack's queue, which is no queue to `get` from; to `keep` them is to give them back."""
    messages: list[DeliveredMessage] = []

    async def take(message: DeliveredMessage) -> None:
        messages.append(message)

    count = await Caller(connection, rack).depth(request_queue(rack))
    channel = await connection.channel()
    await channel.basic_consume(request_queue(rack), take, no_ack=not keep)
    await eventually(lambda: len(messages) >= count, f"{count} requests")
    await channel.close()
    return messages


async def test_each_reason_is_told_and_each_letter_replayed(amqp_url: str, rack: str, operator: Operator) -> None:
    async with serving(amqp_url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.publish("fail", b'{"n":1}', reply_to=None, user_id="guest", message_id="refused")
        await caller.until_depth(dead_letter_queue(rack), 1)
        await served.transport.drain(5)
        await caller.publish("count", b'{"n":2}', expiration="1", user_id="guest", message_id="expired")
        await caller.until_depth(dead_letter_queue(rack), 2)
        await caller.publish(
            "count", b'{"n":3}', reply_to=None, headers={"x-deadline": 1, "x-mine": [bytearray(b"\xff")]}
        )
        for _ in range(topology.DELIVERY_LIMIT + 1):
            await caller.until_depth(request_queue(rack), 1)
            await taken(caller.connection, rack, keep=True)
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
        back = await taken(caller.connection, rack, keep=True)
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
    await Caller(connection, rack).until_depth(dead_letter_queue(rack), 1)
    async with serving(amqp_url, rack, delete=False) as served:
        async with dead_letters(amqp_url, rack) as letters:
            async for letter in letters.read():
                drop, letters.drop = letters.drop, _nothing  # type: ignore[method-assign]
                await letters.replay(letter)
                letters.drop = drop  # type: ignore[method-assign]
                await letters.replay(letter)
        await Caller(connection, rack).until_depth(request_queue(rack), 0)
        await served.transport.drain(5)
        assert list(served.dispatcher.effects.values()) == [1]
        assert len(served.dispatcher.contexts) == 2


async def _nothing(_letter: object) -> None:
    return


async def test_looking_changes_neither_order_nor_number_however_often_and_whatever_is_taken_out(
    amqp_url: str, connection: AbstractConnection, rack: str, operator: Operator
) -> None:
    await bury(connection, rack, 60)
    for count in (1, 7, 60, 3):
        await look(amqp_url, rack, count)
    assert await numbers(amqp_url, rack) == list(range(60))
    found = await operator.letters("--limit", "30")
    assert len(found) == 30
    await operator.run("drop", found[3]["id"], found[20]["id"], "--yes")
    left = [number for number in range(60) if number not in (3, 20)]
    assert await numbers(amqp_url, rack) == left
    await bury(connection, rack, 1)
    for count in range(topology.DELIVERY_LIMIT + 5):
        await look(amqp_url, rack, count)
    assert await numbers(amqp_url, rack) == [*left, 0]


@pytest.mark.parametrize("words", [("list", "--limit", "100000"), ("replay", "--all"), ("drop", "--all", "--yes")])
async def test_a_command_that_is_killed_in_the_middle_loses_nothing_and_does_nothing_twice(
    amqp_url: str, connection: AbstractConnection, rack: str, operator: Operator, words: tuple[str, ...]
) -> None:
    count = 800
    await bury(connection, rack, count)
    caller = Caller(connection, rack)
    process = operator.start(*words)
    while await caller.depth(dead_letter_queue(rack)) == count:
        assert process.poll() is None, process.communicate()
    while words[0] == "replay" and await caller.depth(request_queue(rack)) < 20:
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = await numbers(amqp_url, rack)
    replayed = [json.loads(each.body)["number"] for each in await taken(connection, rack)]
    assert left == list(range(count - len(left), count))
    if words[0] != "drop":
        assert left
        # The one between its confirm and its end is in both places, with one key.
        assert replayed in (list(range(count - len(left))), list(range(count - len(left) + 1)))


async def test_what_a_killed_replay_had_sent_already_has_one_effect(
    amqp_url: str, connection: AbstractConnection, rack: str, operator: Operator
) -> None:
    count = 300
    await bury(connection, rack, count)
    async with serving(amqp_url, rack, delete=False) as served:
        process = operator.start("replay", "--all")
        await eventually(lambda: len(served.dispatcher.effects) > 20)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        await operator.run("replay", "--all")
        await eventually(lambda: len(served.dispatcher.effects) == count)
        await Caller(connection, rack).until_depth(request_queue(rack), 0)
        await served.transport.drain(5)
        assert set(served.dispatcher.effects.values()) == {1}
    assert await numbers(amqp_url, rack) == []


async def test_thousands_of_letters_are_no_more_in_memory_than_a_few(
    connection: AbstractConnection, rack: str, operator: Operator
) -> None:
    await bury(connection, rack, 10, filling=20_000)
    few, _ = await operator.peak_bytes("list", "--limit", "100000", "-o", "json")
    await bury(connection, rack, 2990, filling=20_000)
    many, out = await operator.peak_bytes("list", "--limit", "100000", "-o", "json")
    assert len(json.loads(out)["deadLetters"]) == 3000
    assert many - few < 20_000_000  # all of them are 60 MB
    _, out = await operator.peak_bytes("drop", "--all", "--yes")
    assert "3000 dropped" in out


async def test_letters_are_chosen_by_code_method_and_caller(
    amqp_url: str, connection: AbstractConnection, rack: str, operator: Operator
) -> None:
    await bury(connection, rack, 2)
    told = {"x-error-code": "ERR_NOT_ORIGIN", "x-error-user-id": "eve"}
    await bury(connection, rack, 2, headers=told, message_type="echo")
    await bury(connection, rack, 1, headers=told, message_type="count")
    assert len(await operator.letters("--code", "ERR_NOT_ORIGIN")) == 3
    assert len(await operator.letters("--code", "ERR_NOT_ORIGIN", "--limit", "2")) == 2
    assert [each["method"] for each in await operator.letters("--caller", "eve", "--method", "echo")] == ["echo"] * 2
    assert await operator.letters("--code", "ERR_NOT") == []
    assert "2 dropped" in await operator.run("drop", "--method", "echo", "--caller", "eve", "--yes")
    assert "--yes" in (refused := await operator.run("drop", "--code", "ERR_NOT_ORIGIN", status=2))
    assert "all dead letters of code ERR_NOT_ORIGIN" in refused
    assert "1 replayed" in await operator.run("replay", "--code", "ERR_NOT_ORIGIN")
    assert await numbers(amqp_url, rack) == [0, 1]
    assert [each.routing_key for each in await taken(connection, rack)] == [f"{rack}.count"]


async def test_a_queue_that_was_made_otherwise_is_read_all_the_same_and_told(
    amqp_url: str, connection: AbstractConnection, rack: str, operator: Operator
) -> None:
    channel = await connection.channel()
    await channel.queue_delete(dead_letter_queue(rack))
    await channel.queue_declare(dead_letter_queue(rack), durable=True)
    await channel.queue_bind(dead_letter_queue(rack), topology.DEAD_EXCHANGE, rack)
    await bury(connection, rack, 10)
    process = operator.start("list", "--limit", "5", "-o", "json")
    out, err = await asyncio.to_thread(process.communicate, timeout=60)
    assert len(json.loads(out)["deadLetters"]) == 5
    assert "each look" in err and dead_letter_queue(rack) in err
    assert await numbers(amqp_url, rack) == list(range(10))


async def test_letters_that_somebody_holds_are_refused_to_others(
    amqp_url: str, connection: AbstractConnection, rack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bury(connection, rack, 2)
    monkeypatch.setattr("worker.transport.dead_letters.PATIENCE_S", 0.2)
    async with dead_letters(amqp_url, rack):
        with pytest.raises(ModelManagerError, match="try again later") as refused:
            await numbers(amqp_url, rack)
    assert refused.value.code == "ERR_CONFLICT"
    assert await numbers(amqp_url, rack) == [0, 1]


async def test_letters_that_another_tool_consumes_are_refused_too(
    amqp_url: str, connection: AbstractConnection, rack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bury(connection, rack, 2)
    monkeypatch.setattr("worker.transport.dead_letters.PATIENCE_S", 0.2)
    channel = await connection.channel()
    await channel.basic_consume(dead_letter_queue(rack), _nothing)
    with pytest.raises(ModelManagerError, match="try again later"):
        await numbers(amqp_url, rack)
    await channel.close()
    assert await numbers(amqp_url, rack) == [0, 1]


async def test_commands_that_begin_at_once_hold_the_letters_one_after_the_other(
    amqp_url: str, connection: AbstractConnection, rack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.transport.dead_letters.PATIENCE_S", 30.0)
    await bury(connection, rack, 20)
    found = await asyncio.gather(*(numbers(amqp_url, rack) for _ in range(4)))
    assert found == [list(range(20))] * 4


async def test_a_letter_that_the_queue_does_not_take_stays_dead(
    amqp_url: str, connection: AbstractConnection, rack: str, operator: Operator
) -> None:
    await bury(connection, rack, 2)
    channel = await connection.channel()
    await channel.queue_delete(request_queue(rack))
    assert "no request queue" in await operator.run("replay", "--all", status=4)
    assert await numbers(amqp_url, rack) == [0, 1]
    await channel.queue_declare(
        request_queue(rack), durable=True, arguments={"x-max-length": 0, "x-overflow": "reject-publish"}
    )
    await channel.queue_bind(request_queue(rack), topology.RPC_EXCHANGE, f"{rack}.*")
    assert "is full" in await operator.run("replay", "--all", status=4)
    assert await numbers(amqp_url, rack) == [0, 1]


async def test_what_is_not_named_or_not_there_is_refused(
    tmp_path: Path, amqp_url: str, connection: AbstractConnection, rack: str, operator: Operator
) -> None:
    await bury(connection, rack, 1)
    assert "--all" in await operator.run("replay", status=2)
    assert "--all" in await operator.run("replay", "0123456789abcdef", "--all", status=2)
    assert "--yes" in await operator.run("drop", "--all", status=2)
    assert "0123456789abcdef" in await operator.run("drop", "0123456789abcdef", "--yes", status=3)
    process = operator.start("drop", "0123456789abcdef", "--yes", "-o", "json")
    out, _ = await asyncio.to_thread(process.communicate, timeout=60)
    assert json.loads(out) == {"success": False, "dropped": [], "kept": []}
    envelope = json.loads(await operator.run("show", "0123456789abcdef", "-o", "json", status=3))
    assert (envelope["success"], envelope["error"]["code"]) == (False, "ERR_NOT_FOUND")
    assert await numbers(amqp_url, rack) == [0]
    await (await connection.channel()).queue_delete(dead_letter_queue(rack))
    assert rack in await operator.run("list", status=3)
    nobody = Operator(tmp_path, f"amqp://guest:guest@127.0.0.1:{free_port()}/", rack)
    assert "The broker cannot be reached." in await nobody.run("list", status=7)
    misspelt = await Operator(tmp_path, "amqp://guest:se/cret@127.0.0.1/", rack).run("list", status=8)
    assert "is not an AMQP URL" in misspelt and "cret" not in misspelt


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
    (back,) = await taken(connection, rack)
    assert back.header.properties.user_id is None
    assert await Caller(connection, rack).depth(dead_letter_queue(rack)) == 0
