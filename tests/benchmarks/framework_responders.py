"""Peers that need packages of their own: FastStream and Nameko. It imports nothing of the project.

`<their python> framework_responders.py faststream|nameko URL QUEUE REPLY_FILE READY_FILE`. The queue is there already;
each answers every request on it with the same reply, with its own defaults but for the prefetch.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

PREFETCH = 64  # as the worker's


async def faststream(url: str, queue: str, reply: dict[str, Any], ready: Path) -> None:
    """A subscriber whose return value is the reply."""
    from faststream import FastStream
    from faststream.rabbit import Channel, RabbitBroker, RabbitQueue

    broker = RabbitBroker(url, default_channel=Channel(prefetch_count=PREFETCH), logger=None)

    @broker.subscriber(RabbitQueue(queue, declare=False))  # type: ignore[untyped-decorator]
    async def answer(body: dict[str, Any]) -> dict[str, Any]:
        return reply

    await FastStream(broker, after_startup=[ready.touch], logger=None).run()


def nameko(url: str, queue: str, reply: dict[str, Any], ready: Path) -> None:
    """A consumer on the queue and a publisher, since its RPC insists on a queue and an exchange of its own."""
    import eventlet

    eventlet.monkey_patch()
    from kombu import Queue
    from nameko.containers import ServiceContainer
    from nameko.messaging import Consumer, Publisher

    class Requests(Consumer):  # type: ignore[misc]
        def handle_message(self, body: Any, message: Any) -> None:
            super().handle_message((body, message.properties), message)

    class Responder:
        name = "responder"
        publish = Publisher()

        @Requests.decorator(queue=Queue(queue, no_declare=True))  # type: ignore[untyped-decorator]
        def answer(self, request: tuple[Any, dict[str, Any]]) -> None:
            _, properties = request
            self.publish(reply, routing_key=properties["reply_to"], correlation_id=properties["correlation_id"])

    container = ServiceContainer(Responder, {"AMQP_URI": url, "max_workers": PREFETCH, "serializer": "json"})
    container.start()
    ready.touch()
    container.wait()


if __name__ == "__main__":
    _, kind, url, queue, reply_file, ready_file = sys.argv
    body = json.loads(Path(reply_file).read_bytes())
    if kind == "faststream":
        asyncio.run(faststream(url, queue, body, Path(ready_file)))
    else:
        nameko(url, queue, body, Path(ready_file))
