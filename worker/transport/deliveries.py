"""Requests as they arrive: the envelope read and checked, and the rules of acknowledging.

Nothing here judges the body: its bytes go to the dispatcher as they are.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pamqp.commands import Basic

from schemas.errors import ModelManagerError
from schemas.ids import MAX_INTEGER
from schemas.wire import MAX_BODY_BYTES, is_json
from worker.context import Context
from worker.transport.amqp_decoding import UnreadableTable, printable
from worker.transport.amqp_observer import AmqpObserver
from worker.transport.connections import LinkLostError
from worker.transport.hot_channel import Message
from worker.transport.reply_addresses import is_direct, is_exclusive, is_permitted

MAX_KEY_CHARACTERS = 128
_log = logging.getLogger(__name__)
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Request:
    """One delivery, read. `refusal` tells why it must not be executed.

    `reply_to` is empty when nobody is to be answered; `correlation_id` may hold surrogates, for bytes that are not
    UTF-8. `queue_wait_s` is None when the sender gave no timestamp.
    """

    method: str
    body: bytes
    reply_to: str
    correlation_id: str
    context: Context
    refusal: ModelManagerError | None
    traceparent: str | None
    queue_wait_s: float | None


def read_request(message: Message) -> Request:
    """Read a delivery by the contract, and never raise: what is wrong with it is its `refusal`."""
    try:
        return _read(message)
    except Exception:  # noqa: BLE001 - raised, it would end the connection and cost every neighbour a delivery
        _log.exception("A delivery could not be read")
        return Request(
            method="",
            body=message.body,
            reply_to="",
            correlation_id="",
            context=Context(transport="amqp"),
            refusal=_invalid("The request cannot be read."),
            traceparent=None,
            queue_wait_s=None,
        )


def _read(message: Message) -> Request:
    properties = message.properties
    headers: Mapping[str, Any] = {} if properties.headers is None else properties.headers
    reply_to = properties.reply_to or ""
    correlation_id = properties.correlation_id or ""
    method, refusal = "", None
    deadline: float | None = None
    key: str | None = None
    try:
        if reply_to and not is_permitted(reply_to):
            raise _invalid("reply_to must be a direct reply, amq.gen-* or model-manager.reply.* address.")
        _check_envelope(message, headers)
        method = _method(message)
        deadline = _deadline(headers.get("x-deadline"), properties.expiration)
        key = _idempotency_key(headers.get("x-idempotency-key"), properties)
    except ModelManagerError as error:
        refusal = error
    return Request(
        method=method,
        body=message.body,
        reply_to=reply_to if is_permitted(reply_to) else "",
        correlation_id=correlation_id,
        context=Context(
            caller=printable(properties.user_id or ""),
            idempotency_key=key,
            deadline=deadline,
            correlation_id=printable(correlation_id),
            transport="amqp",
        ),
        refusal=refusal,
        traceparent=_traceparent(headers.get("traceparent")),
        queue_wait_s=_age(properties.timestamp),
    )


def _invalid(message: str, **details: Any) -> ModelManagerError:
    return ModelManagerError("ERR_INVALID_REQUEST", message, **details)


def _check_envelope(message: Message, headers: Mapping[str, Any]) -> None:
    properties = message.properties
    if isinstance(headers, UnreadableTable):
        raise _invalid("The header table cannot be decoded.")
    if properties.content_type not in (None, "", "application/json") and not is_json(properties.content_type):
        raise _invalid("content_type must be application/json, in UTF-8.")
    if properties.content_encoding:
        raise _invalid("content_encoding must be absent.")
    if len(message.body) > MAX_BODY_BYTES:
        raise _invalid(f"The body is over {MAX_BODY_BYTES} bytes.", maxBodySize=MAX_BODY_BYTES)


def _method(message: Message) -> str:
    """The last part of the routing key, or the `type` of what the default exchange brought."""
    named = printable(message.properties.message_type or "")
    routed = printable((message.routing_key or "").rpartition(".")[2]) if message.exchange else ""
    if routed and named and routed != named:
        raise _invalid("The routing key and type name different methods.")
    if not (routed or named):
        raise _invalid("Neither the routing key nor type names a method.")
    return routed or named


def _deadline(header: Any, expiration: str | None) -> float | None:
    """The earlier of `x-deadline` and what is left of `expiration`, in `time.monotonic()` seconds."""
    now = time.monotonic()
    deadlines = []
    if header is not None:
        if not isinstance(header, int) or isinstance(header, bool) or not 0 <= header <= MAX_INTEGER:
            raise _invalid("x-deadline must be an integer, in milliseconds since 1970.")
        deadlines.append(now + header / 1000 - time.time())
    if expiration and expiration.isascii() and expiration.isdigit() and int(expiration) <= MAX_INTEGER:
        deadlines.append(now + int(expiration) / 1000)
    return min(deadlines, default=None)


def _idempotency_key(header: Any, properties: Basic.Properties) -> str | None:
    """What tells a repeat from a new request: the header, else `message_id`, else the address of the answer."""
    if header is not None:
        if not isinstance(header, str) or not header:
            raise _invalid("x-idempotency-key must be a string that is not empty.")
        return _bounded(header)
    if properties.message_id:
        return _bounded(properties.message_id)
    # A caller's counter restarts with the caller; only an address that dies with the caller makes it unique.
    reply_to, correlation_id = properties.reply_to or "", properties.correlation_id
    if correlation_id and (is_direct(reply_to) or is_exclusive(reply_to)):
        return _hashed(f"{reply_to}\n{correlation_id}")
    return None


def _bounded(key: str) -> str:
    return key if len(key) <= MAX_KEY_CHARACTERS and key.isascii() and key.isprintable() else _hashed(key)


def _hashed(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()}"


def _traceparent(header: Any) -> str | None:
    return header if isinstance(header, str) and _TRACEPARENT.fullmatch(header) else None


def _age(sent: datetime.datetime | None) -> float | None:
    return None if sent is None else max(0.0, time.time() - sent.timestamp())


class Delivery:
    """One unacknowledged message. It is settled at most once, and its channel may be gone by then.

    When the channel is gone the broker delivers the message again, so a lost settlement is counted and nothing more.
    """

    def __init__(self, message: Message, observer: AmqpObserver) -> None:
        self.message = message
        self._observer = observer
        self._settled = False

    @property
    def alive(self) -> bool:
        """Whether the message is still ours to settle."""
        return not (self._settled or self.message.channel.is_closed)

    def ack(self) -> None:
        """Done with: the broker forgets it."""
        self._settle(lambda: self.message.channel.ack(self.message.delivery_tag))

    def fail(self) -> None:
        """It cannot be done, and it may be the request's fault: delivered again, until the limit of deliveries."""
        self._observer.requeued()
        self._settle(lambda: self.message.channel.fail(self.message.delivery_tag))

    def requeue(self) -> None:
        """Not done here, through no fault of its own: the broker delivers it again, to whoever consumes."""
        self._observer.requeued()
        self._settle(lambda: self.message.channel.nack(self.message.delivery_tag, requeue=True))

    def reject(self) -> None:
        """The broker dead-letters it, without a reason."""
        self._settle(lambda: self.message.channel.nack(self.message.delivery_tag, requeue=False))

    def _settle(self, settle: Callable[[], None]) -> None:
        if self._settled:
            return
        self._settled = True
        try:
            settle()
        except LinkLostError:
            self._observer.ack_lost()
