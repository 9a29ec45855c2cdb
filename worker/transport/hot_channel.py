"""A channel for what is done once for each request: deliveries, acknowledgements, replies and their confirms.

It works on frames, synchronously, as they come out of the socket (see `frame_tap`), without a task, a lock or a queue
for each. Acknowledgements given in one turn of the event loop are put together; confirms are awaited with one timer
for all.
"""

from __future__ import annotations

import asyncio
import secrets
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import pamqp.frame
from pamqp.base import Frame
from pamqp.commands import Basic, Channel, Confirm
from pamqp.exceptions import PAMQPException

from worker.transport import amqp_codec as codec
from worker.transport.amqp_codec import BadFrameError
from worker.transport.connections import BrokerConnection, LinkLostError, link_failures, reason_of

ANSWER_TIMEOUT_S = 10.0
CONFIRM_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Message:
    """One delivery. It is settled on its channel, by its tag."""

    channel: HotChannel
    delivery_tag: int
    redelivered: bool
    exchange: str
    routing_key: str
    properties: Basic.Properties
    body: bytes


class HotChannel:
    """One channel of `connection`; `open` comes first.

    `delivered` gets each message and `cancelled` is called when the broker ends the consumer; both at once, on the
    event loop, and must not raise. `lost` is called when the channel is of no more use. `before_acks` is called before
    acknowledgements are written, to write what has to go before them; if it raises LinkLostError, that is lost, and
    what should have been acknowledged is given back.
    """

    def __init__(
        self,
        connection: BrokerConnection,
        *,
        delivered: Callable[[Message], None] | None = None,
        cancelled: Callable[[], None] | None = None,
        lost: Callable[[], None] | None = None,
        before_acks: Callable[[], None] | None = None,
    ) -> None:
        self._connection = connection
        self._tap = connection.tap
        self._delivered = delivered
        self._cancelled = cancelled
        self._lost = lost
        self._before_acks = before_acks
        self._number = 0
        self._closed: str | None = None  # why
        self._answer: asyncio.Future[Frame] | None = None
        self._method: codec.Deliver | None = None  # of the content under way; None: it is a returned message
        self._header: tuple[int, Basic.Properties] | None = None
        self._body: list[bytes] = []
        self._missing = 0
        self._in_content = False
        self._unsettled: dict[int, None] = {}  # in the order of their tags
        self._acked: set[int] = set()
        self._published = 0
        self._returned: set[int] = set()
        self._unconfirmed: dict[int, tuple[float, asyncio.Future[bool]]] = {}  # in the order of their tags
        self._patience: asyncio.TimerHandle | None = None
        self._message_ids = secrets.token_hex(8)

    @property
    def is_closed(self) -> bool:
        return self._closed is not None

    @property
    def busy(self) -> bool:
        """Deliveries are unsettled, or messages unconfirmed."""
        return bool(self._unsettled or self._unconfirmed)

    @property
    def congested(self) -> bool:
        """More has been written than the socket takes for now; `drained` waits for that."""
        return self._tap.congested

    async def open(self, *, confirms: bool = False) -> None:
        """LinkLostError when the broker does not open it."""
        self._number = self._connection.free_channel()
        self._tap.take(self._number, self)
        await self.call(Channel.Open())
        if confirms:
            await self.call(Confirm.Select())

    async def close(self) -> None:
        """What was not settled goes back to its queue. LinkLostError: the broker does not say that it is closed."""
        self._tap.flush()  # acknowledgements wait for the end of the turn, which is behind the closing
        await self.call(Channel.Close(200, "", 0, 0))
        self._tap.release(self._number)
        self._close("the channel was closed")

    async def call(self, method: Frame) -> Frame:
        """Send a synchronous method; its answer. One at a time.

        LinkLostError: there is no answer within `ANSWER_TIMEOUT_S`.
        """
        self._check_open()
        assert self._answer is None
        self._answer = asyncio.get_running_loop().create_future()
        self._tap.send(pamqp.frame.marshal(method, self._number))
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                answer = await self._answer
        except TimeoutError:
            self._abandon()
            raise LinkLostError("the broker does not answer") from None
        except asyncio.CancelledError:
            self._abandon()
            raise
        finally:
            self._answer = None
        if answer.name not in method.valid_responses:
            raise LinkLostError(f"the broker answered {method.name} with {answer.name}")
        return answer

    def _abandon(self) -> None:
        """Close it, since an answer may still come that nobody waits for."""
        if self._closed is None:
            self._tap.send(pamqp.frame.marshal(Channel.Close(200, "", 0, 0), self._number))
            self._close("the broker does not answer")

    def _check_open(self) -> None:
        if self._closed is not None:
            raise LinkLostError(self._closed)

    # --- settling ---

    def ack(self, delivery_tag: int) -> None:
        """Acknowledge at the end of this turn. LinkLostError: the broker delivers it again."""
        self._check_open()
        if not self._acked:
            self._tap.before_flush(self._write_acks)
        self._acked.add(delivery_tag)

    def nack(self, delivery_tag: int, *, requeue: bool) -> None:
        """Give back what was not begun or was cut off, or have it dead-lettered. LinkLostError: it comes again."""
        self._check_open()
        self._unsettled.pop(delivery_tag, None)
        self._tap.send(codec.encode_nack(self._number, delivery_tag, requeue=requeue))

    def fail(self, delivery_tag: int) -> None:
        """Give back what could not be done. LinkLostError: the broker delivers it again.

        RabbitMQ 4.3 counts this against the limit of deliveries, and a `nack` not: without it, a request that nobody
        gets done would come for ever.
        """
        self._check_open()
        self._unsettled.pop(delivery_tag, None)
        self._tap.send(pamqp.frame.marshal(Basic.Reject(delivery_tag, requeue=True), self._number))

    def _write_acks(self) -> None:
        """One frame for the oldest unsettled messages as far as they are all acknowledged, and one for each other."""
        try:
            if self._before_acks is not None:
                self._before_acks()
        except LinkLostError:
            for tag in sorted(self._acked):
                self.nack(tag, requeue=True)
            self._acked.clear()
            return
        last = count = 0
        for tag in self._unsettled:
            if tag not in self._acked:
                break
            last, count = tag, count + 1
        if count:
            self._tap.send(codec.encode_ack(self._number, last, multiple=count > 1))
        for tag in sorted(self._acked):
            self._unsettled.pop(tag, None)
            if tag > last:
                self._tap.send(codec.encode_ack(self._number, tag))
        self._acked.clear()

    # --- publishing ---

    def reply(
        self, routing_key: str, body: bytes, *, correlation_id: str, headers: dict[str, Any] | None, mandatory: bool
    ) -> int:
        """Send a transient JSON message to a queue, at the end of this turn; its number. LinkLostError: not sent."""
        self._check_open()
        number = self._published + 1
        frames = codec.encode_reply(
            self._number,
            routing_key,
            body,
            message_id=f"{self._message_ids}{number:016x}",
            correlation_id=correlation_id,
            headers=headers,
            mandatory=mandatory,
            frame_max=self._connection.connection_tune.frame_max or 0,
        )
        self._tap.send(frames)
        self._published = number
        return number

    async def drained(self) -> None:
        """Return when the socket has taken most of what was written. LinkLostError: it has not within the time."""
        self._tap.flush()
        with link_failures():
            async with asyncio.timeout(CONFIRM_TIMEOUT_S):
                await self._tap.writer.drain()

    def confirmed(self, number: int) -> asyncio.Future[bool]:
        """Whether a queue took the message, once the broker says so; to be asked for at once after `reply`.

        LinkLostError: the broker has not said so within `CONFIRM_TIMEOUT_S`, or the channel is lost.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        self._unconfirmed[number] = (time.monotonic(), future)
        if self._patience is None:
            self._patience = loop.call_later(CONFIRM_TIMEOUT_S, self._give_up)
        return future

    def _give_up(self) -> None:
        """Fail what waits too long; come back when the next one would."""
        self._patience = None
        overdue = time.monotonic() - CONFIRM_TIMEOUT_S
        while self._unconfirmed:
            number, (started, future) = next(iter(self._unconfirmed.items()))
            if started > overdue:
                self._patience = asyncio.get_running_loop().call_later(started - overdue, self._give_up)
                return
            del self._unconfirmed[number]
            _settle(future, LinkLostError("the broker does not confirm"))

    def _on_confirm(self, number: int, multiple: bool, acked: bool) -> None:
        confirmed = list(takewhile(lambda waiting: waiting <= number, self._unconfirmed)) if multiple else [number]
        for one in confirmed:
            _, future = self._unconfirmed.pop(one, (0.0, None))
            if future is not None:
                _settle(future, acked and one not in self._returned)
            self._returned.discard(one)

    def _on_return(self, properties: Basic.Properties) -> None:
        message_id = properties.message_id or ""
        if not message_id.startswith(self._message_ids):
            raise BadFrameError("a returned message that is not ours")
        self._returned.add(int(message_id[len(self._message_ids) :], 16))

    # --- frames ---

    def taken(self, kind: int, payload: bytes) -> None:
        if self._closed is not None:
            self._on_late_frame(kind, payload)
        elif kind == codec.BODY and self._header is not None:
            self._body.append(payload)
            self._missing -= len(payload)
            if self._missing <= 0:
                self._end_content()
        elif kind == codec.HEADER and self._in_content and self._header is None:
            self._header = codec.decode_header(payload)
            self._missing = self._header[0]
            if not self._missing:
                self._end_content()
        elif kind == codec.METHOD and not self._in_content:
            self._on_method(payload)
        else:
            raise BadFrameError(f"a frame of type {kind} out of turn")

    def _on_late_frame(self, kind: int, payload: bytes) -> None:
        """Of a channel that was abandoned: all that counts is when its number is free."""
        if kind == codec.METHOD and payload[:4] in (codec.CHANNEL_CLOSE, codec.CHANNEL_CLOSE_OK):
            if payload[:4] == codec.CHANNEL_CLOSE:
                self._tap.send(pamqp.frame.marshal(Channel.CloseOk(), self._number))
            self._tap.release(self._number)

    def _on_method(self, payload: bytes) -> None:
        method = payload[:4]
        if method == codec.DELIVER:
            self._method, self._in_content = codec.decode_deliver(payload), True
        elif method in (codec.ACK, codec.NACK):
            self._on_confirm(*codec.decode_confirm(payload), acked=method == codec.ACK)
        elif method == codec.RETURN:
            self._method, self._in_content = None, True
        else:
            self._on_rare_method(payload)

    def _end_content(self) -> None:
        if self._missing < 0:
            raise BadFrameError("a body that is longer than its header says")
        assert self._header is not None
        method, properties = self._method, self._header[1]
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._method, self._header, self._in_content, self._body = None, None, False, []
        if method is None:
            self._on_return(properties)
            return
        self._unsettled[method.delivery_tag] = None
        if self._delivered is not None:
            message = Message(
                self,
                method.delivery_tag,
                method.redelivered,
                method.exchange,
                method.routing_key,
                properties,
                body,
            )
            self._delivered(message)

    def _on_rare_method(self, payload: bytes) -> None:
        try:
            _, _, method = pamqp.frame.unmarshal(codec.frame(codec.METHOD, self._number, payload))
        except (PAMQPException, ValueError, TypeError, LookupError, ArithmeticError, struct.error) as error:
            raise BadFrameError(f"a method that cannot be read: {type(error).__name__}") from None
        match method:
            case Channel.Close():
                self._tap.send(pamqp.frame.marshal(Channel.CloseOk(), self._number))
                self._tap.release(self._number)
                self._close(method.reply_text or "the channel was closed")
            case Basic.Cancel():
                if self._connection.accept_consumer_cancel_ok:
                    answer = Basic.CancelOk(consumer_tag=method.consumer_tag)
                    self._tap.send(pamqp.frame.marshal(answer, self._number))
                if self._cancelled is not None:
                    self._cancelled()
            case Frame() if self._answer is not None and not self._answer.done():
                self._answer.set_result(method)
            case _:
                raise BadFrameError(f"{method.name} that nothing was asked for")

    def lost(self, reason: BaseException | None) -> None:
        self._close("the connection was lost" if reason is None else reason_of(reason))

    def _close(self, reason: str) -> None:
        if self._closed is not None:
            return
        self._closed = reason
        if self._patience is not None:
            self._patience.cancel()
        if self._answer is not None:
            _settle(self._answer, LinkLostError(reason))
        for _, future in self._unconfirmed.values():
            _settle(future, LinkLostError(reason))
        self._unconfirmed.clear()
        self._acked.clear()
        if self._lost is not None:
            self._lost()


def _settle(future: asyncio.Future[Any], outcome: Any) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
        future.exception()  # looked at: whoever waited may have been cancelled
    else:
        future.set_result(outcome)
