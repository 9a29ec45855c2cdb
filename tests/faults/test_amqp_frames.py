"""What comes out of the socket is cut anywhere, or is no AMQP at all: the worker goes on, and nothing is lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import pytest

from tests.amqp import calling, eventually, serving
from worker.transport.amqp_codec import frame

pytestmark = pytest.mark.broker


class Wire:
    """TCP between the worker and the broker, which can bring the broker's bytes in pieces, and others among them."""

    def __init__(self, url: str) -> None:
        self._broker = urlsplit(url)
        self._dice = random.Random(7)
        self._to_worker: list[asyncio.StreamWriter] = []
        self.piece: int | None = None
        self.url = ""

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_broker, to_broker = await asyncio.open_connection(self._broker.hostname, self._broker.port)
        self._to_worker.append(writer)
        with suppress(OSError):
            await asyncio.gather(self._there(reader, to_broker), self._back(from_broker, writer))

    async def _there(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            while data:
                size = len(data) if self.piece is None else self._dice.randint(1, self.piece)
                writer.write(data[:size])
                await writer.drain()
                data = data[size:]
                await asyncio.sleep(0)
        writer.close()

    def inject(self, garbage: bytes) -> None:
        for writer in self._to_worker:
            writer.write(garbage)
        self._to_worker.clear()

    def close(self) -> None:
        for writer in self._to_worker:
            writer.transport.abort()


@asynccontextmanager
async def wire(url: str) -> AsyncIterator[Wire]:
    between = Wire(url)
    server = await asyncio.start_server(between.accept, "127.0.0.1", 0)
    login = urlsplit(url).netloc.rpartition("@")[0]
    between.url = f"amqp://{login}@127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    try:
        yield between
    finally:
        between.close()
        server.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x01\x00\x01\xff\xff\xff\xff",
        frame(1, 2047, b"\x00\x3c\x00\x3c\x05t"),
        frame(3, 2047, b"a body of nothing"),
        frame(1, 2047, random.Random(1).randbytes(50)),
        frame(1, 1, random.Random(2).randbytes(50)),
    ],
    ids=["another protocol", "an endless frame", "cut off", "out of turn", "random", "random, for aiormq"],
)
async def test_bad_frames_cost_a_connection_and_nothing_else(amqp_url: str, rack: str, garbage: bytes) -> None:
    async with wire(amqp_url) as between, serving(between.url, rack) as served, calling(amqp_url, rack) as caller:
        await caller.publish("slow", headers={"x-idempotency-key": "k-1"}, correlation_id="c-1")
        await eventually(lambda: served.dispatcher.started["slow"] == 1)
        between.inject(garbage)
        await eventually(lambda: served.observer.counts["reconnected"] >= 1)
        await eventually(lambda: served.dispatcher.started["slow"] == 2, "the redelivery")
        served.dispatcher.released.set()
        await eventually(lambda: caller.replies)
        assert served.dispatcher.effects == {"k-1": 1}
        assert served.dispatcher.cancelled == 0
        await served.until_consuming()
        assert (await caller.call("echo")).body["success"]


@pytest.mark.parametrize(("piece", "size"), [(3, 10), (5000, 400_000)], ids=["of three bytes", "of large frames"])
async def test_requests_are_understood_in_pieces(amqp_url: str, rack: str, piece: int, size: int) -> None:
    async with wire(amqp_url) as between, serving(between.url, rack) as served, calling(amqp_url, rack) as caller:
        between.piece = piece
        queue = (await caller.channel.queue_declare("", exclusive=True)).queue or ""
        await caller.consume(queue)
        for number in range(20):
            params = {"n": number, "filling": "x" * size}
            await caller.publish("echo", params, reply_to=queue if number % 2 else "amq.rabbitmq.reply-to")
        await eventually(lambda: len(caller.replies) == 20)
        assert sorted(reply.body["params"]["n"] for reply in caller.replies) == list(range(20))
        assert {len(reply.body["params"]["filling"]) for reply in caller.replies} == {size}
        assert served.observer.counts["redelivered"] == served.observer.counts["reconnected"] == 0
