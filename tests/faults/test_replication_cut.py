"""The network between two workers fails while one copies from the other: all arrives, and what arrives is whole."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ledger.proxy import Proxy
from tests.process import Processes, Service, free_port

pytestmark = pytest.mark.broker
SIZE = 24 * 1024 * 1024
CONTENT = "/api/models/{}/versions/1.0.0/content"


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    with Processes(tmp_path) as started:
        yield started


def start(processes: Processes, name: str, port: int, **settings: object) -> Service:
    own: dict[str, object] = {
        "rack": name,
        "http.port": port,
        "registry.path": f"{name}/registry",
        "storage.path": f"{name}/models",
        "replicationFactor": 2,
    }
    return processes.start("worker", settings={**own, **settings}).until_ready()


async def until(condition: Callable[[], Any], within_s: float = 60.0) -> None:
    """Wait until `condition()`, asked in a thread, is true."""
    async with asyncio.timeout(within_s):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.05)


def holds(service: Service, model: str, data: bytes) -> bool:
    answer = service.send("GET", CONTENT.format(model))
    return answer.status == 200 and answer.body == data


async def test_transfers_and_questions_that_are_cut_are_gone_on_with(processes: Processes, amqp_url: str) -> None:
    first, second = (f"r-{secrets.token_hex(4)}" for _ in range(2))
    port = free_port()
    async with Proxy(f"http://127.0.0.1:{port}") as bytes_way, Proxy(amqp_url) as broker_way:
        given = {"amqp.url": amqp_url, "http.publicUrl": bytes_way.url, "replication.peers": [second]}
        one = await asyncio.to_thread(lambda: start(processes, first, port, **given))
        asked = {"amqp.url": broker_way.url, "replication.peers": [first]}
        two = await asyncio.to_thread(lambda: start(processes, second, free_port(), **asked))

        data = os.urandom(SIZE)
        bytes_way.bytes_per_s = 4_000_000
        assert (await asyncio.to_thread(one.put, "large", data)).status == 201
        for times in (1, 2):
            await until(lambda times=times: bytes_way.counts["bytes"] > times * SIZE / 4)
            (bytes_way.reset if times == 1 else bytes_way.cut)()
        bytes_way.bytes_per_s = None
        await until(lambda: holds(two, "large", data))
        assert bytes_way.counts["reset"] and bytes_way.counts["cut"]
        assert bytes_way.counts["bytes"] < 1.5 * SIZE, "it went on where it was"

        broker_way.half_open("far")  # to the second rack its connections stand, and nobody is there
        broker_way.refusing = True
        assert (await asyncio.to_thread(one.put, "meanwhile", b"small")).status == 201
        assert (await asyncio.to_thread(one.send, "DELETE", "/api/models/large")).status == 200
        await asyncio.sleep(2)
        assert not await asyncio.to_thread(holds, two, "meanwhile", b"small")
        broker_way.refusing = False
        broker_way.reset()
        await until(lambda: holds(two, "meanwhile", b"small"), within_s=120)
        await until(lambda: two.send("GET", CONTENT.format("large")).status == 404)
        assert [await asyncio.to_thread(each.stop) for each in (one, two)] == [0, 0]
