"""A probe through the dead-letter path: what expires in the rack's queue must be found among its dead letters.

The probe goes through a queue of its own, which has the arguments of the request queue and lives for a moment. So it
takes no request's place, no worker ever gets it, and where the path is broken it ends with its queue, instead of
staying in the rack's for ever.
"""

from __future__ import annotations

from contextlib import suppress

from aiormq.abc import AbstractConnection
from aiormq.exceptions import ChannelAccessRefused, DeliveryError
from pamqp.commands import Basic

from schemas.errors import ModelManagerError
from worker.transport.connections import (
    LinkLostError,
    close_connection,
    link_failures,
    open_channel,
    open_connection,
)
from worker.transport.dead_letters import CONNECTION_NAME, dead_letters
from worker.transport.topology import DEAD_EXCHANGE, Problem, new_probe_queue, request_queue, topology

PROBE_METHOD = "ping"
ARRIVAL_S = 10.0
_NAME = "the way of dead letters"
_EXPIRATION_MS = 1
# If this process dies, the broker removes the queue.
_UNUSED_MS = 60_000


async def probe(url: str, rack: str) -> Problem | None:
    """Send a probe and take it from the rack's dead letters, which are held for that time; nothing else is touched.

    Raises LinkLostError when a connection is lost.
    """
    connection = await open_connection(url, CONNECTION_NAME)
    queue = new_probe_queue(rack)
    try:
        async with dead_letters(url, rack) as letters:
            await _send(connection, rack, queue)
            arrived = await letters.arrival(queue, ARRIVAL_S)
            if arrived is not None:
                await letters.drop(arrived)
    except ModelManagerError as error:
        return Problem("unverified", _NAME, error.message)
    except LinkLostError as error:
        if not isinstance(error.__cause__, ChannelAccessRefused):
            raise
        return Problem("unverified", _NAME, "the broker does not allow this login to send a probe")
    except DeliveryError:
        return Problem("unverified", _NAME, "the broker did not take the probe")
    finally:
        with suppress(LinkLostError):
            await _delete(connection, queue)
        await close_connection(connection)
    if arrived is None:
        return Problem("broken", _NAME, "a probe that expired did not arrive: such requests stay, and fill the queue")
    if arrived.code != "expired":
        return Problem("broken", _NAME, f"a probe that expired arrived as one that was {arrived.code}")
    return None


async def _send(connection: AbstractConnection, rack: str, queue: str) -> None:
    """Have a message expire in a new queue that dead-letters as the rack's does. The message is named as the queue."""
    (like,) = (each for each in topology(rack).queues if each.name == request_queue(rack))
    with link_failures():
        channel = await open_channel(connection, confirms=True)
        await channel.queue_declare(queue, durable=True, arguments={**like.arguments, "x-expires": _UNUSED_MS})
        # Not by the default exchange: whoever may write to that may write to every queue, so operators may not.
        await channel.queue_bind(queue, DEAD_EXCHANGE, queue)
        properties = Basic.Properties(
            expiration=str(_EXPIRATION_MS), delivery_mode=2, message_id=queue, message_type=PROBE_METHOD
        )
        await channel.basic_publish(
            b"{}", exchange=DEAD_EXCHANGE, routing_key=queue, properties=properties, mandatory=True
        )


async def _delete(connection: AbstractConnection, queue: str) -> None:
    with link_failures():
        channel = await open_channel(connection, confirms=False)
        await channel.queue_delete(queue)
