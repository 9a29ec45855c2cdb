"""The faults, each of which gives proof that it really happened."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiormq
from aiormq.exceptions import AMQPError

from deploy.local import RabbitMQ
from tests.ledger.proxy import Proxy
from tests.ledger.rack import Rack
from worker.transport.topology import request_queue

ALARM_S = 1.5
FREEZE_S = 1.5
SLOW_S = 2.0
SLOW_BYTES_PER_S = 20_000.0
_BACK_WITHIN_S = 90.0


@dataclass(frozen=True)
class Stage:
    """What faults happen to. `callers` and `workers` are the proxies before either."""

    broker: RabbitMQ
    rack: Rack
    callers: Proxy
    workers: Proxy

    @property
    def proxies(self) -> tuple[Proxy, Proxy]:
        return self.callers, self.workers

    async def until_consuming(self) -> None:
        """Return when the broker has the queue of the rack, with a consumer."""
        queue = request_queue(self.rack.name)
        async with asyncio.timeout(_BACK_WITHIN_S):
            while True:
                try:
                    async with aiormq.connect(self.broker.url) as connection:
                        channel = await connection.channel()
                        if (await channel.queue_declare(queue, passive=True)).consumer_count:
                            return
                except (AMQPError, OSError):
                    pass
                await asyncio.sleep(0.1)


async def _cut(stage: Stage) -> str:
    for proxy in stage.proxies:
        proxy.cut()
    return _proof(stage, "cut")


async def _reset(stage: Stage) -> str:
    for proxy in stage.proxies:
        proxy.reset()
    return _proof(stage, "reset")


async def _half_open(stage: Stage) -> str:
    """The broker has forgotten all connections, and neither callers nor workers know."""
    for proxy in stage.proxies:
        proxy.half_open("far")
    return _proof(stage, "half-opened")


async def _forgotten(stage: Stage) -> str:
    """Callers and workers have new connections, and the broker keeps the old ones: a consumer that is nobody."""
    for proxy in stage.proxies:
        proxy.half_open("near")
    return _proof(stage, "half-opened")


async def _freeze(stage: Stage) -> str:
    await asyncio.gather(*(proxy.freeze(FREEZE_S) for proxy in stage.proxies))
    return _proof(stage, "frozen")


async def _slow(stage: Stage) -> str:
    await asyncio.gather(*(proxy.slow(SLOW_S, bytes_per_s=SLOW_BYTES_PER_S) for proxy in stage.proxies))
    return _proof(stage, "slowed")


async def _restart(stage: Stage) -> str:
    return await _again(stage, stage.broker.stop)


async def _kill(stage: Stage) -> str:
    return await _again(stage, stage.broker.kill)


async def _again(stage: Stage, end: Callable[[], None]) -> str:
    before = await _pid(stage)
    await asyncio.to_thread(end)
    await asyncio.to_thread(stage.broker.start)
    after = await _pid(stage)
    assert before != after, "the broker is the same process as before"
    return f"process {before}, then {after}"


async def _pid(stage: Stage) -> str:
    return (await asyncio.to_thread(stage.broker.ctl, "eval", "os:getpid().")).strip().strip('"')


async def _alarm(stage: Stage) -> str:
    await asyncio.to_thread(stage.broker.ctl, "set_vm_memory_high_watermark", "0.00001")
    try:
        await asyncio.sleep(ALARM_S)
        listed = await asyncio.to_thread(stage.broker.ctl, "list_connections", "state", "--quiet")
    finally:
        await asyncio.to_thread(stage.broker.ctl, "set_vm_memory_high_watermark", "0.4")
    blocked = listed.split().count("blocked")
    assert blocked > 0, "the broker blocked nobody"
    return f"{blocked} connections blocked"


async def _delete(stage: Stage) -> str:
    async with aiormq.connect(stage.broker.url) as connection:
        channel = await connection.channel()
        deleted = await channel.queue_delete(request_queue(stage.rack.name))
    return f"with {deleted.message_count} requests that waited"


async def _kill_worker(stage: Stage) -> str:
    await stage.rack.kill()
    return f"taken over in {stage.rack.takeovers[-1]:.2f} s"


async def _freeze_worker(stage: Stage) -> str:
    seconds = await stage.rack.freeze()
    return f"ended by its watchdog after {seconds:.1f} s, taken over in {stage.rack.takeovers[-1]:.2f} s"


def _proof(stage: Stage, what: str) -> str:
    """How many connections the proxies did it to by now, those of earlier times among them."""
    callers, workers = (proxy.counts[what] for proxy in stage.proxies)
    assert callers and workers, f"no connection was {what}"
    return f"{callers} connections of callers and {workers} of workers {what} by now"


FAULTS: dict[str, Callable[[Stage], Awaitable[str]]] = {
    "connections cut": _cut,
    "worker killed": _kill_worker,
    "connections reset": _reset,
    "queue deleted": _delete,
    "connections frozen": _freeze,
    "memory alarm": _alarm,
    "connections slowed": _slow,
    "broker killed": _kill,
    "worker frozen": _freeze_worker,
    "half-open, broker gone": _half_open,
    "broker restarted": _restart,
    "half-open, peer gone": _forgotten,
}
# A broker keeps what it believes to be a consumer for two to three heartbeats; that takes a minute.
LONG = ("half-open, peer gone",)
