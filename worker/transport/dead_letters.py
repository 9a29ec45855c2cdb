"""Dead letters, for people: read in place, sent back to where they came from, or dropped.

They are read without being acknowledged, on a channel of their own. Whatever is not settled when that channel closes,
or its connection dies, goes back to its place in the queue: the broker keeps the order. RabbitMQ counts each reading
as a delivery, which is why the queue has no delivery limit. While a command holds letters nobody else sees them.

Of why a letter is here there are two witnesses. The broker (`x-death`): expired, delivered too often, rejected. The
worker (`x-error-*` on the copy it made): it refused the request, and there was nobody to tell.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aiormq.abc import AbstractConnection, DeliveredMessage
from aiormq.channel import Channel
from aiormq.exceptions import (
    ChannelAccessRefused,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    DeliveryError,
    PublishError,
)
from pamqp.commands import Basic

from schemas.errors import ModelManagerError
from worker.transport.amqp_decoding import UnreadableTable
from worker.transport.connections import LinkLostError, link_failures, open_channel
from worker.transport.deliveries import read_request
from worker.transport.replies import DEATH_HEADERS, REASON_PREFIX, ROUTING_HEADERS, encodable
from worker.transport.topology import RPC_EXCHANGE, dead_letter_queue

ANSWER_TIMEOUT_S = 30.0
ID_CHARACTERS = 16
KEY_HEADER = "x-idempotency-key"
# The broker's count of deliveries; it changes with each reading.
_COUNTERS = ("x-delivery-count", "x-acquired-count")
# What must not go back with a letter. A deadline that has passed would make it a dead letter again.
_LEFT_BEHIND = (REASON_PREFIX, *DEATH_HEADERS, *_COUNTERS, "x-deadline")
_DEATHS = {
    "expired": "It expired: no worker took it within its time.",
    "delivery_limit": "It was delivered too often without an end; it may be what ends the worker.",
    "rejected": "The worker rejected it, and could not say why.",
    "maxlen": "The queue was full.",
}


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One dead letter, and why it is one.

    `id` is a digest of the message: the same at each reading, and for letters that are the same in everything.
    `method` is empty if nothing names one; `caller` is the broker's user, empty if unknown. `code` is one of ours, or
    the broker's word for its reason. The texts may hold surrogates, for bytes that are not UTF-8.
    """

    id: str
    died_at: datetime | None
    method: str
    caller: str
    message_id: str
    code: str
    reason: str
    message: DeliveredMessage

    @property
    def body(self) -> bytes:
        return self.message.body

    @property
    def properties(self) -> Basic.Properties:
        return self.message.header.properties


class NotReplayedError(Exception):
    """The letter did not reach the request queue and is still dead; the message says why."""


class DeadLetters:
    """The dead letters of a rack, oldest first, while they are held. LinkLostError: the connection is lost."""

    def __init__(self, rack: str, connection: AbstractConnection, channel: Channel, total: int) -> None:
        self.total = total
        self._rack = rack
        self._connection = connection
        self._channel = channel
        self._outlet: Channel | None = None

    async def read(self, limit: int | None = None) -> AsyncIterator[DeadLetter]:
        """Those that were there at the beginning, at most `limit`; one at a time is in memory."""
        for _ in range(self.total if limit is None else min(limit, self.total)):
            with link_failures():
                message = await self._channel.basic_get(dead_letter_queue(self._rack), timeout=ANSWER_TIMEOUT_S)
            if not message.delivery_tag:
                return
            yield read_letter(message)

    async def drop(self, letter: DeadLetter) -> None:
        """Remove it for good."""
        with link_failures():
            await self._channel.basic_ack(letter.message.delivery_tag or 0)

    async def replay(self, letter: DeadLetter) -> None:
        """Put it on the request queue, confirmed, and only then remove it here. Raises NotReplayedError.

        It keeps its idempotency key, or gets one: what was replayed twice, after a crash in between, has one effect.
        """
        if not letter.method:
            raise NotReplayedError("nothing names its method")
        if isinstance(letter.properties.headers, UnreadableTable):
            raise NotReplayedError("its headers cannot be read")
        key, properties = f"{self._rack}.{letter.method}", _request_properties(letter)
        try:
            with link_failures():
                await self._publish(letter.body, key, properties)
        except PublishError:
            raise NotReplayedError("the rack has no request queue") from None
        except DeliveryError:
            raise NotReplayedError("the request queue is full") from None
        await self.drop(letter)

    async def _publish(self, body: bytes, key: str, properties: Basic.Properties) -> None:
        try:
            await self._publish_once(body, key, properties)
        except ChannelPreconditionFailed:
            if properties.user_id is None:
                raise
            # The broker lets nobody but an impersonator send another's user id.
            properties.user_id = None
            await self._publish_once(body, key, properties)

    async def _publish_once(self, body: bytes, key: str, properties: Basic.Properties) -> None:
        if self._outlet is None or self._outlet.is_closed:
            self._outlet = await open_channel(self._connection, confirms=True)
        await self._outlet.basic_publish(
            body,
            exchange=RPC_EXCHANGE,
            routing_key=key,
            properties=properties,
            mandatory=True,
            timeout=ANSWER_TIMEOUT_S,
        )


@asynccontextmanager
async def dead_letters(connection: AbstractConnection, rack: str) -> AsyncIterator[DeadLetters]:
    """Hold the rack's dead letters; at the end those that were neither dropped nor replayed are back in their places.

    Raises ModelManagerError: ERR_NOT_FOUND for a rack without that queue, ERR_FORBIDDEN for a login that may not read.
    """
    channel = await open_channel(connection, confirms=False)
    try:
        with link_failures():
            declared = await channel.queue_declare(dead_letter_queue(rack), passive=True, timeout=ANSWER_TIMEOUT_S)
        yield DeadLetters(rack, connection, channel, declared.message_count or 0)
    except LinkLostError as error:
        raise _refusal(error, rack) or error from None
    finally:
        if not channel.is_closed:
            with suppress(LinkLostError), link_failures():
                await channel.close()


def _refusal(error: LinkLostError, rack: str) -> ModelManagerError | None:
    if isinstance(error.__cause__, ChannelNotFoundEntity):
        return ModelManagerError("ERR_NOT_FOUND", f"Rack {rack} has no queue of dead letters on that broker.")
    if isinstance(error.__cause__, ChannelAccessRefused):
        return ModelManagerError("ERR_FORBIDDEN", "The broker does not allow this login to do that.")
    return None


def read_letter(message: DeliveredMessage) -> DeadLetter:
    """What a message from a queue of dead letters tells; whatever it holds, it never raises."""
    properties = message.header.properties
    headers: Mapping[str, Any] = properties.headers or {}
    death = _last_death(headers.get("x-death"))
    if death is not None:
        code = str(death.get("reason", "unknown"))
        reason = _DEATHS.get(code, f"The broker dead-lettered it: {code}.")
        died_at, routing_key = death.get("time"), _first(death.get("routing-keys")) if death.get("exchange") else ""
        caller = properties.user_id
    else:
        code = str(headers.get("x-error-code", "unknown"))
        reason = str(headers.get("x-error-message", "Nothing on it tells why."))
        died_at, routing_key = _moment(headers.get("x-error-time")), headers.get("x-error-routing-key", "")
        caller = headers.get("x-error-user-id", "")
    return DeadLetter(
        id=_digest(message),
        died_at=died_at if isinstance(died_at, datetime) else None,
        method=str(routing_key).rpartition(".")[2] or properties.message_type or "",
        caller=str(caller or ""),
        message_id=properties.message_id or "",
        code=code,
        reason=reason,
        message=message,
    )


def _last_death(deaths: Any) -> Mapping[str, Any] | None:
    last = deaths[0] if isinstance(deaths, list) and deaths else None
    return last if isinstance(last, dict) else None


def _first(values: Any) -> str:
    return str(values[0]) if isinstance(values, list) and values else ""


def _moment(unix_ms: Any) -> datetime | None:
    try:
        return datetime.fromtimestamp(unix_ms / 1000, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _digest(message: DeliveredMessage) -> str:
    properties = message.header.properties
    told = {name: value for name, value in properties if name != "headers"}
    headers = {name: value for name, value in (properties.headers or {}).items() if name not in _COUNTERS}
    digest = hashlib.sha256(repr((message.routing_key, sorted(told.items()), headers)).encode("utf-8", "replace"))
    digest.update(message.body)
    return digest.hexdigest()[:ID_CHARACTERS]


def _request_properties(letter: DeadLetter) -> Basic.Properties:
    """The properties of the request as it was sent, without what has ended it. `expiration` is none of them."""
    original = letter.properties
    headers = {
        name: value
        for name, value in encodable(original.headers or {}).items()
        if name not in ROUTING_HEADERS and not name.startswith(_LEFT_BEHIND)
    }
    if KEY_HEADER not in headers and not original.message_id:
        # Publishing makes up a message_id, which would be a new key each time.
        headers[KEY_HEADER] = read_request(letter.message).context.idempotency_key or f"dead-{letter.id}"
    return Basic.Properties(
        content_type=original.content_type,
        content_encoding=original.content_encoding,
        headers=headers,
        delivery_mode=2,
        priority=original.priority,
        correlation_id=original.correlation_id,
        reply_to=original.reply_to,
        message_id=original.message_id,
        timestamp=original.timestamp,
        message_type=original.message_type,
        user_id=original.user_id,
        app_id=original.app_id,
    )
