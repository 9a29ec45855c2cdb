"""The peers: programs that answer every request with the same reply, the way aio-pika is commonly used.

`python -m tests.benchmarks.responders bare|patterns URL RACK REPLY_FILE READY_FILE`. The request queue is that of a
rack, with all its arguments and bindings; the body is decoded and the reply encoded each time.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import aio_pika
import orjson
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from aio_pika.patterns import JsonRPC

from worker.transport.topology import RPC_EXCHANGE, request_queue, topology

PREFETCH = 64  # as the worker's


async def respond(kind: str, url: str, rack: str, reply: dict[str, Any], ready: Path) -> None:
    """Answer until the process is ended."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=PREFETCH)
        await (bare(channel, rack, reply) if kind == "bare" else patterns(channel, rack, reply))
        ready.touch()
        await asyncio.Event().wait()


async def bare(channel: AbstractChannel, rack: str, reply: dict[str, Any]) -> None:
    """A consumer and a publish, with the library's defaults: confirms, mandatory."""
    queue = await channel.get_queue(request_queue(rack))

    async def answer(message: AbstractIncomingMessage) -> None:
        orjson.loads(message.body)
        await channel.default_exchange.publish(
            aio_pika.Message(
                orjson.dumps(reply), content_type="application/json", correlation_id=message.correlation_id
            ),
            routing_key=message.reply_to or "",
        )
        await message.ack()

    await queue.consume(answer)


async def patterns(channel: AbstractChannel, rack: str, reply: dict[str, Any]) -> None:
    """The library's own RPC, with JSON in place of pickle. It insists on a dead-letter exchange of its own."""

    async def answer(**_: Any) -> dict[str, Any]:
        return reply

    rpc = await JsonRPC.create(channel)
    queue = next(queue for queue in topology(rack).queues if queue.name == request_queue(rack))
    await channel.queue_delete(queue.name)
    await rpc.register(queue.name, answer, durable=True, arguments=dict(queue.arguments))
    await (await channel.get_queue(queue.name)).bind(RPC_EXCHANGE, f"{rack}.*")


if __name__ == "__main__":
    _, kind, url, rack, reply_file, ready_file = sys.argv
    asyncio.run(respond(kind, url, rack, orjson.loads(Path(reply_file).read_bytes()), Path(ready_file)))
